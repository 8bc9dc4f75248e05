"""Typed calls of the C++ kernels in ``kernels.cpp`` on the memory of torch tensors."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from saetrain.ops.native.compile import build_library

MEASURE, STORE, UPDATE, ADD = 0, 1, 2, 3
"""Modes of the latent pass, as in the C++ ``Mode``."""
FROM_PAIRS, FROM_MEMORY, FROM_ROWS = 0, 1, 2
"""Origins of the gradient rows, as in the C++ ``Origin``."""
CHUNK_BYTES = 24 << 20
"""Bytes of pre-activations per chunk. Smaller chunks are slower, because each product packs all weights."""

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double
LONG_FIELDS = ("N", "D", "F", "L")
INT_FIELDS = ("threads", "use_bf16")
POINTER_FIELDS = (
    *(
        "x",
        "x_enc",
        "x_norms",
        "offsets",
        "level_stops",
        "values",
        "indices",
        "threshold",
        "active_stops",
        "l0_grad",
        "residual",
        "residual_copy",
        "grad_pre",
        "g_threshold",
        "residual_norms",
    ),
    *("residual_sum", "residual_square", "starts", "pair_token", "pair_value", "pair_grad_pre", "W_enc", "W_dec"),
    *("b_enc", "b_dec", "W_enc_bf16", "W_dec_bf16", "m_enc", "v_enc", "m_dec", "v_dec", "m_b", "v_b"),
    *("m_threshold", "v_threshold"),
    *("g_enc", "g_dec", "g_b", "extra_row", "extra_enc", "extra_dec", "extra_b"),
)
FLOAT_FIELDS = ("lr", "encoder_lr", "beta1", "beta2", "eps", "correction1", "correction2", "decay", "clip", "bandwidth")

POINTER_DTYPES = {
    **dict.fromkeys(("indices", "pair_token", "extra_row"), (torch.int32,)),
    **dict.fromkeys(("residual_sum", "residual_square", "g_b_dec", "g_threshold", "square"), (torch.float64,)),
    **dict.fromkeys(("residual_copy", "W_enc_bf16", "W_dec_bf16"), (torch.bfloat16,)),
    "x_enc": (torch.float32, torch.bfloat16),
    **dict.fromkeys(("starts", "offsets", "active_stops", "level_stops"), (torch.int64,)),
}
"""Allowed dtypes of the tensors that are not fp32."""


class Gradients(ctypes.Structure):
    """Mirror of the C++ ``Gradients``: the source of the gradient rows of a range of latents."""

    _fields_ = [("origin", INT), ("first", LONG), ("stop", LONG), ("enc", POINTER), ("dec", POINTER)]


class SaetrainStep(ctypes.Structure):
    """Mirror of the C++ ``SaetrainStep``; :func:`set_pointers` sets its pointers from tensors."""

    _fields_ = [
        *((name, LONG) for name in LONG_FIELDS),
        *((name, INT) for name in INT_FIELDS),
        ("loss_scale", FLOAT),
        *((name, POINTER) for name in POINTER_FIELDS),
        *((name, FLOAT) for name in FLOAT_FIELDS),
        ("g_b_dec", POINTER),
        ("square", POINTER),
    ]


class GroupSelection(ctypes.Structure):
    """Mirror of the C++ ``GroupSelection``: candidates for the largest pre-activations of a group of tokens."""

    _fields_ = [
        *((name, LONG) for name in ("F", "wanted", "block", "rows", "total")),
        *((name, INT) for name in ("threads", "has_nan")),
        ("bound", FLOAT),
        *((name, POINTER) for name in ("values", "indices", "counts", "keys")),
    ]


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the compiled kernels; raises OSError if they can't be built or loaded."""
    path = build_library()
    try:
        return _declare_functions(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):  # a library that can't be loaded, or one without our functions
        return _declare_functions(ctypes.CDLL(str(build_library(rebuild=True))))


