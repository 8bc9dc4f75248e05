"""A reader's way through a page: loading, sorting, filters, search, permalinks, keyboard, notes and copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.report.conftest import SIZE, OpenedPage

Open = Callable[..., OpenedPage]
VIEWS = {"": "run", "#v=sae": "sae", "#v=latents": "latents", "#s=h.1&l=5": "latents:h.1:5"}


@pytest.fixture(scope="module")
def latents(run: Path) -> dict[str, Any]:
    table = pq.read_table(run / "features" / "h.1" / "latents.parquet")
    return {name: table[name].to_pylist() for name in table.column_names}


def listed(opened: OpenedPage) -> list[int]:
    """The numbers of the rows in view, from the top."""
    return opened.evaluate(
        "[...document.querySelectorAll('.option')].sort((a, b) => a.ariaPosInSet - b.ariaPosInSet)"
        ".map((row) => Number(row.dataset.latent))"
    )


def list_all(opened: OpenedPage) -> set[int]:
    """The numbers of all rows."""
    found = set(listed(opened))
    while len(found) < int(opened.texts(".count")[0].split()[0].replace(",", "")):
        opened.page.locator(".list").evaluate("(list) => { list.scrollTop += list.clientHeight; }")
        opened.page.wait_for_timeout(50)
        found |= set(listed(opened))
    return found


def choose(opened: OpenedPage, label: str, value: str) -> None:
    opened.page.get_by_label(label, exact=True).select_option(value)
    opened.page.wait_for_timeout(50)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_views_fit_and_have_a_title(open_page: Open, report: Path, width: int, theme: str) -> None:
    opened = open_page(report, width, color_scheme=theme)
    for address, ready in VIEWS.items():
        opened.visit(address)
        opened.wait(ready)
        opened.page.wait_for_timeout(100)
        opened.assert_no_overflow()
        assert opened.page.title().endswith("run · saetrain")
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")


def test_charts_and_controls_have_names(open_page: Open, report: Path) -> None:
    opened = open_page(report)
    for address in VIEWS:
        opened.visit(address)
        opened.page.wait_for_timeout(100)
        nameless = opened.evaluate(
            "[...document.querySelectorAll('svg, canvas, select, input, textarea, button, a')]"
            ".filter((e) => !e.getAttribute('aria-label') && !e.textContent.trim() && e.checkVisibility())"
            ".map((e) => e.outerHTML.slice(0, 80))"
        )
        assert not nameless, nameless
        if address in ("", "#v=sae"):
            drawn = opened.page.locator(".chart svg").count()
            assert drawn == opened.page.locator(".chart svg .axis-label").count() >= 3
            ticks = opened.evaluate(
                "[...document.querySelectorAll('.chart svg')].map((chart) => chart.querySelectorAll('.tick').length)"
            )
            assert min(ticks) >= 5, "an axis has too few numbers"


def test_the_run_is_described(open_page: Open, report: Path) -> None:
    opened = open_page(report)
    opened.visit()
    text = opened.page.locator("main").inner_text()
    for words in ("synthetic-model", "synthetic-text", "Raise k.", "fail, by construction", "random decoder", "0.843"):
        assert words in text, words
    lines = opened.page.locator(".chart svg path.line")
    before = lines.first.get_attribute("d")
    opened.page.get_by_role("group", name="Vertical axis of Loss").get_by_text("linear").click()
    assert lines.first.get_attribute("d") != before


@pytest.mark.parametrize("sort", ["variance_explained", "rate", "max", "purity", "loss_effect", "index"])
def test_sorting(open_page: Open, report: Path, latents: dict[str, Any], sort: str) -> None:
    opened = open_page(report)
    opened.visit("#v=latents")
    choose(opened, "Show", "all")
    choose(opened, "Sort by", sort)
    column = {"rate": "count", "index": "latent"}.get(sort, sort)
    values = np.array(latents[column], np.float64)
    shown = values[listed(opened)]
    expected = np.sort(values) if sort == "index" else -np.sort(-values)
    # A page stores 12 bits of a number, so the order of almost equal numbers is open.
    np.testing.assert_allclose(shown, expected[: len(shown)], rtol=1e-3, atol=1e-4)
    opened.page.get_by_label("reverse").click()
    opened.page.wait_for_timeout(50)
    assert values[listed(opened)][0] == pytest.approx(np.nanmin(values) if sort != "index" else 299, abs=1e-4)


def test_the_list_starts_with_the_strongest_sparse_latents(
    open_page: Open, report: Path, latents: dict[str, Any]
) -> None:
    opened = open_page(report)
    opened.visit("#v=latents")
    kept = pq.read_table(report.parent / "features/h.1/stream.parquet")["kept"].to_numpy().sum()
    sparse = [n for n, count in enumerate(latents["count"]) if 0 < count <= 0.1 * kept]
    expected = sorted((latents["max"][n] for n in sparse), reverse=True)
    shown = [latents["max"][n] for n in listed(opened)]
    np.testing.assert_allclose(shown, expected[: len(shown)], rtol=1e-3)
    values = [float(text) for text in opened.texts(".option .value")]
    np.testing.assert_allclose(sorted(values), sorted(shown), rtol=6e-3)
    # A number that is typed is found in spite of the filter.
    for latent in (latents["count"].index(0), int(np.argmax(latents["count"]))):
        assert latent not in sparse
        opened.page.get_by_role("searchbox").fill(str(latent))
        opened.page.wait_for_timeout(400)
        assert listed(opened)[0] == latent


def test_the_effect_of_an_ablation_has_a_name_and_a_unit(
    open_page: Open, report: Path, latents: dict[str, Any]
) -> None:
    opened = open_page(report)
    ablated = next(n for n, effect in enumerate(latents["loss_effect"]) if effect is not None and not np.isnan(effect))
    opened.visit(f"#s=h.1&l={ablated}")
    facts = opened.texts("dl.facts")[0]
    assert "cross-entropy rises by" in facts
    assert " nats" in facts


@pytest.mark.parametrize("name", ["alive", "dead", "dense", "sparse"])
def test_filters(open_page: Open, report: Path, latents: dict[str, Any], name: str) -> None:
    opened = open_page(report)
    opened.visit("#v=latents")
    choose(opened, "Show", name)
    counts = np.array(latents["count"])
    kept = pq.read_table(report.parent / "features/h.1/stream.parquet")["kept"].to_numpy().sum()
    expected = {
        "alive": counts > 0,
        "dead": counts == 0,
        "dense": counts > 0.1 * kept,
        "sparse": (counts > 0) & (counts <= 0.1 * kept),
    }[name]
    assert f"{expected.sum():,}" == opened.texts(".count")[0].split()[0]


def test_only_rows_in_view_are_elements(open_page: Open, report: Path) -> None:
    opened = open_page(report)
    opened.visit("#v=latents")
    choose(opened, "Show", "all")
    choose(opened, "Sort by", "index")
    assert len(listed(opened)) < 40
    opened.page.locator(".list").evaluate("(list) => { list.scrollTop = list.scrollHeight; }")
    opened.page.wait_for_timeout(100)
    assert listed(opened)[-1] == SIZE.latents - 1


def test_search_finds_tokens_contexts_and_numbers(open_page: Open, run: Path, latents: dict[str, Any]) -> None:
    opened = open_page(run / "report.html")
    opened.visit("#v=latents")
    choose(opened, "Show", "all")
    folder = run / "features" / "h.1"
    vocabulary = pq.read_table(folder / "vocabulary.parquet")["text"].to_pylist()
    stream = pq.read_table(folder / "stream.parquet")
    tokens, sequences = stream["token_id"].to_numpy(), stream["sequence"].to_numpy()
    contexts = pq.read_table(folder / "contexts.parquet").select(["latent", "token"]).to_pylist()

    row = 1000
    words = [vocabulary[token] for token in tokens[row : row + 2]]
    phrase = "".join(words).strip()
    starts = [n for n in range(len(tokens) - 1) if tokens[n] == tokens[row] and tokens[n + 1] == tokens[row + 1]]
    expected = {
        context["latent"]
        for context in contexts
        for start in starts
        if context["token"] - 16 <= start <= context["token"] + 8 and sequences[start] == sequences[context["token"]]
    }
    search = opened.page.get_by_role("searchbox")
    search.fill(phrase.upper())
    opened.page.wait_for_timeout(400)
    assert expected <= list_all(opened), "a context with the phrase is not found"
    assert expected

    search.fill("123")
    opened.page.wait_for_timeout(400)
    assert listed(opened)[0] == 123
    search.fill("no such words at all")
    opened.page.wait_for_timeout(400)
    assert listed(opened) == []
    assert "No latent matches." in opened.texts(".list")[0]


def test_a_token_lists_the_latents_that_fire_on_it(open_page: Open, report: Path, latents: dict[str, Any]) -> None:
    opened = open_page(report)
    latent = next(n for n, ids in enumerate(latents["token_ids"]) if ids)
    opened.visit(f"#s=h.1&l={latent}")
    opened.page.locator(".side .token").first.click()
    opened.page.wait_for_selector(".chip:not([hidden])")
    token = latents["token_ids"][latent][0]
    expected = {
        number: counts[ids.index(token)]
        for number, (ids, counts) in enumerate(zip(latents["token_ids"], latents["token_counts"], strict=True))
        if token in ids
    }
    shown = listed(opened)
    assert set(shown) <= expected.keys()
    assert [expected[number] for number in shown] == sorted(expected.values(), reverse=True)[: len(shown)]
    assert opened.page.get_by_label("Show", exact=True).input_value() == "alive"
    opened.page.get_by_label("Remove this filter").click()
    opened.page.wait_for_selector(".chip", state="hidden")


def test_permalinks_and_history(open_page: Open, report: Path) -> None:
    opened = open_page(report)
    opened.visit("#s=h.3&l=42")
    opened.wait("latents:h.3:42")
    assert opened.texts("h1") == ["Latent 42"]
    opened.page.locator(".option").nth(3).click()
    opened.page.wait_for_function("() => !location.hash.includes('l=42')")
    opened.page.go_back()
    opened.wait("latents:h.3:42")
    opened.page.get_by_label("SAE", exact=True).select_option("0")
    opened.wait("latents:h.1")
    for broken in (
        "#s=nothing&l=99999999999",
        "#l=-1",
        "#%E0%A4%A",
        "#main",
        "#v=constructor",
        "#t=99999999&v=latents",
    ):
        opened.visit(broken)
        assert opened.texts("main")[0]


def test_keyboard(open_page: Open, report: Path) -> None:
    opened = open_page(report)
    opened.visit()
    opened.page.keyboard.press("3")
    opened.wait("latents")
    first = listed(opened)[:4]
    opened.page.keyboard.press("j")
    opened.wait(f"latents:h.1:{first[1]}")
    opened.page.keyboard.press("k")
    opened.wait(f"latents:h.1:{first[0]}")
    opened.page.locator(".list").focus()
    opened.page.keyboard.press("ArrowDown")
    opened.page.keyboard.press("ArrowDown")
    opened.wait(f"latents:h.1:{first[2]}")
    assert opened.page.locator(".list").get_attribute("aria-activedescendant") == f"option-{first[2]}"
    opened.page.keyboard.press("End")
    opened.page.wait_for_function(f"() => !document.documentElement.dataset.ready.endsWith(':{first[2]}')")
    opened.page.keyboard.press("/")
    opened.page.keyboard.type("ka 2j")
    assert opened.page.get_by_role("searchbox").input_value() == "ka 2j"
    opened.page.keyboard.press("Escape")
    opened.page.keyboard.press("?")
    assert opened.page.locator("dialog").is_visible()
    opened.page.keyboard.press("Escape")
    opened.page.keyboard.press("2")
    opened.wait("sae")


def test_notes_are_kept_and_exported(open_page: Open, report: Path, tmp_path: Path) -> None:
    opened = open_page(report)
    opened.visit("#s=h.1&l=5")
    opened.page.keyboard.press("n")
    opened.page.keyboard.type("names of <b>weekdays</b>")
    opened.visit("#s=h.1&l=5")
    assert opened.page.locator("#note").input_value() == "names of <b>weekdays</b>"
    choose(opened, "Show", "noted")
    assert listed(opened) == [5]
    with opened.page.expect_download() as download:
        opened.page.get_by_role("button", name="Export 1 note").click()
    download.value.save_as(tmp_path / "notes.json")
    assert json.loads((tmp_path / "notes.json").read_text())["notes"] == {"h.1": {"5": "names of <b>weekdays</b>"}}


def test_a_copy_of_a_latent_has_the_values_of_the_files(open_page: Open, run: Path, latents: dict[str, Any]) -> None:
    """The way from parquet through columns, base64 and the browser changes numbers by rounding alone."""
    opened = open_page(run / "report.html")
    folder = run / "features" / "h.1"
    vocabulary = pq.read_table(folder / "vocabulary.parquet")["text"].to_pylist()
    stream = pq.read_table(folder / "stream.parquet").to_pydict()
    contexts = pq.read_table(folder / "contexts.parquet").to_pylist()
    dead = latents["count"].index(0)
    dense = int(np.argmax(latents["count"]))
    for latent in (0, 7, dead, dense, SIZE.latents - 1):
        opened.visit(f"#s=h.1&l={latent}")
        opened.page.get_by_role("button", name="Copy JSON").click()
        copied = json.loads(opened.evaluate("window.copied"))
        assert (copied["latent"], copied["fires_on_tokens"]) == (latent, latents["count"][latent])
        for key, column in {
            "max": "max",
            "mean_active": "mean_active",
            "variance_explained": "variance_explained",
        }.items():
            assert copied[key] == pytest.approx(latents[column][latent], rel=1e-3)
        assert copied["purity"] == pytest.approx(latents["purity"][latent], abs=1e-4)
        assert copied["tokens"] == [
            {"token": vocabulary[token], "count": count}
            for token, count in zip(latents["token_ids"][latent], latents["token_counts"][latent], strict=True)
        ]
        assert [found["latent"] for found in copied["neighbours"]] == latents["neighbours"][latent]
        lens = [(found["token"], found["logit"]) for found in copied["lens_bottom"]]
        assert [token for token, _ in lens] == [vocabulary[token] for token in latents["lens_bottom"][latent]]
        np.testing.assert_allclose([logit for _, logit in lens], latents["lens_bottom_logits"][latent], atol=0.006)
        own = [context for context in contexts if context["latent"] == latent]
        assert len(copied["contexts"]) == len(own)
        for shown, context in zip(copied["contexts"], own, strict=True):
            check_context(shown, context, stream, vocabulary, latents["max"][latent])


def check_context(
    shown: dict[str, Any], context: dict[str, Any], stream: dict[str, Any], vocabulary: list[str], largest: float
) -> None:
    row = context["token"]
    sequence = stream["sequence"][row]
    rows = [n for n in range(max(0, row - 16), min(len(stream["doc"]), row + 9)) if stream["sequence"][n] == sequence]
    assert shown["tokens"] == [vocabulary[stream["token_id"][n]] for n in rows]
    assert (shown["document"], shown["position"]) == (stream["doc"][row], stream["position"][row])
    expected = np.zeros(len(rows))
    expected[rows.index(row)] = context["value"]
    for offset, value in zip(context["offsets"], context["activations"], strict=True):
        expected[rows.index(row + offset)] = value
    np.testing.assert_allclose(shown["activations"], expected, atol=largest / 4000)


def test_the_saes_of_a_run_are_compared(open_page: Open, report: Path, run: Path) -> None:
    opened = open_page(report)
    opened.visit("#s=h.1")
    opened.wait("run")
    marks = opened.page.locator("figure:has-text('FVU and L0') .point")
    names = sorted(path.parent.name for path in (run / "sae").rglob("cfg.json"))
    assert marks.count() == len(names) >= 2
    shown = set()
    for number in range(marks.count()):
        # Marks of equal SAEs cover one another.
        marks.nth(number).dispatch_event("pointermove")
        shown.add(opened.texts("#tip div")[0])
    assert shown == set(names)
    other = next(
        number for number in range(marks.count()) if "current" not in (marks.nth(number).get_attribute("class") or "")
    )
    marks.nth(other).dispatch_event("click")
    opened.page.wait_for_timeout(100)
    assert opened.evaluate("location.hash") != "#s=h.1"
