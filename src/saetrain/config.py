"""All settings of a run: one nested settings class per stage, and their flat form as flags and YAML files."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
import yaml

from saetrain.activations.buffer import BufferSettings
from saetrain.activations.cache_files import CacheSettings
from saetrain.activations.hookpoints import HookpointSettings
from saetrain.activations.model import ModelSettings
from saetrain.atomic_io import write_atomic
from saetrain.coders import CODERS, DEFAULT_ARCHITECTURE, CoderSettings, SparseCoder, find_coder_class
from saetrain.data.mixture import MixSettings
from saetrain.data.sharded import LoaderSettings
from saetrain.data.sources import SourceSettings
from saetrain.data.tokenize import CtxLen, NumProc, TokenSettings
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.evaluation.evaluator import EvalSettings, ScoreSettings
from saetrain.evaluation.health import HealthSettings
from saetrain.features.settings import FeatureSettings
from saetrain.logs import LogSettings
from saetrain.optim import OptimSettings
from saetrain.settings import MAX_TOTAL, Range, Settings, Share, Size, Total
from saetrain.training.checkpoint import CheckpointSettings
from saetrain.training.dead_latents import DEFAULT_DEAD_BIAS_LIFT, DeadSettings
from saetrain.training.placement import ParallelSettings
from saetrain.training.steps.base import KernelSettings
from saetrain.training.trainer import TrainSettings
from saetrain.typed_values import convert_value
from saetrain.types import shown_default
from saetrain.untrusted import show_text

EvalTokens = typing.Annotated[int, Range(2, MAX_TOTAL)]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """Train sparse autoencoders on the activations of MODEL over the text of DATASET."""

    model: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Hub id or local folder of a transformer."""
    dataset: tyro.conf.Positional[typing.Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATASET [DATASET ...]")]]
    """Hub id, or local folder or file (parquet, jsonl, csv, txt, or tokens). --mix sets the shares of several."""
    activations: typing.Annotated[str | None, shown_default("none: MODEL computes them", "DIR")] = None
    """Train on the activations in this folder (docs/activations.md), instead of MODEL and DATASET."""
    where: HookpointSettings = field(default_factory=HookpointSettings)
    architecture: typing.Annotated[
        str,
        tyro.conf.arg(
            help=f"SAE architecture: {', '.join(CODERS)}, or your own class as package.module:Class (CONTRIBUTING.md)."
        ),
    ] = DEFAULT_ARCHITECTURE
    sae: CoderSettings = field(default_factory=CODERS[DEFAULT_ARCHITECTURE].Settings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    dead: DeadSettings = field(default_factory=DeadSettings)
    compute: KernelSettings = field(default_factory=KernelSettings)
    base: ModelSettings = field(default_factory=ModelSettings)
    source: SourceSettings = field(default_factory=SourceSettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)
    mixing: MixSettings = field(default_factory=MixSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    buffer: BufferSettings = field(default_factory=BufferSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    scoring: ScoreSettings = field(default_factory=ScoreSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    processes: ParallelSettings = field(default_factory=ParallelSettings)
    output: CheckpointSettings = field(default_factory=CheckpointSettings)
    finetune: typing.Annotated[str | None, shown_default("none: random initial weights", "PATH")] = None
    """Start from a saved SAE: its folder, or a folder with one SAE per hookpoint, of saetrain or another library."""
    assess: bool = True
    """Evaluate the SAEs at the end: metrics with baselines and a verdict. `false` also skips features by default."""
    report: bool = True
    """Write report.html at the end, a page with all results (`saetrain report`). --assess false also skips it."""
    grid: typing.Annotated[tuple[dict[str, typing.Any], ...], tyro.conf.Suppress] = ()
    """Settings in which the SAEs of a run differ (saetrain.grid); flags with several values and --grid set it."""
    force: bool = False
    """Start even if the run needs more memory than is available."""
    dry_run: bool = False
    """Check all settings, print the run's plan, memory, disk space and time, and stop."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optim.lr == "auto" and not self.has_lr_rule:
            raise SaetrainError(
                "--lr auto: the rule is for adam, reconstruction and random initial weights; with --optimizer sgd, "
                "--loss_fn ce or kl, or --finetune, pass a number (docs/recipe.md)"
            )
        if self.cache.cache_activations and self.train.end_to_end:
            raise SaetrainError(
                f"--cache_activations: --loss_fn {self.train.loss_fn} runs the model in each step; omit the flag, or "
                "use mse or fvu"
            )
        if self.dead.dead_bias_lift and not self._can_raise_dead_bias:
            raise SaetrainError(
                f"--dead_bias_lift {self.dead.dead_bias_lift:g}: needs --optimizer adam and --loss_fn mse or fvu; omit "
                "it"
            )

    @property
    def coder_class(self) -> type[SparseCoder]:
        """Return the class of the architecture, which :func:`config_class` has imported."""
        return find_coder_class(self.architecture, may_import=False)

    @property
    def collects_features(self) -> bool:
        """Return whether features are collected at the end; without a given number, only if the run is assessed."""
        tokens = self.features.feature_tokens
        return self.assess if tokens is None else tokens > 0

    @property
    def has_lr_rule(self) -> bool:
        """Return whether the rule of `--lr auto` was fitted to runs of this kind."""
        return self.optim.optimizer == "adam" and not self.train.end_to_end and self.finetune is None

    @property
    def _can_raise_dead_bias(self) -> bool:
        return self.optim.optimizer == "adam" and not self.train.end_to_end

    @property
    def dead_bias_lr_multiplier(self) -> float:
        """Return the multiple of the learning rate by which each step raises the encoder biases of dead latents."""
        given = self.dead.dead_bias_lift
        return given if given is not None else DEFAULT_DEAD_BIAS_LIFT if self._can_raise_dead_bias else 0.0


def config_class(architecture: str, *, may_import: bool = False) -> type[RunConfig]:
    """Return the settings class of an architecture, whose field ``sae`` has the architecture's settings.

    ``may_import``: import the module of a user's own class (:func:`saetrain.coders.find_coder_class`).
    """
    settings = find_coder_class(architecture, may_import=may_import).Settings
    return _build_config_class(settings)  # type: ignore[arg-type]


@functools.cache
def _build_config_class(settings: Any) -> type[RunConfig]:
    sae = ("sae", settings, field(default_factory=settings))
    return dataclasses.make_dataclass("RunConfig", [sae], bases=(RunConfig,), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(Settings):
    """Tokenize the text of DATASET for MODEL once, and write the tokens to the folder OUT. Then pass OUT as DATASET."""

    model: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Hub id or local folder of a transformer; its weights are not needed."""
    dataset: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="DATASET")]]
    """Hub id, or local folder or file (parquet, jsonl, csv, txt)."""
    out: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="OUT")]]
    """Folder to write."""
    split: str = SourceSettings.split
    """Split to train on; `train[:10%]` selects a part."""
    dataset_config: typing.Annotated[str | None, shown_default("the only one", "NAME")] = None
    """Configuration, if the data set has several."""
    text_column: typing.Annotated[str | None, shown_default("detected", "NAME")] = None
    """Column that contains the text."""
    skip_bad_rows: bool = False
    """Skip and count unreadable rows of jsonl, csv and parquet files."""
    ctx_len: typing.Annotated[CtxLen | None, shown_default("512, or the model's limit if lower", "INT")] = None
    """Tokens per sequence. For an encoder, training must use the same value."""
    data_preprocessing_num_proc: NumProc = 1
    """Number of processes that tokenize."""
    revision: typing.Annotated[str | None, shown_default("main", "NAME")] = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """Score the SAEs in PATH on held-out text, and give a verdict on each of them."""

    path: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """Run directory, or folder of one SAE, of saetrain or another library."""
    dataset: typing.Annotated[tuple[str, ...], shown_default("only the training data set", "D [D ...]")] = ()
    """Additional data sets to score on: hub ids, local folders or files."""
    in_sample: bool = True
    """Also score on held-out text of the data set that the SAE was trained on."""
    model: typing.Annotated[str | None, shown_default("the SAE's", "MODEL")] = None
    """Hub id or local folder of the model, if the SAE does not name it or if it has moved."""
    hookpoint: typing.Annotated[str | None, shown_default("the SAE's", "NAME")] = None
    """Module whose output the SAE takes, if the SAE does not name it."""
    architecture: typing.Annotated[str | None, shown_default("those of saetrain only", "NAME")] = None
    """Import your own architecture, package.module:Class, which an SAE in PATH has."""
    eval_tokens: typing.Annotated[
        EvalTokens | None, shown_default("the run's, else 50000 on a CPU, 1000000 on a GPU", "INT")
    ] = None
    """Held-out tokens per data set. If you pass a number, that many must exist; the default is only an upper limit."""
    scoring: ScoreSettings = field(default_factory=ScoreSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    dead_percentage_threshold: typing.Annotated[Share | None, shown_default("the run's, else 0.0005", "FLOAT")] = None
    """A latent counts as dead if it fires on less than this share of tokens."""
    base: ModelSettings = field(default_factory=ModelSettings)
    split: typing.Annotated[str | None, shown_default("the held-out split, else train", "NAME")] = None
    """Split of --dataset; `train[:10%]` selects a part."""
    dataset_config: typing.Annotated[str | None, shown_default("the only one", "NAME")] = None
    """Configuration of --dataset, if it has several."""
    text_column: typing.Annotated[str | None, shown_default("detected", "NAME")] = None
    """Column of --dataset that contains the text."""
    skip_bad_rows: bool = False
    """Skip and count unreadable rows of --dataset."""
    ctx_len: typing.Annotated[CtxLen | None, shown_default("the SAE's", "INT")] = None
    """Tokens per sequence."""
    exclude_special_tokens: typing.Literal["auto", "true", "false"] = "auto"
    """Exclude special tokens from the main metrics. `auto` does as the SAE's training did."""
    exclude_sinks: typing.Literal["auto", "true", "false"] = "auto"
    """Exclude position 0 of a causal model. `auto` does as the SAE's training did."""
    out: typing.Annotated[str | None, shown_default("PATH", "DIR")] = None
    """Folder for evaluation/<data set>.json and final_assessment.json."""
    details: bool = True
    """Print all metrics and reasons of each SAE; without, one row per SAE and its verdict."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset and not self.in_sample:
            raise SaetrainError("--in_sample false: no text is left to score on; name a data set with --dataset")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Show the evaluations of several runs, one SAE per row, with the settings in which the runs differ."""

    runs: tyro.conf.Positional[typing.Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Directories of runs, or folders of single SAEs, that have an assessment."""
    out: typing.Annotated[str | None, shown_default("none: the table is only printed", "FILE")] = None
    """File to write all metrics and settings to, ending in `.json` or `.csv`."""
    csv: typing.Annotated[str | None, shown_default("none", "FILE")] = None
    """File to write all metrics and settings to, as CSV."""
    sort: typing.Annotated[str | None, shown_default("none: as given", "METRIC")] = None
    """Metric by which to sort the SAEs, the best first, such as fvu."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise SaetrainError("RUN is missing: pass the folders of one or more runs")
        if self.out is not None and Path(self.out).suffix not in (".json", ".csv"):
            raise SaetrainError(f"--out {self.out}: must end in .json or .csv")


@dataclass(frozen=True, kw_only=True)
class PushConfig(Settings):
    """Upload the SAEs of a finished run to the Hugging Face hub, with model cards and evaluation."""

    run: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Directory of a finished run."""
    repo: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="USER/REPO")]]
    """Repository on the hub; it is created if it does not exist."""
    private: bool = False
    """Create a private repository."""
    revision: typing.Annotated[str | None, shown_default("main", "BRANCH")] = None
    """Branch to upload to; it is created from main if it does not exist."""
    model: typing.Annotated[str | None, shown_default("the folder's name, for a local model", "HUB_ID")] = None
    """Hub id of the model, if the run used a local copy."""
    report: bool = True
    """Also upload the run's report, which contains excerpts of the text."""
    dry_run: bool = False
    """List the files with their sizes, and stop."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Settings):
    """Collect what each latent of the SAEs in PATH fires on and what it does, into the folder `features` of the run."""

    path: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """Run directory, or folder of one SAE, of saetrain or another library."""
    features: FeatureSettings = field(default_factory=FeatureSettings)
    dataset: typing.Annotated[str | None, shown_default("the training data set", "D")] = None
    """Other text to read: hub id, local folder or file."""
    model: typing.Annotated[str | None, shown_default("the SAE's", "MODEL")] = None
    """Hub id or local folder of the model, if the SAE does not name it or if it has moved."""
    base: ModelSettings = field(default_factory=ModelSettings)
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features.feature_tokens == 0:
            raise SaetrainError("--feature_tokens 0: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Write RUN/report.html: the run, its SAEs and their latents in one page that needs no network."""

    run: tyro.conf.Positional[typing.Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Directory of a finished run."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Train an SAE on a small encoder and Python's documentation, and show what its latents fire on."""

    max_tokens: Total = 400_000
    """Tokens to train on."""
    folder: str = "demo"
    """Folder for the texts and the run."""
    texts: Size = 1000
    """Number of held-out texts to search for activations."""
    debug: bool = False
    """Show the traceback of an error."""


def settings_sections(config: type) -> dict[str, type]:
    """Return {field of ``config``: its settings class}."""
    hints = typing.get_type_hints(config)
    return {
        item.name: hints[item.name] for item in dataclasses.fields(config) if dataclasses.is_dataclass(hints[item.name])
    }


def setting_types(config: type) -> dict[str, Any]:
    """Return {setting: type} of all settings of ``config``, as in a settings file."""
    sections, out = settings_sections(config), {}
    for cls in (*sections.values(), config):
        hints = typing.get_type_hints(cls)
        out.update({item.name: hints[item.name] for item in dataclasses.fields(cls) if item.name not in sections})
    return out


def flag_types(config: type) -> dict[str, Any]:
    """Return {flag without dashes: type} of all settings of ``config`` except the positionals."""
    hints = typing.get_type_hints(config, include_extras=True)
    no_flags = {
        name for name, hint in hints.items() if {tyro.conf.Positional, tyro.conf.Suppress} & {*typing.get_args(hint)}
    }
    return {name: hint for name, hint in setting_types(config).items() if name not in no_flags}


def to_flat(config: RunConfig) -> dict[str, Any]:
    """Return {flag: value} with plain YAML types."""
    out: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        out.update(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {item.name: value})  # type: ignore[arg-type]
    if len(config.dataset) == 1:
        out["dataset"] = config.dataset[0]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}


def from_flat(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Return the settings in ``values``, with defaults for the rest.

    Raises SaetrainError that names ``origin`` (a file) for unknown keys and for values of a wrong type.
    """
    config = config_class(str(values.get("architecture", RunConfig.architecture)))
    types = setting_types(config)
    for name in values:
        if name not in types:
            suggestion = did_you_mean(name, types)
            raise SaetrainError(f"{origin}: there is no setting '{show_text(name)}'.{suggestion}")
    # The command line may add the model and the data set.
    rest: dict[str, Any] = {"model": "", "dataset": ()}
    rest |= {name: convert_value(value, types[name], f"{origin}: {name}") for name, value in values.items()}
    sections: dict[str, Any] = {}
    for section, cls in settings_sections(config).items():
        names = [item.name for item in dataclasses.fields(cls) if item.name in rest]
        sections[section] = cls(**{name: rest.pop(name) for name in names})
    return config(**sections, **rest)


PER_INVOCATION = ("resume", "overwrite", "force", "dry_run", "debug")
"""Flags that apply to one start only; a settings file must not repeat them unnoticed."""


def write_yaml(path: Path, config: RunConfig) -> None:
    """Write the settings to a YAML file that ``--config`` can read."""
    values = {name: value for name, value in to_flat(config).items() if name not in PER_INVOCATION}
    write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