def _declare_functions(library: ctypes.CDLL) -> ctypes.CDLL:
    """Set the types of the library's functions; raises AttributeError if it lacks one."""
    library.saetrain_topk_bf16.argtypes = [POINTER, POINTER, LONG, LONG, LONG, POINTER, POINTER, INT]
    library.saetrain_topk_f32.argtypes = library.saetrain_topk_bf16.argtypes
    for name in ("saetrain_collect_bf16", "saetrain_collect_f32"):
        getattr(library, name).argtypes = [POINTER, POINTER, POINTER, LONG]
    library.saetrain_smallest_wanted.argtypes = [POINTER]
    library.saetrain_smallest_wanted.restype = FLOAT
    library.saetrain_count_above.argtypes = [POINTER, FLOAT]
    library.saetrain_count_above.restype = LONG
    library.saetrain_prune_group.argtypes = [POINTER, FLOAT, LONG]
    for name in ("saetrain_collect_above_bf16", "saetrain_collect_above_f32"):
        function = getattr(library, name)
        function.argtypes, function.restype = [*[POINTER] * 4, *[LONG] * 4, *[POINTER] * 4, INT], LONG
    library.saetrain_threshold_gradients.argtypes = [POINTER]
    library.saetrain_center.argtypes = [POINTER, POINTER, POINTER]
    library.saetrain_tokens.argtypes = library.saetrain_sort.argtypes = [POINTER]
    library.saetrain_code_rows.argtypes = library.saetrain_residuals.argtypes = [POINTER, LONG, LONG, POINTER]
    library.saetrain_pick.argtypes = [POINTER, LONG, LONG, POINTER]
    library.saetrain_codes.argtypes = [POINTER, LONG, LONG, POINTER, POINTER]
    library.saetrain_latents.argtypes = [POINTER, INT, POINTER, POINTER]
    library.saetrain_norm_bound.argtypes = [POINTER, DOUBLE, DOUBLE, POINTER]
    library.saetrain_norm_bound.restype = ctypes.c_double
    return library


def set_pointers(step: SaetrainStep, **tensors: Tensor | None) -> None:
    """Set pointers of ``step`` to contiguous tensors, which the caller must keep alive."""
    for name, tensor in tensors.items():
        assert name in POINTER_FIELDS or name in ("g_b_dec", "square"), name
        assert tensor is None or tensor.is_contiguous(), name
        assert tensor is None or tensor.dtype in POINTER_DTYPES.get(name, (torch.float32,)), (name, tensor.dtype)
        setattr(step, name, None if tensor is None else tensor.data_ptr())


def center_inputs(step: SaetrainStep, out_ND: Tensor, norms_N: Tensor) -> None:
    """Write ``x - b_dec`` in the dtype of the products to ``out_ND``, and the norms of its rows to ``norms_N``."""
    load_library().saetrain_center(ctypes.byref(step), out_ND.data_ptr(), norms_N.data_ptr())


def encode_topk(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, pre_CF: Tensor, values_NK: Tensor, indices_NK: Tensor
) -> None:
    """Write ReLU of the k largest entries of each row of ``x W_encᵀ + b_enc`` to ``values_NK`` and ``indices_NK``.

    ``x_ND`` and ``W_enc_FD`` are both fp32 or both bf16; ``pre_CF`` is a buffer for the pre-activations of C tokens.
    ``indices_NK`` is int32. Among equal entries the one with the lower index is chosen.
    """
    select_topk = (
        load_library().saetrain_topk_bf16 if x_ND.dtype == torch.bfloat16 else load_library().saetrain_topk_f32
    )
    chunk, latents = pre_CF.shape
    k, threads = values_NK.shape[1], torch.get_num_threads()
    bias = b_enc_F.data_ptr()
    for start in range(0, len(x_ND), chunk):
        rows = x_ND[start : start + chunk]
        out = pre_CF[: len(rows)]
        torch.mm(rows, W_enc_FD.T, out=out)
        values, indices = values_NK[start].data_ptr(), indices_NK[start].data_ptr()
        select_topk(out.data_ptr(), bias, len(rows), latents, k, values, indices, threads)


def compute_residuals(step: SaetrainStep) -> None:
    """Compute residuals and pre-activation gradients of each token, then sort the active pairs by latent.

    With thresholds, their gradients are added to the step's ``g_threshold``.
    """
    load_library().saetrain_tokens(ctypes.byref(step))
    _finish_residuals(step)


def _finish_residuals(step: SaetrainStep) -> None:
    if step.threshold:
        load_library().saetrain_threshold_gradients(ctypes.byref(step))
    load_library().saetrain_sort(ctypes.byref(step))


def compute_residuals_dense(
    step: SaetrainStep, W_dec_FD: Tensor, residual_ND: Tensor, workspace: DenseWorkspace, pre_CF: Tensor
) -> None:
    """Compute the results of :func:`compute_residuals` from dense bf16 products of C tokens at a time."""
    pointer, rows = ctypes.byref(step), len(pre_CF)
    for first in range(0, step.N, rows):
        stop = min(first + rows, step.N)
        dense_CF, decoded = pre_CF[: stop - first], workspace.decoded[: stop - first]
        load_library().saetrain_code_rows(pointer, first, stop, dense_CF.data_ptr())
        torch.mm(dense_CF, W_dec_FD, out=decoded)
        load_library().saetrain_residuals(pointer, first, stop, decoded.data_ptr())
        torch.mm(residual_ND[first:stop], W_dec_FD.T, out=dense_CF)
        load_library().saetrain_pick(pointer, first, stop, dense_CF.data_ptr())
    _finish_residuals(step)


