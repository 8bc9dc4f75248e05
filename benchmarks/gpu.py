"""The step on a GPU: Triton's kernels beside plain PyTorch and sparsify's formulation, and under the ceilings.

benchmarks/gpu.sh calls it; it needs torch, transformers and triton alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.cases import Work
from benchmarks.inputs import SEED, activations, token_ids, transformer
from benchmarks.machine import describe_machine, describe_run
from saetrain.coders.topk import TopK
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import AutogradEngine, Engine
from saetrain.training.torch_engine import TorchEngine
from saetrain.training.triton_engine import TritonEngine
from saetrain.types import Progress

OUT = Path(__file__).parent / "results" / "gpu.json"
WARM_UP, ROUNDS, STEPS = 5, 7, 5
LR = 1e-3


@dataclass(frozen=True)
class Shape:
    """N tokens, D width, F latents, K active."""

    width: int
    latents: int
    k: int
    tokens: int


SHAPES = [
    Shape(width, latents, k, tokens)
    for width, latents, k in ((768, 24576, 32), (768, 24576, 192), (2304, 65536, 64), (4096, 131072, 64))
    for tokens in (4096, 16384)
]
MODELS = [Work("end_to_end", tokens=8192, model=name, model_dtype="bf16", latents=24576) for name in ("bert", "gpt2")]


def optimizer(coder: TopK) -> Optimizer:
    """Of a torch path."""
    return Optimizer(
        dict(coder.named_parameters()),
        OptimSettings(),
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )


ENGINES: dict[str, Callable[[TopK], Engine]] = {
    "triton": lambda coder: TritonEngine(coder, OptimSettings(), half=True, fused=True),
    "torch": lambda coder: TorchEngine(coder, optimizer(coder), torch.bfloat16),
}


class Stepping:
    """Steps of an engine over inputs in turn."""

    def __init__(self, shape: Shape, build: Callable[[TopK], Engine], device: str) -> None:
        coder = TopK(shape.width, shape.latents, shape.k, seed=SEED).to(device)
        self._engine = build(coder)
        work = Work("step", tokens=shape.tokens, width=shape.width, latents=shape.latents, k=shape.k)
        self._batches = [batch.to(device) for batch in activations(work)]
        variance = torch.tensor(float(shape.width), device=device)
        self._about = Progress(0, shape.tokens, None, variance, variance)
        self._step = 0

    def __call__(self) -> None:
        """One step."""
        self._step += 1
        self._engine.micro_step(self._batches[self._step % len(self._batches)], self._about)
        self._engine.norm_bound()
        self._engine.apply(LR)


def milliseconds(run: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Of a call, by device events, the mean of STEPS in each round."""
    for _ in range(WARM_UP):
        run()
    out = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS):
            run()
        stop.record()
        stop.synchronize()
        out.append(start.elapsed_time(stop) / STEPS)
    return out


