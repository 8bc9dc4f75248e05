"""``saetrain MODEL DATASET``: what the main command does, in order."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from saetrain import distributed
from saetrain.activations.model import resolve_device, weights_hash
from saetrain.activations.normalize import Normalizer, calibrate
from saetrain.activations.shuffle import MixingBuffer
from saetrain.coders.folding import folded
from saetrain.coders.topk import TopK
from saetrain.config import RunConfig, to_flat, write_yaml
from saetrain.errors import SaetrainError
from saetrain.evaluation.heldout import Subject, evaluate
from saetrain.interop.directory import save_sae
from saetrain.logs import Log, check_extras
from saetrain.logs.base import Record, RunInfo
from saetrain.logs.console import ProgressLine, say
from saetrain.optim import Optimizer, resolve_lr, warmup_steps
from saetrain.runs.prepare import Prepared, held_out_batches, make_buffer, prepare, read_sample, resolved
from saetrain.training.checkpoint import (
    MAX_MINUTES,
    Checkpoint,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from saetrain.training.firing import FiringTracker, alive_bound
from saetrain.training.trainer import SaeTrainer, Throughput, Trainer


def run(config: RunConfig) -> None:
    """Train, evaluate and save; SaetrainError for what the user can mend."""
    distributed.require_one_rank()
    check_extras(config.logs)
    resolve_device(config.base.device)
    directory = run_directory(config)
    checkpoint = open_directory(config, directory)
    prepared = prepare(config)
    if config.dry_run:
        from saetrain.runs.dry_run import report

        report(prepared, build_trainer(prepared, None)[0], make_buffer(prepared))
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_yaml(directory / "config.yaml", resolved(prepared))
    Session(prepared, directory, checkpoint).train()


def run_directory(config: RunConfig) -> Path:
    """``save_dir/run_name``."""
    name = config.output.run_name
    if name is None:
        where = config.where
        if where.hookpoints is not None:
            site = "_".join(
                "".join(c if c.isalnum() or c in ".-" else "-" for c in pattern) for pattern in where.hookpoints
            )
        elif where.layer_stride is not None:
            site = f"every{where.layer_stride}"
        else:
            site = "layer" + "-".join(map(str, where.layers or (0,)))
        width = f"f{config.sae.num_latents}" if config.sae.num_latents else f"x{config.sae.expansion_factor}"
        name = f"{Path(config.model).name}_{site}_k{config.sae.k}_{width}"
    return Path(config.output.save_dir) / name


def open_directory(config: RunConfig, directory: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if any; SaetrainError when a run lies there that must not be touched."""
    if config.dry_run:
        return None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and any(directory.iterdir()):
            if config.output.overwrite:
                _require_run(directory)
                shutil.rmtree(directory)
            elif not config.output.resume:
                raise SaetrainError(
                    f"{directory} holds a run already: --resume goes on with it, --overwrite deletes it, "
                    "--run_name gives this one another name"
                )
        directory.mkdir(exist_ok=True)
        probe = directory / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SaetrainError(
            f"--save_dir {config.output.save_dir}: can't write to {directory}: {error.strerror}"
        ) from error
    return _checkpoint(directory) if config.output.resume else None


def _require_run(directory: Path) -> None:
    """Only what this tool wrote is deleted."""
    if not (directory / "config.yaml").exists() and not (directory / "checkpoints").exists():
        raise SaetrainError(
            f"--overwrite: {directory} holds no run of saetrain, so it is left alone; remove it by hand"
        )


def _checkpoint(directory: Path) -> Checkpoint | None:
    path, remarks = newest_whole(directory / "checkpoints")
    for remark in remarks:
        say(remark)
    if path is None:
        say(f"--resume: {directory} holds no checkpoint, so the run starts from the beginning")
        return None
    return load_checkpoint(path)


def build_trainer(run: Prepared, checkpoint: Checkpoint | None) -> tuple[Trainer, dict[str, Normalizer]]:
    """The SAEs of every hookpoint and seed, from the start or from a checkpoint."""
    config, device = run.config, run.model.device
    if checkpoint is None:
        say("measuring centre and scale of the activations")
        sample = read_sample(run)
        normalizers = calibrate(sample, run.reader.limits)
        for name, normalizer in normalizers.items():
            say(f"{name}: ‖mean‖/‖std‖ {normalizer.mean_to_std:.2f}, width {len(normalizer.mean)}")
    else:
        normalizers = {name: _normalizer(checkpoint, name, device) for name in run.hookpoints}
        if config.buffer.exclude_sinks:
            run.reader.limits = {name: normalizer.norm_limit for name, normalizer in normalizers.items()}
    window = config.dead.window(config.train.max_tokens)
    saes: dict[str, SaeTrainer] = {}
    for hookpoint, normalizer in normalizers.items():
        latents = config.sae.latents(len(normalizer.mean))
        lr, remark = resolve_lr(config.optim, latents)
        if remark:
            say(remark)
        for number, seed in enumerate(config.train.init_seeds):
            coder = TopK(len(normalizer.mean), latents, config.sae.k, config.sae.auxk_alpha, seed).to(device)
            name = hookpoint if number == 0 else f"{hookpoint}/seed{seed}"
            saes[name] = SaeTrainer(
                hookpoint,
                coder,
                normalizer,
                make_optimizer(coder, config),
                FiringTracker(latents, window, config.dead.dead_percentage_threshold, device),
                data_variance=normalizer.scaled_variance,
                raw_mse=normalizer.variance / coder.d_in,
                lr=lr,
            )
            if checkpoint is not None:
                saes[name].restore(checkpoint.tensors[name])
    warmup = warmup_steps(config.optim, run.plan.steps)
    trainer = Trainer(saes, config.train, tokens=run.plan.tokens_per_step, warmup=warmup)
    trainer.step = checkpoint.values["step"] if checkpoint else 0
    return trainer, normalizers