def bound_squared_norm(step: SaetrainStep, grad_b_enc_F: Tensor, inputs: dict[str, Tensor] | None = None) -> float:
    """Return an upper bound of the squared norm of the gradients of both weights and ``b_enc``, from norms of rows.

    ``inputs`` {`enc`: encoder input (N, D), `dec`: residuals (L, N, D)} give a tighter bound: the norm of a weighted
    sum of rows is at most the norm of the weights times the largest singular value of the rows. The exact gradient of
    ``b_enc`` is written to ``grad_b_enc_F``.
    """
    eigenvalues = (float("inf"), float("inf"))
    if inputs:
        # A latent's gradient sums rows of one level, so the largest bound holds for all.
        eigenvalues = bound_largest_eigenvalue(inputs["enc"]), max(map(bound_largest_eigenvalue, inputs["dec"]))
    return float(load_library().saetrain_norm_bound(ctypes.byref(step), *eigenvalues, grad_b_enc_F.data_ptr()))


def bound_largest_eigenvalue(rows_ND: Tensor) -> float:
    """Return an upper bound of the largest eigenvalue of ``rowsᵀ rows``: the fourth root of Σ λ⁴."""
    gram = (rows_ND.T @ rows_ND).float()
    trace = float(gram.diagonal().sum().clamp_min(torch.finfo(torch.float32).tiny))
    gram = (gram / trace).to(rows_ND.dtype)
    # The factor covers the relative error of products in bfloat16, which is below 0.01.
    return 1.02 * trace * float((gram @ gram).float().norm()) ** 0.5


def run_latent_pass(step: SaetrainStep, mode: int, encoder_norms_F: Tensor, *, from_memory: bool) -> None:
    """Measure (MEASURE), store (STORE), accumulate (ADD) or apply (UPDATE) the gradient rows of each latent.

    ``from_memory`` reads the rows from memory instead of computing them from the pairs. The pass adds to the step's
    ``square`` and, unless the rows come from memory, to its ``g_b_dec``.
    """
    source = Gradients(origin=FROM_MEMORY if from_memory else FROM_PAIRS, first=0, stop=step.F)
    load_library().saetrain_latents(ctypes.byref(step), mode, ctypes.byref(source), encoder_norms_F.data_ptr())


def run_latent_pass_dense(
    step: SaetrainStep, mode: int, encoder_norms_F: Tensor, inputs: dict[str, Tensor], workspace: DenseWorkspace
) -> None:
    """Run :func:`run_latent_pass` on rows from dense bf16 products of blocks of latents, for less sparse codes.

    ``inputs``: {`enc`: encoder input (N, D), `dec`: residual (1, N, D)}, both bf16.
    """
    for first in range(0, step.F, workspace.block_latents):
        stop = min(first + workspace.block_latents, step.F)
        codes = {name: code[: stop - first] for name, code in workspace.codes.items()}
        load_library().saetrain_codes(ctypes.byref(step), first, stop, codes["enc"].data_ptr(), codes["dec"].data_ptr())
        rows = {
            name: torch.mm(code, inputs[name].view(step.N, step.D), out=workspace.rows[name][: stop - first])
            for name, code in codes.items()
        }
        source = Gradients(FROM_ROWS, first, stop, rows["enc"].data_ptr(), rows["dec"].data_ptr())
        load_library().saetrain_latents(ctypes.byref(step), mode, ctypes.byref(source), encoder_norms_F.data_ptr())


class DenseWorkspace:
    """Memory of the dense products in bf16.

    ``decoded`` (C, D): reconstructions of a chunk of tokens; ``codes`` {`enc`, `dec`: (B, N)} and ``rows`` {…: (B, D)}:
    codes and gradient rows of a block of latents. The codes share the memory of ``pre_CF``, which is free by then.
    """

    def __init__(self, latents: int, tokens: int, width: int, pre_CF: Tensor) -> None:
        self.decoded = torch.empty(len(pre_CF), width, dtype=torch.bfloat16)
        flat = pre_CF.view(-1)
        self.block_latents = max(1, min(latents, flat.numel() // (2 * tokens)))
        size = self.block_latents * tokens
        if flat.numel() < 2 * size:
            flat = torch.empty(2 * size, dtype=torch.bfloat16)
        parts = {"enc": flat[:size], "dec": flat[size : 2 * size]}
        self.codes = {name: part.view(self.block_latents, tokens) for name, part in parts.items()}
        self.rows = {name: torch.empty(self.block_latents, width, dtype=torch.bfloat16) for name in parts}
