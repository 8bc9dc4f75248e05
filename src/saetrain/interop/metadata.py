"""What the entry ``saetrain`` of ``cfg.json`` records about an SAE: model, hookpoint, text, token policy, training."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from saetrain.activations.hookpoints import resolve_module_name, translate_hook_name
from saetrain.activations.model import BaseModel, Dtype, hash_model_weights
from saetrain.errors import SaetrainError
from saetrain.interop.schema import require_types
from saetrain.settings import PositiveFactor, Seed, Share, Total, TotalOrZero
from saetrain.types import Site


@dataclass(frozen=True, kw_only=True)
class SaeMetadata:
    """The metadata of a saved SAE, in the order of the file; docs/output.md describes each entry.

    None means unknown: other libraries record less, and so did earlier versions. With several data sets, the entries
    on the text are lists.
    """

    model: str | None = None
    model_revision: str | None = None
    model_weights_sha256: str | None = None
    model_dtype: Dtype | None = None
    dataset: str | list[str] | None = None
    mix: list[Share] | None = None
    dataset_config: str | None = None
    split: str | None = None
    streaming: bool = False
    skip_bad_rows: bool = False
    eval_tokens: Total | None = None
    text_columns: list[str] | list[list[str]] | None = None
    held_out: str | list[str] | None = None
    train_tokens_available: TotalOrZero | list[TotalOrZero | None] | None = None
    fingerprint: str | list[str] | None = None
    ctx_len: Total | None = None
    causal: bool | None = None
    prepend_bos: bool | None = None
    exclude_special_tokens: bool = True
    exclude_sinks: bool = True
    loss_fn: str | None = None
    finetuned_from: str | None = None
    kernels: str | None = None
    compute_dtype: str | None = None
    processes: Total = 1
    tokens_seen: TotalOrZero | None = None
    steps: TotalOrZero | None = None
    diverged_step: TotalOrZero | None = None
    """Step whose loss spike ended the training early; ``steps`` and ``tokens_seen`` are those of the saved weights."""
    hookpoint: str | None = None
    hook_name: str | None = None
    init_seed: Seed | None = None
    norm_limit: PositiveFactor | None = None
    inputs: list[str] | None = None
    """Hookpoints that the coder reads, if it is no SAE; ``hookpoint`` then names what it reconstructs."""
    outputs: list[str] | None = None
    norm_limits: dict[str, PositiveFactor] | None = None
    """{hookpoint: norm limit} of a coder that is no SAE."""
    held_out_figures: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def from_entry(
        cls, path: Path, name: str, entry: Mapping[str, Any], keys: Mapping[str, str] | None = None
    ) -> SaeMetadata:
        """Return the metadata in the entry ``name`` of the file ``path``; ``keys``: {field: key}, if they differ.

        Missing and empty entries get their defaults, and keys of later versions are ignored. Raises SaetrainError that
        names the key if a value has the wrong type.
        """
        hints = typing.get_type_hints(cls, include_extras=True)
        keys = keys or {field: field for field in hints}
        require_types(path, entry, {key: hints[field] for field, key in keys.items()}, f"{name}.")
        return cls(**{field: entry[key] for field, key in keys.items() if entry.get(key) not in (None, "", [])})

    @property
    def site(self) -> Site | None:
        """What the coder reads and reconstructs, or None if that is unknown."""
        if self.inputs and self.outputs:
            return Site(tuple(self.inputs), tuple(self.outputs))
        return Site.of_sae(self.hookpoint) if self.hookpoint else None

    def find_hookpoint(self, model: nn.Module) -> str | None:
        """Return the module of ``model``, a transformer without its head, that an SAE was trained on; None if unknown.

        It is that of ``hookpoint``, else that of ``hook_name``, which may be a name of TransformerLens or sparsify.
        """
        names = [name for name, _ in model.named_modules() if name]
        return resolve_module_name(self.hookpoint or "", names) or translate_hook_name(self.hook_name or "", model)

    def with_site(self, site: Site, limits: Mapping[str, float]) -> SaeMetadata:
        """Return the metadata of a coder at ``site``; ``limits``: {hookpoint: norm limit}."""
        if site.is_sae and len(site.inputs) == 1:
            return dataclasses.replace(self, hookpoint=site.name, norm_limit=limits.get(site.name))
        own = {name: limits[name] for name in site.hookpoints if name in limits}
        return dataclasses.replace(
            self, hookpoint=site.name, inputs=list(site.inputs), outputs=list(site.outputs), norm_limits=own
        )

    def require_model(self, model: BaseModel, path: Path) -> None:
        """Raise SaetrainError if the SAE in ``path`` was trained on a model with other weights than ``model``."""
        expected = self.model_weights_sha256
        found = hash_model_weights(model) if expected is not None else None
        if expected is not None and found != expected:
            raise SaetrainError(
                f"model {model.name}: its weights are not those that the SAE in {path} was trained on "
                f"({self.model}, SHA-256 {expected[:12]}…, found {str(found)[:12]}…)"
            )