def make_optimizer(coder: TopK, config: RunConfig) -> Optimizer:
    """The optimizer of one coder."""
    return Optimizer(
        dict(coder.named_parameters()),
        config.optim,
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )


def _normalizer(checkpoint: Checkpoint, name: str, device: torch.device) -> Normalizer:
    values = checkpoint.values["normalizers"][name]
    mean = checkpoint.tensors[f"normalizer:{name}"]["mean"].to(device)
    return Normalizer(mean, values["scale"], values["variance"], values["norm_limit"] or float("inf"))


class Session:
    """A run under way: the trainer, its data, its logs and its directory."""

    def __init__(self, prepared: Prepared, directory: Path, checkpoint: Checkpoint | None) -> None:
        self.prepared, self.directory = prepared, directory
        self.config = prepared.config
        self.trainer, self.normalizers = build_trainer(prepared, checkpoint)
        self.buffer: MixingBuffer = make_buffer(prepared)
        if checkpoint is not None:
            self.buffer.restore(checkpoint.values["buffer"])
            say(f"resumed from {checkpoint.path} at step {self.trainer.step} of {self.trainer.steps}")
        info = RunInfo(
            directory=directory,
            name=directory.name,
            settings=to_flat(resolved(prepared)),
            resumed_step=checkpoint.values["step"] if checkpoint else None,
            state=checkpoint.values["logs"] if checkpoint else {},
        )
        self.log = Log(self.config.logs, info)
        self.saved_at = time.monotonic()

    def train(self) -> None:
        """Run the remaining steps, then evaluate and save the SAEs."""
        announce(self.prepared, self.trainer)
        failed = True
        try:
            self._loop()
            final = self.evaluate("final")
            self.save_saes(final)
            failed = False
        finally:
            self.log.close(failed)
        summary(self.directory, final)

    def _loop(self) -> None:
        trainer, plan = self.trainer, self.prepared.plan
        line = ProgressLine(trainer.steps, trainer.step)
        speed = Throughput(trainer.tokens)
        share = plan.tokens_per_step // self.config.train.grad_acc_steps
        try:
            while trainer.step < trainer.steps:
                trainer.train_step(lambda micro: self.buffer.take(micro * share, share, plan.tokens))
                figures = self._log_step(speed)
                line.update(trainer.step, figures)
                if self._every(self.config.evaluation.eval_every) and trainer.step < trainer.steps:
                    self.evaluate("eval")
                if self._every(self.config.output.save_every) or trainer.step == trainer.steps or self._overdue():
                    self.save()
        finally:
            line.close()

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.trainer.step % steps == 0

    def _overdue(self) -> bool:
        return time.monotonic() - self.saved_at > 60 * MAX_MINUTES

    def _log_step(self, speed: Throughput) -> dict[str, float] | None:
        """Log the step when a sink wants it; gives the first SAE's figures for the progress line."""
        trainer = self.trainer
        if not self.log.due(trainer.step) and trainer.step != trainer.steps:
            return None
        trainer.check_finite()
        rate = speed.read(trainer.tokens)
        saes = trainer.metrics()
        self.log.write(Record("train", trainer.step, trainer.tokens, {"tokens_per_second": rate}, saes))
        return {**next(iter(saes.values())), "tokens_per_second": rate}

    def subjects(self) -> dict[str, Subject]:
        """The SAEs as they would be saved now: folded, for raw activations."""
        return {
            name: Subject(
                sae.hookpoint,
                folded(sae.coder, self.normalizers[sae.hookpoint].mean, self.normalizers[sae.hookpoint].scale),
                self.normalizers[sae.hookpoint].mean,
            )
            for name, sae in self.trainer.saes.items()
        }

    def evaluate(self, kind: Any) -> dict[str, dict[str, float]]:
        """Held-out figures of all SAEs, logged."""
        figures = evaluate(
            self.subjects(),
            held_out_batches(self.prepared),
            self.config.evaluation.eval_tokens,
            self.config.dead.dead_percentage_threshold,
        )
        self.log.write(Record(kind, self.trainer.step, self.trainer.tokens, {}, figures))
        return figures

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        tensors = {name: sae.state() for name, sae in self.trainer.saes.items()}
        tensors.update({f"normalizer:{name}": {"mean": value.mean} for name, value in self.normalizers.items()})
        values = {
            "normalizers": {
                name: {
                    "scale": value.scale,
                    "variance": value.variance,
                    "norm_limit": value.norm_limit if value.norm_limit != float("inf") else None,
                }
                for name, value in self.normalizers.items()
            },
            "buffer": self.buffer.state(),
            "logs": self.log.state(),
        }
        try:
            save_checkpoint(self.directory / "checkpoints", self.trainer.step, tensors, values)
        except OSError as error:
            raise SaetrainError(f"checkpoint of step {self.trainer.step} could not be written: {error}") from error
        self.saved_at = time.monotonic()

    def save_saes(self, figures: dict[str, dict[str, float]]) -> None:
        """Write the directories of the finished SAEs."""
        about = about_run(self.prepared, self.trainer)
        for name, subject in self.subjects().items():
            assert isinstance(subject.coder, TopK)
            metadata = {**about, "hookpoint": subject.hookpoint, "held_out_figures": figures[name]}
            metadata["hook_name"] = hook_name(self.prepared, subject.hookpoint)
            metadata["norm_limit"] = self.prepared.reader.limits.get(subject.hookpoint)
            save_sae(self.directory / "sae" / name, subject.coder, metadata, self.config.output.save_sparsify)


