"""Format of Gemma Scope: JumpReLU SAEs in ``params.npz``, Lieberum et al., arXiv 2408.05147."""

from __future__ import annotations

import re
from pathlib import Path

from saetrain.coders import SparseCoder
from saetrain.coders.jumprelu import JumpReLU
from saetrain.errors import SaetrainError
from saetrain.interop.archives import read_numpy_tensors
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import restore_sae

NAME = "Gemma Scope"
MARKER_FILE = "params.npz"
FILES: tuple[str, ...] = (MARKER_FILE,)
RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)/(?:.*/)?layer_(\d+)/")
"""Part of the path of an SAE in a repository of Gemma Scope: size and kind of the model, activation, and layer."""
CTX_LEN = 1024
"""Length of the sequences of the training, which begin with BOS."""


def read_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` contains no SAE of Gemma Scope.

    The arrays are ``W_enc`` (D, F), ``b_enc`` (F,), ``W_dec`` (F, D), ``b_dec`` (D,) and ``threshold`` (F,). The
    encoder does not subtract ``b_dec``. The file contains no metadata, so they come from the path.
    Raises SaetrainError if the SAE is damaged, or if the path is that of a transcoder, which has the same arrays.
    """
    path = folder / MARKER_FILE
    if not path.exists():
        return None
    place = f"{folder.absolute().as_posix()}/"
    if "transcoders" in place.partition("gemma-scope")[2]:
        raise SaetrainError(f"{path}: is a transcoder of Gemma Scope; only SAEs are supported")
    weights = read_numpy_tensors(path)
    coder = restore_sae(JumpReLU, {}, weights, config_path=path, weights_path=path, subtracts_b_dec=False)
    return coder, _read_metadata(place)


def _read_metadata(place: str) -> SaeMetadata:
    """Return the metadata of an SAE of the residual stream by its path; those of other paths are unknown."""
    # The hub's cache has a folder models--google--REPOSITORY/snapshots/COMMIT.
    found = RELEASE.search(place)
    if found is None or found[3] != "res":
        return SaeMetadata()
    model = f"google/gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}"
    hook_name = f"blocks.{found[4]}.hook_resid_post"
    return SaeMetadata(model=model, hook_name=hook_name, ctx_len=CTX_LEN, prepend_bos=True)
