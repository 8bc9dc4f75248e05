"""Speed, waiting time and utilization of each process of a run."""

from __future__ import annotations

import contextlib
import time

import torch

from saetrain import distributed
from saetrain.distributed import env


class RankMetrics:
    """Metrics of every rank since the last reading; none with one process."""

    def __init__(self) -> None:
        self._time, self._waited, self._tokens = time.perf_counter(), 0.0, 0.0
        self._cpu = time.process_time()

    def read(self, tokens: float, device: torch.device) -> dict[str, float]:
        """Return ``{"rank0/tokens_per_second": …, "rank0/waiting": …, "rank0/utilisation": …}`` of all ranks.

        ``tokens``: this rank's share of the tokens trained on since the start of the run. The speed excludes the time
        in which the rank waited for others, so a slow rank is visible. A GPU communicates asynchronously: its speed is
        over all time, and there is no `waiting`. Every rank must call this at the same step.
        """
        if env.world_size() == 1:
            return {}
        time_s, cpu, waited = time.perf_counter(), time.process_time(), distributed.comm_stats().waited_s
        elapsed, waiting = max(time_s - self._time, 1e-9), waited - self._waited
        gpu = device.type == "cuda"
        metrics = {"tokens_per_second": (tokens - self._tokens) / max(elapsed - (0 if gpu else waiting), 1e-9)}
        if not gpu:
            metrics["waiting"] = waiting / elapsed
        used = _gpu_utilization(device) if gpu else (cpu - self._cpu) / elapsed / torch.get_num_threads()
        if used is not None:
            metrics["utilisation"] = used
        self._time, self._cpu, self._waited, self._tokens = time_s, cpu, waited, tokens
        rows = distributed.all_gather_json(metrics, "gathering the ranks' metrics")
        return {f"rank{number}/{name}": value for number, row in enumerate(rows) for name, value in row.items()}


def _gpu_utilization(device: torch.device) -> float | None:
    """Return the share of the last second in which the GPU was busy, or None if NVIDIA's library is missing."""
    with contextlib.suppress(Exception):  # nvidia-ml-py may be missing, or access may be denied
        return torch.cuda.utilization(device) / 100
    return None
