"""Memory does not grow with the text, tokens read as text, and what is missing or damaged is named."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from saetrain.coders.topk import TopK
from saetrain.data.tokenize import load_tokenizer
from saetrain.errors import SaetrainError
from saetrain.features import pairs, weights
from saetrain.features.features import Features
from saetrain.features.settings import FeatureSettings
from saetrain.features.vocabulary import describe_tokens
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.run_dir import find_features_folder
from saetrain.sae import SAE
from tests.unit.features.conftest import Collection, build_coder, make_batches, write_collection


def test_memory_does_not_grow_with_the_text(tiny_gpt2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (pairs, "RUN_PAIRS", 2000),
        (pairs, "RANGE_PAIRS", 2000),
        (weights, "MAX_SAMPLE_PAIRS", 2000),
        (weights, "MAX_PRODUCTS", 10_000),
    ):
        monkeypatch.setattr(module, name, value)
    coder, site = build_coder("causal")
    # No latent fires on many tokens, because one latent is always read as a whole.
    coder.W_enc.data /= coder.W_enc.norm(dim=0)
    coder.b_enc.data.zero_()
    peaks = []
    for number, n_sequences in enumerate((200, 200, 1600)):
        batches = make_batches(n_sequences, 200)
        tracemalloc.start()
        write_collection(tmp_path / str(number), tiny_gpt2, coder, site, batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The first collection imports modules.
    assert peaks[2] < 1.3 * peaks[1] + 1e6, peaks


def test_texts_of_tokens_can_be_joined(tiny_gpt2: str, minilm: str) -> None:
    for model, text in ((tiny_gpt2, " a class's naïve — method"), (minilm, " unbelievable tokenization of classes")):
        tokenizer = load_tokenizer(model, None, False)
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        texts = describe_tokens(tokenizer, ids)
        joined = "".join(texts)
        if "<0x" not in joined:
            assert joined == text
        else:
            assert "<0xE2>" in joined
            assert joined.startswith(" a class's na")
    tokenizer = load_tokenizer(minilm, None, False)
    assert describe_tokens(tokenizer, np.array([0, tokenizer.convert_tokens_to_ids("##ing")])) == [" [PAD]", "ing"]


def test_a_feature_reads_well(collection: Collection) -> None:
    features = collection.features
    assert len(features) == len(list(features)) == collection.coder.num_latents
    assert repr(features[-1]) == repr(features[len(features) - 1])
    assert [feature.latent for feature in features[2:5]] == [2, 3, 4]
    feature = max(features, key=lambda each: each.count)
    shown = repr(feature)
    assert shown.startswith(f"Feature {feature.latent}: fires on {feature.count:,} tokens")
    assert len(shown.splitlines()) <= 9
    context = feature.contexts[0]
    assert f"«{context.token.removeprefix(' ')}»" in str(context)
    assert str(context).replace("«", "").replace("»", "") == "".join(context.tokens)
    assert all(line.isprintable() for line in shown.splitlines())
    silent = [each for each in features if not each.count]
    assert all(repr(each) == f"Feature {each.latent}: never fires" and not each.contexts for each in silent)
    with pytest.raises(IndexError, match="the SAE has latents 0 to"):
        _ = features[len(features)]


def test_features_are_found_next_to_the_sae(collection: Collection, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "sae" / "h.1" / "seed3"
    assert find_features_folder(folder) == tmp_path / "run" / "features" / "h.1" / "seed3"
    assert find_features_folder(tmp_path / "alone") == tmp_path / "alone" / "features"
    sae = SAE(TopK(4, 8, 2), SaeMetadata(), folder)
    with pytest.raises(SaetrainError, match="contains no features; collect them with `saetrain features RUN`"):
        _ = sae.features
    target = find_features_folder(folder)
    target.parent.mkdir(parents=True)
    target.symlink_to(collection.features.folder)
    assert sae.features[3].count == collection.features[3].count


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.json", None, "contains no features"),
        ("metadata.json", "{", "metadata.json: is not valid JSON"),
        ("metadata.json", json.dumps({"format": 99}), "was not written by this version"),
        ("latents.parquet", None, "latents.parquet: can't be read"),
        ("latents.parquet", "damaged", "latents.parquet: can't be read"),
        ("contexts.parquet", "stream.parquet", "contexts.parquet: has no column 'latent'"),
    ],
)
def test_damaged_files_are_named(
    collection: Collection, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    for path in collection.features.folder.glob("*.*"):
        if path.name != file:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    source = collection.features.folder / (content or "")
    if content is not None:
        (tmp_path / file).write_bytes(source.read_bytes() if source.is_file() else content.encode())
    with pytest.raises(SaetrainError, match=message):
        _ = Features(tmp_path)[3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feature_tokens": -1}, "--feature_tokens -1: must be at least 0"),
        ({"feature_tokens": 1 << 40}, "--feature_tokens .*: must be at most"),
        ({"ablate_latents": -2}, "--ablate_latents -2: must be at least 0"),
        ({"ablate_tokens": 0}, "--ablate_tokens 0: must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, int], message: str) -> None:
    with pytest.raises(SaetrainError, match=message):
        FeatureSettings(**values)
