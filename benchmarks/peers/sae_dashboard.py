"""SAEDashboard: its ``SaeVisRunner`` over given tokens, and its page; ``benchmarks/dashboards.py`` starts this.

python -m benchmarks.peers.sae_dashboard REQUEST.json

The request has ``model`` (folder), ``sae`` (folder in SAELens' format), ``tokens`` (.npy file, sequences x positions),
``latents`` (how many, from 0) and ``page_latents``, ``threads`` and ``out`` (folder). ``out`` gets ``page.html`` and
``result.json``.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_dashboard.components import SequenceGroupData
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

PACKAGES = ("sae-dashboard", "sae-lens", "transformer-lens", "transformers", "torch", "numpy")


def load_model(folder: str) -> HookedSAETransformer:
    """Load a GPT-2 without changes of its weights, because the SAE was trained on its activations."""
    # SAEDashboard needs an old transformers, which does not know the tokenizer class that newer versions write.
    names = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    special = {name: token for name, token in names.items() if name.endswith("_token") and isinstance(token, str)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), **special)
    source = GPT2LMHeadModel.from_pretrained(folder)
    found = source.config
    config = HookedTransformerConfig(
        n_layers=found.n_layer,
        d_model=found.n_embd,
        n_ctx=found.n_positions,
        d_head=found.n_embd // found.n_head,
        n_heads=found.n_head,
        d_mlp=found.n_inner or 4 * found.n_embd,
        d_vocab=found.vocab_size,
        eps=found.layer_norm_epsilon,
        act_fn=found.activation_function,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedSAETransformer(config)
    # The page needs it to decode tokens; set_tokenizer() would load it again by its name.
    model.tokenizer = tokenizer
    model.load_and_process_state_dict(
        convert_gpt2_weights(source, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    return model.eval()


def list_contexts(group: SequenceGroupData) -> list[list[float]]:
    """Return the (sequence, position, activation) of each context of a group."""
    found = []
    for each in group.seq_data:
        # The window has as many tokens before the context's token as after it, and one less is kept.
        value = each.feat_acts[(len(each.feat_acts) - 1) // 2]
        found.append([each.original_index, each.qualifying_token_index, value])
    return found


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """Collect, write the page, and return times in seconds of CPU and of the clock, the size and the contexts."""
    torch.set_num_threads(request["threads"])
    sae, model = SAE.load_from_disk(request["sae"], device="cpu"), load_model(request["model"])
    # Its decoder rows have unit norm, and SAELens refuses to fold norms into a TopK SAE.
    sae.fold_W_dec_norm = lambda: None
    tokens = torch.from_numpy(np.load(request["tokens"])).long()
    out, hook = Path(request["out"]), sae.cfg.metadata.hook_name
    config = SaeVisConfig(hook_point=hook, features=list(range(request["latents"])), device="cpu")
    marks = [(time.process_time(), time.perf_counter())]
    data: SaeVisData = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    marks.append((time.process_time(), time.perf_counter()))
    save_feature_centric_vis(
        data, out / "page.html", include_only=list(data.feature_data_dict)[: request["page_latents"]]
    )
    marks.append((time.process_time(), time.perf_counter()))
    (collect_cpu, collect), (page_cpu, page) = np.diff(marks, axis=0).tolist()
    groups = {latent: found.sequence_data.seq_group_data[0] for latent, found in data.feature_data_dict.items()}
    return {
        "collect_cpu": collect_cpu,
        "collect": collect,
        "page_cpu": page_cpu,
        "page": page,
        "bytes": (out / "page.html").stat().st_size,
        "batch": config.minibatch_size_features,
        "window": list(config.feature_centric_layout.seq_cfg.buffer),
        "contexts": {latent: list_contexts(group) for latent, group in groups.items()},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    """Answer the request in the file."""
    request = json.loads(Path(sys.argv[1]).read_text())
    result = run_request(request)
    (Path(request["out"]) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
