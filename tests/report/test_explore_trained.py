"""``saetrain explore`` on a masked language model that has learnt something: its answers are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

import saetrain
from saetrain.cli import main
from tests.report.conftest import OpenedPage
from tests.report.test_explore import enter_prompt, serve_run, wait_for_outcome
from tests.report.trained_mlm import CAPITALS, train_masked_lm

Open = Callable[..., OpenedPage]
WORDS = "--layers 1 --k 8 --num_latents 256 --batch_size 16 --ctx_len 32 --max_tokens 40000 --lr auto --assess false"
WORDS += " --feature_tokens 4000 --device cpu --compute_dtype float32"
COUNTRY, CAPITAL = "norway", "oslo"
PROMPT = f"the capital of {COUNTRY} is [MASK] ."
MASK_POSITION = 6


@dataclass(frozen=True)
class TrainedRun:
    """Address of the served page, the model's folder, and the SAE's folder."""

    url: str
    model: str
    sae: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedRun]:
    """A masked LM, and an SAE on its second layer."""
    folder = tmp_path_factory.mktemp("trained")
    model, text = train_masked_lm(folder)
    main([model, text, *WORDS.split(), "--save_dir", str(folder), "--run_name", "run"])
    with serve_run(folder / "run") as url:
        yield TrainedRun(url, model, folder / "run" / "sae" / "encoder.layer.1")


def test_the_model_knows_the_capitals(open_page: Open, trained: TrainedRun) -> None:
    opened = open_page(trained.url)
    opened.visit("#v=prompt")
    for country, capital in CAPITALS.items():
        enter_prompt(opened, PROMPT.replace(COUNTRY, country))
        first = opened.page.locator(".prompt-predicted li").first.inner_text().split()
        assert first[0].strip("·") == capital, (country, first)
        assert float(first[1]) > 30
    # The same without a mask in the text.
    enter_prompt(opened, PROMPT.replace("[MASK]", "rome"))
    opened.page.locator(".ptok").nth(MASK_POSITION).click()
    opened.page.get_by_role("button", name="Mask this token").click()
    opened.page.wait_for_selector(".ptok.mask")
    assert CAPITAL in opened.texts(".prompt-predicted li")[0]


def test_ablating_the_latents_of_the_country_removes_its_capital(open_page: Open, trained: TrainedRun) -> None:
    sae, model = saetrain.load(trained.sae), BertForMaskedLM.from_pretrained(trained.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.model)
    inputs, wanted = tokenizer(PROMPT, return_tensors="pt"), tokenizer.convert_tokens_to_ids(CAPITAL)

    def score(output: object) -> torch.Tensor:
        return output.logits[0, MASK_POSITION].softmax(-1)[wanted]  # type: ignore[attr-defined]

    effects = saetrain.attribute_latents(model, sae, inputs, score, exact=True).to_dense().sum(dim=0)
    latent = int(effects.argmax())
    with torch.no_grad():
        before = float(score(model(**inputs)))
        mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        mask[:, [0, -1]] = False
        with saetrain.splice(model, sae, ablate=[latent], positions=mask):
            after = float(score(model(**inputs)))
    assert after < before - 0.05, "no latent matters"
    opened = open_page(trained.url)
    opened.visit(f"#v=prompt&l={latent}")
    enter_prompt(opened, PROMPT)
    opened.page.get_by_role("button", name="Ablate").click()
    wait_for_outcome(opened)
    rows = {
        cells[0].strip("·"): cells[1:] for text in opened.texts(".change-table tbody tr") if (cells := text.split())
    }
    shown = [float(rows[CAPITAL][place]) / 100 for place in (0, 2)]
    assert shown == pytest.approx([before, after], abs=6e-4)
