"""``saetrain tokenize MODEL DATASET OUT``: tokenize a data set once and save it as a token folder."""

from __future__ import annotations

from pathlib import Path

from saetrain.activations.model import ModelSettings, detect_causal, load_config
from saetrain.config import TokenizeConfig
from saetrain.data.sources import SourceSettings
from saetrain.data.token_store import TokenMetadata, check_output_folder, is_token_folder, save_tokens
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing, TokenSettings, load_tokenizer
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.runs.text_data import open_text, tokenize_source
from saetrain.runs.train.metadata import absolute_location
from saetrain.runs.train.setup import quiet_libraries


def tokenize_dataset(config: TokenizeConfig) -> None:
    """Write the token folder that ``config`` names; raises SaetrainError for errors that the user can fix."""
    quiet_libraries()
    out = Path(config.out)
    check_output_folder(out)
    if is_token_folder(config.dataset):
        raise SaetrainError(
            f"DATASET {config.dataset}: is already a token folder; pass the data set that it was made from"
        )
    source_settings = SourceSettings(
        split=config.split,
        dataset_config=config.dataset_config,
        text_column=config.text_column,
        skip_bad_rows=config.skip_bad_rows,
    )
    settings = TokenSettings(ctx_len=config.ctx_len, data_preprocessing_num_proc=config.data_preprocessing_num_proc)
    tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    framing = _resolve_framing(config, tokenizer)
    source = open_text(config.dataset, source_settings, tokenizer)
    column, splits = tokenize_source(config.dataset, source, tokenizer, framing, settings)
    metadata = TokenMetadata(
        model=config.model,
        dataset=absolute_location(config.dataset),
        split=config.split,
        dataset_config=config.dataset_config,
        text_columns=list(column.columns),
        distinct=source.deduplicate,
        held_out_split=source.held_out_split,
    )
    save_tokens(out, splits, metadata.with_framing(tokenizer, framing))
    log_rank0(f"wrote {sum(len(rows) for rows in splits.values()):,} rows of tokens to {out}")


def _resolve_framing(config: TokenizeConfig, tokenizer: object) -> Framing:
    """Return the framing for the model, with the context length that a training run would use."""
    settings = ModelSettings(revision=config.revision, trust_remote_code=config.trust_remote_code)
    model = load_config(config.model, settings)
    max_len = getattr(model, "max_position_embeddings", None)
    length = config.ctx_len or min(DEFAULT_CTX_LEN, max_len or DEFAULT_CTX_LEN)
    if max_len is not None and length > max_len:
        raise SaetrainError(f"--ctx_len {length}: {config.model} has positions for at most {max_len} tokens")
    return Framing.from_tokenizer(tokenizer, detect_causal(config.model, model), length)
