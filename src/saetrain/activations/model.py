"""The frozen base model: loading it with an explicit dtype, and what it is."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from saetrain.atomic_io import hash_file
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.hub import load_cached_or_fetch, refuse_missing_path
from saetrain.types import shown_default

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BIDIRECTIONAL_FAMILIES = {"flaubert", "xlm", "xlnet"}
"""Families whose heads are called like those of causal models, though their attention goes both ways."""
IGNORED_CONFIG_KEYS = ("_name_or_path", "_commit_hash", "transformers_version")
"""Entries of a model's configuration that decide nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model: how it is loaded and run."""

    revision: Annotated[str | None, shown_default("main", "NAME")] = None
    """Branch, tag or commit of a hub model."""
    device: Annotated[str | None, shown_default("cuda where there is one, else cpu", "NAME")] = None
    """`cpu`, `cuda` or `cuda:N`."""
    dtype: Annotated[
        Dtype | None,
        shown_default("float32 on a CPU, bfloat16 on a GPU", "{float32,bfloat16,float16}"),
    ] = None
    """Number format of the model (the SAE is always trained in float32)."""
    model_batch_tokens: Annotated[
        int | None, shown_default("4096 on a GPU, on a CPU 1024 a thread, up to 4096", "INT")
    ] = None
    """Tokens, padding included, that the model takes at once."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings along."""

    def __post_init__(self) -> None:
        if self.model_batch_tokens is not None and self.model_batch_tokens < 1:
            raise SaetrainError(f"--model_batch_tokens {self.model_batch_tokens}: must be at least 1")

    def resolve_batch_tokens(self, device: torch.device) -> int:
        """Tokens that the model takes at once on ``device``."""
        if self.model_batch_tokens is not None:
            return self.model_batch_tokens
        # More would leave a processor's cache between two layers, by which a BERT is up to a sixth slower.
        return 4096 if device.type == "cuda" else min(4096, 1024 * torch.get_num_threads())


@dataclass(frozen=True)
class BaseModel:
    """A frozen model without its head, in eval mode."""

    module: nn.Module
    name: str
    config: Any
    causal: bool
    """Attends to the left only (a decoder), so that documents may be packed."""
    max_positions: int | None
    device: torch.device
    dtype: torch.dtype
    revision: str | None
    """The hub's commit, where the model came from the hub."""

    def forward_kwargs(self) -> dict[str, bool]:
        """What every forward pass is called with beside tokens and mask."""
        return {"use_cache": False} if self.causal else {}


def resolve_device(wanted: str | None) -> torch.device:
    """The device to run on; SaetrainError when it is not there."""
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and env.local_world_size() > 1 and torch.cuda.device_count() > 1:
        # A launcher that gives each process a GPU of its own shows it that one alone.
        wanted = f"cuda:{env.local_rank()}"
        if env.local_rank() >= torch.cuda.device_count():
            raise SaetrainError(
                f"{env.local_world_size()} processes on a host of {torch.cuda.device_count()} GPUs: start one for "
                "each GPU, or give --device cpu"
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


def load_config(name: str, settings: ModelSettings) -> Any:
    """The model's configuration, from the local cache when it is there, else over the network."""
    from transformers import AutoConfig

    if not os.path.isdir(name):
        refuse_missing_path("model", name)
    return _from_pretrained(AutoConfig, name, revision=settings.revision, trust_remote_code=settings.trust_remote_code)


def detect_causal(name: str, config: Any) -> bool:
    """Whether the model is causal; SaetrainError for models that do not take tokens in one stream."""
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

    Raises SaetrainError for an unknown or unsupported model, for one whose weights are incomplete, and for a
    device that is not there.
    """
    from transformers import AutoModel

    config = load_config(name, settings)
    causal = detect_causal(name, config)
    return build_base_model(name, load_module(AutoModel, name, settings), config, causal, settings)


def load_module(auto_class: Any, name: str, settings: ModelSettings) -> nn.Module:
    """The module that ``auto_class`` (of transformers) makes of ``name``, frozen and in eval mode on its device."""
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
    # The pooler comes after every hookpoint, and many checkpoints leave it out.
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)
    if missing:
        raise SaetrainError(
            f"model {name}: its files lack {len(missing)} of the weights ({', '.join(missing[:3])}, …), "
            "which would be random; is the download complete?"
        )
    loaded: nn.Module = module.to(device).eval().requires_grad_(False)
    return loaded


def _resolve_device_and_dtype(settings: ModelSettings) -> tuple[torch.device, torch.dtype]:
    device = resolve_device(settings.device)
    return device, DTYPES[settings.dtype or ("bfloat16" if device.type == "cuda" else "float32")]


def build_base_model(name: str, module: nn.Module, config: Any, causal: bool, settings: ModelSettings) -> BaseModel:
    """A loaded module, which has no head, with what is known of it."""
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
    """The hub's commit that the configuration was taken from, or None for a local folder."""
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
            f"model '{name}' brings Python code of its own, which is not run unless you ask: read it, then give "
            "--trust_remote_code true"
        )
    if "gated repo" in text or "401 Client Error" in text:
        return (
            f"model '{name}' is gated or private: accept its terms on the hub and set HF_TOKEN to a token "
            "that has access"
        )
    if "is not a local folder" in text or "Repository Not Found" in text:
        return (
            f"model '{name}' was not found: no local folder of that name, and not on the hub (or private there: set "
            "HF_TOKEN to a token that has access)"
        )
    return f"model '{name}' could not be loaded: {type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _max_positions(config: Any, module: nn.Module) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = [m for name, m in module.named_modules() if name.endswith("position_embeddings")]
    # The positions of RoBERTa's family and of MPNet begin behind the padding index.
    padding = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
    return int(positions) - (0 if padding is None else padding + 1)


def hash_model_code(model: BaseModel) -> str:
    """Hash of the rest that decides what the model computes: its configuration, and Python files in a local folder."""
    config = model.config.to_dict()
    settings = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    folder = Path(model.name)
    own = {file.name: hash_file(file) for file in sorted(folder.glob("*.py"))} if folder.is_dir() else {}
    text = json.dumps([settings, own], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_model_weights(model: BaseModel) -> str | None:
    """SHA-256 over the model's weight files, or None where they are not to be found."""
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
