"""Triton's compiler takes every kernel, for a Hopper and an Ampere GPU, and keeps what a program holds in registers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from saetrain.ops.triton import kernels as triton_kernels
from saetrain.ops.triton import topk as triton_topk
from saetrain.ops.triton import launch as triton_launch
from saetrain.optim import BETAS, EPS

DUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    "pre": "bf16", "W_dec": "bf16", "x": "bf16", "residual": "bf16", "residual_copy": "bf16", "W_enc_bf16": "bf16",
    "W_dec_bf16": "bf16", "indices": "i32", "candidates": "i32", "candidate_keys": "u32", "pair_token": "i32",
    "segment_latent": "i32", "extra_row": "i32", "ok": "i32", "starts": "i64", "segment_starts": "i64",
    "segment_first": "i64",
}

PAIRS = ("starts", "pair_token", "segment_starts", "extra_row")

def compiled(kernel, target, constants, launch={}, **types):
    types = {**TYPES, **types}
    signature = {
        name: "constexpr" if name in constants else "i32" if name in "DF" else "*" + types.get(name, "fp32")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # As a launch finds them: memory of torch is aligned, and so are widths and latents that are multiples of 16.
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(kernel, signature, places, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True, **launch}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        said = subprocess.run([DUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    ((registers, stack),) = re.findall(r"REG:(\\d+) STACK:(\\d+)", said.stdout)
    print(target, kernel.__name__, constants.get("BLOCK_D"), stack, registers, flush=True)

for target, widths in ((90, (768, 4096)), (80, (768,))):
    for k, groups in ((64, 1024), (512, 2048)):
        sizes = {"K": k, "GROUPS": groups, "CAPACITY": groups, "BLOCK": triton_launch.BLOCK}
        compiled(triton_topk.select_topk_kernel, target, sizes)
    compiled(triton_kernels.bound_norms_kernel, target, {"BLOCK": 128})
    for width in widths:
        given = triton_launch.row_launch_options(width)
        block = {"BLOCK_D": given.pop("BLOCK_D")}
        rows = triton_launch.rows_per_tile(width)
        single = {"x": "fp32", "residual": "fp32"}
        compiled(triton_kernels.compute_residuals_kernel, target, {"K": 64, "BLOCK_K": rows, **block}, given, **single)
        segments = {"SEGMENT": triton_launch.SEGMENT_PAIRS, "BLOCK_P": rows, **block}
        compiled(triton_kernels.sum_segments_kernel, target, segments, given)
        adam = {"BETA1": BETAS[0], "BETA2": BETAS[1], "EPS": EPS}
        ways = ((0, False, False), (1, False, True), (2, False, False), (3, True, False), (3, False, True))
        for mode, stored, extra in ways:
            way = {"MODE": mode, "STORED": stored, "EXTRA": extra, "BLOCK_P": rows}
            # What is not read is handed over as any other tensor.
            unread = dict.fromkeys(PAIRS, "fp32") if stored else {}
            compiled(triton_kernels.latent_pass_kernel, target, {**adam, **way, "BF16": True, **block}, given, **unread)
        single |= {"W_enc_bf16": "fp32", "W_dec_bf16": "fp32"}
        compiled(triton_kernels.latent_pass_kernel, target, {**adam, **way, "BF16": False, **block}, given, **single)
"""

STACK = 16
"""Bytes of a program's frame that are no spill: some have a few with 40 registers."""


@pytest.mark.slow
def test_every_kernel_compiles_without_spills() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 3 + 3 * 8
    assert {row[1] for row in rows} == {
        "select_topk_kernel",
        "bound_norms_kernel",
        "compute_residuals_kernel",
        "sum_segments_kernel",
        "latent_pass_kernel",
    }
    assert [row for row in rows if int(row[3]) > STACK] == []
