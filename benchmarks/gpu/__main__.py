"""The GPU benchmark: kernel checks, peak rates, training steps and end-to-end passes; see benchmarks/gpu.sh."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton reads this variable when it is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.cases import Work
from benchmarks.gpu.interpreter import patch_language_once
from benchmarks.gpu.kernel_checks import check_kernels
from benchmarks.gpu.model_forward import ModelForward
from benchmarks.gpu.shapes import HOOK, MODELS, SHAPES, SMALL
from benchmarks.gpu.steps import SKEWED, STEP_BUILDERS, build_batches, builders_for, cycle_batches
from benchmarks.gpu.timing import floor_ms, measure_ceilings, time_built
from benchmarks.machine import describe_machine, describe_run
from benchmarks.peers.sparsify_gpu import PACKAGE_VARIABLE, load_package
from benchmarks.results_file import write_results
from saetrain.training.steps.self_check import StepShape

OUT = Path(__file__).parents[1] / "results" / "gpu.json"
MINUTES = 8.0
"""No further measurement starts after this time."""
Record = dict[str, Any]


def time_steps(shape: StepShape, limits: dict[str, float]) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Yield (name, function that times it) for each implementation at a shape."""
    for name, make in builders_for(shape, SMALL).items():

        def time_step(name: str = name, make: Any = make) -> Record:
            batches, built = build_batches(shape, "cuda", skewed=name == SKEWED), []

            def build() -> Callable[[], None]:
                built.append(make(shape, "cuda"))
                return cycle_batches(built[0], batches)

            result = time_built(build)
            if "ms" in result:
                result.update(built[0].check_steps())
                result["of_floor"] = floor_ms(shape, limits) / result["ms"]
                if "fired" in result:
                    result["of_floor_of_fired"] = floor_ms(shape, limits, result["fired"]) / result["ms"]
            return result

        yield name, time_step


def time_end_to_end(work: Work) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Yield (name, function that times it) for the forward pass to the hook, alone and followed by each step."""
    forward = ModelForward(work)
    forward_ms: list[float] = []

    def time_forward() -> Record:
        result = time_built(lambda: forward)
        forward_ms.append(result.get("ms", math.nan))
        return result

    yield "forward alone", time_forward
    shape = StepShape(work.width, work.latents, work.k, work.tokens)
    for name in ("triton", "torch"):

        def time_step(name: str = name) -> Record:
            built = []

            def build() -> Callable[[], object]:
                built.append(STEP_BUILDERS[name](shape, "cuda"))
                return lambda: built[0](forward())

            result = time_built(build)
            if "ms" in result:
                result.update(built[0].check_steps())
                result["of_forward"], result["tokens_per_s"] = (
                    forward_ms[0] / result["ms"],
                    1e3 * work.tokens / result["ms"],
                )
            return result

        yield name, time_step


def format_line(name: str, result: Record) -> str:
    """Format the results of one implementation."""
    if "failed" in result:
        return f"  {name}: {result['failed']}"
    kinds = ("of_floor", "of_floor_of_fired", "of_forward", "fired")
    shares = "".join(f", {result[kind]:.0%} {kind.replace('_', ' ')}" for kind in kinds if kind in result)
    return f"  {name}: {result['ms']:.3f} ms{shares}, {result['peak_bytes'] / 2**30:.1f} GiB"


def print_plan(shapes: list[StepShape], models: list[Work]) -> None:
    """Print what would be timed on a GPU."""
    print("no GPU: nothing is timed. On a GPU, a large copy, a large bf16 product and these are timed:")
    for shape in shapes:
        sizes = f"D={shape.width} F={shape.latents} k={shape.k} N={shape.tokens}"
        print(f"  step {sizes}: {'; '.join(builders_for(shape, SMALL))}")
    for work in models:
        print(
            f"  end to end: {work.model} to block {HOOK}, {work.tokens} tokens per step, F={work.latents}, k={work.k}"
        )


def time_all(shapes: list[StepShape], models: list[Work], results: Record, out: Path, until: float) -> None:
    """Time every implementation until the time limit, and write the results file after each."""
    tasks: list[tuple[str, Record, Iterator[tuple[str, Callable[[], Record]]]]] = []
    tasks += [("end_to_end", {"model": work.model, **asdict(work)}, time_end_to_end(work)) for work in models]
    limits = results["ceilings"]
    tasks[1:1] = [
        ("steps", {"shape": asdict(shape), "floor_ms": floor_ms(shape, limits)}, time_steps(shape, limits))
        for shape in shapes
    ]
    for key, description, implementations in tasks:
        print(description)
        results[key].append({**description, "implementations": {}})
        for name, time_step in implementations:
            found: Record = {"failed": "skipped, because the time limit was reached"}
            if time.monotonic() < until:
                try:
                    found = time_step()
                except AssertionError as error:
                    found = {"failed": str(error)}
            results[key][-1]["implementations"][name] = found
            print(format_line(name, found), flush=True)
            write_results(out, results)


def main() -> None:
    """Check the kernels; on a GPU, time the steps and write the results file."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="results file; default: benchmarks/results/gpu.json")
    parser.add_argument("--quick", action="store_true", help="only the small shape and BERT")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="start no further measurement after this time; default: %(default)s",
    )
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be positive")
    try:
        load_package()
    except OSError as error:
        parser.error(
            f"{PACKAGE_VARIABLE}={os.environ[PACKAGE_VARIABLE]}: {error}; set it to the folder sparsify or to the "
            "wheel of eai-sparsify"
        )
    until, device = time.monotonic() + 60 * options.minutes, "cuda" if torch.cuda.is_available() else "cpu"
    shapes, models = ([SMALL], MODELS[:1]) if options.quick else ([SMALL, *SHAPES], MODELS)
    place = "on the GPU" if device == "cuda" else "in Triton's interpreter, which is slow"
    print(f"checking the kernels {place}", flush=True)
    if device == "cpu":
        patch_language_once()
    checked = check_kernels(device, quick=options.quick)
    for check in checked:
        verdict = "correct" if check["ok"] else "WRONG"
        print(
            f"  {verdict}: {check['what']}, {check['shape']}: {check['distance']:.1e} (at most {check['allowed']:.0e})"
        )
    if device == "cpu":
        print_plan(shapes, models)
    else:
        results: Record = {
            "run": {**describe_run([]), "command": "benchmarks/gpu.sh " + " ".join(sys.argv[1:])},
            "machine": describe_machine(),
            "device": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")},
            "checks": checked,
            "ceilings": measure_ceilings(),
            "steps": [],
            "end_to_end": [],
        }
        print(f"{results['device']}: {results['ceilings']}")
        time_all(shapes, models, results, options.out, until)
    if not all(check["ok"] for check in checked):
        sys.exit("the kernels compute wrong results")


if __name__ == "__main__":
    main()
