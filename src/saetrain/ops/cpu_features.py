"""Hardware features of the processor, and the limits up to which dense products are faster than sparse ones."""

from __future__ import annotations

import functools

import torch

FAST_BF16_CAPABILITIES = ("amx_bf16", "avx512_bf16", "arm_bf16")
"""CPU capabilities with which products in bfloat16 are faster than in float32."""
DENSE_LIMIT = 12
DENSE_LIMIT_AMX = 48
"""Largest F / k for which dense products are faster than sparse ones: in general, and in bfloat16 with AMX tiles."""


@functools.cache
def _has_capability(*names: str) -> bool:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name) for name in names)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return _has_capability(*FAST_BF16_CAPABILITIES)


def dense_limit(use_bf16: bool) -> int:
    """Return the largest F / k for which dense products are faster than sparse ones on this CPU."""
    return DENSE_LIMIT_AMX if use_bf16 and _has_capability("amx_bf16") else DENSE_LIMIT
