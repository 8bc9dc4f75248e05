"""Contexts and page of every latent of one SAE, next to SAEDashboard: time, size, and whether the contexts are equal.

python -m benchmarks.dashboards MODEL DATASET [--latents 3072] [--tokens 200000] [--folder .bench/dashboards]

MODEL is the folder of a GPT-2. saetrain trains a TopK SAE on it, and SAELens loads the SAE for SAEDashboard. Both tools
read the same tokens. Times are seconds of CPU time over all threads, which other programs disturb less, and of the
clock. The time of saetrain includes loading the model and writing all files; that of SAEDashboard is
``SaeVisRunner.run`` alone. `make bench-dashboards MODEL=… DATASET=…` installs SAEDashboard in .bench/sae-dashboard.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.machine import ROOT, describe_machine, describe_run
from benchmarks.measure import worker_environment
from saetrain.config import FeaturesConfig
from saetrain.features.settings import FeatureSettings
from saetrain.report.build import write_report
from saetrain.runs.features import collect_features

PEER = ROOT / ".bench" / "sae-dashboard" / "bin" / "python"
LAYER, K, CTX_LEN = 3, 32, 128
TOLERANCE = 1e-3
"""Activations that differ by less than this share of the largest one count as equal."""
Contexts = dict[int, list[tuple[int, int, float]]]
"""{latent: (sequence, position, activation) from the strongest}."""


def train_sae(options: argparse.Namespace) -> Path:
    """Train the SAE in a process of its own unless the folder has it, and return the run directory."""
    run: Path = options.folder / f"run-{options.latents}"
    if not (run / "sae").is_dir():
        flags = (
            f"--layers {LAYER} --k {K} --num_latents {options.latents} --ctx_len {CTX_LEN} --batch_size 16 --lr auto"
        )
        flags += " --feature_tokens 0 --assess false --device cpu --overwrite"
        words = [options.model, options.dataset, *flags.split(), "--max_tokens", str(options.train_tokens)]
        words += ["--save_dir", str(options.folder), "--run_name", run.name]
        subprocess.run([sys.executable, "-m", "saetrain", *words], check=True, stdout=subprocess.DEVNULL)
    return run


def read_clocks() -> tuple[float, float]:
    """Return (CPU seconds of this process, seconds of the clock)."""
    return time.process_time(), time.perf_counter()


def measure_own(run: Path, tokens: int) -> tuple[dict[str, float], Path]:
    """Collect the features and write the report; return (times, size of the page) and the folder of the features."""
    settings = FeatureSettings(feature_tokens=tokens, distinct_documents=False)
    # Imports of libraries are not counted for either tool.
    collect_features(FeaturesConfig(path=str(run), features=dataclasses.replace(settings, feature_tokens=CTX_LEN)))
    marks = [read_clocks()]
    (folder,) = collect_features(FeaturesConfig(path=str(run), features=settings))
    marks.append(read_clocks())
    page = write_report(run)[0]
    marks.append(read_clocks())
    (collect_cpu, collect), (page_cpu, page_seconds) = np.diff(marks, axis=0).tolist()
    times = {"collect_cpu": collect_cpu, "collect": collect, "page_cpu": page_cpu, "page": page_seconds}
    return {**times, "bytes": page.stat().st_size}, folder


def read_own_contexts(folder: Path) -> Contexts:
    """Return the strongest contexts that saetrain stored."""
    stream, table = pq.read_table(folder / "stream.parquet"), pq.read_table(folder / "contexts.parquet")
    strongest = table.filter(table["band"].to_numpy() == 0)
    sequence, position = (stream[name].to_numpy() for name in ("sequence", "position"))
    found: Contexts = {}
    columns = (strongest[name].to_pylist() for name in ("latent", "token", "value"))
    for latent, token, value in zip(*columns, strict=True):
        found.setdefault(latent, []).append((int(sequence[token]), int(position[token]), value))
    return found


def run_peer(options: argparse.Namespace, run: Path, features: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Run SAEDashboard on the tokens that saetrain read; return its result, and kept (sequences, positions)."""
    stream = pq.read_table(features / "stream.parquet")
    token_id, kept = (stream[name].to_numpy().reshape(-1, CTX_LEN) for name in ("token_id", "kept"))
    assert (stream["position"].to_numpy().reshape(-1, CTX_LEN) == np.arange(CTX_LEN)).all()
    out = options.folder / "sae-dashboard"
    out.mkdir(exist_ok=True)
    np.save(out / "tokens.npy", token_id)
    request = {
        "model": options.model,
        "sae": str(next((run / "sae").iterdir())),
        "tokens": str(out / "tokens.npy"),
        "latents": options.peer_latents or options.latents,
        "page_latents": options.page_latents,
        "threads": options.threads,
        "out": str(out),
    }
    (out / "request.json").write_text(json.dumps(request))
    command = [str(PEER), "-m", "benchmarks.peers.sae_dashboard", str(out / "request.json")]
    subprocess.run(command, cwd=ROOT, env=worker_environment(options.threads), check=True, stderr=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text()), kept


