"""Splice: replaces the output of a module during a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def splice_output(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply ``replace`` to the output (B, S, D) of ``module`` within the context; its dtype and tuple are kept."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return replace(output).to(output.dtype)
        return type(output)([replace(output[0]).to(output[0].dtype), *output[1:]])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def replace_positions(x_BSD: Tensor, mask_BS: Tensor, rows_ND: Tensor) -> Tensor:
    """Return ``x_BSD`` with ``rows_ND`` at the N positions where ``mask_BS`` (bool) is true; differentiable."""
    return x_BSD.masked_scatter(mask_BS.unsqueeze(-1), rows_ND.to(x_BSD.dtype))
