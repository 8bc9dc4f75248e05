"""``saetrain features`` and the collection at a run's end, on real models, real text and real files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import saetrain
from saetrain.activations.mlm_masking import select_masked_positions
from saetrain.cli import main
from saetrain.errors import SaetrainError
from saetrain.runs.ablate_latents import choose_ablated_latents
from saetrain.sae import SAE
from saetrain.types import TokenKind, TokenSequence
from tests.conftest import python_topics

SIZES = "--k 8 --num_latents 96 --batch_size 4 --ctx_len 32 --max_tokens 3200 --eval_tokens 1500 --lr 4e-3"
FEATURES = "--assess false --feature_tokens 1200 --ablate_latents 3 --bootstrap 20"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in python_topics()))
    return str(path)


@pytest.fixture(scope="module", params=["tiny_gpt2", "tiny_mlm", "tiny_bert"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A run with two SAEs and their features."""
    out = tmp_path_factory.mktemp("run")
    words = f"{request.getfixturevalue(request.param)} {text} --layers 1 2 {SIZES} {FEATURES}"
    main([*words.split(), "--save_dir", str(out), "--run_name", "run"])
    return out / "run"


def load_saes(run: Path) -> list[SAE]:
    return [saetrain.load(folder.parent) for folder in sorted(run.glob("sae/*/cfg.json"))]


def test_a_run_ends_with_the_features_of_its_saes(run: Path) -> None:
    first, second = load_saes(run)
    assert not (run / "final_assessment.json").exists()
    metadata = first.features.metadata
    assert (metadata["text"], metadata["sae"]) == ("held_out", first.hookpoint)
    assert 1200 <= metadata["kept_tokens"] < 1300
    assert metadata["mean_l0"] == pytest.approx(8, abs=0.01)
    assert metadata["seconds"].keys() == {"model_and_encoder", "ablation", "statistics"}
    assert sum(feature.count for feature in first.features) == round(metadata["mean_l0"] * metadata["kept_tokens"])
    # The SAEs share one forward pass.
    assert first.features.stream.equals(second.features.stream)
    assert first.features[0].count != second.features[0].count or first.features[1].count != second.features[1].count
    assert not list(run.rglob(".*collecting*"))
    assert {path.name for path in first.features.folder.iterdir()} == {
        "contexts.parquet",
        "latents.parquet",
        "metadata.json",
        "stream.parquet",
        "vocabulary.parquet",
    }


def test_codes_are_those_of_the_public_encoder(run: Path) -> None:
    """Strongest contexts hold what `encode` finds on the activations of the same sequence."""
    sae = load_saes(run)[0]
    model, stream = AutoModel.from_pretrained(sae.metadata.model).eval(), sae.features.stream
    columns = {name: stream[name].to_numpy() for name in ("token_id", "sequence")}
    table = pq.read_table(sae.features.folder / "contexts.parquet").to_pylist()
    for row in table[:: max(1, len(table) // 15)]:
        own = np.flatnonzero(columns["sequence"] == columns["sequence"][row["token"]])
        seen: list[Tensor] = []
        module = model.get_submodule(str(sae.hookpoint))
        handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(input_ids=torch.from_numpy(columns["token_id"][own]).long()[None])
        handle.remove()
        value = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
        code = sae.encode(value[0]).to_dense()[row["token"] - own[0]]
        assert float(code[row["latent"]]) == pytest.approx(row["value"], rel=1e-3, abs=1e-4)


def measure_effect(sae: SAE, latent: int) -> float:
    """The effect of an ablation, by a hook written here, one sequence at a time."""
    stream = {name: sae.features.stream[name].to_numpy() for name in ("token_id", "sequence", "doc", "kept")}
    head = sae.features.metadata["loss"]
    loaders: dict[str, Any] = {"ce_increase": AutoModelForCausalLM, "kl": AutoModelForMaskedLM}
    model = loaders.get(head, AutoModel).from_pretrained(sae.metadata.model).eval()
    mask_id = AutoTokenizer.from_pretrained(sae.metadata.model).mask_token_id
    (module,) = [m for name, m in model.named_modules() if f".{name}".endswith(f".{sae.hookpoint}")]
    sums = np.zeros(2)
    for number in np.unique(stream["sequence"]):
        own = stream["sequence"] == number
        ids, kept = stream["token_id"][own], torch.from_numpy(stream["kept"][own])
        kind = np.where(stream["kept"][own], TokenKind.TEXT, TokenKind.SPECIAL).astype(np.uint8)
        masked = select_masked_positions(TokenSequence(ids, kind, stream["doc"][own]), 0)
        inputs = torch.from_numpy(np.where(masked, mask_id, ids) if head == "kl" else ids).long()[None]

        def ablate(module: Any, args: Any, output: Any, kept: Tensor = kept) -> Any:
            x = output if isinstance(output, Tensor) else output[0]
            f = sae.encode(x[0]).to_dense()[:, latent] * kept
            x = x - (f[:, None] * sae.W_dec[latent])[None]
            return x if isinstance(output, Tensor) else (x, *output[1:])

        outputs = []
        with torch.no_grad():
            outputs.append(model(input_ids=inputs)[0][0])
            handle = module.register_forward_hook(ablate)
            outputs.append(model(input_ids=inputs)[0][0])
            handle.remove()
        if head == "final_hidden_error":
            clean, changed = (output.double() for output in outputs)
            sums += [float((changed - clean).square().sum()), float(clean.square().sum())]
            continue
        clean, changed = (output.double().log_softmax(-1) for output in outputs)
        if head == "kl":
            rows = torch.from_numpy(masked)
            sums += [float((clean[rows].exp() * (clean[rows] - changed[rows])).sum()), masked.sum()]
        else:
            targets = torch.from_numpy(ids[1:]).long()[:, None]
            sums += [float((clean - changed)[:-1].gather(1, targets).sum()), len(targets)]
    return float(np.sqrt(sums[0] / sums[1]) if head == "final_hidden_error" else sums[0] / sums[1])


def test_loss_effects_equal_hooks_written_by_hand(run: Path) -> None:
    sae = load_saes(run)[1]
    measured = [feature for feature in sae.features if feature.loss_effect is not None]
    counts = np.array([feature.count for feature in sae.features])
    assert [feature.latent for feature in measured] == sorted(choose_ablated_latents(counts, 3))
    for feature in measured:
        assert feature.loss_effect is not None
        value, low, high = feature.loss_effect
        assert value == pytest.approx(measure_effect(sae, feature.latent), rel=0.02, abs=2e-7)
        assert value != 0
        assert low is not None
        assert high is not None
        assert low <= value <= high


def test_ablated_latents_cover_the_firing_rates() -> None:
    counts = np.array([0, 5, 100, 3, 0, 40, 9, 7])
    assert counts[choose_ablated_latents(counts, 3)].tolist() == [5, 9, 100]
    assert sorted(choose_ablated_latents(counts, 99)) == [1, 2, 3, 5, 6, 7]
    assert choose_ablated_latents(np.zeros(4, dtype=int), 3).tolist() == []


def test_features_of_one_sae_on_other_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"Line {number} of a text that no SAE has read." for number in range(60)))
    sae = load_saes(run)[0]
    before = (load_saes(run)[1].features.folder / "metadata.json").read_text()
    main(["features", str(sae.path), "--dataset", str(other), "--feature_tokens", "200"])
    assert "other text" in capsys.readouterr().err
    again = saetrain.load(sae.path).features
    assert again.folder == run / "features" / str(sae.hookpoint)
    assert (again.metadata["text"], again.metadata["dataset"]) == ("other", str(other))
    assert again.metadata["kept_tokens"] < 300
    assert all(feature.loss_effect is None for feature in again)
    assert (load_saes(run)[1].features.folder / "metadata.json").read_text() == before