def ceilings() -> dict[str, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(milliseconds(lambda: target.copy_(source)))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(milliseconds(lambda: a @ b))
    return {"bytes_per_s": 2 * len(source) / copy * 1e3, "flops_per_s": 2 * 8192**3 / product * 1e3}


def floor(shape: Shape, limits: dict[str, float]) -> float:
    """Milliseconds of the encoder's product and one fused optimizer pass, at the ceilings.

    The pass reads and writes both weights and their two moments in fp32, and writes the bf16 copies.
    """
    product = 2 * shape.tokens * shape.width * shape.latents / limits["flops_per_s"]
    moved = 2 * shape.width * shape.latents * (6 * 4 + 2) / limits["bytes_per_s"]
    return 1e3 * (product + moved)


def steps(shape: Shape, limits: dict[str, float]) -> dict[str, Any]:
    """Medians, peak memory and share of the floor, for each engine."""
    lowest = floor(shape, limits)
    found: dict[str, Any] = {"shape": asdict(shape), "floor_ms": lowest}
    for name, build in ENGINES.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        samples = milliseconds(Stepping(shape, build, "cuda"))
        middle = statistics.median(samples)
        peak = torch.cuda.max_memory_allocated()
        found[name] = {"ms": middle, "samples": samples, "of_floor": lowest / middle, "peak_bytes": peak}
    return found


@torch.no_grad()
def end_to_end(work: Work) -> dict[str, Any]:
    """A model's forward to a hook, alone and with the SAE's step behind it."""
    module = transformer(work).cuda()
    ids = token_ids(work, work.tokens // work.ctx_len).cuda()
    kept: list[torch.Tensor] = []
    blocks = module.encoder.layer if work.model == "bert" else module.h
    blocks[work.layers[0]].register_forward_hook(
        lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    shape = Shape(work.width, work.latents, work.k, work.tokens)
    forward = statistics.median(milliseconds(lambda: (kept.clear(), module(ids))))
    found: dict[str, Any] = {"model": work.model, "forward_ms": forward}
    for name, build in ENGINES.items():
        engine = build(TopK(shape.width, shape.latents, shape.k, seed=SEED).cuda())
        variance = torch.tensor(float(shape.width), device="cuda")
        about = Progress(0, shape.tokens, None, variance, variance)

        def whole(engine: Engine = engine, about: Progress = about) -> None:
            kept.clear()
            module(ids)
            engine.micro_step(kept[0].flatten(0, 1).float(), about)
            engine.norm_bound()
            engine.apply(LR)

        middle = statistics.median(milliseconds(whole))
        found[name] = {"ms": middle, "of_forward": forward / middle}
    return found


def correct(device: str) -> list[dict[str, Any]]:
    """Distance of the update by Triton's kernels from that by autograd, as a share of it, in fp32."""
    sizes = [Shape(33, 47, 5, 20), Shape(7, 16, 16, 9)]
    if device == "cuda":
        sizes += [Shape(768, 6144, 32, 1000), Shape(384, 3000, 64, 777)]
    out = []
    for shape in sizes:
        coders = [TopK(shape.width, shape.latents, shape.k, seed=SEED).to(device) for _ in range(2)]
        start = coders[0].W_dec.detach().clone()
        engines = [
            AutogradEngine(coders[0], optimizer(coders[0])),
            TritonEngine(coders[1], OptimSettings(), half=False, fused=True),
        ]
        generator = torch.Generator().manual_seed(SEED)
        variance = torch.tensor(float(shape.width), device=device)
        for _ in range(2):
            x = torch.randn(shape.tokens, shape.width, generator=generator).to(device)
            for engine in engines:
                engine.micro_step(x, Progress(0, shape.tokens, None, variance, variance))
                engine.norm_bound()
                engine.apply(LR)
        moved = [coder.W_dec.detach() - start for coder in coders]
        error = float((moved[1] - moved[0]).norm() / moved[0].norm())
        assert error < 0.02, (shape, error)
        out.append({"shape": asdict(shape), "error": error})
    return out


def main() -> None:
    """Everything, into a file, and a table on the terminal."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="the first shape alone")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checked = correct(device)
    print("update by Triton's kernels against autograd, relative:", ", ".join(f"{c['error']:.1e}" for c in checked))
    shapes, models = (SHAPES[:1], MODELS[:1]) if options.quick else (SHAPES, MODELS)
    if device == "cpu":
        print("no GPU: nothing is timed. With one, these would be:")
        for shape in shapes:
            print(f"  step {shape}: {', '.join(ENGINES)}")
        for work in models:
            print(f"  end to end {work.model}, {work.tokens} tokens a step: {', '.join(ENGINES)}")
        return
    limits = ceilings()
    results = {
        "run": describe_run([]), "machine": describe_machine(), "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__}, "ceilings": limits, "correct": checked, "steps": [], "end_to_end": [],
    }  # fmt: skip
    for shape in shapes:
        results["steps"].append(steps(shape, limits))
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["steps"][-1]))
    for work in models:
        results["end_to_end"].append(end_to_end(work))
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["end_to_end"][-1]))


if __name__ == "__main__":
    main()
