"""saetrain: sparse autoencoders on the activations of any Hugging Face transformer.

Data flows one way::

    text -> tokens -> activations -> codes -> loss -> metrics -> artifacts
    data/   data/     activations/   coders/  losses  metrics    interop/
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "SAE": "saetrain.sae",
    "load": "saetrain.sae",
    "train": "saetrain.sae",
    "splice": "saetrain.splicing",
    "attribute_latents": "saetrain.splicing",
    "Codes": "saetrain.types",
    "ActivationWriter": "saetrain.activations.writer",
    "write_activations": "saetrain.activations.writer",
    "SaetrainError": "saetrain.errors",
}
__all__ = [
    "SAE",
    "ActivationWriter",
    "Codes",
    "SaetrainError",
    "__version__",
    "attribute_latents",
    "load",
    "splice",
    "train",
    "write_activations",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'saetrain' has no attribute '{name}'")
