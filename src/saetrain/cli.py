"""Command line: parses the arguments into settings, starts the run, and prints a user's error as one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from saetrain import distributed
from saetrain.cli_help import DESCRIPTION, SHORT_HELP
from saetrain.cli_suggestions import explain_parser_message, require_command_or_model
from saetrain.cli_words import (
    FALSE_WORDS,
    find_value,
    find_values,
    given_flags,
    list_combinations,
    normalize_flags,
    split_off_file,
)
from saetrain.coders import find_coder_class
from saetrain.config import (
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    FeaturesConfig,
    PushConfig,
    ReportConfig,
    RunConfig,
    TokenizeConfig,
    config_class,
    flag_types,
    from_flat,
)
from saetrain.distributed import env
from saetrain.errors import RankFailure, SaetrainError
from saetrain.explore.settings import ExploreConfig
from saetrain.grid import apply_point, expand_grid, join_configs, parse_points
from saetrain.runs.cache_settings import CacheConfig
from saetrain.small_files import read_settings
from saetrain.typed_values import convert_value, describe_type, takes_list
from saetrain.untrusted import escape_text, format_error, require_plain_text, show_text

COMMANDS: dict[str, tuple[type, str]] = {
    "tokenize": (TokenizeConfig, "saetrain.runs.tokenize:tokenize_dataset"),
    "evaluate": (EvaluateConfig, "saetrain.runs.evaluate.run:evaluate_saes"),
    "features": (FeaturesConfig, "saetrain.runs.features:collect_features"),
    "compare": (CompareConfig, "saetrain.runs.compare:compare_runs"),
    "report": (ReportConfig, "saetrain.report.build:report_run"),
    "explore": (ExploreConfig, "saetrain.explore.run:explore_run"),
    "cache": (CacheConfig, "saetrain.runs.cache:manage_cache"),
    "push": (PushConfig, "saetrain.runs.share.push:push_run"),
    "demo": (DemoConfig, "saetrain.runs.demo:run_demo"),
}
"""Commands other than training: {name: (settings, module:function)}."""
tyro_registry = ConstructorRegistry()
Config = typing.TypeVar("Config")


@tyro_registry.primitive_rule
def _lower_case_bool_rule(info: Any) -> PrimitiveConstructorSpec[bool] | None:
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        choices=("true", "false"),
        instance_from_str=lambda words: words[0] == "true",
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with 2 after a user's mistake.

    ``argv`` defaults to the arguments of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _is_debug_requested(words)
    try:
        try:
            with distributed.process_group_context(), _explain_file_errors():
                _run_command(words)
        finally:
            sys.stdout.flush()
    except SaetrainError as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                print(escape_text(line), file=sys.stderr)
        # A mistake that every rank finds is printed by the first rank; a dead rank is reported by each remaining rank.
        if distributed.report_failure(str(error), error.exit_code) or (
            isinstance(error, RankFailure) and env.should_print_error(error)
        ):
            print(format_error(f"saetrain: {distributed.rank_prefix()}error: ", error), file=sys.stderr)
        distributed.exit_now(error.exit_code)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(_abandon_stdout(error)) from None


@contextlib.contextmanager
def _explain_file_errors() -> Iterator[None]:
    """Raise SaetrainError instead of an OSError that names a file, such as one without permission."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise SaetrainError(f"{show_text(error.filename)}: {error.strerror}") from error


