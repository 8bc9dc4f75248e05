"""Activations -> codes: one file per published idea, and the one list of them."""

from __future__ import annotations

from saetrain.coders.topk import TopK

CODERS = {"topk": TopK}
"""Architecture name (as written in ``cfg.json``) -> class."""
