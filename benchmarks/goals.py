"""The goals of the project's speed, and what a results file says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import AUTOCAST, STEP_SHAPES
from benchmarks.summary import Record, Row, named, rival, rows

Against = Literal["fastest peer", "fastest peer with an fp32 model", "sae-lens with both autocast options", "floor"]


@dataclass(frozen=True)
class Goal:
    """How many times as fast as something our torch and native paths shall be in a case."""

    case: str
    torch: float
    native: float
    model_dtype: str | None = None
    against: Against = "fastest peer"

    @property
    def name(self) -> str:
        """What the table calls it."""
        model = f", {self.model_dtype} model" if self.model_dtype else ""
        return f"{self.case}{model}: over {self.against}"


STEP_GOALS = dict(zip(STEP_SHAPES, ((1.5, 2.0), (2.8, 4.5), (2.0, 5.0), (2.4, 4.5), (2.6, 5.5)), strict=True))
BERT, GPT2, LAYERS = "end to end BERT", "end to end GPT-2", "12 layers BERT"
GOALS = (
    *(Goal(f"step F={latents} k={k}", *wanted) for (latents, k), wanted in STEP_GOALS.items()),
    Goal(BERT, 3.0, 3.3, "bf16"),
    Goal(BERT, 3.0, 3.3, "bf16", "fastest peer with an fp32 model"),
    Goal(BERT, 1.6, 1.8, "fp32", "fastest peer with an fp32 model"),
    Goal(GPT2, 1.8, 1.9, "bf16", "sae-lens with both autocast options"),
    Goal(LAYERS, 2.4, 3.0, "bf16"),
    Goal(LAYERS, 2.4, 3.0, "bf16", "fastest peer with an fp32 model"),
    Goal(BERT, 0.9, 0.95, "bf16", "floor"),
    Goal(BERT, 0.9, 0.95, "fp32", "floor"),
)
MEMORY_GOALS = {"torch": 1.0, "native": 0.5}
"""Peak memory as a share of the leanest peer's, at the most."""


def own_row(found: list[Row], path: str, model_dtype: str | None) -> Row | None:
    """Our row of that path and model dtype."""
    for row in found:
        name: str = row.tool["name"]
        if name.startswith(f"ours {path} ") and row.tool["changes"].get("model_dtype") == model_dtype and row.rounds:
            return row
    return None


def opponent(found: list[Row], goal: Goal) -> Row | None:
    """The row that the goal compares with."""
    if goal.against == "floor":
        return named(found, f"floor, {goal.model_dtype} model")
    if goal.against == "sae-lens with both autocast options":
        return named(found, AUTOCAST)
    if goal.against == "fastest peer with an fp32 model":
        return rival(found, model_dtype="fp32")
    return rival(found)


def cell(found: list[Row], goal: Goal, path: str, wanted: float) -> str:
    """The ratio measured, the goal, and whether it is met."""
    row, other = own_row(found, path, goal.model_dtype), opponent(found, goal)
    ratio = row.over(other) if row and other else None
    if ratio is None:
        return f"- (goal {wanted:g})"
    return f"{ratio.show(2)} (goal {wanted:g}, {'met' if ratio.median >= wanted else 'missed'})"


def memory_cell(found: list[Row], path: str) -> str:
    """Peak memory over that of the leanest peer."""
    row, wanted = own_row(found, path, None), MEMORY_GOALS[path]
    peers = [peer.peak for peer in found if peer.tool["peer"] and peer.peak is not None]
    if row is None or row.peak is None or not peers:
        return f"- (goal {wanted:g})"
    ratio = row.peak / min(peers)
    return f"{ratio:.2f} (goal {wanted:g}, {'met' if ratio <= wanted else 'missed'})"


def table(results: Record) -> str:
    """The goals whose cases were run with peers or floors."""
    cases = {case["name"]: rows(case) for case in results["cases"]}
    lines = ["### goals", "", "| goal | torch path | native path |", "|---|---|---|"]
    for goal in GOALS:
        found = cases.get(goal.case, [])
        if opponent(found, goal) is not None:
            cells = (cell(found, goal, "torch", goal.torch), cell(found, goal, "native", goal.native))
            lines.append(f"| {goal.name} | {cells[0]} | {cells[1]} |")
    for name, found in cases.items():
        if name.startswith("step ") and any(row.tool["peer"] for row in found):
            cells = (memory_cell(found, "torch"), memory_cell(found, "native"))
            lines.append(f"| {name}: peak memory over the leanest peer's | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""]) if len(lines) > 4 else ""
