"""The main command on real models and real text: what it learns, what it leaves, and what must not change it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import saetrain
from saetrain.cli import main, parse_train
from saetrain.runs.train.builders import measure_normalizers
from saetrain.runs.train.setup import held_out_batches, prepare_run
from tests.unit.interop.layouts import name_as_linear, write_dictionary

SIZES = "--k 4 --num_latents 64 --batch_size 4 --ctx_len 32 --eval_tokens 1500 --assess false"
TINY = f"{SIZES} --buffer_tokens 2048"


def train(out: Path, name: str, words: str) -> Path:
    """Run the command line; gives the run's folder."""
    main([*words.split(), "--save_dir", str(out), "--run_name", name])
    return out / name


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind, without the times of the SAEs' steps."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for metrics in (metrics for record in records for metrics in record["saes"].values()):
        metrics.pop("step_ms", None)
    return [record for record in records if record["kind"] == kind]


def weights(run: Path, sae: str) -> dict[str, torch.Tensor]:
    return load_file(run / "sae" / sae / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory: pytest.TempPathFactory, minilm: str, topics_jsonl: str) -> Path:
    """A short run on the trained encoder over Python's documentation."""
    words = (
        f"{minilm} {topics_jsonl} --layers 3 --k 16 --num_latents 768 --max_tokens 15360 --batch_size 4 --ctx_len 128 "
        "--lr 8e-3 --eval_tokens 1500 --assess false --eval_every 15 --log_every 1"
    )
    return train(tmp_path_factory.mktemp("encoder"), "run", words)


def test_it_learns_and_says_so(encoder_run: Path) -> None:
    first, last = lines(encoder_run, "train")[0], lines(encoder_run, "train")[-1]
    assert last["saes"]["encoder.layer.3"]["fvu"] < 0.5 * first["saes"]["encoder.layer.3"]["fvu"]
    final = lines(encoder_run, "final")[0]["saes"]["encoder.layer.3"]
    assert final["fvu"] < 0.4
    assert final["l0"] == 16
    assert len(lines(encoder_run, "train")) == 30
    assert [record["step"] for record in lines(encoder_run, "eval")] == [15]


