"""SAE architectures, one file per published method, and the list that maps their names to classes."""

from __future__ import annotations

from saetrain.coders.topk import TopK

CODERS = {"topk": TopK}
"""Architecture name (as written in ``cfg.json``) -> class."""
