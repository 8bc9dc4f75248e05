"""Another activation in the place of a module's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def splice_output(module: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the output (B, S, D) of ``module`` goes through ``replace``, in its own dtype and its own tuple."""

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
    """``x_BSD`` with ``rows_ND`` at the N positions that ``where_BS`` (bool) marks; differentiable in the rows."""
    return x_BSD.masked_scatter(mask_BS.unsqueeze(-1), rows_ND.to(x_BSD.dtype))
