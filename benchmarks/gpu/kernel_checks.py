"""Whether the kernels compute what they should: on the device in real sizes, by the interpreter in small ones."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.steps import PATHS, batches_of, coder_of, triton
from benchmarks.gpu.timing import WARM_UP
from saetrain.kernels import gpu_step
from saetrain.training.triton_check import SMALL, Shape, Way, distances
from saetrain.types import Progress

ODD = [Shape(33, 47, 5, 20), Shape(7, 16, 16, 9)]
REAL = [Shape(768, 6144, 32, 1000), Shape(384, 3000, 64, 777)]
REAL_TOLERANCE = {False: 0.05, True: 0.3}
"""By whether products are in bf16: of thousands of latents, rounding decides between some that are nearly alike."""
WIDE = Shape(768, 24576, 192, 4096)
Check = dict[str, Any]


def correct(device: str, *, quick: bool) -> list[Check]:
    """What was compared, how far apart it was, and whether that is near enough."""
    if device != "cuda":
        return [check for shape in (ODD[-1:] if quick else ODD) for check in _updates(shape, device)]
    found = [check for shape in [SMALL, *ODD, *REAL] for check in _updates(shape, device)]
    return [*found, _search(WIDE), _same_bits(WIDE), _asks_nothing(WIDE)]


def _check(what: str, shape: Shape, distance: float, allowed: float = 0.0) -> Check:
    sizes = f"D={shape.width} F={shape.latents} k={shape.k} N={shape.tokens}"
    # What is not a number is not near.
    return {"what": what, "shape": sizes, "distance": distance, "allowed": allowed, "fine": distance <= allowed}


def _updates(shape: Shape, device: str) -> list[Check]:
    def allowed(way: Way) -> float:
        return REAL_TOLERANCE[way.half] if shape in REAL else way.tolerance

    found = distances(shape, torch.device(device))
    if any(each > allowed(way) for way, each in found.items()):
        # With one seed rounding may choose another latent.
        again = distances(shape, torch.device(device), seed=1)
        found = {way: min(each, again[way]) for way, each in found.items()}
    return [_check(f"update against autograd, {way}", shape, each, allowed(way)) for way, each in found.items()]


def _search(shape: Shape) -> Check:
    """The k largest of bf16 products with ties among them, against torch.topk."""
    coder, x = coder_of(shape, "cuda"), batches_of(shape, "cuda")[0].bfloat16()
    weights = coder.W_enc.detach().T.bfloat16()
    values, indices = gpu_step.topk_relu(x, weights, coder.b_enc.detach(), shape.k)
    pre = (x @ weights.T).float() + coder.b_enc.detach()
    expected = pre.topk(shape.k, dim=1).values.relu()
    apart = (values.sort(dim=1, descending=True).values - expected).abs().max()
    misplaced = (pre.gather(1, indices.long()).relu() - values).abs().max()
    return _check("the k largest against torch.topk", shape, float(apart + misplaced))


def _same_bits(shape: Shape) -> Check:
    """Steps from the same inputs give the same bits."""
    ends = []
    for _ in range(2):
        coder = coder_of(shape, "cuda")
        variance = torch.tensor(float(shape.width), device="cuda")
        for products in ("sparse", "dense"):
            engine = triton(coder, products=products, recorded=False)
            engine.micro_step(
                batches_of(shape, "cuda", skewed=True)[0], Progress(0, shape.tokens, None, variance, variance)
            )
            engine.apply(1e-3)
        ends.append(coder.W_dec.detach().clone())
    return _check("two runs of the same steps, bit by bit", shape, float((ends[0] - ends[1]).norm()))


def _asks_nothing(shape: Shape) -> Check:
    """A step in which torch refuses to wait for the device."""
    step, batches = PATHS["triton"](shape, "cuda"), batches_of(shape, "cuda")
    for number in range(WARM_UP):
        step(batches[number % len(batches)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[0])
    except RuntimeError as error:
        return _check(f"a step that waits for nothing: {error}", shape, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return _check("a step that waits for nothing", shape, 0.0)
