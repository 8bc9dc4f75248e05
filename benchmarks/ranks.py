"""Scaling from one process to several on a CPU: speed, communicated bytes, and time spent waiting.

    torchrun --nproc_per_node 2 -m benchmarks.ranks

Each process builds all variants. In each round, one process trains alone while the others wait; then all processes
train with the same number of tokens per process (weak scaling), then with the same number of tokens in total (strong
scaling). The training is end to end: model, shuffle buffer and SAE.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.cases import Work
from benchmarks.inputs import SEED, STEPS, hookpoint_name
from benchmarks.machine import ROOT, describe_machine, describe_run
from benchmarks.results_file import write_results
from benchmarks.saetrain_runner import (
    BUFFER_BATCHES,
    CALIBRATION_BATCHES,
    CPU,
    RandomSequences,
    build_base_model,
    build_sae_trainer,
    iterate_sae_batches,
)
from saetrain import distributed
from saetrain.activations.buffer import ShuffleBuffer
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.model import ModelSettings
from saetrain.activations.normalize import Normalizer, compute_norm_limits, fit_normalizers
from saetrain.coders.topk import TopKSettings
from saetrain.data.sharded import LoaderSettings, ShardedSequences
from saetrain.distributed import env
from saetrain.optim import OptimSettings, resolve_warmup_steps
from saetrain.training.trainer import Trainer, TrainSettings
from saetrain.types import Site

SHARDS = 16
VARIANTS = ("alone", "weak", "strong")
QUICK: dict[str, Any] = {"tokens": 128, "width": 32, "k": 4, "blocks": 2, "heads": 2, "ctx_len": 32, "latents": 128}


def _do_nothing() -> None:
    """Replace the all-reduce of the flags where there is only one process."""


class Variant:
    """Training with a number of tokens per step on a number of ranks."""

    def __init__(
        self, reader: ActivationExtractor, source: Any, normalizers: dict[str, Normalizer], work: Work
    ) -> None:
        self.work = work
        self._reader, self._source, self._normalizers = reader, source, normalizers

    def build(self, tokens: int, ranks: int, compute_dtype: str) -> Variant:
        """Build trainer and buffer, and return self."""
        work, self._ranks = self.work, ranks
        settings = TopKSettings(k=work.k, num_latents=work.latents)
        saes = {
            name: build_sae_trainer(name, each, settings, "auto", compute_dtype, tokens, alone=ranks == 1)
            for name, each in self._normalizers.items()
        }
        warmup = resolve_warmup_steps(OptimSettings(), STEPS)
        train = TrainSettings(max_tokens=STEPS * tokens)
        self.trainer = Trainer(saes, train, tokens_per_step=tokens, warmup_steps=warmup, is_data_parallel=ranks > 1)
        owned = list(range(env.rank() if ranks > 1 else 0, SHARDS, ranks))
        # The same number of steps in every variant, so that a sample covers whole refill periods.
        slots_per_shard = BUFFER_BATCHES * tokens // SHARDS
        buffer = ShuffleBuffer(self._reader, self._source, owned, SHARDS, slots_per_shard, SEED)
        self._batches = iterate_sae_batches(
            lambda number: buffer.take_activations(number * tokens, tokens, STEPS * tokens)
        )
        self._prefetch = buffer.prefetch_pools
        return self

    def take_sample(self, steps: int) -> dict[str, float]:
        """Run ``steps`` steps and return, per step, the seconds, the share of waiting, and the communication."""
        before = dataclasses.replace(distributed.comm_stats())
        start = time.perf_counter()
        for _ in range(steps):
            # A run all-reduces as many flags before every update.
            sync_flags = distributed.AsyncAllReduce([0, 0, 0, 0]).wait if self._ranks > 1 else _do_nothing
            self.trainer.train_step(self._batches, sync_flags, self._prefetch)
        seconds, now = time.perf_counter() - start, distributed.comm_stats()
        return {
            "seconds": seconds / steps,
            "waiting": (now.waited_s - before.waited_s) / seconds,
            "bytes": (now.n_bytes - before.n_bytes) / steps,
            "calls": (now.n_tensor_collectives - before.n_tensor_collectives) / steps,
            "control_calls": (now.n_control_collectives - before.n_control_collectives) / steps,
        }


def build_variants(work: Work, compute_dtype: str) -> dict[str, Variant]:
    """Build all variants on one model."""
    names = [hookpoint_name(work, layer) for layer in work.layers]
    batch_tokens = ModelSettings().resolve_batch_tokens(CPU)
    settings = LoaderSettings(data_shards=SHARDS)
    source = ShardedSequences(RandomSequences(work, STEPS), settings, True, False, batch_tokens)
    reader = ActivationExtractor(ActivationCapture(build_base_model(work), names), source.keep, batch_tokens)
    sample = reader.extract_all(source.read_first_batches(CALIBRATION_BATCHES * work.tokens))
    reader.set_norm_limits(compute_norm_limits(sample))
    normalizers = fit_normalizers(sample, reader.norm_limits, map(Site.of_sae, names))
    ranks = env.world_size()
    shapes = {"alone": (work.tokens, 1), "weak": (ranks * work.tokens, ranks), "strong": (work.tokens, ranks)}
    return {
        name: Variant(reader, source, normalizers, work).build(tokens, count, compute_dtype)
        for name, (tokens, count) in shapes.items()
    }


def measure_variants(variants: dict[str, Variant], rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Measure in rounds and return this process's samples, without the first round, which fills the buffers."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            distributed.barrier("before a sample")
            if name == "alone" and env.rank():
                continue
            found = variant.take_sample(steps)
            if number:
                samples[name].append(found)
    return samples


def measure_all_reduce_s(work: Work, rounds: int = 10) -> float:
    """Median seconds of an all-reduce of tensors with the gradients' sizes, while nothing else runs."""
    tensors = [torch.zeros(work.latents, work.width) for _ in range(2)]
    seconds = []
    for _ in range(rounds):
        distributed.barrier("before a sample")
        start = time.perf_counter()
        reduction = distributed.GradientBuckets()
        reduction.add(tensors)
        reduction.wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def summarize_samples(samples: dict[str, list[dict[str, float]]], work: Work, exchange: float) -> dict[str, Any]:
    """Medians, and the speed over one process in pairs of the same round; ``exchange``: seconds of the all-reduce."""
    ranks = env.world_size()
    out: dict[str, Any] = {}
    for name, rows in samples.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        tokens = work.tokens * (ranks if name == "weak" else 1)
        speed = [
            tokens / row["seconds"] / (work.tokens / alone["seconds"])
            for row, alone in zip(rows, samples["alone"], strict=True)
        ]
        out[name] = {
            **medians,
            "tokens_per_second": tokens / medians["seconds"],
            "over_one": statistics.median(speed),
            "over_one_range": [min(speed), max(speed)],
        }
    out["exchange_seconds"] = exchange
    # Data-parallel training communicates at least the float32 gradients of both matrices.
    out["bound_bytes"] = 2 * work.width * work.latents * 4
    return out


