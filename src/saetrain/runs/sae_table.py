"""Tables with one row per SAE that fit 80 columns: at the end of a run, of an evaluation, and of a comparison."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from saetrain.untrusted import escape_text

DEFAULT_TABLE_COLUMNS = 120
"""Width of a table in characters if there is no terminal."""
RANDOM_REDUNDANCY = "decoder_redundancy_top100_random"
NAME_TITLES = ("run", "SAE")
"""Titles of the columns that may wrap."""
COLUMNS = {
    "fvu": ("FVU", ".4f"),
    "l0": ("L0", ".1f"),
    "ce_recovered_zero": ("CE rec.", ".3f"),
    "delta_ce": ("CE incr.", ".3f"),
    "pooled_cosine": ("pooled", ".3f"),
    "dead_below_threshold": ("dead", ".1%"),
    "decoder_redundancy_top100": ("redund.", ".3f"),
    RANDOM_REDUNDANCY: ("random", ".3f"),
}
"""{metric: title and format of its column}; a column that no SAE has is left out."""


class EscapingConsole(Console):
    """Console that escapes what a terminal would act on, such as colours in the name of a file."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Yield the segments of ``renderable`` with escaped text."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else "\n".join(map(escape_text, segment.text.split("\n")))
            yield Segment(text, segment.style, segment.control)


def open_console() -> Console:
    """Return a console on stdout as wide as COLUMNS or the terminal, or DEFAULT_TABLE_COLUMNS without either."""
    # Rich itself takes 80 columns for TERM=dumb, whatever COLUMNS is, unless both dimensions are given.
    size = shutil.get_terminal_size((DEFAULT_TABLE_COLUMNS, 25))
    return EscapingConsole(file=sys.stdout, width=size.columns, height=size.lines, highlight=False)


def build_sae_table(
    labels: Mapping[str, Sequence[str]], metrics: Sequence[Mapping[str, float]], verdicts: Sequence[str] = ()
) -> Table:
    """Return a table with one row per SAE: its labels ({title: one cell per SAE}), metrics and verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in labels:
        table.add_column(Text(title), overflow="fold", no_wrap=title not in NAME_TITLES)
    shown = [name for name in COLUMNS if any(name in row for row in metrics)]
    for title in (*(COLUMNS[name][0] for name in shown), *(["verdict"] if verdicts else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for number, row in enumerate(metrics):
        cells = [f"{row[name]:{COLUMNS[name][1]}}" if name in row else "" for name in shown]
        names = (cell[number] for cell in labels.values())
        table.add_row(*map(Text, (*names, *cells, *verdicts[number : number + 1])))
    return table
