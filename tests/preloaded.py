"""What runs import and cache, for the fork server of ``tests/processes.py``."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import pkgutil
import tempfile

from benchmarks.gpu.interpreter import patch_language_once

LAZY = (
    "datasets",
    "pydantic.dataclasses",
    "rich._emoji_codes",
    "tokenizers.trainers",
    "torch.profiler._cupti_monitor",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.tokenization_utils_tokenizers",
)
"""Modules that a run imports only when it needs them; without ``datasets`` each fork takes a second longer."""


def import_modules() -> None:
    """Import what a run imports."""
    import saetrain

    for name in LAZY:
        importlib.import_module(name)
    # Triton is an optional package, and reads this variable when it is imported.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    for module in pkgutil.walk_packages(saetrain.__path__, "saetrain."):
        if interpreted or not module.name.startswith("saetrain.ops.triton"):
            importlib.import_module(module.name)
    if interpreted:
        patch_language_once()


def fill_caches() -> None:
    """Parse a command line and load a model; the first time compiles hundreds of regular expressions."""
    import torch
    from transformers import AutoModel, BertConfig, BertModel, logging

    from saetrain.cli import parse_train

    torch.set_num_threads(1)
    parse_train(["model", "dataset"])
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
        BertModel(config).save_pretrained(folder)
        AutoModel.from_pretrained(folder)
    logging.enable_progress_bar()


# Garbage collection takes a quarter of the time of these imports, and they leave none.
gc.disable()
import_modules()
fill_caches()
# Otherwise the first collections of each fork visit, and so copy, everything that was imported.
gc.collect()
gc.freeze()
gc.enable()
