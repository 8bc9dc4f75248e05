"""Nothing that a data set, a tokenizer or a name holds is run, fetched, or able to break the layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.synthetic_run import RunSize, write_synthetic_run
from saetrain.report.build import write_report
from tests.report.conftest import OpenedPage
from tests.report.hostile import NAMES, STRINGS

Open = Callable[..., OpenedPage]
SIZE = RunSize(latents=250, d_in=8, tokens=5000, vocabulary=300)
ELEMENTS = {
    *("A", "ARTICLE", "B", "BDI", "BUTTON", "CANVAS", "DD", "DETAILS", "DIV", "DL", "DT", "FIGCAPTION", "FIGURE"),
    *("H1", "H2", "H3", "HEADER", "INPUT", "LI", "OL", "OPTION", "P", "SECTION", "SELECT", "SMALL", "SPAN", "SUMMARY"),
    *(
        "TABLE",
        "TBODY",
        "TD",
        "TEXTAREA",
        "TH",
        "THEAD",
        "TR",
        "UL",
        "circle",
        "g",
        "line",
        "path",
        "rect",
        "svg",
        "text",
    ),
}
"""Elements that the views consist of."""
CHECK_TEXT = r"""
() => {
  const bad = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node; (node = walker.nextNode()); ) {
    if (node.parentElement.closest("script, noscript")) continue;
    if (bad.test(node.data)) found.push(JSON.stringify(node.data.slice(0, 80)));
  }
  return found;
}
"""


def write_hostile_run(folder: Path, name: str) -> Path:
    """Write a run of a given name whose tokens, data sets, settings and verdict are hostile strings."""
    run = write_synthetic_run(folder / name, SIZE, ("h.1",), STRINGS, {"model": NAMES[0], "dataset": NAMES[1]})
    # A larger file of settings would be refused.
    short = [text[:300] for text in STRINGS]
    config = {"model": short[1], "dataset": short, **dict(zip(short[:50], short[50:100], strict=True))}
    (run / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    for path in (run / "final_assessment.json", run / "evaluation" / "text.json"):
        content = path.read_text()
        for word, hostile in (("synthetic-text", STRINGS[3]), ("raise k", STRINGS[5]), ("of 250 latents", STRINGS[9])):
            content = content.replace(json.dumps(word)[1:-1], json.dumps(hostile)[1:-1])
        path.write_text(content)
    evaluation = json.loads((run / "evaluation" / "text.json").read_text())
    evaluation["saes"]["h.1"]["figures"].update(
        {text: evaluation["saes"]["h.1"]["figures"]["l0"] | {"flag": text} for text in STRINGS[:120]}
    )
    evaluation["saes"]["h.1"]["classes"].update({STRINGS[0]: {"tokens": 3, "fvu": 0.5}})
    (run / "evaluation" / "text.json").write_text(json.dumps(evaluation))
    return run


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_hostile_run(tmp_path_factory.mktemp("hostile"), "run")
    return write_report(run)[0]


def assert_harmless(opened: OpenedPage, width: int) -> None:
    assert opened.evaluate("window.pwned") is None
    names = set(opened.evaluate("[...document.querySelectorAll('main *')].map((e) => e.tagName)"))
    assert names <= ELEMENTS, names - ELEMENTS
    assert not opened.evaluate(
        "[...document.querySelectorAll('*')].some((e) => [...e.attributes].some((a) => /^on/.test(a.name)))"
    )
    assert opened.evaluate(CHECK_TEXT) == []
    opened.assert_no_overflow()
    assert opened.evaluate("innerWidth") == width


def test_the_file_holds_no_string_of_the_run(hostile_page: Path) -> None:
    text = hostile_page.read_text(encoding="utf-8")
    assert "pwned" not in text
    assert "evil.example" not in text
    scripts = re.findall(r"<script\b[^>]*>", text)
    columns = re.findall(r'<script type="application/octet-stream" id="[\w.]+">([A-Za-z0-9+/=]+)</script>', text)
    assert len(scripts) == 1 + len(columns)
    # The page stores the beginning of a token of 100,000 characters.
    assert len(text) < 1_000_000


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_tokens_and_texts_are_text(open_page: Open, hostile_page: Path, width: int) -> None:
    opened = open_page(hostile_page, width)
    for address in ("", "#v=sae", "#v=latents"):
        opened.visit(address)
        for summary in opened.page.locator("summary").all():
            summary.click()
        opened.page.wait_for_timeout(100)
        assert_harmless(opened, width)
    # Each token is shown at least once: as the chip of the filter by token, and in the rows that the filter leaves.
    for token in range(len(STRINGS)):
        opened.page.evaluate(f"location.hash = 't={token}&v=latents'")
        opened.page.wait_for_timeout(20)
    opened.page.wait_for_timeout(300)
    assert_harmless(opened, width)
    for latent in range(0, SIZE.latents, 20):
        opened.page.evaluate(f"location.hash = 'l={latent}'")
        opened.wait(f"latents:h.1:{latent}")
        assert_harmless(opened, width)
    heights = set(opened.evaluate("[...document.querySelectorAll('.option')].map((row) => row.offsetHeight)"))
    assert heights <= {52, 0}


def test_hostile_text_can_be_hovered_searched_and_copied(open_page: Open, hostile_page: Path) -> None:
    opened = open_page(hostile_page)
    opened.visit("#l=3")
    opened.evaluate(
        "document.querySelectorAll('.tok').forEach((token) =>"
        " token.dispatchEvent(new PointerEvent('pointerover', { bubbles: true })))"
    )
    opened.page.get_by_role("button", name="Copy JSON").click()
    assert json.loads(opened.evaluate("window.copied"))["latent"] == 3
    for text in STRINGS[::7]:
        opened.page.get_by_role("searchbox").fill(text[:200].replace("\0", ""))
        opened.page.wait_for_timeout(20)
    opened.page.wait_for_timeout(400)
    assert_harmless(opened, 1280)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_runs_and_saes_are_text(open_page: Open, tmp_path: Path, name: str) -> None:
    size = RunSize(latents=20, d_in=4, tokens=300, vocabulary=40, k=2)
    is_printable = name.isprintable()
    sae = name if is_printable else "h.1"
    run = write_synthetic_run(tmp_path / name, size, (sae, "h.2"), names={"model": name, "dataset": name})
    page = write_report(run)[0]
    opened = open_page(page, 390)
    for address in ("", "#v=sae", "#v=latents"):
        opened.visit(address)
        assert_harmless(opened, 390)
    opened.visit()
    opened.page.get_by_label("SAE", exact=True).select_option("1")
    opened.page.wait_for_timeout(100)
    assert_harmless(opened, 390)
    opened.page.keyboard.press("3")
    opened.page.wait_for_timeout(200)
    assert_harmless(opened, 390)


GLYPHS = {
    "\u202eevil": "⟨202E⟩evil",
    "a\0b": "a⟨00⟩b",
    "\x1b[31m": "⟨1B⟩[31m",
    "\u200b": "⟨200B⟩",
    "\n": "↵",
    " x ": "·x·",
    "": "∅",
    "\U000e0041": "⟨E0041⟩",
    "e\u0301": "e\u0301",
    "a" + "\u0301" * 150: "a\u0301\u0301…",
    "\U0001f40d": "\U0001f40d",
}
"""{token: what the page shows}"""


def test_invisible_characters_are_glyphs(open_page: Open, tmp_path: Path) -> None:
    size = RunSize(latents=20, d_in=4, tokens=300, vocabulary=40, k=2)
    page = write_report(write_synthetic_run(tmp_path / "run", size, words=list(GLYPHS)))[0]
    opened = open_page(page)
    opened.visit("#t=0&v=latents")
    numbers = range(40)
    # The page numbers tokens by frequency.
    found = set()
    for number in numbers:
        opened.page.evaluate(f"location.hash = 't={number}&v=latents'")
        opened.page.wait_for_function("() => document.querySelector('.chip b')")
        opened.page.wait_for_timeout(15)
        found.add(opened.page.locator(".chip b").inner_text())
    assert set(GLYPHS.values()) <= found


def test_the_policy_refuses_other_scripts_and_styles(open_page: Open, hostile_page: Path) -> None:
    opened = open_page(hostile_page)
    opened.visit()
    opened.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.pwned = 1";
          document.body.append(script);
          const image = document.createElement("div");
          image.innerHTML = "<img src=x onerror='window.pwned=2'>";
          document.body.append(image);
          const style = document.createElement("style");
          style.textContent = "body { display: none }";
          document.head.append(style);
          setTimeout("window.pwned = 3");
        }"""
    )
    opened.page.wait_for_timeout(200)
    assert opened.evaluate("window.pwned") is None
    assert opened.evaluate("getComputedStyle(document.body).display") == "block"
    assert sum("Content Security Policy" in text for text in opened.errors) >= 3
    opened.errors.clear()
    opened.requests[:] = [url for url in opened.requests if not url.endswith("/x")]
