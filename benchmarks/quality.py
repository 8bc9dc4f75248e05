"""How kernels and dtypes affect the trained SAE: the same runs with each of them, scored on held-out text.

python -m benchmarks.quality NAME MODEL DATASET [options of saetrain]
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT, describe_machine, describe_run
from benchmarks.results_file import write_results

SEEDS = (1, 2, 3)
VARIANTS = (
    ("reference", "float32"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("native", "float32"),
    ("native", "bfloat16"),
)
METRICS = {"fvu": "FVU", "dead_never_fired": "never fired", "dead_below_threshold": "dead by rate"}
TOLERANCES = {"fvu": 0.002, "dead_never_fired": 0.015, "dead_below_threshold": 0.015}
"""Largest allowed difference of a mean from the reference's mean."""
Values = dict[str, list[float]]
"""Metric -> its value for each seed."""


def train_seeds(arguments: list[str], kernels: str, dtype: str, folder: Path) -> Values:
    """Train one SAE per seed and return the held-out metrics."""
    seeds = [str(seed) for seed in SEEDS]
    flags = ["--init_seeds", *seeds, "--kernels", kernels, "--compute_dtype", dtype]
    flags += ["--save_dir", str(folder), "--run_name", f"{kernels}-{dtype}", "--save_every", "1000000"]
    subprocess.run([sys.executable, "-m", "saetrain", *arguments, *flags], check=True, stdout=subprocess.DEVNULL)
    lines = (folder / f"{kernels}-{dtype}" / "metrics.jsonl").read_text().splitlines()
    final = next(record for record in map(json.loads, lines) if record["kind"] == "final")
    return {name: [sae[name] for sae in final["saes"].values()] for name in METRICS}


def format_table(results: dict[str, Values]) -> str:
    """Means over the seeds, with their difference from the reference."""
    lines = [
        "| kernels | " + " | ".join(METRICS.values()) + " | within the tolerances |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    reference = results["reference float32"]
    for variant, values in results.items():
        cells, is_within = [], True
        for metric, tolerance in TOLERANCES.items():
            mean = statistics.mean(values[metric])
            difference = mean - statistics.mean(reference[metric])
            is_within &= abs(difference) <= tolerance
            spread = max(values[metric]) - min(values[metric])
            cells.append(f"{mean:.4f} ({difference:+.4f}, seeds {spread:.4f} apart)")
        lines.append(f"| {variant} | {' | '.join(cells)} | {'yes' if is_within else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    """Run all variants, write the results file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="results go to benchmarks/results/quality-NAME.json")
    parser.add_argument("model", help="hub id or folder of a transformer")
    parser.add_argument("dataset", help="hub id, folder or file")
    options, rest = parser.parse_known_args()
    arguments = [options.model, options.dataset, *rest]
    with tempfile.TemporaryDirectory() as folder:
        metrics = {
            f"{kernels} {dtype}": train_seeds(arguments, kernels, dtype, Path(folder)) for kernels, dtype in VARIANTS
        }
    command = shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    head = {"run": {**describe_run([]), "command": command}, "machine": describe_machine(), "seeds": SEEDS}
    write_results(ROOT / "benchmarks" / "results" / f"quality-{options.name}.json", {**head, "metrics": metrics})
    print(format_table(metrics))


if __name__ == "__main__":
    main()
