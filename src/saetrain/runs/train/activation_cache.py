"""The activation cache of a run, and the lines about it in the log."""

from __future__ import annotations

from saetrain.activations.cache import ActivationCache
from saetrain.activations.cache_files import parse_size, resolve_cache_dir
from saetrain.activations.cache_key import describe_activations
from saetrain.activations.extract import BatchCache, Capture
from saetrain.config import RunConfig
from saetrain.logs.console import log_rank0


def open_activation_cache(config: RunConfig, capture: Capture, weights_sha256: str | None) -> ActivationCache | None:
    """Open the cache if the run has one. ``--dry_run`` has none, because it measures the speed of the model."""
    settings = config.cache
    if not settings.cache_activations or config.dry_run:
        return None
    metadata = describe_activations(capture, weights_sha256, config.base.trust_remote_code)
    cache = ActivationCache(
        resolve_cache_dir(settings.cache_dir),
        metadata,
        parse_size(settings.cache_size),
        log_rank0,
        pin_memory=capture.model.device.type == "cuda",
    )
    log_rank0(
        f"activation cache {cache.folder}: {cache.n_stored:,} tokens of this model at these hookpoints are stored"
    )
    return cache


def close_activation_cache(cache: BatchCache | None) -> None:
    """Write what is still in memory, and log how many tokens were read and computed."""
    if cache is None:
        return
    cache.close()
    if isinstance(cache, ActivationCache):
        log_rank0(f"activation cache: {cache.n_read:,} tokens were read, {cache.n_computed:,} were computed")