def about_run(run: Prepared, trainer: Trainer) -> dict[str, Any]:
    """What every SAE's metadata say of model, text, token policy and training."""
    config = run.config
    return {
        "model": config.model,
        "model_revision": run.model.revision,
        "model_weights_sha256": weights_hash(run.model),
        "model_dtype": str(run.model.dtype).removeprefix("torch."),
        "dataset": config.dataset,
        "dataset_config": config.source.dataset_config,
        "split": config.source.split,
        **run.data,
        "ctx_len": run.framing.ctx_len,
        "causal": run.framing.causal,
        "prepend_bos": run.framing.bos is not None,
        "exclude_special_tokens": config.tokens.exclude_special_tokens,
        "exclude_sinks": config.buffer.exclude_sinks,
        "tokens_seen": trainer.tokens,
        "steps": trainer.step,
    }


def hook_name(run: Prepared, hookpoint: str) -> str:
    """TransformerLens' name of a causal model's residual stream, which SAELens expects; else the module's own."""
    if run.model.causal and run.config.where.hookpoints is None:
        return f"blocks.{hookpoint.rsplit('.', 1)[1]}.hook_resid_post"
    return hookpoint


def announce(run: Prepared, trainer: Trainer) -> None:
    """The lines at the start: what will be trained on what, and what to know of it."""
    plan, config = run.plan, run.config
    rest = config.train.max_tokens - plan.tokens
    say(
        f"training {len(trainer.saes)} SAE{'s' if len(trainer.saes) > 1 else ''} for {plan.steps} steps of "
        f"{plan.tokens_per_step:,} tokens ({plan.tokens:,} in all; {rest:,} of --max_tokens left over), "
        f"{plan.epochs:.2f} passes over the text"
    )
    if config.dead.dead_feature_threshold is not None:
        say("--dead_feature_threshold is deprecated: use --dead_window_tokens")
    threshold = config.dead.dead_percentage_threshold
    for name, sae in trainer.saes.items():
        bound = alive_bound(config.sae.k, sae.coder.num_latents, threshold)
        if bound > 0:
            say(
                f"{name}: with k = {config.sae.k} at most {int(config.sae.k / threshold):,} of "
                f"{sae.coder.num_latents:,} latents can fire on {threshold:.3%} of tokens, so at least {bound:.1%} "
                "count as dead by --dead_percentage_threshold whatever the training does"
            )


def summary(directory: Path, figures: dict[str, dict[str, float]]) -> None:
    """The held-out figures of each SAE, and where things lie."""
    print(f"{'SAE':<28} {'FVU':>7} {'expl.var':>9} {'L0':>7} {'never fired':>12} {'redundancy (random)':>20}")
    for name, row in figures.items():
        print(
            f"{name:<28} {row['fvu']:7.4f} {row['explained_variance']:9.4f} {row['l0']:7.2f} "
            f"{100 * row['dead_never_fired']:10.1f} % {row['decoder_redundancy_top100']:11.3f} "
            f"({row['decoder_redundancy_top100_random']:.3f})"
        )
    tokens = next(iter(figures.values()))["tokens"]
    print(f"on {tokens:,.0f} held-out tokens; run in {directory}, SAEs in {directory / 'sae'}")
