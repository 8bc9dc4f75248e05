"""Typed columns for a page: little-endian numbers, grouped by byte, deflated, and base64-encoded.

The browser decodes a column when a view needs it (``js/data.js``). Base64 has no character that HTML interprets, so no
string of a data set can end the element that holds it.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MANTISSA_BITS = 11
"""Bits of a float's mantissa that a page stores: a relative error of at most 2^-12."""


@dataclass
class ColumnStore:
    """The columns of one page.

    ``manifest``: {column: element type, number of values, and what stored integers are multiplied by}; ``payloads``:
    {column: base64 text}. The name of a column is also the id of its element in the page.
    """

    manifest: dict[str, dict[str, Any]] = field(default_factory=dict)
    payloads: dict[str, str] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Size of all columns in the page."""
        return sum(map(len, self.payloads.values()))

    def add_integers(self, name: str, values: np.ndarray) -> None:
        """Add integers as the smallest type that holds them."""
        least, most = (int(values.min()), int(values.max())) if values.size else (0, 0)
        kinds = (np.int8, np.int16, np.int32) if least < 0 else (np.uint8, np.uint16, np.uint32)
        kind = next((kind for kind in kinds if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max), np.float64)
        self._add_array(name, values.astype(kind))

    def add_floats(self, name: str, values: np.ndarray) -> None:
        """Add numbers of any size as fp32 with a short mantissa."""
        low_bits = 23 - MANTISSA_BITS
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = np.where(np.isfinite(values), (bits + (1 << (low_bits - 1))) >> low_bits << low_bits, bits)
        self._add_array(name, rounded.astype(np.uint32).view(np.float32))

    def add_quantized(self, name: str, values: np.ndarray, step: float) -> None:
        """Add numbers of a known range as multiples of ``step``; nan is not allowed."""
        self.add_integers(name, np.rint(np.asarray(values, np.float64) / step).astype(np.int64))
        self.manifest[name]["step"] = step

    def add_json(self, name: str, value: Any) -> None:
        """Add any value that JSON can represent."""
        # Escapes keep surrogates without a partner, which occur in file names and have no UTF-8.
        self._add_bytes(name, json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode())
        self.manifest[name] = {"type": "json"}

    def _add_array(self, name: str, values: np.ndarray) -> None:
        values = values.reshape(-1)
        little = values.astype(values.dtype.newbyteorder("<"))
        # Bytes of equal weight resemble one another, so they compress better next to one another.
        planes = little.view(np.uint8).reshape(len(values), values.dtype.itemsize).T
        self._add_bytes(name, planes.tobytes())
        self.manifest[name] = {"type": f"{values.dtype.kind}{values.dtype.itemsize}", "length": len(values)}

    def _add_bytes(self, name: str, content: bytes) -> None:
        assert name not in self.payloads, name
        self.payloads[name] = base64.b64encode(zlib.compress(content, 9)).decode()