def independent_figures(folder: Path, x: np.ndarray) -> tuple[float, float]:
    """FVU and L0 from the saved file alone, in numpy, token by token."""
    raw = load_file(folder / "sae_weights.safetensors")
    w = {name: value.double().numpy() for name, value in raw.items()}
    k = json.loads((folder / "cfg.json").read_text())["k"]
    residual, active = 0.0, 0
    for token in x:
        pre = (token - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        chosen = np.argsort(-pre)[:k]
        values = np.maximum(pre[chosen], 0)
        estimate = values @ w["W_dec"][chosen] + w["b_dec"]
        residual += float(((token - estimate) ** 2).sum())
        active += int((values > 0).sum())
    total = float(((x - x.mean(axis=0)) ** 2).sum())
    return residual / total, active / len(x)


def independent_tokens(folder: Path, run: Path, tokens: int) -> np.ndarray:
    """The held-out activations by transformers alone: no hook, one sequence at a time, no padding."""
    from transformers import AutoModel

    about = json.loads((folder / "cfg.json").read_text())["saetrain"]
    model = AutoModel.from_pretrained(about["model"], dtype=torch.float32)
    config = parse_train([about["model"], about["dataset"], *settings_of(run)])
    held_out = prepare_run(config).held_out
    order = np.random.default_rng([42, 1]).permutation(len(held_out))
    rows: list[np.ndarray] = []
    with torch.no_grad():
        for number in order:
            sequence = held_out[int(number)]
            states = model(input_ids=torch.from_numpy(sequence.ids)[None].long(), output_hidden_states=True)
            rows.append(states.hidden_states[4][0].numpy()[sequence.kind == 0].astype(np.float64))
            if sum(map(len, rows)) >= 2 * tokens:
                break
    return np.concatenate(rows)


def settings_of(run: Path) -> list[str]:
    values = yaml.safe_load((run / "config.yaml").read_text())
    return ["--layers", "3", "--ctx_len", str(values["ctx_len"]), "--eval_tokens", str(values["eval_tokens"])]


def test_figures_agree_with_an_independent_computation(encoder_run: Path) -> None:
    """Over the same tokens: the run's own reader gives them, plain transformers and numpy give them again."""
    folder = encoder_run / "sae" / "encoder.layer.3"
    about = json.loads((folder / "cfg.json").read_text())["saetrain"]
    reported = about["held_out_figures"]
    prepared = prepare_run(parse_train([about["model"], about["dataset"], *settings_of(encoder_run)]))
    measure_normalizers(prepared)
    ours = np.concatenate([batch.values["encoder.layer.3"].numpy() for batch in held_out_batches(prepared)]).astype(
        np.float64
    )
    ours = ours[: int(reported["tokens"])]
    fvu, l0 = independent_figures(folder, ours)
    assert fvu == pytest.approx(reported["fvu"], abs=1e-4)
    assert l0 == pytest.approx(reported["l0"], abs=1e-4)
    plain = independent_tokens(folder, encoder_run, len(ours))
    nearest = np.abs(plain[:, None, :8] - ours[None, :200, :8]).max(axis=2).min(axis=0)
    assert nearest.max() < 1e-4, "every token that was scored is one that plain transformers gives"


def test_saved_sae_equals_the_trained_one_on_real_data(encoder_run: Path, topics: list[str]) -> None:
    """Folded == unfolded: the checkpoint's raw parameters with their constants give what the saved SAE gives."""
    sae = saetrain.load(encoder_run / "sae" / "encoder.layer.3")
    checkpoint = sorted((encoder_run / "checkpoints").iterdir())[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    raw = load_file(checkpoint / state["files"]["encoder.layer.3"])
    mean, axes = map(load_file(checkpoint / state["files"]["normalizer:encoder.layer.3"]).get, ("mean", "axes"))
    scale = state["normalizers"]["encoder.layer.3"]["scale"]
    _, tokenizer, capture, *_ = sae._loaded_model
    batch = tokenizer(topics[:3], return_tensors="pt", truncation=True, max_length=64, padding=True)
    x = capture(batch["input_ids"], batch["attention_mask"])["encoder.layer.3"].flatten(0, 1)
    inner = (x - mean) / scale @ axes
    pre = (inner - raw["coder.b_dec"]) @ raw["coder.W_enc"] + raw["coder.b_enc"]
    values, indices = pre.topk(sae.coder.k, dim=1)
    code = torch.zeros_like(pre).scatter(1, indices, values.relu())
    estimate = (code @ raw["coder.W_dec"] + raw["coder.b_dec"]) @ axes.T * scale + mean
    assert (sae.decode(sae.encode(x)) - estimate).abs().max() < 1e-5 * x.pow(2).mean().sqrt() * 10
    torch.testing.assert_close(sae.encode(x).to_dense(), code * scale, rtol=1e-4, atol=1e-4 * scale)


def test_the_decoder_is_left_at_unit_norm(encoder_run: Path) -> None:
    norms = weights(encoder_run, "encoder.layer.3")["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_encode_text_runs_the_model_it_was_trained_on(encoder_run: Path) -> None:
    sae = saetrain.load(encoder_run / "sae" / "encoder.layer.3")
    short, longer = sae.encode_text(["The yield statement.", "A literal [SEP] is text here, and it is long enough."])
    assert short.tokens[0] == "[CLS]"
    assert short.kept.tolist() == [False, *[True] * (len(short.tokens) - 2), False]
    assert longer.tokens.count("[SEP]") == 1, "only the tokenizer's own separator is one"
    alone = sae.encode_text(["The yield statement."])[0]
    active = int(alone.codes.firing_counts().sum())
    assert repr(alone) == f"TokenCodes({len(alone.tokens)} tokens, {sae.num_latents} latents, {active} active values)"
    torch.testing.assert_close(alone.codes.to_dense(), short.codes.to_dense(), rtol=1e-3, atol=1e-3)


def test_encode_text_warns_about_long_texts(encoder_run: Path) -> None:
    sae = saetrain.load(encoder_run / "sae" / "encoder.layer.3")
    with pytest.warns(UserWarning, match=rf"truncated 1 of 2 texts to {sae.metadata.ctx_len} tokens"):
        _, longer = sae.encode_text(["The yield statement.", "word " * 500])
    assert len(longer.tokens) == sae.metadata.ctx_len


def test_encode_text_refuses_another_model(encoder_run: Path, tmp_path: Path, tiny_bert: str) -> None:
    sae = saetrain.load(encoder_run / "sae" / "encoder.layer.3")
    sae.metadata = dataclasses.replace(sae.metadata, model=tiny_bert)
    with pytest.raises(saetrain.SaetrainError, match="not those that the SAE"):
        sae.encode_text(["text"])


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_several_layers_and_seeds_in_one_pass_equal_single_runs(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, topics_jsonl: str
) -> None:
    name = request.getfixturevalue(model)
    site = "encoder.layer" if model == "tiny_bert" else "h"
    base = f"{name} {topics_jsonl} {SIZES} --max_tokens 4096"
    together = train(tmp_path, "both", f"{base} --layers 0 2 --init_seeds 42 7")
    alone = train(tmp_path, "one", f"{base} --layers 2 --init_seeds 7")
    for key, value in weights(together, f"{site}.2/seed7").items():
        torch.testing.assert_close(value, weights(alone, f"{site}.2")[key], rtol=1e-5, atol=1e-6, msg=key)
    assert sorted(p.name for p in (together / "sae").iterdir()) == [f"{site}.0", f"{site}.2"]


@pytest.mark.parametrize("kernels", ["reference", "torch", "native"])
def test_accumulated_micro_batches_equal_one_batch(
    kernels: str, tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    base = f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 8192 --dead_window_tokens 512 --kernels {kernels}"
    base += " --compute_dtype float32"
    one = train(tmp_path, "one", f"{base} --batch_size 8")
    four = train(tmp_path, "four", f"{base} --batch_size 2 --grad_acc_steps 4")
    for key, value in weights(one, "encoder.layer.0").items():
        torch.testing.assert_close(value, weights(four, "encoder.layer.0")[key], rtol=1e-4, atol=1e-5, msg=key)
    for a, b in zip(lines(one, "train"), lines(four, "train"), strict=True):
        for name, value in a["saes"]["encoder.layer.0"].items():
            assert b["saes"]["encoder.layer.0"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_figures_do_not_depend_on_the_log_frequency(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    base = f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 4096"
    often = train(tmp_path, "often", f"{base} --log_every 1 --eval_every 3")
    seldom = train(tmp_path, "seldom", f"{base} --log_every 9 --eval_every 0")
    by_step = {record["step"]: record["saes"] for record in lines(often, "train")}
    assert [record["step"] for record in lines(seldom, "train")] == [9, 18, 27, 32], "and the last"
    for record in lines(seldom, "train"):
        assert record["saes"] == by_step[record["step"]]
    assert lines(often, "final")[0]["saes"] == lines(seldom, "final")[0]["saes"]


def test_mse_and_fvu_train_alike_and_differ_in_unit(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    base = f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 2048 --log_every 1"
    runs = {loss: train(tmp_path, loss, f"{base} --loss_fn {loss}") for loss in ("mse", "fvu")}
    for key, value in weights(runs["mse"], "encoder.layer.0").items():
        assert torch.equal(value, weights(runs["fvu"], "encoder.layer.0")[key])
    mse, fvu = (lines(runs[loss], "train")[-1]["saes"]["encoder.layer.0"] for loss in ("mse", "fvu"))
    assert fvu["loss_recon"] == fvu["fvu"] == mse["fvu"]
    state = json.loads((sorted((runs["mse"] / "checkpoints").iterdir())[-1] / "state.json").read_text())
    variance = state["normalizers"]["encoder.layer.0"]["variance"]
    assert mse["loss_recon"] == pytest.approx(fvu["fvu"] * variance / 32)


def test_two_runs_of_the_same_command_are_equal_to_the_bit(tmp_path: Path, tiny_gpt2: str, topics_jsonl: str) -> None:
    base = f"{tiny_gpt2} {topics_jsonl} {TINY} --max_tokens 4096 --layers 1"
    one, two = (weights(train(tmp_path, name, base), "h.1") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_config_yaml_repeats_the_run_and_flags_win(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    run = train(tmp_path, "run", f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 2048 --layer_stride 6")
    config = str(run / "config.yaml")
    assert yaml.safe_load(Path(config).read_text())["layers"] == [0, 6]
    again = train(tmp_path, "again", f"--config {config} --layers 6")
    for key, value in weights(run, "encoder.layer.6").items():
        torch.testing.assert_close(weights(again, "encoder.layer.6")[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_the_commands_of_the_readme_run_as_they_stand(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, topics: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With folders of those names in the working directory, and fewer tokens."""
    import datasets

    (tmp_path / "bert-base-uncased").symlink_to(request.getfixturevalue(model))
    datasets.Dataset.from_dict({"text": topics}).to_parquet(tmp_path / "wikitext" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    layers = "6" if model == "tiny_bert" else "3"
    every = " ".join(str(layer) for layer in range(12 if model == "tiny_bert" else 4))
    for chosen in (layers, every):
        main(
            f"bert-base-uncased wikitext --layers {chosen} --max_tokens 1024 --k 192 --expansion_factor 32 "
            "--batch_size 4 --ctx_len 64 --lr auto --eval_tokens 1000 --assess false".split()
        )
    assert len(list((tmp_path / "output").iterdir())) == 2


def test_special_tokens_and_sinks_are_left_out_by_default(tmp_path: Path, minilm: str, topics_jsonl: str) -> None:
    base = [minilm, topics_jsonl, "--layers", "3", "--ctx_len", "64", "--model_batch_tokens", "4096"]
    kept = next(iter(held_out_batches(prepare_run(parse_train(base)))))
    everything = next(iter(held_out_batches(prepare_run(parse_train([*base, "--exclude_special_tokens", "false"])))))
    assert len(everything.doc) == len(kept.doc) + 2 * 64, "one CLS and one SEP in each of 64 sequences"


def test_wandb_offline_takes_the_figures(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    seen: dict[str, Any] = {}
    finish = wandb.Run.finish

    def look(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.update(dict(self.summary), id=self.id, config=dict(self.config))
        finish(self, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "finish", look)
    words = f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 2048 --log_to_wandb true --wandb_log_frequency 4"
    run = train(tmp_path, "run", words)
    final = lines(run, "final")[0]["saes"]["encoder.layer.0"]
    assert seen["final/encoder.layer.0/fvu"] == final["fvu"]
    assert seen["config"]["num_latents"] == 64
    state = json.loads((sorted((run / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["logs"]["wandb_id"] == seen["id"]
    assert list((run / "wandb").glob("offline-run-*"))


def test_tensorboard_takes_the_figures(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    words = f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 2048 --log_to_tensorboard true --log_every 4"
    run = train(tmp_path, "run", words)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    points = events.Scalars("train/encoder.layer.0/fvu")
    assert [point.step for point in points] == [4, 8, 12, 16]
    expected = [record["saes"]["encoder.layer.0"]["fvu"] for record in lines(run, "train")]
    assert [point.value for point in points] == pytest.approx(expected)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    for name, [pattern] in charts.items():
        assert [tag for tag in events.Tags()["scalars"] if re.search(pattern, tag)] == [f"train/encoder.layer.0/{name}"]


def parquet(folder: Path, **splits: list[str]) -> str:
    import datasets

    for name, texts in splits.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def test_texts_of_the_held_out_split_are_not_trained_on(tmp_path: Path, tiny_bert: str, topics: list[str]) -> None:
    train, held = topics[:60], topics[40:]
    data = parquet(tmp_path / "data", train=[*train, train[0]], validation=[text.upper() for text in held])
    prepared = prepare_run(parse_train([tiny_bert, data, "--ctx_len", "64"]))
    trained = {
        int(doc)
        for shard in range(16)
        for batch in prepared.train_source.read(shard, prepared.train_source.start_cursor, 20_000)[0]
        for sequence in batch
        for doc in sequence.doc
    }
    assert not trained & {*range(40, 60)}, "these repeat texts of the validation split, in other letters"
    assert len(trained & {*range(40), 60}) > 35
    assert "with the same texts are excluded" in prepared.text_metadata["held_out"]


def test_a_tiny_validation_split_is_not_enough(tmp_path: Path, tiny_bert: str, topics: list[str]) -> None:
    data = parquet(tmp_path / "data", train=topics[1:], validation=[topics[0][:200]])
    prepared = prepare_run(parse_train([tiny_bert, data, "--ctx_len", "64"]))
    assert prepared.held_out.text_tokens > 5000
    assert "split 'validation' has only" in prepared.text_metadata["held_out"]


def test_finetuning_knows_the_hookpoint_and_wants_one_seed(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"{tiny_bert} {topics_jsonl} {TINY} --max_tokens 512"
    first = train(tmp_path, "first", f"{base} --layers 1")
    sae = first / "sae" / "encoder.layer.1"
    for words, message in (
        (f"--layers 2 --finetune {sae}", "it is an SAE of encoder.layer.1, the run trains encoder.layer.2"),
        (f"--layers 1 --init_seeds 1 2 --finetune {sae}", "all would start from the same SAE"),
    ):
        with pytest.raises(SystemExit):
            train(tmp_path, "second", f"{base} {words}")
        assert message in capsys.readouterr().err
    again = train(tmp_path, "third", f"{base} --layers 1 --finetune {first / 'sae'}")
    about = json.loads((again / "sae" / "encoder.layer.1" / "cfg.json").read_text())["saetrain"]
    assert (about["finetuned_from"], about["init_seed"]) == (str(first / "sae"), 42)


@pytest.mark.parametrize(("architecture", "dict_class"), [("batchtopk", "BatchTopKSAE"), ("standard", "AutoEncoder")])
def test_finetuning_starts_from_an_sae_of_another_library(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, architecture: str, dict_class: str
) -> None:
    """Its FVU before the first step is that of the SAE, not that of random weights."""
    words = f"{tiny_bert} {topics_jsonl} {TINY} --layers 1 --architecture {architecture} --lr 1e-9 --max_tokens 512"
    trained = train(tmp_path, "trained", f"{words.replace('1e-9', '0.01').replace('512', '20480')}")
    coder = saetrain.load(trained / "sae" / "encoder.layer.1").coder
    weights = {name: value.contiguous() for name, value in coder.state_dict().items()}
    named = name_as_linear(weights, "bias" if architecture == "standard" else "b_dec")
    extra = {} if architecture == "standard" else {"k": torch.tensor(4), "threshold": weights["threshold"]}
    folder = write_dictionary(tmp_path / "other", dict_class, {**named, **extra}, submodule_name=None)
    started = train(tmp_path, "started", f"{words} --finetune {folder}")
    fvu = {
        run.name: saetrain.load(run / "sae" / "encoder.layer.1").metadata.held_out_figures["fvu"]
        for run in (trained, started, train(tmp_path, "random", words))
    }
    assert fvu["started"] == pytest.approx(fvu["trained"], rel=0.05)
    assert abs(fvu["trained"] - fvu["random"]) > 0.2


def test_a_useless_sae_is_said_to_be_useless(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "run", f"{tiny_bert} {topics_jsonl} {SIZES} --k 40 --max_tokens 256 --lr 3")
    assert end.value.code == 3
    printed = capsys.readouterr()
    assert "--k 40 is at least the activation width 32" in printed.err
    assert "WARNING: encoder.layer.0: worse than predicting the mean" in printed.out
