"""Sizes that the GPU benchmark times."""

from __future__ import annotations

from benchmarks.cases import Work
from saetrain.training.steps.self_check import StepShape

SHAPES = [
    StepShape(width, latents, k, tokens)
    for width, latents, k in ((768, 24576, 32), (768, 24576, 192), (2304, 65536, 64), (4096, 131072, 64))
    for tokens in (4096, 16384)
]
SMALL = StepShape(768, 3072, 32, 4096)
"""A shape whose launches are replayed as CUDA graphs."""
HOOK = 6
MODELS = [
    Work("end_to_end", tokens=8192, model=name, model_dtype="bf16", latents=24576, layers=(HOOK,))
    for name in ("bert", "gpt2")
]
"""Models with the sizes of BERT-base and GPT-2."""
