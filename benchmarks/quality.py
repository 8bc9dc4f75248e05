"""What precision and kernels do to an SAE: the same runs by each, from the same seeds, scored on held-out text.

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
from typing import Any

from benchmarks.machine import ROOT, describe_machine, describe_run

SEEDS = (1, 2, 3)
VARIANTS = (
    ("reference", "float32"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("native", "float32"),
    ("native", "bfloat16"),
)
FIGURES = {"fvu": "FVU", "dead_never_fired": "never fired", "dead_below_threshold": "dead by rate"}
ALLOWED = {"fvu": 0.002, "dead_never_fired": 0.015, "dead_below_threshold": 0.015}
"""How far a mean may lie from the reference's."""


def train(words: list[str], kernels: str, dtype: str, folder: Path) -> list[dict[str, float]]:
    """The held-out figures of one SAE for each seed."""
    seeds = [str(seed) for seed in SEEDS]
    flags = ["--init_seeds", *seeds, "--kernels", kernels, "--compute_dtype", dtype]
    flags += ["--save_dir", str(folder), "--run_name", f"{kernels}-{dtype}", "--save_every", "1000000"]
    subprocess.run([sys.executable, "-m", "saetrain", *words, *flags], check=True, stdout=subprocess.DEVNULL)
    lines = (folder / f"{kernels}-{dtype}" / "metrics.jsonl").read_text().splitlines()
    final = next(record for record in map(json.loads, lines) if record["kind"] == "final")
    return [{name: sae[name] for name in FIGURES} for sae in final["saes"].values()]


def rows(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """A table of means, with their distance from the reference's."""
    lines = [
        "| kernels | " + " | ".join(FIGURES.values()) + " | within what is allowed |",
        "|---" * (len(FIGURES) + 2) + "|",
    ]
    reference = results["reference float32"]
    for name, saes in results.items():
        cells, fine = [], True
        for figure, allowed in ALLOWED.items():
            mean = statistics.mean(sae[figure] for sae in saes)
            off = mean - statistics.mean(sae[figure] for sae in reference)
            fine &= abs(off) <= allowed
            spread = max(sae[figure] for sae in saes) - min(sae[figure] for sae in saes)
            cells.append(f"{mean:.4f} ({off:+.4f}, seeds {spread:.4f} apart)")
        lines.append(f"| {name} | {' | '.join(cells)} | {'yes' if fine else 'no'} |")
    return lines


def main() -> None:
    """Run all variants, write the figures, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results file, benchmarks/results/quality-NAME.json")
    parser.add_argument("model", help="hub id or folder of a transformer")
    parser.add_argument("dataset", help="hub id, folder or file")
    options, rest = parser.parse_known_args()
    name, words = options.name, [options.model, options.dataset, *rest]
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kernels, dtype in VARIANTS:
            results[f"{kernels} {dtype}"] = train(words, kernels, dtype, Path(folder))
    table = "\n".join(rows(results))
    command = shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    about: dict[str, Any] = {"run": {**describe_run([]), "command": command}, "machine": describe_machine()}
    out = ROOT / "benchmarks" / "results" / f"quality-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**about, "seeds": SEEDS, "figures": results, "table": table}, indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
