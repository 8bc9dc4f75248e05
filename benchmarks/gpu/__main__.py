"""``benchmarks/gpu.sh``: correctness, ceilings, steps and whole runs, into a file and as tables."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.cases import Work
from benchmarks.gpu.correct import correct
from benchmarks.gpu.shapes import HOOK, MODELS, SHAPES, SMALL
from benchmarks.gpu.steps import PATHS, batches_of, in_turn, paths_of
from benchmarks.gpu.timing import ceilings, floor, milliseconds, samples_of
from benchmarks.inputs import token_ids, transformer
from benchmarks.machine import describe_machine, describe_run
from saetrain.training.triton_check import Shape

OUT = Path(__file__).parents[1] / "results" / "gpu.json"
MINUTES = 7.5
"""After which nothing more is begun."""


def steps(shape: Shape, limits: dict[str, float]) -> dict[str, Any]:
    """Times of each path at a shape, beside the floor."""
    lowest = floor(shape, limits)
    batches = batches_of(shape, "cuda")
    found: dict[str, Any] = {"shape": asdict(shape), "floor_ms": lowest, "paths": {}}
    for name, make in paths_of(shape, SMALL).items():
        torch.cuda.empty_cache()
        result = samples_of(in_turn(make(shape, "cuda"), batches))
        if "ms" in result:
            result["of_floor"] = lowest / result["ms"]
        found["paths"][name] = result
    return found


@torch.no_grad()
def end_to_end(work: Work) -> dict[str, Any]:
    """The model's forward to the hook alone, and with the SAE's step behind it."""
    module = transformer(work).cuda()
    ids = token_ids(work, 4 * work.tokens // work.ctx_len).cuda().chunk(4)
    number = 0

    def forward() -> torch.Tensor:
        nonlocal number
        number += 1
        out: torch.Tensor = module(ids[number % len(ids)]).last_hidden_state
        return out.flatten(0, 1)

    alone = statistics.median(milliseconds(forward))
    shape = Shape(work.width, work.latents, work.k, work.tokens)
    found: dict[str, Any] = {"model": work.model, "shape": asdict(shape), "forward_ms": alone, "paths": {}}
    for name in ("triton", "torch"):
        step = PATHS[name](shape, "cuda")
        result = samples_of(lambda step=step: step(forward()))  # type: ignore[misc]
        if "ms" in result:
            result["of_forward"] = alone / result["ms"]
            result["tokens_per_s"] = 1e3 * work.tokens / result["ms"]
        found["paths"][name] = result
    return found


def show(result: dict[str, Any]) -> None:
    """One line for each path."""
    about = result.get("model", "step")
    known = ", ".join(f"{key} {result[key]:.3f}" for key in ("floor_ms", "forward_ms") if key in result)
    print(f"{about} {result['shape']}: {known}")
    own = result["paths"].get("triton", {}).get("ms")
    for name, path in result["paths"].items():
        if "failed" in path:
            print(f"  {name}: {path['failed']}")
            continue
        shares = "".join(f", {path[k]:.0%} {k.replace('_', ' ')}" for k in ("of_floor", "of_forward") if k in path)
        ratio = f", {path['ms'] / own:.2f}x triton's time" if own else ""
        print(f"  {name}: {path['ms']:.3f} ms{shares}{ratio}, {path['peak_bytes'] / 2**30:.1f} GiB")


def announce(shapes: list[Shape], models: list[Work]) -> None:
    """What a GPU would be asked for."""
    print("no GPU: nothing is timed. With one, these are, beside a large copy and a large bf16 product:")
    for shape in shapes:
        sizes = f"D={shape.width} F={shape.latents} k={shape.k} N={shape.tokens}"
        print(f"  step {sizes}: {', '.join(paths_of(shape, SMALL))}")
    for work in models:
        print(f"  end to end: {work.model} to block {HOOK}, {work.tokens} tokens a step, F={work.latents}, k={work.k}")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="the results file (benchmarks/results/gpu.json)")
    parser.add_argument("--quick", action="store_true", help="the small shape and BERT alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing more is begun")
    options = parser.parse_args()
    began, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    shapes, models = ([SMALL], MODELS[:1]) if options.quick else ([SMALL, *SHAPES], MODELS)
    checked = correct(device, quick=options.quick)
    for check in checked:
        print(f"{check['what']}, {check['shape']}: {check['distance']:.1e}")
    if device == "cpu":
        announce(shapes, models)
        return
    results: dict[str, Any] = {
        "run": {**describe_run([]), "command": "benchmarks/gpu.sh " + " ".join(sys.argv[1:])},
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")},
        "ceilings": ceilings(),
        "correct": checked,
        "steps": [],
        "end_to_end": [],
        "left_out": [],
    }
    print(f"{results['device']}: {results['ceilings']}")
    tasks: list[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]]
    tasks = [("end_to_end", end_to_end, (work,)) for work in models]
    tasks[1:1] = [("steps", steps, (shape, results["ceilings"])) for shape in shapes]
    for key, run, given in tasks:
        if time.monotonic() - began > 60 * options.minutes:
            results["left_out"].append(str(given[0]))
            continue
        results[key].append(run(*given))
        show(results[key][-1])
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if results["left_out"]:
        print("left out for want of time:", *results["left_out"], sep="\n  ")


if __name__ == "__main__":
    main()
