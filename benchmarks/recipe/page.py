"""The tables of docs/recipe.md and its picture, from the files of results: no figure in them is typed by hand.

python -m benchmarks.recipe.page
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.recipe import ablation, defaults, rule
from benchmarks.recipe.report import comparison_table, draw_comparison
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import Comparison
from benchmarks.recipe.task import Task

PAGE = ROOT / "docs" / "recipe.md"
RESULTS = ROOT / "benchmarks" / "results"
COMPARISON = Comparison(
    functools.partial(Task, site="minilm-3", latents=3072, k=32, tokens=1024), (400, 4000), (1, 2, 3)
)


def build_tables() -> dict[str, str]:
    """{marker: what stands behind it}."""
    cases = rule.rule_tasks(rule.build_parser().parse_args([]))
    return {
        "defaults": defaults.defaults_table("minilm-3", read_results("recipe-defaults")),
        "comparison": comparison_table(COMPARISON, read_results("recipe")),
        "ablation": ablation.ablation_table(read_results("recipe-ablation")),
        "rule": rule.rule_table(cases, read_results("recipe-rule")),
    }


def read_results(name: str) -> Results:
    """The file of results of that name."""
    return Results(RESULTS / f"{name}.json", "benchmarks.recipe.page")


def fill_tables(page: str) -> str:
    """The page with its tables made anew."""
    for name, text in build_tables().items():
        marked = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        assert marked.search(page), name
        page = marked.sub(lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def main(page: Path = PAGE) -> None:
    """Rewrite page and picture."""
    page.write_text(fill_tables(page.read_text()))
    draw_comparison(COMPARISON, read_results("recipe"), RESULTS / "recipe.png")


if __name__ == "__main__":
    main()
