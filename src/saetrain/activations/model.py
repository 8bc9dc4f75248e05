"""Base model: loads a frozen transformer with an explicit dtype, and identifies its code and weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from saetrain.atomic_io import hash_file
from saetrain.distributed import env
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.hub import load_cached_or_fetch, refuse_missing_path
from saetrain.settings import Settings, Size
from saetrain.small_files import read_json_object
from saetrain.typed_values import require_type
from saetrain.types import shown_default

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BIDIRECTIONAL_FAMILIES = {"flaubert", "xlm", "xlnet"}
"""Model families with bidirectional attention whose heads are named like those of causal models."""
CONFIG_TYPES = {
    "model_type": str,
    "architectures": list[str],
    "vocab_size": Size,
    "max_position_embeddings": Size,
    "is_decoder": bool,
    "is_encoder_decoder": bool,
}
"""Types of the entries of a model's ``config.json`` that this program reads."""
IGNORED_CONFIG_KEYS = ("_name_or_path", "_commit_hash", "transformers_version")
"""Entries of a model's configuration that do not affect its outputs."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Model: loading and inference."""

    revision: Annotated[str | None, shown_default("main", "NAME")] = None
    """Branch, tag or commit of a hub model."""
    device: Annotated[str | None, shown_default("cuda if available, else cpu", "NAME")] = None
    """Device of the model and the SAEs: `cpu`, `cuda` or `cuda:N`."""
    dtype: Annotated[
        Dtype | None,
        shown_default("float32 on a CPU, bfloat16 on a GPU", "{float32,bfloat16,float16}"),
    ] = None
    """Number format of the model. The SAE's weights are always float32."""
    model_batch_tokens: Annotated[Size | None, shown_default("4096 on a GPU, 2048 on a CPU", "INT")] = None
    """Maximum number of tokens per forward pass of the model, including padding. It changes the data order."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""

    def resolve_batch_tokens(self, device: torch.device) -> int:
        """Return the maximum number of tokens per forward pass on ``device``."""
        if self.model_batch_tokens is not None:
            return self.model_batch_tokens
        # Larger batches do not fit into a CPU's cache between two layers, which makes BERT up to a sixth slower. The
        # number of threads does not matter, because it differs between one process and several.
        return 4096 if device.type == "cuda" else 2048


@contextlib.contextmanager
def explain_out_of_memory(settings: ModelSettings, message: str) -> Iterator[None]:
    """Convert a lack of memory within the block to a SaetrainError, whose ``message`` gets advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = settings.resolve_batch_tokens(resolve_device(settings.device))
        raise SaetrainError(f"{message}: lower --model_batch_tokens from {tokens} to {max(1, tokens // 2)}") from error


@dataclass(frozen=True)
class BaseModel:
    """A frozen model without its head, in eval mode."""

    module: nn.Module
    name: str
    config: Any
    causal: bool
    """Whether attention is causal (a decoder), so that documents can be packed."""
    max_positions: int | None
    device: torch.device
    dtype: torch.dtype
    revision: str | None
    """Commit of the hub, if the model comes from the hub."""

    def forward_kwargs(self) -> dict[str, bool]:
        """Return the arguments of each forward pass besides tokens and mask."""
        return {"use_cache": False} if self.causal else {}