def select_comparable(contexts: list[tuple[int, int, float]], kept: np.ndarray, window: list[int]) -> np.ndarray:
    """Return the contexts that both tools may choose, (n, 3), from the strongest.

    SAEDashboard leaves out positions near the ends of a sequence, and saetrain those that its token policy excludes.
    """
    chosen = [
        (sequence, position, value)
        for sequence, position, value in contexts
        if value > 0 and kept[sequence, position] and window[0] < position < CTX_LEN - window[1]
    ]
    return np.array(sorted(chosen, key=lambda context: -context[2])).reshape(-1, 3)


def are_equal(own: np.ndarray, peer: np.ndarray) -> bool:
    """Return whether the contexts ``own`` are the first of ``peer``, both (n, 3); the order among ties is open."""
    if not len(own):
        return True
    if len(peer) < len(own):
        return False
    allowed = TOLERANCE * max(own[0, 2], peer[0, 2])
    values = {(int(sequence), int(position)): value for sequence, position, value in peer}
    is_shared = all(abs(values.get((int(s), int(p)), np.inf) - value) <= allowed for s, p, value in own)
    return is_shared and bool(np.abs(own[:, 2] - peer[: len(own), 2]).max() <= allowed)


def compare_contexts(own: Contexts, result: dict[str, Any], kept: np.ndarray) -> tuple[int, int, int]:
    """Return (latents with equal contexts, latents compared, contexts compared)."""
    equal = compared = n_contexts = 0
    for name, contexts in result["contexts"].items():
        ours = select_comparable(own.get(int(name), []), kept, result["window"])
        theirs = select_comparable(contexts, kept, result["window"])
        equal += are_equal(ours, theirs)
        compared += 1
        n_contexts += len(ours)
    return equal, compared, n_contexts


def format_table(own: dict[str, float], result: dict[str, Any], latents: int, n_peer: int, n_page: int) -> str:
    """Return the rows of benchmarks/features.md: both tools, scaled to all latents, and their ratios."""
    scale, page_scale = latents / n_peer, latents / n_page
    rows = [
        ("collection, CPU time", own["collect_cpu"], result["collect_cpu"] * scale, "s"),
        ("collection, clock", own["collect"], result["collect"] * scale, "s"),
        ("page, CPU time", own["page_cpu"], result["page_cpu"] * page_scale, "s"),
        ("page, bytes per latent", own["bytes"] / latents, result["bytes"] / n_page, ""),
    ]
    lines = ["| | saetrain | SAEDashboard | ratio |", "|---|---:|---:|---:|"]
    for name, ours, theirs, unit in rows:
        cells = [f"{value:,.1f} {unit}".strip() if unit else f"{value:,.0f}" for value in (ours, theirs)]
        lines.append(f"| {name} | {' | '.join(cells)} | {theirs / ours:,.0f} |")
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a GPT-2")
    parser.add_argument("dataset", help="folder or file with text")
    parser.add_argument("--latents", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens that both tools read")
    parser.add_argument("--train_tokens", type=int, default=1_000_000)
    parser.add_argument("--peer_latents", type=int, help="latents that SAEDashboard collects (default: all)")
    parser.add_argument("--page_latents", type=int, default=256, help="latents in SAEDashboard's page")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench" / "dashboards")
    return parser.parse_args()


def main() -> None:
    """Measure both tools and print the table."""
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    run = train_sae(options)
    own, features = measure_own(run, options.tokens)
    result, kept = run_peer(options, run, features)
    equal, compared, n_contexts = compare_contexts(read_own_contexts(features), result, kept)
    command = shlex.join(["python", "-m", "benchmarks.dashboards", *sys.argv[1:]])
    print({**describe_run([]), "command": command, **describe_machine(), **result["versions"]})
    print(format_table(own, result, options.latents, compared, min(compared, options.page_latents)))
    print(f"equal strongest contexts: {equal} of {compared} latents ({n_contexts:,} contexts)")


if __name__ == "__main__":
    main()
