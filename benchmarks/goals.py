"""The project's goals for speed and memory, and whether a results file meets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import AUTOCAST, STEP_SHAPES
from benchmarks.summary import Record, Row, find_fastest_peer, find_row, read_rows

Baseline = Literal["fastest peer", "fastest peer with an fp32 model", "sae-lens with both autocast options", "floor"]


@dataclass(frozen=True)
class Goal:
    """Required speed of the torch and native kernels in a case, relative to a baseline."""

    case: str
    torch: float
    native: float
    model_dtype: str | None = None
    baseline: Baseline = "fastest peer"

    @property
    def name(self) -> str:
        """Label of the goal in the table."""
        model = f", {self.model_dtype} model" if self.model_dtype else ""
        return f"{self.case}{model}: speed over {self.baseline}"


STEP_GOALS = dict(zip(STEP_SHAPES, ((1.5, 2.0), (2.8, 4.5), (2.0, 5.0), (2.4, 4.5), (2.6, 5.5)), strict=True))
BERT, GPT2, LAYERS = "end to end BERT", "end to end GPT-2", "12 layers BERT"
GOALS = (
    *(Goal(f"step F={latents} k={k}", *required) for (latents, k), required in STEP_GOALS.items()),
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
"""Largest allowed peak memory, relative to the peer with the lowest peak."""


def find_own_row(rows: list[Row], kernels: str, model_dtype: str | None) -> Row | None:
    """saetrain's row with these kernels and this dtype of the model."""
    for row in rows:
        name: str = row.tool["name"]
        same_model = row.tool["changes"].get("model_dtype") == model_dtype
        if name.startswith(f"saetrain {kernels} ") and same_model and row.rounds:
            return row
    return None


def find_baseline(rows: list[Row], goal: Goal) -> Row | None:
    """The row with which the goal compares."""
    if goal.baseline == "floor":
        return find_row(rows, f"floor, {goal.model_dtype} model")
    if goal.baseline == "sae-lens with both autocast options":
        return find_row(rows, AUTOCAST)
    if goal.baseline == "fastest peer with an fp32 model":
        return find_fastest_peer(rows, model_dtype="fp32")
    return find_fastest_peer(rows)


def format_goal(rows: list[Row], goal: Goal, kernels: str, required: float) -> str:
    """The measured ratio, the goal, and whether it is met."""
    row, other = find_own_row(rows, kernels, goal.model_dtype), find_baseline(rows, goal)
    ratio = row.speed_over(other) if row and other else None
    if ratio is None:
        return f"- (goal {required:g})"
    return f"{ratio.format(2)} (goal {required:g}, {'met' if ratio.median >= required else 'missed'})"


def format_memory_goal(rows: list[Row], kernels: str) -> str:
    """Peak memory relative to the peer with the lowest peak, and whether it is low enough."""
    row, allowed = find_own_row(rows, kernels, None), MEMORY_GOALS[kernels]
    peers = [peer.peak_bytes for peer in rows if peer.tool["peer"] and peer.peak_bytes is not None]
    if row is None or row.peak_bytes is None or not peers:
        return f"- (goal {allowed:g})"
    ratio = row.peak_bytes / min(peers)
    return f"{ratio:.2f} (goal {allowed:g}, {'met' if ratio <= allowed else 'missed'})"


def goals_table(results: Record) -> str:
    """The goals whose cases ran with peers or floors."""
    cases = {case["name"]: read_rows(case) for case in results["cases"]}
    lines = ["### goals", "", "| goal | torch kernels | native kernels |", "|---|---|---|"]
    for goal in GOALS:
        rows = cases.get(goal.case, [])
        if find_baseline(rows, goal) is not None:
            cells = (format_goal(rows, goal, "torch", goal.torch), format_goal(rows, goal, "native", goal.native))
            lines.append(f"| {goal.name} | {cells[0]} | {cells[1]} |")
    for name, rows in cases.items():
        if name.startswith("step ") and any(row.tool["peer"] for row in rows):
            cells = (format_memory_goal(rows, "torch"), format_memory_goal(rows, "native"))
            lines.append(f"| {name}: peak memory over the lowest of the peers | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""]) if len(lines) > 4 else ""