def test_an_sae_outside_a_run(run: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If its training text has moved, another text is asked for; its features are in its own folder."""
    folder = tmp_path / "alone"
    shutil.copytree(load_saes(run)[0].path, folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["saetrain"]["dataset"] = str(tmp_path / "moved.jsonl")
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["features", str(folder)])
    printed = capsys.readouterr().err
    assert "moved.jsonl" in printed
    assert "pass --dataset to score without it" in printed
    words = ["--feature_tokens", "300", "--ablate_latents", "1", "--ablate_tokens", "40"]
    main(["features", str(folder), "--dataset", text, *words])
    ablated = re.search(r"ablated 1 latents on ([\d,]+) tokens", capsys.readouterr().err)
    assert ablated is not None
    assert 40 <= int(ablated[1]) <= 150
    features = saetrain.load(folder).features
    assert sum(feature.loss_effect is not None for feature in features) == 1
    assert features.folder == folder / "features"
    assert features.metadata["text"] == "other"


def test_training_text_is_read_if_too_little_is_held_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["features", str(run), "--feature_tokens", "30000"])
    found = load_saes(run)[0].features
    assert found.metadata["text"] == "training"
    assert 30_000 <= found.metadata["kept_tokens"] < 30_100
    rows = found.stream.select(["doc", "position", "token_id"]).to_pandas()
    assert "training text" in capsys.readouterr().err
    assert len(rows) == found.metadata["tokens"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{run} --feature_tokens 0", "--feature_tokens 0: must be at least 1"),
        ("{run} --feature_tokens -3", "--feature_tokens -3: must be at least 0"),
        ("{run} --ablate_latents -1", "--ablate_latents -1: must be at least 0"),
        ("{run}/missing", "there is no such folder"),
        ("{run} --model {run}", "could not be loaded"),
        ("{run} --ablate 3", "--ablate: no such flag"),
    ],
)
def test_mistakes_are_named(
    tmp_path_factory: pytest.TempPathFactory,
    run: Path,
    words: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["features", *words.format(run=run).split()])
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_a_failed_collection_leaves_no_features(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted collection leaves is not read as complete, and the next one removes its files."""
    from saetrain.runs import features

    def fail(*args: Any, **options: Any) -> Callable[[], None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "write_stream", fail)
    with pytest.raises(SystemExit):
        main(["features", str(run), "--feature_tokens", "200"])
    assert not list(run.rglob(".collecting-*"))
    with pytest.raises(SaetrainError, match="contains no features"):
        _ = load_saes(run)[0].features
    monkeypatch.undo()
    (run / "features" / str(load_saes(run)[0].hookpoint) / ".collecting-left").mkdir()
    main(["features", str(run), "--feature_tokens", "200"])
    assert load_saes(run)[0].features.metadata["kept_tokens"] >= 200
    assert not list(run.rglob(".collecting-*"))
