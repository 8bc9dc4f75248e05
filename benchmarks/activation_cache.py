"""Time a run that reads its activations from the cache, next to the SAE's step alone and to reading the same files.

The model has the shape of BERT-base and random weights. ``--cold`` drops the files from the page cache before a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import Work
from benchmarks.inputs import SEED, hookpoint_name
from benchmarks.saetrain_runner import RandomSequences, build_base_model, build_sae_trainer
from saetrain.activations.buffer import ShuffleBuffer
from saetrain.activations.cache import ActivationCache
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.normalize import compute_norm_limits, fit_normalizers
from saetrain.activations.store import StoreMetadata, list_shards
from saetrain.coders import CODERS
from saetrain.data.sharded import LoaderSettings, ShardedSequences
from saetrain.training.steps.base import MicroBatch
from saetrain.training.trainer import Trainer, TrainSettings
from saetrain.types import Site

SHARDS = 16
POOL_BATCHES = 8
"""Size of the shuffle buffer in steps."""


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activation_cache", description=__doc__)
    parser.add_argument("--steps", type=int, default=64, help="steps per round, each on 2048 new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latents", type=int, default=Work.latents)
    parser.add_argument("--k", type=int, default=Work.k)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--blocks", type=int, default=Work.blocks, help="layers of the model")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each round")
    parser.add_argument("--folder", type=Path, help="parent folder of the cache (default: the temporary folder)")
    return parser.parse_args()


def time_steps(run_step: Callable[[int], object], steps: int) -> float:
    """Return the mean seconds per step."""
    start = time.perf_counter()
    for number in range(steps):
        run_step(number)
    return (time.perf_counter() - start) / steps


def read_files(folder: Path) -> None:
    """Read all shards of a folder from start to end, into one buffer."""
    buffer = bytearray(4 << 20)
    for path in list_shards(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_files(folder: Path) -> None:
    """Remove the shards of a folder from the page cache."""
    for path in list_shards(folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


class Bench:
    """A filled cache and an SAE; the methods time one round."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        work = Work(
            "end_to_end", latents=options.latents, k=options.k, model_dtype=options.dtype, blocks=options.blocks
        )
        self.tokens, self.steps, self._cold = work.tokens, options.steps, options.cold
        self.name = hookpoint_name(work, min(work.layers[0], options.blocks - 1))
        sequences = RandomSequences(work, self.steps * work.tokens // work.ctx_len)
        self._source = ShardedSequences(sequences, LoaderSettings(data_shards=SHARDS), True, False, work.tokens)
        model = build_base_model(work)
        capture, dtype = ActivationCapture(model, [self.name]), str(model.dtype).removeprefix("torch.")
        metadata = StoreMetadata(hookpoints=capture.widths, dtype=dtype, model="bert")  # type: ignore[arg-type]
        self.cache = ActivationCache(folder, metadata, 10**12, print)
        self._extractor = ActivationExtractor(capture, self._source.keep, work.tokens, cache=self.cache)
        sample = self._extractor.extract_all(self._source.read_first_batches(2 * work.tokens))
        self._extractor.set_norm_limits(compute_norm_limits(sample))
        self._values = sample.values[self.name][: work.tokens].clone()
        normalizers = fit_normalizers(sample, self._extractor.norm_limits, [Site.of_sae(self.name)])
        settings = CODERS["topk"].Settings(k=work.k, num_latents=work.latents)
        sae = build_sae_trainer(self.name, normalizers[self.name], settings, "native", "bf16", work.tokens)
        steps = self.steps * (2 * options.rounds + 2)
        train = TrainSettings(max_tokens=steps * work.tokens)
        self._trainer = Trainer({self.name: sae}, train, tokens_per_step=work.tokens, warmup_steps=1)
        self.computed_s = self._time_buffer()
        self.cache.close()
        # A new object, as in the next run.
        self._extractor.cache = self.cache = ActivationCache(folder, metadata, 10**12, print)

    def _train_step(self, values: torch.Tensor) -> None:
        self._trainer.train_step(iter([{self.name: MicroBatch(values, values)}]))

    def _time_buffer(self) -> float:
        pool_tokens, run_tokens = POOL_BATCHES * self.tokens // SHARDS, self.steps * self.tokens
        buffer = ShuffleBuffer(self._extractor, self._source, list(range(SHARDS)), SHARDS, pool_tokens, SEED)

        def run_step(number: int) -> None:
            self._train_step(buffer.take_activations(number * self.tokens, self.tokens, run_tokens)[self.name])

        seconds = time_steps(run_step, self.steps)
        buffer.close()
        return seconds

    def time_sae(self) -> float:
        """Return the seconds per step of the SAE alone, on one batch in memory."""
        return time_steps(lambda number: self._train_step(self._values), self.steps)

    def time_cached(self) -> float:
        """Return the seconds per step of a run that reads the cache, including the filling of its buffer."""
        if self._cold:
            drop_files(self.cache.folder)
        return self._time_buffer()

    def time_reading(self) -> float:
        """Return the seconds in which the bytes of one step are read sequentially."""
        if self._cold:
            drop_files(self.cache.folder)
        return time_steps(lambda number: read_files(self.cache.folder), 1) / self.steps

    def time_extraction(self) -> float:
        """Return the seconds per step to read and check the stored batches in order, without an SAE."""
        if self._cold:
            drop_files(self.cache.folder)
        batches = self._source.read_first_batches(self.steps * self.tokens)
        return time_steps(lambda number: list(map(self.cache.read_batch, batches)), 1) / self.steps


def main() -> None:
    """Measure in rounds, and print medians and ratios."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options, Path(folder))
        kinds = {
            "SAE step alone": bench.time_sae,
            "cached run": bench.time_cached,
            "cache read alone": bench.time_extraction,
            "plain sequential read": bench.time_reading,
        }
        times = [{name: measure() for name, measure in kinds.items()} for _ in range(options.rounds)]
        bench.cache.close()
    n_bytes = bench.tokens * bench.cache._metadata.bytes_per_token
    print(
        f"{n_bytes / 1e6:.1f} MB per step of {bench.tokens} tokens; times per step, medians of {options.rounds} rounds"
    )
    print(f"| {'run that fills the cache':<24} | {bench.computed_s * 1e3:8.1f} ms |")
    for name in kinds:
        seconds = statistics.median(each[name] for each in times)
        print(f"| {name:<24} | {seconds * 1e3:8.1f} ms |")
    for one, other in (("SAE step alone", "cached run"), ("plain sequential read", "cache read alone")):
        ratios = sorted(each[one] / each[other] for each in times)
        print(f"{other} reaches {statistics.median(ratios):.2f} of {one} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
