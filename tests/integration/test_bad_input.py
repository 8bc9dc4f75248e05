"""What a user can get wrong: each ends with one short message and exit code 2, and leaves nothing that looks whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from saetrain.cli import main
from tests.conftest import python_topics
from tests.integration.conftest import BASE, Place
from tests.processes import ForkedCommand, finish


def unknown_model(place: Place) -> list[str]:
    place.model = "nobody/no-such-model"
    return []


def unknown_dataset(place: Place) -> list[str]:
    place.text = "nobody/no-such-text"
    return []


def encoder_decoder(place: Place) -> list[str]:
    from transformers import T5Config

    shutil.rmtree(place.model)
    T5Config(num_layers=2).save_pretrained(place.model)
    return []


def cut_short_model(place: Place) -> list[str]:
    path = Path(place.model) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return []


def no_tokenizer(place: Place) -> list[str]:
    for path in Path(place.model).glob("*token*"):
        path.unlink()
    return []


def missing_weights(place: Place) -> list[str]:
    from safetensors.torch import load_file, save_file

    path = Path(place.model) / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "layer.5" not in k}
    save_file(weights, path, metadata={"format": "pt"})
    return []


def not_finite(place: Place) -> list[str]:
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(place.model)
    number = AutoTokenizer.from_pretrained(place.model).convert_tokens_to_ids("the")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[number] = float("inf")
    model.save_pretrained(place.model)
    return []


def empty_file(place: Place) -> list[str]:
    Path(place.text).write_text("")
    return []


def empty_rows(place: Place) -> list[str]:
    Path(place.text).write_text('{"text": ""}\n{"text": "  "}\n')
    return []


def no_text(place: Place) -> list[str]:
    Path(place.text).write_text('{"label": 1}\n{"label": 2}\n')
    return []


def one_short_row(place: Place) -> list[str]:
    Path(place.text).write_text('{"text": "hello"}\n')
    return []


def broken_parquet(place: Place) -> list[str]:
    place.text = str(place.folder / "t.parquet")
    Path(place.text).write_bytes(b"PAR1 this is not parquet PAR1")
    return []


def broken_line(place: Place) -> list[str]:
    lines = Path(place.text).read_text().splitlines()
    lines[6] = lines[6][:30]
    Path(place.text).write_text("\n".join(lines))
    return []


def streamed_broken_line(place: Place) -> list[str]:
    broken_line(place)
    return ["--streaming"]


def no_rows_to_stream(place: Place) -> list[str]:
    import datasets

    place.text = str(place.folder / "t.parquet")
    datasets.Dataset.from_dict({"text": []}).to_parquet(place.text)
    return ["--streaming"]


def short_row(place: Place) -> list[str]:
    place.text = str(place.folder / "t.csv")
    Path(place.text).write_text("number,text\n1,some text\n2,some,more,text\n")
    return []


def broken_row_group(place: Place) -> list[str]:
    from tests.unit.data.test_lenient_readers import write_parquet

    place.text = str(write_parquet(place.folder / "t.parquet"))
    return []


def number_for_text(place: Place) -> list[str]:
    Path(place.text).write_text('{"text": "a"}\n{"text": 3}\n')
    return []


def tokens_for_another_length(place: Place) -> list[str]:
    main(["tokenize", place.model, place.text, str(place.folder / "tokens"), "--ctx_len", "64"])
    place.text = str(place.folder / "tokens")
    return []


def odd_bytes(place: Place) -> list[str]:
    place.text = str(place.folder / "t.bin")
    Path(place.text).write_bytes(b"123")
    return []


def odd_file(place: Place) -> list[str]:
    place.text = str(place.folder / "t.docx")
    Path(place.text).write_text("x")
    return []


def unwritable(place: Place) -> list[str]:
    return ["--save_dir", place.model + "/config.json"]


CUSTOM = """
from pathlib import Path
from transformers import BertConfig, BertModel
Path(__file__).with_name("was-run").touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertModel):
    config_class = OwnConfig
