"""Base class of all coders: what an SAE architecture must define, with defaults for most of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from saetrain.errors import SaetrainError
from saetrain.losses import reconstruction_loss
from saetrain.ops import decode_codes
from saetrain.optim import RunSize, recommended_lr
from saetrain.settings import Settings, Size
from saetrain.types import Affine, Codes, Encoded, Site, StepContext, shown_default

ENCODER_INIT_NORM = 0.3
"""Norm of the columns of the initial encoder. With 1, the first reconstructions are several times too large, and the
first steps only shrink them (docs/recipe.md)."""
ROWS_PER_CHUNK = 256
"""Latents per chunk of projection and renormalization."""


@dataclass(frozen=True, kw_only=True)
class CoderSettings(Settings):
    """SAE: size and sparsity."""

    k: Size = 192
    """Active latents per token (the wanted L0)."""
    expansion_factor: Size = 32
    """Number of latents per activation dimension."""
    num_latents: Annotated[Size | None, shown_default("width x expansion_factor", "INT")] = None
    """Number of latents, instead of --expansion_factor."""

    def resolve_num_latents(self, d_in: int) -> int:
        """Return the number of latents for activations of width ``d_in``; raises SaetrainError if k is larger."""
        num_latents = self.num_latents or d_in * self.expansion_factor
        if self.k > num_latents:
            raise SaetrainError(f"--k {self.k}: more than the {num_latents} latents")
        return num_latents


@dataclass(frozen=True, kw_only=True)
class GroupSettings(CoderSettings):
    """SAE: size and sparsity, for coders that select latents among the tokens of a group (:class:`TokenGroups`)."""

    group_tokens: Annotated[Size | None, shown_default("the first start's micro-batch over all ranks", "INT")] = None
    """Consecutive activations among which k per token are selected; a micro-batch must hold whole groups."""


class SparseCoder(nn.Module, ABC):
    """x (N, D_in) -> code (N, F) -> ŷ (N, D_out); an SAE has y = x.

    Parameters: ``W_enc`` (D_in, F), ``b_enc`` (F,), ``W_dec`` (F, D_out), ``b_dec`` (D_out,), in fp32. A subclass may
    add parameters, and buffers, which training changes without a gradient; both are part of checkpoints and saved SAEs.

    The encoder is initialized with the transpose of ``W_dec`` times ENCODER_INIT_NORM. ``d_out`` None: an SAE, whose
    encoder subtracts ``b_dec`` from its input.
    """

    Settings: ClassVar[type[CoderSettings]] = CoderSettings
    """Settings of the architecture, which become flags of the command line."""
    has_unit_norm_decoder: ClassVar[bool] = True
    """Whether each step keeps the rows of ``W_dec`` at unit norm."""
    latents_compete: ClassVar[bool] = True
    """Whether the pre-activations of other latents decide which latents are active, at least in training."""
    updates_idle_latents: ClassVar[bool] = False
    """Whether Adam also updates latents that have no gradient in a step (docs/recipe.md)."""
    lifts_dead_biases: ClassVar[bool] = True
    """Whether each step raises the encoder bias of dead latents (--dead_bias_lift)."""
    saved_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that determine the codes; a saved SAE stores the attributes of these names."""
    recorded_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that do not change the codes of a saved SAE, which stores them too; None: its file does not have it."""
    training_buffers: ClassVar[frozenset[str]] = frozenset()
    """Buffers that only training uses. Formats of other libraries omit them, and reading a file sets the defaults."""
    encoder_parameters: ClassVar[frozenset[str]] = frozenset({"W_enc", "b_enc"})
    """Parameters with the encoder's learning rate; the matrices among them decay."""
    lr_scale: ClassVar[float | None] = None
    """Learning rate of ``--lr auto``, relative to that of TopK (docs/recipe.md); None: ``--lr auto`` is refused."""
    latent_dims: ClassVar[Mapping[str, int]] = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    """{parameter with one entry per latent: dimension of the latents}."""

    def __init__(self, d_in: int, num_latents: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__()
        assert d_in > 0, d_in
        assert num_latents > 0, num_latents
        self.d_in, self.d_out, self.num_latents = d_in, d_in if d_out is None else d_out, num_latents
        self.is_sae = d_out is None
        generator = torch.Generator().manual_seed(seed)
        decoder = _draw_unit_rows(num_latents, self.d_out, generator)
        encoder = decoder if self.d_out == d_in else _draw_unit_rows(num_latents, d_in, generator)
        self.W_dec = nn.Parameter(decoder)
        # W_enc is a transposed view, so that its memory has one row per latent: the kernels read whole latents.
        self.W_enc = nn.Parameter((ENCODER_INIT_NORM * encoder).T)
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> SparseCoder:
        """Return a coder with initial weights; ``settings`` is an instance of ``Settings``."""
        return cls(d_in, settings.resolve_num_latents(d_in), seed, d_out)

    @classmethod
    def build_sites(cls, hookpoints: Sequence[str]) -> list[Site]:
        """Return the sites of the coders that a run trains, for the hookpoints that its flags select."""
        return [Site.of_sae(name) for name in hookpoints]

    @abstractmethod
    def encode(self, x_ND: Tensor) -> Codes:
        """Return the code of each row of ``x_ND``, which must not depend on the other rows."""

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the code that training uses; by default that of :meth:`encode`."""
        return Encoded(self.encode(x_ND))

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return named, weighted loss terms; each is this micro-batch's share of the term of the optimizer step.

        ``recon``, the FVU, must be one of them.
        """
        return {"recon": reconstruction_loss(y_ND, y_hat_ND, ctx.n_tokens, ctx.data_variance)}

    def decode(self, codes: Codes, x_ND: Tensor | None = None) -> Tensor:
        """Return the reconstruction (N, D_out) of a code; a coder with a skip connection needs its input ``x_ND``."""
        return decode_codes(codes, self.W_dec) + self.b_dec

    def after_step(self, sums: Mapping[str, Tensor], ctx: StepContext) -> None:
        """Change buffers after an optimizer step; ``sums``: those of :class:`Encoded` over the whole step."""

    def calibrate(self, batches: Iterable[Tensor], ctx: StepContext) -> None:
        """Set thresholds from training activations (N, D_in), at the end of training."""

    @property
    def uses_dead_latents(self) -> bool:
        """Whether the losses use the mask of dead latents in the context of the step."""
        return False

    @property
    def dead_latents_advice(self) -> str | None:
        """Advice on how to revive dead latents, for a run that would not; None if the losses do or nothing helps."""
        return None

    def expected_l0(self) -> float | None:
        """Return the L0 that the architecture is built to reach, or None if training alone decides."""
        return None

    def recommended_lr(self, tokens_per_step: int, steps: int) -> float | None:
        """Return the learning rate of ``--lr auto``, or None if the architecture has no rule."""
        l0 = self.expected_l0()
        if self.lr_scale is None or l0 is None:
            return None
        return self.lr_scale * recommended_lr(RunSize(self.num_latents, l0, tokens_per_step, steps))

    def for_inference(self) -> SparseCoder:
        """Return the coder that is saved; it encodes token by token."""
        return self

    @torch.no_grad()
    def folded(self, inputs: Affine, outputs: Affine) -> SparseCoder:
        """Return a coder of raw activations: x' = ((x - m) / s) A and y = s (y' Aᵀ) + m; this coder is not changed.

        With a code f' of normalized inputs, f = s_out f'. That is exact for encoders that are positively homogeneous
        in W_enc, b_dec and what :meth:`scale_code_units_` scales, such as ReLU and TopK.
        """
        out = copy.deepcopy(self)
        ratio = outputs.scale / inputs.scale
        # A transposed view, so that the memory has one row per latent, as in the coder.
        W_enc = (self.W_enc.T @ inputs.axes.T).T
        out.W_enc = nn.Parameter(W_enc if ratio == 1 else ratio * W_enc)
        out.W_dec = nn.Parameter(self.W_dec @ outputs.axes.T)
        out.scale_code_units_(outputs.scale)
        if not self.is_sae:
            out.shift_pre_activations_(-(inputs.mean @ out.W_enc))
        out.b_dec = nn.Parameter(outputs.axes @ self.b_dec * outputs.scale + outputs.mean)
        return out.requires_grad_(False)

    @torch.no_grad()
    def unfold_(self, inputs: Affine, outputs: Affine) -> None:
        """Undo :meth:`folded` in place: a coder of raw activations becomes a coder of normalized activations."""
        if not self.is_sae:
            self.shift_pre_activations_(inputs.mean @ self.W_enc)
        self.W_enc.copy_(inputs.axes.T @ self.W_enc)
        if outputs.scale != inputs.scale:
            self.W_enc.mul_(inputs.scale / outputs.scale)
        self.W_dec.copy_(self.W_dec @ outputs.axes)
        self.scale_code_units_(1 / outputs.scale)
        self.b_dec.copy_((self.b_dec - outputs.mean) / outputs.scale @ outputs.axes)

    @torch.no_grad()
    def scale_code_units_(self, factor: float | Tensor) -> None:
        """Multiply everything but the encoder's matrix that has the unit of the code: its biases and thresholds.

        ``factor``: a number, or (F,) if latents do not compete.
        """
        self.b_enc.mul_(factor)

    @torch.no_grad()
    def shift_pre_activations_(self, shift_F: Tensor) -> None:
        """Add ``shift_F`` (F,) to the encoder's product of an input, by means of its biases."""
        self.b_enc.add_(shift_F)

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """Return the pre-activations (N, F)."""
        return torch.addmm(self.b_enc, self.centre(x_ND), self.W_enc)

    def centre(self, x_ND: Tensor) -> Tensor:
        """Return the input of the encoder's product: x - b_dec for an SAE, else x."""
        assert x_ND.dim() == 2, tuple(x_ND.shape)
        assert x_ND.shape[1] == self.d_in, tuple(x_ND.shape)
        return x_ND - self.b_dec if self.is_sae else x_ND

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the part of the gradient of ``W_dec`` that is parallel to its rows (Bricken et al. 2023)."""
        assert self.W_dec.grad is not None
        # A chunk stays in a core's cache between the product and the subtraction.
        chunks = (self.W_dec.grad.split(ROWS_PER_CHUNK), self.W_dec.split(ROWS_PER_CHUNK))
        for grad, weight in zip(*chunks, strict=True):
            grad.addcmul_((grad * weight).sum(dim=1, keepdim=True), weight, value=-1)

    @torch.no_grad()
    def renormalize_decoder(self, rows: Tensor | None = None) -> None:
        """Scale the rows of ``W_dec`` to unit norm: all rows, or those with the indices ``rows`` (int64)."""
        tiny = torch.finfo(torch.float32).tiny
        if rows is None:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(tiny))
            return
        for chunk in rows.split(ROWS_PER_CHUNK):
            weight = self.W_dec[chunk]
            self.W_dec[chunk] = weight / weight.norm(dim=1, keepdim=True).clamp_min(tiny)


def _draw_unit_rows(rows: int, width: int, generator: torch.Generator) -> Tensor:
    directions = torch.randn(rows, width, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return directions
