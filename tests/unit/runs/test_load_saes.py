"""SAEs below one folder are evaluated together only if they agree on everything that is read once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.setup import _collect_norm_limits
from saetrain.types import Site

METADATA = SaeMetadata(model="m", hookpoint="h.0", dataset="text", fingerprint="a" * 8, ctx_len=8, norm_limit=3.0)


def save_two(folder: Path, **changes: Any) -> None:
    for name, metadata in (("one", METADATA), ("two", dataclasses.replace(METADATA, **changes))):
        save_sae(folder / name, TopK(6, 20, 3), metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"dataset": "other"},
        {"fingerprint": "b" * 8},
        {"held_out": "the split 'test'"},
        {"eval_tokens": 100},
        {"ctx_len": 16},
        {"prepend_bos": True},
        {"exclude_special_tokens": False},
        {"exclude_sinks": False},
        {"model_dtype": "bfloat16"},
    ],
)
def test_saes_that_differ_in_model_text_or_token_policy_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_two(tmp_path, **changes)
    with pytest.raises(SaetrainError, match=rf": {next(iter(changes))} is .* for two and .* for one; evaluate each by"):
        load_saes(str(tmp_path))


def test_saes_may_differ_in_hookpoint_and_training(tmp_path: Path) -> None:
    save_two(tmp_path, hookpoint="h.1", norm_limit=4.0, tokens_seen=7, steps=2, init_seed=1)
    loaded = load_saes(str(tmp_path))
    sites = {name: Site.of_sae(str(sae.metadata.hookpoint)) for name, sae in loaded.saes.items()}
    assert _collect_norm_limits(loaded, sites) == {"h.0": 3.0, "h.1": 4.0}


@pytest.mark.parametrize("limit", [4.0, None])
def test_two_norm_limits_of_a_hookpoint_are_refused(tmp_path: Path, limit: float | None) -> None:
    save_two(tmp_path, norm_limit=limit)
    loaded = load_saes(str(tmp_path))
    with pytest.raises(SaetrainError, match=r"the norm limit of h\.0 is .* evaluate each by its own folder"):
        _collect_norm_limits(loaded, dict.fromkeys(loaded.saes, Site.of_sae("h.0")))
