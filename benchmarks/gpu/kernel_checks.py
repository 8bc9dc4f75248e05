"""Checks of the kernels' results: with real sizes on a GPU, with small sizes in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.steps import STEP_BUILDERS, build_batches, build_coder, build_triton_step
from benchmarks.gpu.timing import WARM_UP
from saetrain.ops.triton import launch as triton_launch
from saetrain.training.steps.self_check import SMALL_SHAPE, StepShape, StepVariant, measure_distances
from saetrain.types import StepContext

ODD = [StepShape(33, 47, 5, 20), StepShape(7, 16, 16, 9)]
REAL = [StepShape(768, 6144, 32, 1000), StepShape(384, 3000, 64, 777)]
REAL_TOLERANCE = {False: 0.05, True: 0.3}
"""{products in bf16: tolerance}; among thousands of latents, rounding decides between some that are nearly equal."""
WIDE = StepShape(768, 24576, 192, 4096)
Check = dict[str, Any]


def check_kernels(device: str, *, quick: bool) -> list[Check]:
    """Run all checks; each gives what was compared, the distance, the allowed distance, and whether it is ok."""
    if device != "cuda":
        return [check for shape in (ODD[-1:] if quick else ODD) for check in _check_updates(shape, device)]
    found = [check for shape in [SMALL_SHAPE, *ODD, *REAL] for check in _check_updates(shape, device)]
    return [*found, _check_topk(WIDE), _check_determinism(WIDE), _check_no_sync(WIDE)]


def _make_check(what: str, shape: StepShape, distance: float, allowed: float = 0.0) -> Check:
    sizes = f"D={shape.width} F={shape.latents} k={shape.k} N={shape.tokens}"
    # The comparison is false for NaN.
    return {"what": what, "shape": sizes, "distance": distance, "allowed": allowed, "ok": distance <= allowed}


def _check_updates(shape: StepShape, device: str) -> list[Check]:
    def allowed(variant: StepVariant) -> float:
        return REAL_TOLERANCE[variant.use_bf16] if shape in REAL else variant.tolerance

    found = measure_distances(shape, torch.device(device))
    if any(each > allowed(variant) for variant, each in found.items()):
        # With a single seed, rounding may select another latent.
        again = measure_distances(shape, torch.device(device), seed=1)
        found = {variant: min(each, again[variant]) for variant, each in found.items()}
    return [
        _make_check(f"update against autograd, {variant}", shape, each, allowed(variant))
        for variant, each in found.items()
    ]


def _check_topk(shape: StepShape) -> Check:
    """Compare the k largest of bf16 products, which contain ties, with torch.topk."""
    coder, x = build_coder(shape, "cuda"), build_batches(shape, "cuda")[0].bfloat16()
    weights = coder.W_enc.detach().T.bfloat16()
    values, indices = triton_launch.encode_topk(x, weights, coder.b_enc.detach(), shape.k)
    pre = (x @ weights.T).float() + coder.b_enc.detach()
    expected = pre.topk(shape.k, dim=1).values.relu()
    apart = (values.sort(dim=1, descending=True).values - expected).abs().max()
    misplaced = (pre.gather(1, indices.long()).relu() - values).abs().max()
    return _make_check("the k largest against torch.topk", shape, float(apart + misplaced))


def _check_determinism(shape: StepShape) -> Check:
    """Check that steps on the same inputs give the same bits."""
    ends = []
    for _ in range(2):
        coder = build_coder(shape, "cuda")
        variance = torch.tensor(float(shape.width), device="cuda")
        for products in ("sparse", "dense"):
            engine = build_triton_step(coder, products=products, use_cuda_graphs=False)
            engine.forward_backward(
                build_batches(shape, "cuda", skewed=True)[0], StepContext(0, shape.tokens, None, variance, variance)
            )
            engine.optimizer_step(1e-3)
        ends.append(coder.W_dec.detach().clone())
    return _make_check("two runs of the same steps, bit by bit", shape, float((ends[0] - ends[1]).norm()))


def _check_no_sync(shape: StepShape) -> Check:
    """Check that a step does not synchronize with the device."""
    step, batches = STEP_BUILDERS["triton"](shape, "cuda"), build_batches(shape, "cuda")
    for number in range(WARM_UP):
        step(batches[number % len(batches)])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches[0])
    except RuntimeError as error:
        return _make_check(f"a step without synchronization: {error}", shape, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return _make_check("a step without synchronization", shape, 0.0)
