"""SAE architectures, one file per published method, and the list that maps their names to classes."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from saetrain.coders.abstopk import AbsTopK
from saetrain.coders.base import CoderSettings, GroupSettings, SparseCoder
from saetrain.coders.batchtopk import BatchTopK
from saetrain.coders.gated import Gated
from saetrain.coders.jumprelu import JumpReLU
from saetrain.coders.matryoshka import Matryoshka
from saetrain.coders.standard import Standard
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError, did_you_mean

__all__ = [
    "CODERS",
    "DEFAULT_ARCHITECTURE",
    "INFERENCE_CODERS",
    "CoderSettings",
    "GroupSettings",
    "SparseCoder",
    "TopK",
    "architecture_name",
    "find_coder_class",
]

CODERS: dict[str, type[SparseCoder]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "standard": Standard,
    "abstopk": AbsTopK,
}
"""Architecture name (the value of ``--architecture``, and in ``cfg.json``) -> class."""
INFERENCE_CODERS: dict[str, type[SparseCoder]] = {"gated": Gated}
"""Architectures that are read and evaluated, but not trained."""
DEFAULT_ARCHITECTURE = "topk"


def find_coder_class(name: str, *, may_import: bool) -> type[SparseCoder]:
    """Return the class of an architecture that can be trained: a name in CODERS, or ``package.module:Class``.

    ``may_import``: import the module. It must be false for names that come from a file, because an import runs code;
    then the module must have been imported before. Raises SaetrainError if there is no such class, or if it is
    abstract.
    """
    if name in CODERS:
        return CODERS[name]
    if name in INFERENCE_CODERS:
        raise SaetrainError(
            f"--architecture {name}: saetrain reads and evaluates such SAEs, without this flag, but does not train "
            f"them; it trains {', '.join(CODERS)}"
        )
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise SaetrainError(
            f"--architecture {name}: no such architecture.{did_you_mean(name, list(CODERS))} saetrain has "
            f"{', '.join(CODERS)}; your own class is package.module:Class"
        )
    module = sys.modules.get(module_name)
    if module is None and may_import:
        module = _import_module(name, module_name)
    if module is None:
        raise SaetrainError(
            f"architecture {name}: your own code is not imported because a file names it; pass --architecture {name}, "
            f"or import {module_name} first"
        )
    # A lazy package imports modules when an attribute is read, and a file must not cause an import.
    found = vars(module).get(class_name)
    if not isinstance(found, type) or not issubclass(found, SparseCoder):
        raise SaetrainError(f"--architecture {name}: {module_name} has no class {class_name} derived from SparseCoder")
    if found.__abstractmethods__:
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise SaetrainError(f"--architecture {name}: {class_name} is abstract; it does not define {missing}")
    return found


def _import_module(name: str, module_name: str) -> ModuleType:
    # A console script does not search the current folder, unlike `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise SaetrainError(
            f"--architecture {name}: {module_name} can't be imported: {type(error).__name__}: {error}"
        ) from error


def architecture_name(cls: type[SparseCoder]) -> str:
    """Return the name of an architecture: that in CODERS or INFERENCE_CODERS, or ``package.module:Class``."""
    named = {known: name for name, known in (CODERS | INFERENCE_CODERS).items()}
    return named.get(cls, f"{cls.__module__}:{cls.__qualname__}")
