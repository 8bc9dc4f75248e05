"""The ranks of a run compare their settings by name, also if one has settings that another lacks."""

from __future__ import annotations

from typing import Any

import pytest

from saetrain import distributed
from saetrain.errors import SaetrainError
from saetrain.runs.train.gather import require_equal_on_ranks


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"--architecture": "b", "--rate": 1}, "--architecture is b on rank 1 and a on rank 0; the processes must"),
        ({"--architecture": "a", "--rate": 1}, "--k is absent on rank 1 and 3 on rank 0"),
        ({"--architecture": "a", "--k": 3, "--rate": None}, "--rate is None on rank 1 and absent on rank 0"),
    ],
)
def test_other_settings_are_named(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], said: str) -> None:
    own = {"--architecture": "a", "--k": 3}
    monkeypatch.setattr(distributed, "all_gather_json", lambda values, what: [values, other])
    with pytest.raises(SaetrainError, match=said):
        require_equal_on_ranks(own)


def test_equal_settings_pass_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "all_gather_json", lambda values, what: [values, {"b": 2, "a": 1}])
    require_equal_on_ranks({"a": 1, "b": 2})
