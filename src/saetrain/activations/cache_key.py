"""What the bits of activations depend on: the model and how it is computed, and the token ids of the batch."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path

import numpy as np
import torch
import xxhash

from saetrain.activations.extract import Capture
from saetrain.activations.model import DTYPES, BaseModel, hash_model_code
from saetrain.activations.store import StoreMetadata
from saetrain.errors import SaetrainError
from saetrain.types import ModelBatch


def describe_activations(capture: Capture, weights_sha256: str | None, trust_remote_code: bool) -> StoreMetadata:
    """Return the metadata of what ``capture`` returns, whose key determines the activations of a batch.

    Raises SaetrainError if the model has no weight files.
    """
    import transformers

    model = capture.model
    if weights_sha256 is None:
        raise SaetrainError(
            f"--cache_activations: model {model.name} has no weight files, by which the cache identifies it; omit the "
            "flag"
        )
    dtype = next(name for name, dtype in DTYPES.items() if dtype is model.dtype)
    key = {
        "weights": weights_sha256,
        "config": hash_model_code(model),
        # Only the commit identifies the Python code of a model on the hub.
        "revision": model.revision if trust_remote_code else None,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "device": _describe_device(model),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return StoreMetadata(hookpoints=dict(sorted(capture.widths.items())), dtype=dtype, model=model.name, key=key)


def _describe_device(model: BaseModel) -> dict[str, str]:
    """Return everything about the device that affects how matrix products are computed."""
    found = {"type": model.device.type, "matmul_precision": torch.get_float32_matmul_precision()}
    if model.device.type == "cuda":
        return found | {"name": torch.cuda.get_device_name(model.device), "cuda": str(torch.version.cuda)}
    # Libraries choose their kernels by the processor.
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return found | {
        "name": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def name_folder(metadata: StoreMetadata) -> str:
    """Return the name of the folder of activations with this key, hookpoints and dtype."""
    text = json.dumps([metadata.key, metadata.hookpoints, metadata.dtype, metadata.format], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_batch(batch: ModelBatch) -> bytes:
    """Return a hash of what the model reads of a batch: the token ids of each sequence."""
    lengths = np.array([len(batch), *map(len, batch)], dtype=np.int64)
    ids = np.concatenate([sequence.ids for sequence in batch]).astype(np.int32)
    return xxhash.xxh3_128_digest(lengths.tobytes() + ids.tobytes())