def _abandon_stdout(error: OSError) -> int:
    """Return the exit code after a write to stdout has failed with ``error``; re-raise an error of another file."""
    try:
        # The failed write has emptied the buffer, so only another write fails again.
        print(flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
        message = f"standard output can't be written ({error.strerror}); what the command saved before is complete"
        print(escape_text(f"saetrain: error: {message}"), file=sys.stderr)
        return SaetrainError.exit_code
    raise error


def _is_debug_requested(words: list[str]) -> bool:
    """Return whether --debug is given, even if another flag can't be parsed."""
    value = find_value(words, "debug")
    return value is not None and value.lower() not in FALSE_WORDS


def _run_command(words: list[str]) -> None:
    """Run the command that the first word names; without a command, train."""
    command = words[0] if words else ""
    if "--version" in words:
        if not env.rank():
            print(escape_text(f"saetrain {version('saetrain')}"))
    elif command in COMMANDS:
        env.require_one_rank(command)
        _run_single_process(command, words[1:])
    elif not words:
        if not env.rank():
            print(SHORT_HELP, end="", file=sys.stderr)
        raise SystemExit(2)
    elif {"-h", "--help"} & set(words):
        if not env.rank():
            _print_help(words)
    else:
        require_command_or_model(command, ["train", *COMMANDS])
        config = parse_train(words[1:] if command == "train" and not os.path.exists(command) else words)
        from saetrain.runs.train.run import train_saes

        train_saes(config)


def _run_single_process(command: str, words: list[str]) -> None:
    """Run a command other than training; its modules are imported only now, because they are slow to import."""
    config_type, place = COMMANDS[command]
    config = parse_evaluate(words) if command == "evaluate" else parse_command(config_type, command, words)
    module, _, function = place.partition(":")
    getattr(import_module(module), function)(config)


def _print_help(words: list[str]) -> None:
    """Print the short help, or every flag of the given architecture for ``--help all``."""
    position = next(number for number, word in enumerate(words) if word in ("-h", "--help"))
    if words[position + 1 : position + 2] == ["all"]:
        given = find_value(words, "architecture")
        parse_train(["--help", *(["--architecture", given] if given else [])])
    print(SHORT_HELP, end="")


def parse_train(words: Sequence[str]) -> RunConfig:
    """Parse the arguments of training; raise SaetrainError, or let tyro exit with 2, if they are not valid."""
    words, path = split_off_file(list(words), "config")
    words, grid_path = split_off_file(words, "grid")
    values = read_settings(path) if path else {}
    points = parse_points(read_settings(grid_path, "--grid "), f"--grid {grid_path}") if grid_path else []
    given = find_values(words, "architecture")
    named = given or [str(values.get("architecture", RunConfig.architecture))]
    types: dict[str, Any] = {}
    for name in dict.fromkeys([*named, *(str(point["architecture"]) for point in points if "architecture" in point)]):
        # A module is imported only if the command line names it, because the import runs its code.
        types |= flag_types(config_class(name, may_import=name in given))
    words = normalize_flags(words, types, "saetrain --help all", has_grid=True)
    if {"num_latents", "expansion_factor"} <= given_flags(words):
        # A file contains both, because the number of latents is resolved from the factor.
        raise SaetrainError("--num_latents and --expansion_factor can't be given together: choose one")
    combinations = list_combinations(words)
    if values.get("grid") and (points or len(combinations) > 1):
        raise SaetrainError(f"--config {path}: has a grid already; pass one value per flag, and no --grid")
    if points and len(combinations) > 1:
        raise SaetrainError(f"--grid {grid_path}: lists all SAEs, so pass one value per flag")
    configs = [_parse_one(each, values, path) for each in combinations]
    configs = [apply_point(configs[0], point, f"--grid {grid_path}") for point in points] or configs
    config = join_configs(configs)
    # The error about equal SAEs comes before anything slow.
    expand_grid(config)
    return config


def _parse_one(words: list[str], values: dict[str, Any], path: str | None) -> RunConfig:
    """Parse the normalized words of a run with one value per flag; ``values``: those of the file ``path``."""
    given, values = find_value(words, "architecture"), dict(values)
    config_type = config_class(given or str(values.get("architecture", RunConfig.architecture)))
    if given and values.get("architecture", given) != given:
        raise SaetrainError(f"--architecture {given}: {path} is for architecture {values['architecture']}")
    if given:
        values["architecture"] = given
    if find_value(words, "activations") is not None and not path:
        path, values = "--activations", {"architecture": given or RunConfig.architecture}
    defaults = from_flat(_without_overridden(values, words), path) if path else tyro.MISSING_NONPROP
    config: RunConfig = _parse_words(config_type, "saetrain", words, default=defaults, description=DESCRIPTION)
    if config.activations is not None:
        return _replace_model_by_activations(config)
    for name in ("model", "dataset"):
        if not getattr(config, name):
            from saetrain.runs.run_dir import is_run_dir

            if is_run_dir(Path(config.model)):
                raise SaetrainError(f"{config.model}: is a run directory; saetrain evaluate, report and others take it")
            where = f" or as '{name}:' in {path}" if path else ""
            raise SaetrainError(f"{name.upper()} is missing: give it on the command line{where}")
    config.mixing.normalized_shares(len(config.dataset))
    return config


def _replace_model_by_activations(config: RunConfig) -> RunConfig:
    """Return the settings of a run on stored activations, whose folder takes the place of model and data set."""
    folder = config.activations
    assert folder is not None
    if config.model not in ("", folder) or config.dataset not in ((), (folder,)):
        raise SaetrainError(f"--activations {folder}: takes the place of MODEL and DATASET; omit {config.model}")
    return dataclasses.replace(config, model=folder, dataset=(folder,))


def parse_command(config_type: type[Config], command: str, words: Sequence[str]) -> Config:
    """Parse the arguments of ``saetrain COMMAND``."""
    words = normalize_flags(list(words), flag_types(config_type), f"saetrain {command} --help")
    found: Config = _parse_words(config_type, f"saetrain {command}", words)
    return found


def parse_evaluate(words: Sequence[str]) -> EvaluateConfig:
    """Parse the arguments of ``saetrain evaluate``; the settings of the run in PATH are the defaults."""
    words = normalize_flags(list(words), flag_types(EvaluateConfig), "saetrain evaluate --help")
    architecture = find_value(words, "architecture")
    if architecture:
        find_coder_class(architecture, may_import=True)

    def parse_with_defaults(default: Any) -> EvaluateConfig:
        return _parse_words(EvaluateConfig, "saetrain evaluate", words, default=default)

    path = words[0] if words and not words[0].startswith("--") else parse_with_defaults(tyro.MISSING_NONPROP).path
    from saetrain.runs.evaluate.setup import defaults_from_run

    return parse_with_defaults(defaults_from_run(require_plain_text(path, "PATH")) or tyro.MISSING_NONPROP)


def _parse_words(config_type: Any, prog: str, words: Sequence[str], **options: Any) -> Any:
    """Parse the words with tyro; raise SaetrainError with one line where tyro prints a box and exits."""
    printed = io.StringIO()
    markers: tuple[Any, ...] = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    if not {"-h", "--help"} & set(words):
        # Reading the documentation of all settings from their source takes more than half of the time.
        markers += (tyro.conf.HelptextFromCommentsOff,)
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(config_type, prog=prog, args=words, config=markers, **options, **TYRO_OPTIONS)
    except SystemExit as stop:
        if not stop.code:
            raise
    _require_flag_types(words, flag_types(config_type))
    raise SaetrainError(explain_parser_message(printed.getvalue(), prog))


def _require_flag_types(words: Sequence[str], types_by_flag: dict[str, Any]) -> None:
    """Raise SaetrainError for the first flag whose value is missing or has a wrong type."""
    for position, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in types_by_flag:
            hint = types_by_flag[name]
            values = (
                [value] if equals else list(takewhile(lambda each: not each.startswith("--"), words[position + 1 :]))
            )
            if not values:
                expected = describe_type(hint).removesuffix(" or null")
                raise SaetrainError(f"--{name}: its value is missing; it must be {expected}")
            convert_value(values if takes_list(hint) else values[0], hint, f"--{name}")


TYRO_OPTIONS: dict[str, Any] = {"registry": tyro_registry, "use_underscores": True}
MUTUALLY_EXCLUSIVE = (
    {"layers", "layer_stride", "hookpoints"},
    {"num_latents", "expansion_factor"},
    {"dead_window_tokens", "dead_feature_threshold"},
)
"""Groups of alternative settings: a flag replaces the other settings of its group in the file."""


def _without_overridden(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a file without those that the flags in ``words`` replace."""
    replaced = {name for group in MUTUALLY_EXCLUSIVE if group & given_flags(words) for name in group}
    return {name: value for name, value in values.items() if name not in replaced}
