"""The context of saved SAEs: the model with its head, their hookpoints, and their token policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.lm_head import LMHeadModel, load_model_with_head
from saetrain.activations.model import ModelSettings, load_config
from saetrain.config import EvaluateConfig, RunConfig, from_flat
from saetrain.data.sharded import build_token_policy
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing, load_tokenizer
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.logs.console import log_rank0
from saetrain.runs.evaluate.load_saes import SEPARATELY, LoadedSaes, SavedSae, find_run_dir
from saetrain.runs.run_dir import CONFIG_FILE
from saetrain.runs.train.setup import check_vocabulary
from saetrain.small_files import read_settings
from saetrain.training.dead_latents import DeadSettings
from saetrain.types import INPUT_SUFFIX, Site


@dataclass(frozen=True)
class EvalContext:
    """Everything that scoring needs: settings, SAEs, model, hookpoints and token policy."""

    config: EvaluateConfig
    loaded: LoadedSaes
    head: LMHeadModel
    tokenizer: Any
    framing: Framing
    sites: dict[str, Site]
    """{SAE: what it reads and reconstructs}."""
    extractor: ActivationExtractor
    exclude_special: bool
    exclude_first: bool
    run_config: RunConfig | None
    """Settings of the run that the SAEs belong to."""
    dead_threshold: float
    """Firing rate below which a latent is dead."""
    max_eval_tokens: int | None
    """Tokens per data set without --eval_tokens; None: the default for the device."""

    def token_budget(self, requested: int | None, defaults: dict[str, int]) -> int:
        """Return ``requested`` tokens, or the default for the device if it is None."""
        return requested if requested is not None else defaults[self.head.base.device.type]


def build_eval_context(config: EvaluateConfig, loaded: LoadedSaes, max_eval_tokens: int | None) -> EvalContext:
    """Load the model with its head, and resolve hookpoints, token policy and defaults of the SAEs' run.

    Raises SaetrainError if the model or a flag does not match the SAEs.
    """
    name = config.model or loaded.metadata.model
    if name is None:
        raise SaetrainError(f"{config.path}: its metadata do not name the model; pass --model")
    base = config.base
    base = dataclasses.replace(
        base,
        dtype=base.dtype or loaded.metadata.model_dtype,
        revision=base.revision or loaded.metadata.model_revision,
    )
    _require_model(config, loaded, name, base)
    head = load_model_with_head(name, base)
    loaded.metadata.require_model(head.base, loaded.path)
    tokenizer = load_tokenizer(name, base.revision, base.trust_remote_code)
    check_vocabulary(head.base, len(tokenizer))
    sites = {sae: _resolve_site(config, head, loaded, found) for sae, found in loaded.saes.items()}
    hookpoints = dict.fromkeys(hookpoint for site in sites.values() for hookpoint in site.hookpoints)
    capture = ActivationCapture(head.base, list(hookpoints))
    for sae, found in loaded.saes.items():
        width, d_out = sites[sae].sum_widths(capture.widths)
        if found.coder.d_in != width or found.coder.d_out != d_out:
            raise SaetrainError(
                f"{found.folder}: takes activations of width {found.coder.d_in}, but {sites[sae].x_name} of {name} has "
                f"width {width}; was it trained on another model?"
            )
    special, first = _resolve_token_policy(config, loaded)
    extractor = ActivationExtractor(
        capture, build_token_policy(special, first), base.resolve_batch_tokens(head.base.device)
    )
    if first:
        extractor.set_norm_limits(_collect_norm_limits(loaded, sites))
    framing = _match_trained_bos(
        loaded, tokenizer, Framing.from_tokenizer(tokenizer, head.base.causal, _resolve_ctx_len(config, loaded, head))
    )
    run_config = read_run_config(loaded.run_dir) if loaded.run_dir is not None else None
    return EvalContext(
        config=config,
        loaded=loaded,
        head=head,
        tokenizer=tokenizer,
        framing=framing,
        sites=sites,
        extractor=extractor,
        exclude_special=special,
        exclude_first=first,
        run_config=run_config,
        dead_threshold=_resolve_dead_threshold(config, run_config),
        max_eval_tokens=max_eval_tokens or loaded.metadata.eval_tokens,
    )


def _resolve_dead_threshold(config: EvaluateConfig, run_config: RunConfig | None) -> float:
    """Return the firing rate below which a latent is dead: the flag's, that of the SAE's run, or the default."""
    if config.dead_percentage_threshold is not None:
        return config.dead_percentage_threshold
    return (run_config.dead if run_config is not None else DeadSettings()).dead_percentage_threshold


def _require_model(config: EvaluateConfig, loaded: LoadedSaes, name: str, base: ModelSettings) -> None:
    """Raise a SaetrainError that mentions --model if the model that the SAE's metadata name cannot be loaded."""
    try:
        load_config(name, base)
    except SaetrainError as error:
        if config.model is not None:
            raise
        named = next(iter(loaded.saes.values())).folder
        raise SaetrainError(f"{error} (the files in {named} name this model; if it has moved, pass --model)") from error


