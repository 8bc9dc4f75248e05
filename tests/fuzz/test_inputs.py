"""Any argument and any content of a file: an allowed exit code, at most one line of error, and nothing written."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from saetrain.config import CompareConfig, EvaluateConfig, TokenizeConfig, config_class, flag_types
from saetrain.data.token_store import METADATA_FILE
from tests.fuzz.conftest import TRAIN
from tests.fuzz.harness import check_command, fuzz
from tests.fuzz.strategies import (
    changed_objects,
    damaged_bytes,
    damaged_objects,
    dump_json,
    json_values,
    numbers,
    texts,
)
from tests.unit.interop.layouts import (
    draw_thresholds,
    draw_weights,
    name_as_linear,
    write_dictionary,
    write_gemma_scope,
)

COMMANDS = {"": config_class("topk"), "tokenize": TokenizeConfig, "evaluate": EvaluateConfig, "compare": CompareConfig}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(["", "", *COMMANDS]))
    known = sorted(flag_types(COMMANDS[command]))
    words = [command] if command else []
    words += draw(st.lists(texts | st.sampled_from(["no-model", "no/text"]), max_size=3))
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.sampled_from(known) | st.sampled_from(["config", "help", "nope"]) | texts)
        values = draw(st.lists(texts | numbers.map(str) | st.sampled_from(["auto", "adam", "0 1"]), max_size=2))
        words += [f"--{flag}={values[0]}"] if values and draw(st.booleans()) else [f"--{flag}", *values]
    return words


def test_arguments(place: Path) -> None:
    fuzz(command_lines(), lambda words: check_command(words, place), examples=60)


def test_settings_files(place: Path, finished_run: Path) -> None:
    written = (finished_run / "config.yaml").read_bytes()
    values = yaml.safe_load(written)
    changed = changed_objects(values).map(lambda value: dump_json({**value, "model": "no-model"}))

    def check(content: bytes) -> None:
        (place / "c.yaml").write_bytes(content)
        check_command(["no-model", "no-text", "--config", "c.yaml", "--kernels", "torch"], place)

    fuzz(changed | damaged_bytes(written) | json_values.map(dump_json), check, examples=40)


@pytest.fixture
def sae(finished_run: Path, place: Path) -> Path:
    """A copy of an SAE outside of its run."""
    (found,) = (finished_run / "sae").iterdir()
    return Path(shutil.copytree(found, place / "sae"))


def test_settings_of_saes(place: Path, sae: Path) -> None:
    content = json.loads((sae / "cfg.json").read_text())

    def check(data: bytes) -> None:
        (sae / "cfg.json").write_bytes(data)
        check_command(["evaluate", "sae", "--model", "no-model"], place)

    fuzz(damaged_objects(content), check, examples=40)


def test_headers_of_weights(place: Path, sae: Path) -> None:
    weights = (sae / "sae_weights.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header, values = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    (sae / "sae.safetensors").unlink()

    def pack(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data + values

    def check(data: bytes) -> None:
        (sae / "sae_weights.safetensors").write_bytes(data)
        check_command(["evaluate", "sae", "--model", "no-model"], place)

    fuzz(damaged_objects(header).map(pack) | damaged_bytes(weights), check, examples=40)


@pytest.mark.parametrize("name", ["ae.pt", "params.npz"])
def test_archives_of_other_libraries(name: str, place: Path) -> None:
    """Damaged as a whole, or in one entry of an archive that is otherwise whole."""
    folder, weights = place / "sae", draw_weights()
    if name == "ae.pt":
        write_dictionary(folder, "AutoEncoder", name_as_linear(weights, "bias"))
    else:
        write_gemma_scope(folder, {**weights, "threshold": draw_thresholds()})
    whole = (folder / name).read_bytes()
    with zipfile.ZipFile(folder / name) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}

    def pack(changed: tuple[str, bytes]) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for entry, data in {**entries, changed[0]: changed[1]}.items():
                archive.writestr(entry, data)
        return content.getvalue()

    def check(data: bytes) -> None:
        (folder / name).write_bytes(data)
        check_command(["evaluate", "sae", "--model", "no-model"], place)

    entry = st.sampled_from(sorted(entries)).flatmap(lambda key: damaged_bytes(entries[key]).map(lambda x: (key, x)))
    fuzz(damaged_bytes(whole) | entry.map(pack), check, examples=40)


def test_metrics_of_runs(place: Path, finished_run: Path) -> None:
    run = Path(shutil.copytree(finished_run, place / "run"))
    lines = (run / "metrics.jsonl").read_bytes()
    records = [json.loads(line) for line in lines.splitlines()]
    changed = st.sampled_from(records).flatmap(damaged_objects).map(lambda line: lines + line + b"\n")

    def check(data: bytes) -> None:
        (run / "metrics.jsonl").write_bytes(data)
        check_command(["compare", "run"], place)

    fuzz(changed | damaged_bytes(lines), check, examples=30)


def test_metadata_of_tokens(place: Path, one_layer: Path, finished_run: Path) -> None:
    tokens = place / "tokens"
    text = str(finished_run.parent / "text.jsonl")
    check_command(["tokenize", str(one_layer), text, "tokens", "--ctx_len", "32"], place, may_write=["tokens"])
    content = json.loads((tokens / METADATA_FILE).read_text())
    words = [str(one_layer), "tokens", *TRAIN.split(), "--dry_run", "--save_dir", "out"]

    def check(data: bytes) -> None:
        (tokens / METADATA_FILE).write_bytes(data)
        check_command(words, place)

    fuzz(damaged_objects(content), check, examples=8)


json_rows = json_values | st.fixed_dictionaries({"text": json_values | st.just("some words")})
chats = st.fixed_dictionaries({"messages": json_values | st.lists(json_values, max_size=2)})
ids = st.fixed_dictionaries({"input_ids": st.lists(st.integers(-1, 40_000) | json_values, max_size=4)})


@st.composite
def data_files(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(["jsonl", "jsonl", "json", "csv", "tsv", "txt", "parquet"]))
    if kind == "parquet":
        return kind, draw(damaged_bytes(PARQUET))
    if kind in ("jsonl", "json"):
        rows = draw(st.lists(draw(st.sampled_from([json_rows, chats, ids])), max_size=4))
        data = dump_json(rows) if kind == "json" else b"\n".join(map(dump_json, rows))
    else:
        separator = "\t" if kind == "tsv" else ","
        rows = draw(st.lists(st.lists(texts, max_size=3), max_size=4))
        data = "\n".join(map(separator.join, [["number", "text"], *rows])).encode(errors="surrogatepass")
    return kind, draw(st.just(data) | damaged_bytes(data))


def build_parquet() -> bytes:
    import io

    import datasets

    columns = {"text": [f"some words {i}" for i in range(20)], "more": [[i] for i in range(20)]}
    rows = datasets.Dataset.from_dict(columns)
    file = io.BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


PARQUET = build_parquet()


def test_rows_of_data_files(place: Path, one_layer: Path) -> None:
    def check(case: tuple[tuple[str, bytes], list[str]]) -> None:
        (kind, data), flags = case
        path = place / f"a.{kind}"
        path.write_bytes(data)
        check_command(["tokenize", str(one_layer), path.name, "out", *flags], place, may_write=["out"])
        shutil.rmtree(place / "out", ignore_errors=True)
        path.unlink()

    flags = st.sampled_from([[], [], ["--skip_bad_rows"], ["--text_column", "text"]])
    fuzz(st.tuples(data_files(), flags), check, examples=25)


CARD: dict[str, Any] = {
    "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "a.jsonl"}]}],
    "dataset_info": {
        "features": [{"name": "text", "dtype": "string"}],
        "splits": [{"name": "train", "num_examples": 1}],
    },
    "license": "mit",
}


def test_descriptions_of_data_folders(place: Path, one_layer: Path) -> None:
    folder = place / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "some words"}\n' * 3)

    def check(data: bytes) -> None:
        (folder / "README.md").write_bytes(b"---\n" + data + b"\n---\ntext")
        check_command(["tokenize", str(one_layer), "texts", "out"], place, may_write=["out"])
        shutil.rmtree(place / "out", ignore_errors=True)

    fuzz(damaged_objects(CARD), check, examples=15)


def test_checkpoints(place: Path, one_layer: Path, finished_run: Path) -> None:
    text = str(finished_run.parent / "text.jsonl")
    words = [
        str(one_layer),
        text,
        *TRAIN.split(),
        "--save_dir",
        ".",
        "--run_name",
        "run",
        "--resume",
        "--assess",
        "false",
    ]
    *_, newest = sorted((finished_run / "checkpoints").glob("step_*"))
    files = {name: (newest / name).read_bytes() for name in ("manifest.json", "state.json")}
    damaged = st.sampled_from(sorted(files)).flatmap(
        lambda name: st.tuples(st.just(name), damaged_objects(json.loads(files[name])))
    )

    def check(case: tuple[str, bytes]) -> None:
        name, data = case
        run = Path(shutil.copytree(finished_run, place / "run"))
        (run / "checkpoints" / newest.name / name).write_bytes(data)
        check_command(words, place, may_write=["run"])
        shutil.rmtree(run)

    fuzz(damaged, check, examples=4)
