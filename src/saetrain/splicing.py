"""Intervene: splice SAEs into a running model, change their latents, and attribute the model's outputs to latents."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saetrain.activations.capture import register_recorder
from saetrain.activations.splice import splice_output
from saetrain.coders import SparseCoder
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.sae import SAE
from saetrain.types import INPUT_SUFFIX, Codes, Site

Positions = slice | Sequence[int] | Tensor | None
"""Positions of the sequence, counted over all passes with a KV cache: a slice, numbers, or a mask (B, S) bool.

A negative number counts from the end of each pass. A mask need not cover the tokens that ``generate`` adds; its rows
are repeated like those of the inputs.
"""
PerSae = Mapping[str, Any]
"""{hookpoint: value for the SAE there}."""


class SplicedSae:
    """An SAE in a model: its codes in the last forward pass, and the changes that the splice makes to them.

    ``codes`` are those of all B·S positions before the changes, row by row; ``shape`` is (B, S).
    """

    def __init__(
        self,
        sae: SAE,
        model: nn.Module,
        factors: Mapping[int, float],
        positions: Positions,
        *,
        replace: bool,
        grad: bool,
    ) -> None:
        self.sae, self.site = sae, _resolve_site(sae, model)
        device = next(model.parameters()).device
        self.coder: SparseCoder = sae.coder if sae.coder.W_dec.device == device else copy.deepcopy(sae.coder).to(device)
        self._factors = torch.ones(self.coder.num_latents, device=device)
        for latent, factor in factors.items():
            if not 0 <= latent < self.coder.num_latents:
                raise SaetrainError(f"splice: latent {latent}: the SAE has latents 0 to {self.coder.num_latents - 1}")
            self._factors[latent] = factor
        self._positions, self._replace, self._grad = positions, replace, grad
        self._inputs: dict[str, Tensor] = {}
        self._codes: Codes | None = None
        self.shape = (0, 0)
        self._stop = 0
        """Number of positions that the passes have reached."""
        self.first_position = 0
        """Position of the first token of the current pass, which is not 0 with a KV cache."""

    @property
    def codes(self) -> Codes:
        """The codes of the last forward pass; SaetrainError if the module has not run."""
        if self._codes is None:
            raise SaetrainError(f"splice: {self.site.name} has not run; call the model within the context first")
        return self._codes

    def record_input(self, name: str, value_BSD: Tensor) -> None:
        """Keep the activation of one of the site's inputs."""
        self._inputs[name] = value_BSD

    def edit_output(self, y_BSD: Tensor) -> Tensor:
        """Return what the module outputs instead of ``y_BSD``, in fp32."""
        captured = {**self._inputs, self.site.name: y_BSD}
        x_BSD, _ = self.site.select_xy(captured)
        if x_BSD.shape[-1] != self.coder.d_in:
            raise SaetrainError(
                f"splice: the activations of {self.site.x_name} have width {x_BSD.shape[-1]}, but the SAE in "
                f"{self.sae.path} was trained on width {self.coder.d_in}"
            )
        self.shape = (y_BSD.shape[0], y_BSD.shape[1])
        self._stop = max(self._stop, self.first_position + self.shape[1])
        x_ND = x_BSD.detach().flatten(0, 1).float()
        with torch.no_grad():
            codes = self.coder.encode(x_ND)
        if self._grad:
            codes = dataclasses.replace(codes, values=codes.values.requires_grad_(), cache={})
        self._codes = codes
        with torch.set_grad_enabled(self._grad):
            edited = self.coder.decode(self._scale_latents(codes), x_ND).view_as(y_BSD)
            # With the same setting of autograd both use the same products, so without a change they are equal.
            unedited_codes = dataclasses.replace(codes, values=codes.values.detach(), cache={})
            unedited = self.coder.decode(unedited_codes, x_ND).view_as(y_BSD)
        with torch.set_grad_enabled(torch.is_grad_enabled() or self._grad):
            out_BSD = edited if self._replace else y_BSD.float() + (edited - unedited)
            mask_BS = self._mask_positions(y_BSD)
            return out_BSD if mask_BS is None else torch.where(mask_BS.unsqueeze(-1), out_BSD, y_BSD.float())

    def _scale_latents(self, codes: Codes) -> Codes:
        factors = self._factors if codes.indices is None else self._factors[codes.indices]
        return dataclasses.replace(codes, values=codes.values * factors, cache={})

    def _mask_positions(self, y_BSD: Tensor) -> Tensor | None:
        """Return the positions of this pass that are changed, (B, S) bool, or None for all."""
        chosen, (n_rows, length) = self._positions, self.shape
        if chosen is None:
            return None
        if isinstance(chosen, Tensor):
            return self._slice_mask(chosen).to(y_BSD.device)
        stop = self.first_position + length
        numbers = torch.arange(self.first_position, stop, device=y_BSD.device)
        if isinstance(chosen, slice):
            wanted = list(range(*chosen.indices(stop)))
        else:
            wanted = [n + stop if n < 0 else n for n in chosen]
            if min(wanted, default=0) < 0:
                raise SaetrainError(f"splice: position {min(chosen)}: the pass ends after {stop} positions")
        return torch.isin(numbers, torch.tensor(wanted, device=y_BSD.device)).expand(n_rows, length)

    def _slice_mask(self, mask_BS: Tensor) -> Tensor:
        """Return the part of a mask for the current pass, False after its end, with as many rows as the pass."""
        n_rows, length = self.shape
        is_whole = mask_BS.dtype == torch.bool and mask_BS.dim() == 2 and n_rows % max(1, len(mask_BS)) == 0
        if not is_whole or (self.first_position == 0 and mask_BS.shape[1] < length):
            raise SaetrainError(
                f"splice: positions must be a bool mask of shape {self.shape}, found {mask_BS.dtype} of shape "
                f"{tuple(mask_BS.shape)}"
            )
        part_BS = mask_BS[:, self.first_position : self.first_position + length]
        part_BS = torch.nn.functional.pad(part_BS, (0, length - part_BS.shape[1]))
        return part_BS.repeat_interleave(n_rows // len(mask_BS), dim=0)

    def require_reached_positions(self) -> None:
        """Raise SaetrainError if the passes have not reached one of the chosen positions."""
        if self._stop and isinstance(self._positions, Sequence) and max(self._positions, default=0) >= self._stop:
            raise SaetrainError(
                f"splice: position {max(self._positions)} was not changed: the model has seen only the positions 0 to "
                f"{self._stop - 1}"
            )


class SplicedSaes(Mapping[str, SplicedSae]):
    """The SAEs of a splice, {hookpoint: spliced SAE}."""

    def __init__(self, spliced: Iterable[SplicedSae]) -> None:
        self._spliced = {each.site.name: each for each in spliced}

    def __getitem__(self, hookpoint: str) -> SplicedSae:
        return self._spliced[hookpoint]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spliced)

    def __len__(self) -> int:
        return len(self._spliced)

    @property
    def codes(self) -> Codes:
        """The codes of the only SAE; SaetrainError if there are several."""
        if len(self) != 1:
            raise SaetrainError(f"splice: there are {len(self)} SAEs; take spliced[hookpoint].codes")
        return next(iter(self.values())).codes


