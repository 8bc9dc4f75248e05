"""Base of all settings classes, and the ranges of their numbers."""

from __future__ import annotations

import functools
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from saetrain.errors import SaetrainError
from saetrain.untrusted import require_plain_text, show_value


class Range(NamedTuple):
    """Range of a number from ``least`` to ``most``, as an annotation of a setting; ``above``: without ``least``."""

    least: float
    most: float
    above: bool = False

    def find_problem(self, value: float) -> str | None:
        """Return what is wrong with ``value``, or None if it is in the range."""
        # math.isfinite fails for huge integers.
        if value != value or abs(value) == math.inf:
            return "must be a finite number"
        if value < self.least or (self.above and value == self.least):
            return f"must be {'above' if self.above else 'at least'} {self.least:.16g}"
        hint = "; give a fraction, 0.6 instead of 60 %" if self.most == 1 else ""
        return f"must be at most {self.most:.16g}{hint}" if value > self.most else None


MAX_SIZE, MAX_TOTAL = 2**31 - 1, 10**15
MAX_FACTOR = 1e12
"""Largest factor; the product of two is finite in float32."""
DEFAULT_LOSS_TOKENS = {"cpu": 8_192, "cuda": 131_072}
"""Default of --loss_tokens and --ablate_tokens per type of device."""
Size = Annotated[int, Range(1, MAX_SIZE)]
Total = Annotated[int, Range(1, MAX_TOTAL)]
"""Number of tokens or steps of a whole run."""
TotalOrZero = Annotated[int, Range(0, MAX_TOTAL)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Factor = Annotated[float, Range(0, MAX_FACTOR)]
PositiveFactor = Annotated[float, Range(0, MAX_FACTOR, above=True)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of settings classes: checks each number against its :class:`Range`, and each text for control characters."""

    def __post_init__(self) -> None:
        for name, allowed in _find_ranges(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, str):
                    require_plain_text(item, f"--{name}")
                elif type(item) in (int, float) and allowed is not None:
                    problem = allowed.find_problem(item)
                    if problem is not None:
                        raise SaetrainError(f"--{name} {show_value(item)}: {problem}")


@functools.cache
def _find_ranges(settings: type) -> dict[str, Range | None]:
    return {name: find_range(hint) for name, hint in typing.get_type_hints(settings, include_extras=True).items()}


def find_range(hint: Any) -> Range | None:
    """Return the range in the type of a setting, or None if the type has none."""
    own = (item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range))
    inner = map(find_range, typing.get_args(hint))
    return next((found for found in (*own, *inner) if found is not None), None)
