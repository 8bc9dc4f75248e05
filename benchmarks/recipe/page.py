"""Writes the tables of benchmarks/recipe.md and docs/recipe.md, and the plot, from the results files.

python -m benchmarks.recipe.page
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.recipe import ablation, defaults, rule
from benchmarks.recipe.report import comparison_table, draw_comparison, summary_table
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import Comparison
from benchmarks.recipe.task import Task

PAGES = {
    ROOT / "docs" / "recipe.md": ("summary",),
    ROOT / "benchmarks" / "recipe.md": ("ablation", "defaults", "comparison", "rule"),
}
"""{page: names of its tables}."""
RESULTS = ROOT / "benchmarks" / "results"
COMPARISON = Comparison(
    functools.partial(Task, site="minilm-3", latents=3072, k=32, tokens=1024), (400, 4000), (1, 2, 3)
)


def build_tables() -> dict[str, str]:
    """{name: table}."""
    cases = rule.rule_tasks(rule.build_parser().parse_args([]))
    return {
        "defaults": defaults.defaults_table("minilm-3", read_results("recipe-defaults")),
        "summary": summary_table(COMPARISON, read_results("recipe")),
        "comparison": comparison_table(COMPARISON, read_results("recipe")),
        "ablation": ablation.ablation_table(read_results("recipe-ablation")),
        "rule": rule.rule_table(cases, read_results("recipe-rule")),
    }


def read_results(name: str) -> Results:
    """Read the results file of this name."""
    return Results(RESULTS / f"{name}.json", "benchmarks.recipe.page")


def fill_tables(path: Path) -> str:
    """Return the page's text with current tables."""
    text, tables = path.read_text(), build_tables()
    for name in PAGES[path]:
        marked = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        assert marked.search(text), name
        text = marked.sub(lambda found, table=tables[name]: f"{found[1]}\n{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite the pages and the plot."""
    for path in PAGES:
        path.write_text(fill_tables(path))
    draw_comparison(COMPARISON, read_results("recipe"), RESULTS / "recipe.png")


if __name__ == "__main__":
    main()
