"""A model of the training step over several GPUs: compute, memory, launches and exchange, each from stated figures.

    python -m benchmarks.predict

Nothing here was measured on a GPU unless a figure says so; the counts of bytes and calls are those of
`saetrain.distributed`, which `benchmarks/ranks.py` measures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Attained, not peak, figures of one GPU and its link."""

    product_flops: float = 400e12
    """Of large bf16 products a second: 40 % of the 989e12 that NVIDIA states for the H100 SXM, dense."""
    memory_bytes: float = 2.7e12
    """Read and written a second: 80 % of the stated 3.35e12."""
    link_bytes: float = 300e9
    """One way between GPUs of a host: two thirds of NVLink 4's stated 450e9."""
    link_latency_s: float = 30e-6
    """Of a collective over 8 GPUs."""
    control_s: float = 250e-6
    """Of an agreement between the hosts' memories by gloo."""
    launch_s: float = 5e-6
    """Of a kernel, where the GPU has nothing else to do."""


@dataclass(frozen=True)
class Setting:
    """A run: sizes of model and SAE, tokens a GPU takes in a micro-step."""

    name: str
    latents: int
    k: int
    tokens: int
    micro_steps: int = 1
    width: int = 768
    blocks: int = 7
    """Blocks up to the hook."""


KERNELS_OF_A_BLOCK, KERNELS_OF_AN_SAE = 15, 60


def model_flops(work: Setting) -> float:
    """Products of the model's forward over a micro-step's tokens."""
    return 2 * 12 * work.width**2 * work.blocks * work.tokens


def compute_s(work: Setting, gpu: Hardware) -> float:
    """Seconds of one GPU's optimizer step without exchange."""
    model = model_flops(work)
    # The encoder's product and its two gradients through k latents; a sparse pass moves rows instead of multiplying.
    encoder = 2 * work.width * work.latents * work.tokens
    rows = 4 * work.tokens * work.k * work.width * 2
    products = (model + encoder) / gpu.product_flops + rows / gpu.memory_bytes
    launches = (KERNELS_OF_A_BLOCK * work.blocks + KERNELS_OF_AN_SAE) * gpu.launch_s
    # Weights, two moments and gradients, read, and written but for the gradients.
    update = 7 * 4 * 2 * work.width * work.latents / gpu.memory_bytes
    return work.micro_steps * max(products, launches) + update


def exchange_s(
    work: Setting, gpu: Hardware, ranks: int, *, each_micro_step: bool = False, hidden: bool = False
) -> float:
    """Seconds of the exchange; ``each_micro_step``: gradients go around with every micro-step.

    ``hidden``: less the sums that pass while the model reads for later steps.
    """
    gradients = 2 * work.width * work.latents * 4 + 8 * work.latents
    ring = 2 * (ranks - 1) / ranks * gradients / gpu.link_bytes
    calls = 3 * gpu.link_latency_s
    sums = (work.micro_steps if each_micro_step else 1) * (ring + calls)
    meanwhile = work.micro_steps * model_flops(work) / gpu.product_flops if hidden else 0.0
    return max(0.0, sums - meanwhile) + gpu.control_s


SETTINGS = (
    Setting("the original command: batch 4 x 512, 8 micro-steps, F=200", 200, 32, 2048, 8),
    Setting("the same, F=24,576, k=192", 24_576, 192, 2048, 8),
    Setting("one micro-step of 2,048 tokens, F=24,576, k=192", 24_576, 192, 2048),
    Setting("16,384 tokens a GPU, F=6,144, k=32", 6_144, 32, 16_384),
    Setting("16,384 tokens a GPU, F=24,576, k=192", 24_576, 192, 16_384),
    Setting("the same in 2 micro-steps of 16,384", 24_576, 192, 16_384, 2),
)


def speedup(work: Setting, gpu: Hardware, ranks: int, *, each_micro_step: bool = False, hidden: bool = False) -> float:
    """Tokens a second over one GPU's, at as many tokens a GPU."""
    alone = compute_s(work, gpu)
    return ranks * alone / (alone + exchange_s(work, gpu, ranks, each_micro_step=each_micro_step, hidden=hidden))


def table(ranks: int = 8) -> str:
    """Predictions of every setting, and with half and double of every assumed figure."""
    base = Hardware()
    lines = [
        f"| setting | step of one GPU | exchange | {ranks} GPUs | figures halved, doubled | all hidden that can be | "
        "reduced each micro-step |",
        "|---|---|---|---|---|---|---|",
    ]
    for work in SETTINGS:
        others = [
            speedup(work, dataclasses.replace(base, **{item.name: getattr(base, item.name) * factor}), ranks)
            for item in dataclasses.fields(base)
            for factor in (0.5, 2.0)
        ]
        hidden = speedup(work, base, ranks, hidden=True)
        naive = speedup(work, base, ranks, each_micro_step=True)
        lines.append(
            f"| {work.name} | {compute_s(work, base) * 1e3:.2f} ms | {exchange_s(work, base, ranks) * 1e3:.2f} ms | "
            f"{speedup(work, base, ranks):.1f}x | {min(others):.1f} to {max(others):.1f} | {hidden:.1f}x | "
            f"{naive:.1f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
