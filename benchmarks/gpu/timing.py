"""Times from device events, the device's peak rates, and the lower bound of a step."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch

from saetrain.training.steps.self_check import StepShape

WARM_UP = 6
"""Calls before the first sample, for compilation and for recording CUDA graphs."""
MIN_SAMPLES, MAX_SAMPLES = 5, 25
"""Numbers of samples."""
SAMPLING_S = 4.0
"""After this time, no sample beyond MIN_SAMPLES is taken."""
COPY_BYTES, PRODUCT_ROWS = 1 << 30, 8192
"""Size of the large copy; rows and columns of the large product."""


def time_calls_ms(run: Callable[[], Any], inner: int = 4) -> list[float]:
    """Take samples from device events, each the mean of ``inner`` consecutive calls, in milliseconds."""
    for _ in range(WARM_UP):
        run()
    samples: list[float] = []
    while len(samples) < MIN_SAMPLES or (len(samples) < MAX_SAMPLES and sum(samples) * inner < 1e3 * SAMPLING_S):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            run()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / inner)
    return samples


def measure_ceilings() -> dict[str, float]:
    """Measure bytes per second of a large copy (read and written), and flops per second of a large bf16 product."""
    source = torch.randint(255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(time_calls_ms(lambda: target.copy_(source)))
    # Random numbers, because a product of zeros draws less power and runs faster.
    a, b = (torch.randn(PRODUCT_ROWS, PRODUCT_ROWS, device="cuda").bfloat16() for _ in range(2))
    product = statistics.median(time_calls_ms(lambda: a @ b))
    return {"bytes_per_s": 2e3 * COPY_BYTES / copy, "flops_per_s": 2e3 * PRODUCT_ROWS**3 / product}


def floor_ms(shape: StepShape, limits: dict[str, float], share: float = 1.0) -> float:
    """Milliseconds of the encoder's product and a fused optimizer pass over ``share`` of the latents, at peak rates.

    The pass reads and writes both weights and their two moments in fp32, and writes the bf16 copies. saetrain skips
    latents that did not fire, so its floor covers only the share that fired.
    """
    numbers = 2 * shape.width * shape.latents
    product = shape.tokens * numbers / limits["flops_per_s"]
    return 1e3 * (product + share * numbers * (6 * 4 + 2) / limits["bytes_per_s"])


def time_built(build: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
    """Median and quartiles in ms, and peak memory in bytes, of the function that ``build`` returns; or the error."""
    # Memory of the previous implementation would count as memory of this one.
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        samples = time_calls_ms(build())
    except (RuntimeError, ValueError, AssertionError) as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"ms": median, "ms_quartiles": [low, high], "peak_bytes": torch.cuda.max_memory_allocated()}
