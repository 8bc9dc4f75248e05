"""Whether the kernels compute what they should: on the device in real sizes, by the interpreter in small ones."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.steps import batches_of, coder_of, triton
from saetrain.kernels import gpu_step
from saetrain.training.triton_check import TOLERANCE, Shape, movements
from saetrain.types import Progress

ODD = [Shape(33, 47, 5, 20), Shape(7, 16, 16, 9)]
REAL = [Shape(768, 6144, 32, 1000), Shape(384, 3000, 64, 777)]
WIDE = Shape(768, 24576, 192, 4096)


def correct(device: str, *, quick: bool) -> list[dict[str, Any]]:
    """What was compared, and how far apart it was; AssertionError where that is too far."""
    found: list[dict[str, Any]] = []
    for shape in (ODD[-1:] if quick else ODD) + (REAL if device == "cuda" else []):
        for way, distance in movements(shape, torch.device(device)).items():
            assert distance <= TOLERANCE, (shape, way, distance)
            found.append({"what": f"update in fp32 against autograd, {way}", "shape": str(shape), "distance": distance})
    if device == "cuda":
        found += [_search(WIDE, device), _same_bits(WIDE, device)]
    return found


def _search(shape: Shape, device: str) -> dict[str, Any]:
    """The k largest of bf16 products with ties among them, against torch.topk."""
    coder, x = coder_of(shape, device), batches_of(shape, device)[0].bfloat16()
    weights = coder.W_enc.detach().T.bfloat16()
    values, indices = gpu_step.topk_relu(x, weights, coder.b_enc.detach(), shape.k)
    pre = (x @ weights.T).float() + coder.b_enc.detach()
    expected = pre.topk(shape.k, dim=1).values.relu()
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(pre.gather(1, indices.long()).relu(), values)
    return {"what": "the k largest against torch.topk", "shape": str(shape), "distance": 0.0}


def _same_bits(shape: Shape, device: str) -> dict[str, Any]:
    """Steps from the same inputs give the same bits."""
    ends = []
    for _ in range(2):
        coder = coder_of(shape, device)
        variance = torch.tensor(float(shape.width), device=device)
        for products in ("sparse", "dense"):
            engine = triton(coder, products=products, recorded=False)
            engine.micro_step(batches_of(shape, device)[0], Progress(0, shape.tokens, None, variance, variance))
            engine.apply(1e-3)
        ends.append(coder.W_dec.detach().clone())
    assert torch.equal(*ends)
    return {"what": "two runs of the same steps, bit by bit", "shape": str(shape), "distance": 0.0}
