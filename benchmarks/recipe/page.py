"""The tables of docs/recipe.md and its picture, from the files of results: no figure in them is typed by hand.

python -m benchmarks.recipe.page
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.recipe import ablation, defaults, rule
from benchmarks.recipe.report import plot, table
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import Comparison
from benchmarks.recipe.task import Task

PAGE = ROOT / "docs" / "recipe.md"
RESULTS = ROOT / "benchmarks" / "results"
COMPARISON = Comparison(
    functools.partial(Task, site="minilm-3", latents=3072, k=32, tokens=1024), (400, 4000), (1, 2, 3)
)


def sections() -> dict[str, str]:
    """{marker: what stands behind it}."""
    cases = rule.cases(rule.parser().parse_args([]))
    return {
        "defaults": defaults.table("minilm-3", read("recipe-defaults")),
        "comparison": table(COMPARISON, read("recipe")),
        "ablation": ablation.table(read("recipe-ablation")),
        "rule": rule.table(cases, read("recipe-rule")),
    }


def read(name: str) -> Results:
    """The file of results of that name."""
    return Results(RESULTS / f"{name}.json", "benchmarks.recipe.page")


def filled(page: str) -> str:
    """The page with its tables made anew."""
    for name, text in sections().items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        assert marked.search(page), name
        page = marked.sub(lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def main(page: Path = PAGE) -> None:
    """Rewrite page and picture."""
    page.write_text(filled(page.read_text()))
    plot(COMPARISON, read("recipe"), RESULTS / "recipe.png")


if __name__ == "__main__":
    main()