def resolve_device(wanted: str | None) -> torch.device:
    """Return the device ``wanted``, or the default; SaetrainError when it does not exist.

    With several processes per host, `cuda` is the GPU of the local rank.
    """
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and env.local_world_size() > 1 and torch.cuda.device_count() > 1:
        # Under a launcher that assigns one GPU per process, each process sees only its own GPU.
        wanted = f"cuda:{env.local_rank()}"
        if env.local_rank() >= torch.cuda.device_count():
            raise SaetrainError(
                f"{env.local_world_size()} processes on a host with {torch.cuda.device_count()} GPUs: start one "
                "process per GPU, or pass --device cpu"
            )
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise SaetrainError(f"--device {wanted}: no such device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise SaetrainError(f"--device {wanted}: only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SaetrainError(f"--device {wanted}: this machine has {count} CUDA devices; use --device cpu")
    return device


def check_model_folder(folder: Path) -> None:
    """Raise SaetrainError if a file of a local model is not regular, or if ``config.json`` has values of odd types."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise SaetrainError(f"model {folder}: {path.name} is not a regular file")
    path = folder / "config.json"
    content = read_json_object(path) if path.exists() else {}
    for name, hint in CONFIG_TYPES.items():
        if content.get(name) is not None:
            require_type(content[name], hint, f"{path}: {name}")


def load_config(name: str, settings: ModelSettings) -> Any:
    """Load the model's configuration from a folder or the local cache, else over the network."""
    from transformers import AutoConfig

    if os.path.isdir(name):
        check_model_folder(Path(name))
    else:
        refuse_missing_path("model", name)
    return _from_pretrained(AutoConfig, name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)


def detect_causal(name: str, config: Any) -> bool:
    """Return whether the model is causal; SaetrainError for encoder-decoders and for models that read no tokens."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if config.is_encoder_decoder:
        raise SaetrainError(
            f"model {name}: '{config.model_type}' is an encoder-decoder, which is not supported; "
            "use an encoder (BERT) or a decoder (GPT-2, Llama, …)"
        )
    if config.model_type in BIDIRECTIONAL_FAMILIES:
        return False
    architectures = " ".join(config.architectures or [])
    if getattr(config, "is_decoder", False) or "CausalLM" in architectures or "LMHeadModel" in architectures:
        return True
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return True
    if not getattr(config, "vocab_size", None):
        raise SaetrainError(f"model {name}: '{config.model_type}' does not read text tokens")
    return False


def load_model(name: str, settings: ModelSettings) -> BaseModel:
    """Load ``name`` (local folder or hub id) without its head, frozen and in eval mode.

    Raises SaetrainError for an unknown or unsupported model, for incomplete weights, and for a device that does not
    exist.
    """
    from transformers import AutoModel

    config = load_config(name, settings)
    causal = detect_causal(name, config)
    return build_base_model(name, load_module(AutoModel, name, settings), config, causal, settings)


def load_module(auto_class: Any, name: str, settings: ModelSettings) -> nn.Module:
    """Load ``name`` with ``auto_class`` of transformers, frozen and in eval mode, on the device of ``settings``."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device, dtype = _resolve_device_and_dtype(settings)
    module, info = _from_pretrained(
        auto_class,
        name,
        revision=_find_commit(name, settings.revision) or settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=dtype,
        output_loading_info=True,
    )
    # The pooler runs after all hookpoints, and many checkpoints do not contain it.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise SaetrainError(
            f"model {name}: its files lack {len(missing)} of the weights ({', '.join(missing[:3])}, …), "
            "which would be random; check that the download is complete"
        )
    loaded: nn.Module = module.to(device).eval().requires_grad_(False)
    return loaded


def _resolve_device_and_dtype(settings: ModelSettings) -> tuple[torch.device, torch.dtype]:
    device = resolve_device(settings.device)
    return device, DTYPES[settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")]


def build_base_model(name: str, module: nn.Module, config: Any, causal: bool, settings: ModelSettings) -> BaseModel:
    """Build a :class:`BaseModel` from a loaded module without a head."""
    device, dtype = _resolve_device_and_dtype(settings)
    return BaseModel(
        module=module,
        name=name,
        config=config,
        causal=causal,
        max_positions=_max_positions(config, module),
        device=device,
        dtype=dtype,
        revision=_find_commit(name, settings.revision),
    )


def _find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of the hub that the configuration comes from, or None for a local folder."""
    if os.path.isdir(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    def load() -> Any:
        return cls.from_pretrained(name, **options)

    try:
        return load() if os.path.isdir(name) else load_cached_or_fetch(f"model '{name}'", load)
    except SaetrainError:
        raise
    except Exception as error:  # the library and its file readers raise many unrelated types
        raise SaetrainError(_explain_load_error(name, error)) from error


def _explain_load_error(name: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"model '{name}' contains its own Python code, which is not run by default: read it, then pass "
            "--trust_remote_code true"
        )
    if "gated repo" in text or "401 Client Error" in text:
        return (
            f"model '{name}' is gated or private: accept its terms on the hub and set HF_TOKEN to a token "
            "that has access"
        )
    if "is not a local folder" in text or "Repository Not Found" in text:
        return (
            f"model '{name}' was not found: there is no local folder of that name, and it is not on the hub (or it is "
            "private: set HF_TOKEN to a token that has access)"
        )
    return f"model '{name}' could not be loaded: {type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _max_positions(config: Any, module: nn.Module) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = [m for name, m in module.named_modules() if name.endswith("position_embeddings")]
    # In RoBERTa's family and MPNet, positions start after the padding index.
    padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
    return int(positions) - (0 if padding is None else padding + 1)


def hash_model_code(model: BaseModel) -> str:
    """Return a hash of the model's configuration and of the Python files in a local folder.

    Together with the weights, they determine the model's outputs.
    """
    config = model.config.to_dict()
    settings = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    folder = Path(model.name)
    code_hashes = {file.name: hash_file(file) for file in sorted(folder.glob("*.py"))} if folder.is_dir() else {}
    text = json.dumps([settings, code_hashes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_model_weights(model: BaseModel) -> str | None:
    """Return the SHA-256 of the model's weight files, or None if there are none."""
    folder = Path(model.name)
    if not folder.is_dir():
        from transformers.utils import cached_file

        folder = Path(cached_file(model.name, "config.json", revision=model.revision)).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        return None
    digests = [hash_file(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