def format_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Format the metrics as a table."""
    lines = [
        "| precision | variant | tokens/s | speed over one process | waiting | tensor, flag collectives | bytes sent |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision, variants in metrics.items():
        bound = variants["bound_bytes"]
        for name in VARIANTS:
            row = variants[name]
            share = f" ({row['bytes'] / bound:.3f} of both weights)" if row["bytes"] else ""
            low, high = row["over_one_range"]
            lines.append(
                f"| {precision} | {name} | {row['tokens_per_second']:,.0f} | {row['over_one']:.2f} ({low:.2f} to "
                f"{high:.2f}) | {row['waiting']:.1%} | {row['calls']:.0f}, "
                f"{row['control_calls']:.0f} | {row['bytes'] / 1e6:.2f} MB{share} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure; rank 0 writes the results file and prints the table."""
    parser = argparse.ArgumentParser(prog="torchrun --nproc_per_node 2 -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ranks.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    metrics = {}
    with distributed.process_group_context():
        for precision in options.precisions:
            work = Work(kind="end_to_end", model_dtype=precision)
            if options.quick:
                work = dataclasses.replace(work, **QUICK, layers=(0,))
            samples = measure_variants(build_variants(work, precision), options.rounds, BUFFER_BATCHES)
            exchange = measure_all_reduce_s(work)
            if env.rank() == 0:
                metrics[precision] = summarize_samples(samples, work, exchange)
        if env.rank():
            return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    run = {
        **describe_run(sys.argv[1:]),
        "command": f"torchrun --nproc_per_node {env.world_size()} -m benchmarks.ranks",
    }
    results = {"run": run, "machine": describe_machine(), "versions": versions, "threads_of_each": 1}
    write_results(options.out, {**results, "metrics": metrics})
    print(format_table(metrics))


if __name__ == "__main__":
    main()