"""


def code_of_its_own(place: Place) -> list[str]:
    Path(place.model, "own.py").write_text(
        CUSTOM.replace("Path(__file__).with_name", f"Path({place.model!r}).joinpath")
    )
    place.config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    return []


def endless_line(place: Place) -> list[str]:
    place.text = str(place.folder / "t.txt")
    Path(place.text).write_text("abcdefgh" * 250_000)
    return []


def latin_1(place: Place) -> list[str]:
    lines = Path(place.text).read_bytes().splitlines(keepends=True)
    lines[3] = '{"text": "caf\u00e9 au lait"}\n'.encode("latin-1")
    Path(place.text).write_bytes(b"".join(lines))
    return []


def half_a_character(place: Place) -> list[str]:
    with open(place.text, "a") as file:
        file.write('{"text": "\\ud800 alone"}\n')
    return []


def half_a_character_streamed(place: Place) -> list[str]:
    half_a_character(place)
    return ["--streaming"]


def wide_ids(place: Place) -> list[str]:
    place.text = str(place.folder / "t.bin")
    np.arange(1000, 20_000).astype("<u4").tofile(place.text)
    return []


def model_config(**changes: object) -> Callable[[Place], list[str]]:
    def spoil(place: Place) -> list[str]:
        place.config(**changes)
        return []

    return spoil


def deep_model_config(place: Place) -> list[str]:
    Path(place.model, "config.json").write_text('{"model_type": ' + "[" * 50_000)
    return []


def fifo_in_the_model(place: Place) -> list[str]:
    os.mkfifo(Path(place.model, "added_tokens.json"))
    return []


def row_of_brackets(place: Place) -> list[str]:
    with open(place.text, "a") as file:
        file.write('{"text": ' + "[" * 50_000 + "\n")
    return []


def row(value: object) -> Callable[[Place], list[str]]:
    def spoil(place: Place) -> list[str]:
        Path(place.text).write_text(json.dumps(value) + "\n")
        return []

    return spoil


def odd_column(place: Place) -> list[str]:
    Path(place.text).write_text(json.dumps({"\x1b[31mred\nsaetrain: error: forged": 3}) + "\n")
    return []


def odd_model_type(place: Place) -> list[str]:
    place.config(model_type="\x1b[31mred\nsaetrain: error: forged", architectures=["X"])
    return []


def finetune_elsewhere(place: Place) -> list[str]:
    main([place.model, place.text, *BASE.split(), "--layers", "1", "--save_dir", str(place.folder / "other")])
    (run,) = (place.folder / "other").iterdir()
    place.allowed = {place.folder / "other"}
    return ["--finetune", str(run / "sae")]


def flags(words: str) -> Callable[[Place], list[str]]:
    return lambda place: words.split()


CASES: dict[str, tuple[Callable[[Place], list[str]], str]] = {
    "unknown model": (
        unknown_model,
        "model 'nobody/no-such-model' is neither a local path nor \\(completely\\) in the local cache",
    ),
    "unknown data set": (unknown_dataset, "data set 'nobody/no-such-text' is neither a local path"),
    "encoder-decoder": (encoder_decoder, "'t5' is an encoder-decoder, which is not supported"),
    "model file cut short": (cut_short_model, "could not be loaded"),
    "no tokenizer": (no_tokenizer, "it comes without a tokenizer's vocabulary"),
    "missing weights": (missing_weights, "its files lack 16 of the weights"),
    "activations not finite": (not_finite, "activations at encoder.layer.0 are not finite on data set rows"),
    "layer the model lacks": (flags("--layers 3 12"), "--layers 12: .* has 12 layers, 0 to 11"),
    "pattern that matches nothing": (flags("--hookpoints encoder.layr.3"), "Did you mean encoder.layer.3"),
    "module whose output is no activation": (flags("--hookpoints pooler"), "--hookpoints pooler: its output has shape"),
    "k above the latents": (flags("--k 65"), "--k 65: more than the 64 latents"),
    "context beyond the positions": (flags("--ctx_len 129"), "--ctx_len 129: .* has positions for at most 128 tokens"),
    "less than a step": (flags("--max_tokens 63"), "--max_tokens 63: less than one optimizer step, which takes 64"),
    "more memory than there is": (
        flags("--num_latents 2000000000"),
        r"2,000,000,000 latents .* need about [\d,.]+ GiB of memory, but only .* are available .* --force",
    ),
    "no such device": (flags("--device cuda:7"), "--device cuda:7: this machine has 0 CUDA devices"),
    "odd device": (flags("--device toaster"), "--device toaster: no such device"),
    "unwritable folder": (unwritable, "--save_dir .*: can't write to"),
    "empty file": (empty_file, "text.jsonl"),
    "empty rows": (empty_rows, "the data set contains no text: 2 rows, all empty in column text"),
    "no text column": (no_text, "no text column was found: the data set has label"),
    "one short row": (one_short_row, "too small to train on and hold text out"),
    "broken parquet": (broken_parquet, "t.parquet"),
    "broken line": (
        broken_line,
        "text.jsonl' could not be read: .*text.jsonl, line 7: is not valid JSON: .* --skip_bad_rows",
    ),
    "broken line in a stream": (streamed_broken_line, "could not be read: .*text.jsonl, line 7: .* --skip_bad_rows"),
    "row of too many fields": (short_row, "t.csv, line 3: has 4 fields, the header has 2; --skip_bad_rows"),
    "broken row group": (broken_row_group, r"t.parquet, rows 21 to 30 \(row group 2\): .*; --skip_bad_rows"),
    "number where text should be": (
        number_for_text,
        "column text, row 1 .*contains int 3 instead of text; --skip_bad_rows",
    ),
    "nothing to stream": (no_rows_to_stream, "t.parquet: has no rows"),
    "part of a stream": (flags("--streaming --split train[:5]"), "can't be combined with --streaming"),
    "weights for one data set": (
        flags("--mix 3 1"),
        "--mix 3 1: 2 weights for 1 data set; pass one weight per data set",
    ),
    "weight of nothing": (flags("--mix 0"), "--mix 0.0: must be above 0"),
    "tokens for another length": (
        tokens_for_another_length,
        "was made for --ctx_len 64, but this command uses --ctx_len 32",
    ),
    "no file of ids": (odd_bytes, "t.bin: its size, 3 bytes, is not a positive multiple of 2"),
    "odd file": (odd_file, "files ending in '.docx' can't be read; allowed are .parquet"),
    "unknown split": (flags("--split dev"), "--split dev: .* has no split 'dev'. It has: train"),
    "unknown column": (flags("--text_column body"), "--text_column body: no such column"),
    "code of its own": (code_of_its_own, "contains its own Python code, .* --trust_remote_code true"),
    "endless line without a word": (endless_line, "its activations are the same on every token"),
    "bytes that are no UTF-8": (latin_1, "text.jsonl, line 4: is not UTF-8; .*iconv -f LATIN1 .*--skip_bad_rows"),
    "half a character": (half_a_character, r"text.jsonl, line \d+: contains half of a surrogate pair.*--skip_bad_rows"),
    "half a character in a stream": (
        half_a_character_streamed,
        r"line \d+: contains half of a surrogate pair.*; --skip_bad_rows",
    ),
    "ids of four bytes": (wide_ids, "t.bin: every second 2-byte id is 0"),
    "fine-tuning from another layer": (
        finetune_elsewhere,
        "contains no SAE of encoder.layer.0, only of encoder.layer.1",
    ),
    "broken settings file": (flags("--config nowhere.yaml"), "--config nowhere.yaml: can't be read"),
    "architectures that are no names": (
        model_config(architectures=[3]),
        r"config.json: architectures: found \[3\]",
    ),
    "positions that are no number": (
        model_config(max_position_embeddings="many"),
        "config.json: max_position_embeddings: found 'many', must be a whole number",
    ),
    "deep model configuration": (deep_model_config, "config.json: is nested 50,001 levels deep"),
    "FIFO in the model": (fifo_in_the_model, "added_tokens.json is not a regular file"),
    "row of brackets": (row_of_brackets, r"text.jsonl, line \d+: is nested 50,001 levels deep.*--skip_bad_rows"),
    "null in token ids": (
        row({"input_ids": [5, None, 6]}),
        "column input_ids, row 0 .* of a list of token ids",
    ),
    "chat of strings": (
        row({"messages": [{"role": "user", "content": 3}]}),
        "column messages, row 0 .* instead of chat messages; --skip_bad_rows",
    ),
    "column that forges a line": (odd_column, r"the data set has \\x1b\[31mred\\nsaetrain: error: forged"),
    "model type that forges a line": (odd_model_type, r"\\x1b\[31mred"),
    "path of many characters": (flags(f"--finetune {'x' * 5000}"), "--finetune xxx.*: is too long"),
    "fine-tuning from nothing": (flags("--finetune nowhere"), "--finetune nowhere: contains no SAE"),
}


@pytest.mark.parametrize("name", CASES)
def test_message_and_exit_code(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = CASES[name]
    words = spoil(place)
    out = place.folder / "out"
    before = set(place.folder.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([place.model, place.text, *BASE.split(), "--save_dir", str(out), "--run_name", "run", *words])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saetrain: error: ")]
    assert caught.value.code == 2
    assert len(errors) == 1
    assert len(errors[0]) < 500, "short"
    assert re.search(message, errors[0]), errors[0]
    assert not list(out.rglob("cfg.json"))
    assert not list(out.rglob("step_*"))
    assert set(place.folder.iterdir()) - before <= {out, *place.allowed}


def test_code_of_a_model_is_run_only_when_asked(place: Place) -> None:
    code_of_its_own(place)
    words = [place.model, place.text, *BASE.split(), "--save_dir", str(place.folder / "out")]
    with pytest.raises(SystemExit):
        main(words)
    assert not Path(place.model, "was-run").exists()
    main([*words, "--trust_remote_code", "true"])
    assert Path(place.model, "was-run").exists()
    assert list((place.folder / "out").rglob("cfg.json"))


@pytest.mark.parametrize("causal", [False, True])
def test_one_endless_line_of_words_is_trained_on(causal: bool, place: Place, tiny_gpt2: str) -> None:
    place.text = str(place.folder / "t.txt")
    Path(place.text).write_text(" ".join(python_topics()).replace("\n", " "))
    model = tiny_gpt2 if causal else place.model
    main([model, place.text, *BASE.split(), "--save_dir", str(place.folder / "out")])
    assert list((place.folder / "out").rglob("cfg.json"))


def test_the_original_pipeline_has_no_traceback_outside_debug(place: Place) -> None:
    """In a new interpreter, with everything that other libraries print."""
    cut_short_model(place)
    words = [place.model, place.text, "--save_dir", str(place.folder / "out")]
    command = [sys.executable, "-m", "saetrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Traceback" in finish(ForkedCommand([*words, "--debug"]), 2)