@contextmanager
def splice(
    model: nn.Module,
    saes: SAE | Sequence[SAE],
    *,
    ablate: int | Sequence[int] | PerSae = (),
    scale: Mapping[int, float] | PerSae | None = None,
    positions: Positions = None,
    replace: bool = False,
    gradients: bool = False,
) -> Iterator[SplicedSaes]:
    """Splice one or several SAEs into ``model`` within the context, with some of their latents changed.

    By default, the reconstruction error is kept: x becomes x + decode(changed code) - decode(code), so that nothing
    changes unless a latent does. Works in forward passes, in ``generate`` with a KV cache, and in batches.

    Args:
        model: a transformer of Hugging Face, with or without its head.
        saes: SAEs that were trained on this model.
        ablate: one or several latents that are set to zero; for several SAEs {hookpoint: latents}.
        scale: {latent: factor}; for several SAEs {hookpoint: {latent: factor}}.
        positions: positions that are changed, by default all.
        replace: use the reconstruction alone, without its error.
        gradients: make the values of the codes leaves of autograd, so that ``codes.values.grad`` is filled.

    Raises:
        SaetrainError: if the model has no such hookpoint, or for a latent or position that does not exist. A position
            that no pass has reached is noticed at the end of the context.
    """
    saes = [saes] if isinstance(saes, SAE) else list(saes)
    names = [_resolve_site(sae, model).name for sae in saes]
    if len(set(names)) < len(names):
        raise SaetrainError(f"splice: two SAEs are at the same module ({', '.join(names)}); splice one of them")
    if replace and gradients and len(saes) > 1:
        raise SaetrainError("splice: with replace and gradients, pass one SAE, because encoders have no gradient")
    ablated, scaled = _assign_to_saes("ablate", ablate, names), _assign_to_saes("scale", scale or {}, names)
    spliced = [
        SplicedSae(
            sae,
            model,
            {**scaled.get(name, {}), **dict.fromkeys(ablated.get(name, ()), 0.0)},
            positions,
            replace=replace,
            grad=gradients,
        )
        for sae, name in zip(saes, names, strict=True)
    ]
    with ExitStack() as hooks:
        hooks.callback(_track_positions(model, spliced).remove)
        for each in spliced:
            for name in each.site.inputs if not each.site.is_sae else ():
                recorder = partial(each.record_input, name)
                hooks.callback(register_recorder(find_module(model, name), name, recorder).remove)
            hooks.enter_context(splice_output(find_module(model, each.site.name), each.edit_output))
        yield SplicedSaes(spliced)
        for each in spliced:
            each.require_reached_positions()


