"""``saetrain explore`` in a browser: prompts, latents, changes, and texts and tokens that are hostile."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from saetrain.activations.model import ModelSettings
from saetrain.cli import main
from saetrain.explore import run as explore_run
from saetrain.explore.run import build_server
from saetrain.explore.settings import ExploreConfig
from saetrain.report.build import render_pages
from tests.report.conftest import OpenedPage
from tests.report.hostile import STRINGS
from tests.report.test_hostile import CHECK_TEXT, ELEMENTS
from tests.unit.explore.prompt_models import write_random_saes

Open = Callable[..., OpenedPage]
WORDS = "--k 6 --num_latents 80 --batch_size 2 --ctx_len 32 --max_tokens 640 --assess false --feature_tokens 600"
WORDS += " --device cpu --compute_dtype float32"
TEXT = "The while statement is used for repeated execution."
KINDS = {"tiny_gpt2": "causal", "tiny_mlm": "masked", "tiny_bert": "none"}
MODEL_SETTINGS = ModelSettings(device="cpu")


@contextlib.contextmanager
def serve_run(run: Path) -> Iterator[str]:
    """Serve the page of a run in a thread, and return its address."""
    server = build_server(ExploreConfig(run=str(run), port=0, base=MODEL_SETTINGS))
    thread = threading.Thread(target=server.serve_requests)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop_serving()
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module", params=list(KINDS))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, topics_jsonl: str
) -> Iterator[tuple[str, str]]:
    """The kind of a model, and the address of a run with two SAEs and their features."""
    folder = tmp_path_factory.mktemp("explore")
    model = request.getfixturevalue(request.param)
    main([model, topics_jsonl, "--layers", "1", "2", *WORDS.split(), "--save_dir", str(folder), "--run_name", "run"])
    with serve_run(folder / "run") as url:
        yield KINDS[request.param], url


def enter_prompt(opened: OpenedPage, text: str) -> None:
    opened.page.get_by_label("Prompt", exact=True).fill(text)
    opened.page.keyboard.press("Control+Enter")
    wait_for_answer(opened)


def wait_for_answer(opened: OpenedPage) -> None:
    opened.page.wait_for_function("() => !document.querySelector('.prompt-bar button').disabled")
    assert "Running" not in opened.texts(".prompt-status")[0]


def wait_for_outcome(opened: OpenedPage) -> str:
    opened.page.wait_for_function("() => /^(?!Running).+/.test(document.querySelector('.change-outcome').innerText)")
    return opened.texts(".change-outcome")[0]


def open_prompt(open_page: Open, url: str, text: str = TEXT, **options: object) -> OpenedPage:
    opened = open_page(url, **options)
    opened.visit("#v=prompt")
    enter_prompt(opened, text)
    return opened


def prompt_text(kind: str) -> str:
    return TEXT.replace("while", "[MASK]") if kind == "masked" else TEXT


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (390, "dark")])
def test_the_view_fits(open_page: Open, served: tuple[str, str], width: int, theme: str) -> None:
    kind, url = served
    opened = open_prompt(open_page, url, prompt_text(kind), width=width, color_scheme=theme)
    opened.assert_no_overflow()
    opened.page.locator(".prompt-firing a").first.click()
    opened.page.get_by_role("button", name="Ablate").click()
    wait_for_outcome(opened)
    opened.assert_no_overflow()
    assert opened.page.title() == "Prompt · run · saetrain"
    nameless = opened.evaluate(
        "[...document.querySelectorAll('main :is(select, input, textarea, button, a, [role])')]"
        ".filter((e) => !e.getAttribute('aria-label') && !e.textContent.trim() && e.checkVisibility()"
        " && e.getAttribute('role') !== 'status').map((e) => e.outerHTML.slice(0, 80))"
    )
    assert not nameless, nameless


def test_tokens_list_the_latents_that_fire(open_page: Open, served: tuple[str, str]) -> None:
    kind, url = served
    opened = open_prompt(open_page, url)
    tokens = opened.texts(".ptok")
    assert "".join(tokens).replace(" ", "").lower().endswith(("execution.", "execution.[sep]"))
    excluded = opened.page.locator(".ptok.excluded").count()
    assert excluded == (1 if kind == "causal" else 2)
    assert opened.texts(".prompt-status")[0].startswith(
        f"{len(tokens)} tokens; the SAE uses {len(tokens) - excluded}, on"
    )
    opened.page.locator(".ptok").nth(3).click()
    assert opened.page.locator(".ptok").nth(3).get_attribute("aria-selected") == "true"
    numbers = opened.texts(".prompt-firing .number")
    values = [float(value) for value in opened.texts(".prompt-firing .value")]
    assert len(numbers) == 6
    assert values == sorted(values, reverse=True)
    opened.page.locator(".prompt-firing a").nth(1).click()
    opened.wait(f"prompt:{'h' if kind == 'causal' else 'encoder.layer'}.1:{numbers[1]}")
    label = opened.page.locator(".ptok.on").nth(0).get_attribute("aria-label") or ""
    assert re.search(r", activation [\d.]+$", label), label
    assert "on" in (opened.page.locator(".ptok").nth(3).get_attribute("class") or "").split()
    assert opened.page.get_by_label("Number of the latent").input_value() == numbers[1]
    opened.page.get_by_role("link", name=f"Open latent {numbers[1]}").click()
    opened.wait("latents")
    assert opened.texts("h1") == [f"Latent {numbers[1]}"]
    opened.page.get_by_role("button", name="Try a prompt").click()
    opened.wait("prompt")
    assert opened.texts(".ptok") == tokens


def test_latents_are_changed(open_page: Open, served: tuple[str, str]) -> None:
    kind, url = served
    opened = open_prompt(open_page, url, prompt_text(kind))
    assert opened.page.get_by_text("Choose a latent in the list").is_visible()
    opened.page.locator(".prompt-firing a").first.click()
    opened.page.get_by_role("button", name="Ablate").click()
    ablated = wait_for_outcome(opened)
    assert re.match(r"Latent \d+ ablated on \d+ of \d+ tokens\. ", ablated)
    assert ("final hidden states" if kind == "none" else "KL divergence") in ablated
    rows = opened.page.locator(".change-table tbody tr, .change-outcome li")
    assert rows.count() == (10 if kind != "none" else min(10, len(opened.texts(".ptok"))))
    opened.page.get_by_label("Factor").fill("-4.5")
    opened.page.get_by_role("button", name="Scale by").click()
    opened.page.wait_for_function("() => document.querySelector('.change-outcome').innerText.includes('times')")
    assert "times −4.5" in wait_for_outcome(opened)
    opened.page.get_by_label("Tokens on which the latent is changed").select_option(index=1)
    opened.page.wait_for_function(
        "() => document.querySelector('.change-outcome').innerText.includes('on 1 of 1 token')"
    )
    opened.page.get_by_label("Factor").fill("")
    opened.page.get_by_role("button", name="Scale by").click()
    assert wait_for_outcome(opened).startswith("Type a number")
    fired = set(opened.texts(".prompt-firing .number"))
    other = next(str(number) for number in range(80) if str(number) not in fired)
    opened.page.get_by_label("Number of the latent").fill(other)
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_function(f"() => document.documentElement.dataset.ready.endsWith(':{other}')")
    opened.page.get_by_role("button", name="Ablate").click()
    assert "fires on none of the 1 token, so nothing changes" in wait_for_outcome(opened)
    opened.page.get_by_label("Number of the latent").fill("80")
    opened.page.keyboard.press("Enter")
    assert "numbers 0 to 79" in wait_for_outcome(opened)


def test_predictions_are_shown(open_page: Open, served: tuple[str, str]) -> None:
    kind, url = served
    opened = open_prompt(open_page, url)
    predictions = opened.page.locator(".prompt-predicted li")
    if kind == "none":
        assert not opened.page.locator(".prompt-predicted").is_visible()
    elif kind == "causal":
        assert predictions.count() == 8
        assert opened.texts(".prompt-predicted h2")[0].startswith("Predicted after ‹.›")
        target = opened.page.get_by_label("Prediction that is compared").locator("option")
        assert target.count() == opened.page.locator(".ptok").count()
    else:
        assert predictions.count() == 0
        opened.page.locator(".ptok").nth(2).click()
        opened.page.get_by_role("button", name="Mask this token").click()
        opened.page.wait_for_selector(".ptok.mask")
        assert opened.texts(".ptok.mask") == ["[MASK]"]
        assert predictions.count() == 8
        opened.page.get_by_role("button", name="Unmask").click()
        opened.page.wait_for_selector(".ptok.mask", state="detached")
        opened.page.locator(".prompt-firing a").first.click()
        assert opened.page.get_by_text("Mask a token first").is_visible()


def test_keyboard_and_other_saes(open_page: Open, served: tuple[str, str]) -> None:
    _, url = served
    opened = open_page(url)
    opened.visit()
    opened.page.keyboard.press("4")
    opened.wait("prompt")
    opened.page.get_by_role("button", name="Run").click()
    assert opened.texts(".prompt-status") == ["Type a text first."]
    enter_prompt(opened, TEXT)
    opened.page.locator('.ptok[aria-selected="true"]').focus()
    opened.page.keyboard.press("Home")
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowRight")
    assert opened.evaluate("document.activeElement.dataset.position") == "2"
    assert opened.page.locator('.ptok[tabindex="0"]').count() == 1
    first = opened.texts(".prompt-firing .value")
    opened.page.get_by_label("SAE", exact=True).select_option("1")
    opened.page.wait_for_function(f"() => document.querySelector('.prompt-firing .value').innerText !== '{first[0]}'")
    assert opened.evaluate("document.querySelector('#prompt').value") == TEXT
    # A new page of the same tab keeps the text and runs it.
    opened.page.reload()
    opened.wait("prompt")
    wait_for_answer(opened)
    assert opened.page.locator(".ptok").count() > 5


def test_long_texts_are_cut(open_page: Open, served: tuple[str, str]) -> None:
    opened = open_prompt(open_page, served[1], "while " * 300)
    assert opened.texts(".prompt-status")[0].endswith("The text is longer: it is cut after 32 tokens.")
    opened.page.get_by_label("Prompt", exact=True).fill("x" * 200_000)
    opened.page.keyboard.press("Control+Enter")
    wait_for_answer(opened)
    assert "the text is too long" in opened.texts(".prompt-status")[0]
    assert not opened.page.locator(".prompt-tokens").is_visible()
    opened.errors[:] = [text for text in opened.errors if "413" not in text]


def test_a_server_that_has_ended_is_named(open_page: Open, tmp_path: Path, tiny_gpt2: str) -> None:
    """Also: a run without features has prompts, too."""
    write_random_saes(tmp_path / "run", tiny_gpt2, ["h.1"], causal=True)
    with serve_run(tmp_path / "run") as url:
        opened = open_prompt(open_page, url)
        assert len(opened.texts(".prompt-firing .number")) == 6
        assert opened.texts(".prompt-firing .word") == []
        opened.page.locator(".prompt-firing a").first.click()
        opened.page.get_by_role("button", name="Ablate").click()
        assert "KL divergence" in wait_for_outcome(opened)
    enter_prompt(opened, "another text")
    assert opened.texts(".prompt-status")[0].startswith("The server does not answer.")
    opened.errors[:] = [text for text in opened.errors if "ERR_" not in text]


def test_a_divided_report_has_prompts_on_each_page(
    open_page: Open, tmp_path: Path, tiny_gpt2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_saes(tmp_path / "run", tiny_gpt2, ["h.1", "h.2"], causal=True)
    monkeypatch.setattr(explore_run, "render_pages", functools.partial(render_pages, max_page_bytes=1000))
    with serve_run(tmp_path / "run") as url:
        opened = open_page(url)
        opened.visit("#v=prompt")
        opened.page.wait_for_url("**/report/000.html#*")
        opened.wait("prompt:h.1")
        enter_prompt(opened, TEXT)
        tokens, latents = opened.texts(".ptok"), opened.texts(".prompt-firing .number")
        opened.page.get_by_label("SAE", exact=True).select_option("1")
        opened.page.wait_for_url("**/report/001.html#*")
        opened.wait("prompt:h.2")
        wait_for_answer(opened)
        assert opened.texts(".ptok") == tokens
        assert opened.texts(".prompt-firing .number") != latents


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str) -> str:
    """A GPT-2 with hostile strings as tokens, which its random head predicts like any others."""
    folder = tmp_path_factory.mktemp("hostile-model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.add_tokens([text for text in STRINGS if text.strip()])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    # The hostile tokens are likelier than the others.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.lm_head.weight.data[1000:] *= 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_hostile_prompts_and_tokens_are_text(open_page: Open, tmp_path: Path, hostile_model: str) -> None:
    write_random_saes(tmp_path / "run", hostile_model, ["h.1"], causal=True)
    elements = ELEMENTS | {"KBD", "LABEL", "BR"}
    with serve_run(tmp_path / "run") as url:
        opened = open_page(url, 390)
        opened.visit("#v=prompt&l=1")
        shown: set[str] = set()
        for text in [*STRINGS[::3], "".join(STRINGS[:120]), " ".join(STRINGS[100:180]), "\ud800 alone"]:
            if not text.strip():
                continue
            enter_prompt(opened, text[:10_000])
            opened.page.locator(".ptok").last.click()
            opened.page.locator(".ptok").last.hover()
            shown.update(opened.texts(".prompt-predicted li"))
            opened.page.get_by_role("button", name="Ablate").click()
            wait_for_outcome(opened)
        names = set(opened.evaluate("[...document.querySelectorAll('main *')].map((e) => e.tagName)"))
        assert names <= elements, names - elements
        assert opened.evaluate("window.pwned") is None
        assert opened.evaluate(CHECK_TEXT) == []
        opened.assert_no_overflow()
        assert any("<script>" in text or "onerror" in text for text in shown), shown


def test_the_policy_allows_calls_of_the_own_server_alone(open_page: Open, tmp_path: Path, tiny_gpt2: str) -> None:
    write_random_saes(tmp_path / "run", tiny_gpt2, ["h.1"], causal=True)
    with serve_run(tmp_path / "run") as url:
        opened = open_page(url)
        opened.visit()
        blocked = opened.evaluate(
            """async () => {
              const refused = (address) => fetch(address).then(() => false, () => true);
              const script = document.createElement("script");
              script.textContent = "window.pwned = 1";
              document.body.append(script);
              document.body.append(Object.assign(document.createElement("iframe"), { src: location.href }));
              return [await refused("http://evil.example/"), await refused("http://127.0.0.1:1/")];
            }"""
        )
        assert blocked == [True, True]
        assert opened.evaluate("window.pwned") is None
        assert sum("Content Security Policy" in text for text in opened.errors) >= 4
        opened.errors.clear()
        opened.requests[:] = [request for request in opened.requests if request.startswith(url)]
