"""The comparison of contexts with another tool: what both may choose, and when the choices are equal."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.dashboards import CTX_LEN, are_equal, compare_contexts, select_comparable

WINDOW = [5, 5]
Context = tuple[int, int, float]


def rows(*contexts: Context) -> np.ndarray:
    return np.array(contexts, dtype=float).reshape(-1, 3)


def test_positions_that_one_tool_never_chooses_are_left_out() -> None:
    kept = np.ones((2, CTX_LEN), dtype=bool)
    kept[1, 60] = False
    contexts = [(0, 5, 9.0), (0, 6, 1.0), (0, CTX_LEN - 6, 2.0), (0, CTX_LEN - 5, 8.0), (1, 60, 7.0), (1, 61, 0.0)]
    assert select_comparable(contexts, kept, WINDOW).tolist() == [[0, CTX_LEN - 6, 2], [0, 6, 1]]


@pytest.mark.parametrize(
    ("own", "peer", "equal"),
    [
        (rows((0, 9, 5), (1, 9, 3)), rows((0, 9, 5), (1, 9, 3), (2, 9, 1)), True),
        # The order of contexts with almost equal activations is open, also at the end of the list.
        (rows((0, 9, 5), (1, 9, 5.001)), rows((1, 9, 5.001), (0, 9, 5)), True),
        (rows((0, 9, 5), (1, 9, 3)), rows((0, 9, 5), (2, 9, 3), (1, 9, 3)), True),
        (rows((0, 9, 5), (1, 9, 3)), rows((0, 9, 5), (2, 9, 4), (1, 9, 3)), False),
        (rows((0, 9, 5), (1, 9, 3)), rows((0, 9, 5), (1, 9, 2.9)), False),
        (rows((0, 9, 5), (1, 9, 3)), rows((0, 9, 5), (1, 8, 3)), False),
        (rows((0, 9, 5), (1, 9, 3)), rows((0, 9, 5)), False),
        (rows(), rows((0, 9, 5)), True),
    ],
)
def test_contexts_are_equal_up_to_ties(own: np.ndarray, peer: np.ndarray, equal: bool) -> None:
    assert are_equal(own, peer) == equal


def test_latents_are_counted() -> None:
    kept = np.ones((3, CTX_LEN), dtype=bool)
    result = {"window": WINDOW, "contexts": {"0": [(0, 9, 5.0), (1, 9, 0.0)], "1": [(0, 9, 4.0)], "2": []}}
    own = {0: [(0, 9, 5.0)], 1: [(2, 9, 4.0)]}
    assert compare_contexts(own, result, kept) == (2, 3, 2)
