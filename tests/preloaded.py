"""What runs import and cache, for the fork server of ``tests/processes.py``."""

from __future__ import annotations

import importlib
import pkgutil
import tempfile

import torch
from transformers import AutoModel, BertConfig, BertModel, logging

import saetrain
from saetrain.cli import parse_train

torch.set_num_threads(1)
importlib.import_module("transformers.models.gpt2.modeling_gpt2")
for module in pkgutil.walk_packages(saetrain.__path__, "saetrain."):
    # Triton is an optional package.
    if not module.name.startswith("saetrain.ops.triton"):
        importlib.import_module(module.name)
parse_train(["model", "dataset"])
# The first load of a model compiles hundreds of regular expressions.
logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    config = BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    BertModel(config).save_pretrained(folder)
    AutoModel.from_pretrained(folder)
logging.enable_progress_bar()