def _collect_norm_limits(loaded: LoadedSaes, sites: Mapping[str, Site]) -> dict[str, float]:
    """Return {hookpoint: norm limit} of all SAEs; SaetrainError if two SAEs differ in that of a hookpoint."""
    limits: dict[str, float | None] = {}
    for name, found in loaded.saes.items():
        metadata = found.metadata
        for hookpoint in sites[name].hookpoints:
            own = metadata.norm_limit if metadata.norm_limits is None else metadata.norm_limits.get(hookpoint)
            if limits.setdefault(hookpoint, own) != own:
                raise SaetrainError(
                    f"{loaded.path}: the norm limit of {hookpoint} is {own} for {name} and {limits[hookpoint]} for "
                    f"another SAE; {SEPARATELY}"
                )
    return {hookpoint: limit for hookpoint, limit in limits.items() if limit is not None}


def _resolve_site(config: EvaluateConfig, head: LMHeadModel, loaded: LoadedSaes, sae: SavedSae) -> Site:
    """Return what the SAE reads and reconstructs; SaetrainError if it is unknown or --hookpoint contradicts it."""
    names = [name for name, _ in head.base.module.named_modules() if name]
    metadata = sae.metadata
    if metadata.site is not None and metadata.inputs:
        for name in metadata.site.hookpoints:
            if name.removesuffix(INPUT_SUFFIX) not in names:
                raise SaetrainError(f"{sae.folder}: its hookpoint '{name}' is not a module of {head.base.name}")
        return metadata.site
    named = [name for name in (metadata.hookpoint, metadata.hook_name) if name]
    own = metadata.find_hookpoint(head.base.module)
    wanted = config.hookpoint or own
    if wanted is None:
        shown = " and ".join(f"'{name}'" for name in dict.fromkeys(named))
        problem = (
            f"its hookpoint {shown} is not a module of the model" if named else "its metadata do not name the hookpoint"
        )
        raise SaetrainError(f"{sae.folder}: {problem}; pass --hookpoint")
    if own is not None and own != wanted:
        raise SaetrainError(f"--hookpoint {wanted}: the SAE in {sae.folder} was trained on {own}")
    if wanted not in names:
        raise SaetrainError(f"--hookpoint {wanted}: not a module of {head.base.name}.{did_you_mean(wanted, names)}")
    return Site.of_sae(wanted)


def _resolve_token_policy(config: EvaluateConfig, loaded: LoadedSaes) -> tuple[bool, bool]:
    """Return (exclude special tokens, exclude position 0): the SAE's own policy unless a flag overrides it."""
    special, first = config.exclude_special_tokens, config.exclude_sinks
    return (
        loaded.metadata.exclude_special_tokens if special == "auto" else special == "true",
        loaded.metadata.exclude_sinks if first == "auto" else first == "true",
    )


def _resolve_ctx_len(config: EvaluateConfig, loaded: LoadedSaes, head: LMHeadModel) -> int:
    max_len = head.base.max_positions
    wanted = config.ctx_len or loaded.metadata.ctx_len or min(DEFAULT_CTX_LEN, max_len or DEFAULT_CTX_LEN)
    if max_len is not None and wanted > max_len:
        raise SaetrainError(f"--ctx_len {wanted}: {head.base.name} has positions for at most {max_len} tokens")
    return int(wanted)


def _match_trained_bos(loaded: LoadedSaes, tokenizer: Any, framing: Framing) -> Framing:
    """Add or remove the BOS token as in the SAE's training, which other libraries decide without the tokenizer."""
    wanted = loaded.metadata.prepend_bos
    if not framing.causal or wanted is None or wanted == (framing.bos is not None):
        return framing
    if not wanted:
        log_rank0("texts get no BOS token, because the SAE was trained without one (prepend_bos)")
        return dataclasses.replace(framing, bos=None)
    bos = tokenizer.bos_token_id
    if bos is None:
        raise SaetrainError(
            f"{loaded.path}: the SAE was trained with a BOS token before each text (prepend_bos), but the model's "
            "tokenizer has none; was it trained on another model?"
        )
    log_rank0("each text gets a BOS token, because the SAE was trained with one (prepend_bos)")
    # If one token is both BOS and EOS, it separates documents only once.
    return dataclasses.replace(framing, bos=bos, eos=None if framing.eos == bos else framing.eos)


def read_run_config(run: Path) -> RunConfig:
    """Return the settings of the run in directory ``run``; SaetrainError if they can't be read."""
    path = str(run / CONFIG_FILE)
    return from_flat(read_settings(path, flag=""), path)


def defaults_from_run(path: str) -> EvaluateConfig | None:
    """Return the defaults for an evaluation of ``path``: scoring and thresholds of its run, or None without a run."""
    run = find_run_dir(Path(path))
    if run is None:
        return None
    config = read_run_config(run)
    return EvaluateConfig(path=path, scoring=config.scoring, health=config.health)
