"""What the tests of kernels need is there, for without it they are skipped in silence."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="triton is made for Linux")
def test_triton_is_installed_where_it_can_be() -> None:
    assert importlib.util.find_spec("triton") is not None, "pip install -e '.[dev]'"
