"""A real run from its training to the hub and back: its cards, its upload, and an evaluation of what is on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import saetrain
from saetrain import hub as saetrain_hub
from saetrain.cli import main
from tests.conftest import python_topics
from tests.fake_hub import serve_hub, use_hub

SIZES = "--layers 1 2 --k 8 --num_latents 96 --batch_size 4 --ctx_len 32 --max_tokens 6400 --eval_tokens 800 --lr 4e-3"
QUICK = "--loss_tokens 200 --fit_tokens 1000 --bootstrap 10"


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str) -> Path:
    out = tmp_path_factory.mktemp("share")
    text = write_texts(out / "own.jsonl", python_topics()[:-30])
    main([*f"{tiny_gpt2} {text} {SIZES} {QUICK}".split(), "--save_dir", str(out), "--run_name", "run"])
    return out / "run"


def test_a_run_ends_with_cards_which_evaluate_writes_again(run_dir: Path, tmp_path: Path) -> None:
    found = json.loads((run_dir / "final_assessment.json").read_text())
    cards = {name: run_dir / "sae" / name / "README.md" for name in ("h.1", "h.2")}
    for name, path in cards.items():
        text, sae = path.read_text(), found["saes"][name]
        assert f"{sae['verdict']} checks pass" in text
        assert f"{sae['figures']['explained_variance']['value']:.4g}" in text
        assert f"{sae['figures']['explained_variance']['nulls']['pca']['value']:.4g}" in text
        for metric in sae["figures"]:
            assert f"\n| {metric.replace('_', chr(92) + '_')}" in text
        assert str(run_dir.parent) not in text
    card = ModelCard(cards["h.1"].read_text())
    card.data.license = "mit"
    cards["h.1"].write_text(f"{card}Mine.\n")
    other = write_texts(tmp_path / "other.jsonl", python_topics()[-30:])
    before = cards["h.2"].read_text()
    words = [*QUICK.split(), "--in_sample", "false", "--dataset", other]
    main(["evaluate", str(run_dir / "sae" / "h.1"), *words])
    text = cards["h.1"].read_text()
    assert "held-out text of other.jsonl (from another data set" in text
    assert ModelCard(text).data.license == "mit"
    assert text.endswith("\nMine.\n")
    assert cards["h.2"].read_text() == before
    main(["evaluate", str(run_dir / "sae" / "h.2"), *words, "--out", str(tmp_path / "out")])
    assert cards["h.2"].read_text() == before, "the results are elsewhere"


def test_what_is_on_the_hub_is_the_run(
    run_dir: Path, tiny_gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_texts(tmp_path / "other.jsonl", python_topics()[-30:])
    own = saetrain.load(run_dir / "sae" / "h.2")
    with serve_hub() as hub:
        use_hub(hub, monkeypatch, str(tmp_path / "cache"))
        main(["push", str(run_dir), "me/saes"])
        for name, content in hub.repos["me/saes"].files().items():
            for path in (str(run_dir.parent), str(Path(tiny_gpt2).parent), str(Path.home()) + "/"):
                assert path.encode() not in content, name
        sae = saetrain.load("me/saes", hookpoint="h.2")
        words = [
            *QUICK.split(),
            "--in_sample",
            "false",
            "--dataset",
            other,
            "--model",
            tiny_gpt2,
            "--eval_tokens",
            "800",
        ]
        for place, out in (("me/saes", "hub"), (str(run_dir), "local")):
            main(["evaluate", place, *words, "--out", str(tmp_path / out)])
    saetrain_hub.is_hub_reachable.cache_clear()
    x = torch.randn(50, own.d_in)
    assert torch.equal(sae.encode(x).to_dense(), own.encode(x).to_dense())
    one, two = (json.loads((tmp_path / out / "final_assessment.json").read_text())["saes"] for out in ("hub", "local"))
    for name, found in one.items():
        # The other figures use the mean of the training text, which only the run on this machine finds.
        for metric in ("fvu", "cosine", "l0", "ce_clean", "ce_spliced", "kl"):
            figure = found["figures"][metric]
            assert figure["count"] == two[name]["figures"][metric]["count"]
            assert figure["value"] == pytest.approx(two[name]["figures"][metric]["value"], rel=1e-6, abs=1e-9), metric