def attribute_latents(
    model: nn.Module,
    sae: SAE,
    inputs: Mapping[str, Tensor],
    metric: Callable[[Any], Tensor],
    *,
    exact: bool = False,
    latents: Sequence[int] | None = None,
) -> Codes:
    """Return how much each active latent at each position adds to a scalar of the model's output.

    The estimate is gradient x activation. With ``exact``, it is the change of the scalar when the latent is ablated at
    that position, which takes one forward pass per active latent and position.

    Args:
        model: a transformer of Hugging Face.
        sae: an SAE that was trained on this model.
        inputs: the model's inputs, as its tokenizer returns them.
        metric: maps the model's output to the scalar, such as ``lambda out: out.logits[0, -1, token]``.
        exact: ablate each latent instead of using gradients.
        latents: with ``exact``, the only latents to ablate; the others get 0.

    Returns:
        The scores in the layout of the codes of all B·S positions; ``to_dense()`` is (B·S, F).
    """
    if not exact:
        with torch.enable_grad(), splice(model, sae, gradients=True) as spliced:
            (gradient,) = torch.autograd.grad(metric(model(**inputs)), [spliced.codes.values])
        codes = spliced.codes
        return dataclasses.replace(codes, values=gradient * codes.values.detach(), cache={})
    with torch.no_grad():
        with splice(model, sae) as spliced:
            clean = float(metric(model(**inputs)))
        dense_NF, (each,) = spliced.codes.to_dense(), spliced.values()
        scores = torch.zeros_like(dense_NF)
        for token, latent in dense_NF.nonzero().tolist():
            if latents is not None and latent not in latents:
                continue
            mask_BS = torch.zeros(each.shape, dtype=torch.bool).view(-1)
            mask_BS[token] = True
            with splice(model, sae, ablate=[latent], positions=mask_BS.view(each.shape)):
                scores[token, latent] = clean - float(metric(model(**inputs)))
    return Codes(scores, None, dense_NF.shape[1])


def find_module(model: nn.Module, hookpoint: str) -> nn.Module:
    """Return the module of a hookpoint, whose name may lack the prefix of the model without its head."""
    name = hookpoint.removesuffix(INPUT_SUFFIX)
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    found = [module for key, module in modules.items() if key.endswith(f".{name}")]
    if len(found) != 1:
        problem = "has no module" if not found else f"has {len(found)} modules"
        raise SaetrainError(f"splice: the model {problem} {name}.{did_you_mean(name, list(modules))}")
    return found[0]


def _resolve_site(sae: SAE, model: nn.Module) -> Site:
    """Return what the SAE reads and replaces; SaetrainError if its metadata do not name one module of the model."""
    metadata, base = sae.metadata, getattr(model, "base_model", model)
    # Other libraries have other names for a module.
    found = metadata.find_hookpoint(base) if metadata.inputs is None else None
    site = metadata.site if found is None else Site.of_sae(found)
    if site is None or len(site.outputs) != 1:
        named = f" (hook_name is {metadata.hook_name})" if metadata.hook_name else ""
        raise SaetrainError(
            f"splice: the metadata of the SAE in {sae.path} do not name one module of the model to replace{named}"
        )
    if site.name.endswith(INPUT_SUFFIX):
        raise SaetrainError(f"splice: {site.name} is the input of a module; only outputs can be replaced")
    return site


def _assign_to_saes(argument: str, given: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return ``given`` as {hookpoint: value}; a value without hookpoint is for the only SAE."""
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, Mapping) and given and all(isinstance(key, str) for key in given):
        unknown = [key for key in given if key not in names]
        if unknown:
            raise SaetrainError(f"splice: {argument} names {unknown[0]}, but the SAEs are at {', '.join(names)}")
        return dict(given)
    if isinstance(given, int):
        given = [given]
    if not given:
        return {}
    if len(names) > 1:
        raise SaetrainError(f"splice: with several SAEs, {argument} must be {{hookpoint: …}} ({', '.join(names)})")
    return {names[0]: given}


def _track_positions(model: nn.Module, spliced: Sequence[SplicedSae]) -> RemovableHandle:
    """Set before each pass the number of tokens that the KV cache holds."""

    def record_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        for each in spliced:
            each.first_position = int(cache.get_seq_length()) if cache is not None else 0

    return model.register_forward_pre_hook(record_cache, with_kwargs=True)
