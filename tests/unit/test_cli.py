"""Words -> settings: spellings, defaults, files, and messages that help."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import saetrain
from saetrain.cli import main, parse_train
from saetrain.config import RunConfig, config_class, flag_types, from_flat, to_flat, write_yaml
from saetrain.errors import SaetrainError

BASE = ["bert-base-uncased", "wikitext"]
# The promises of the command line; a change here changes what users have written in their scripts.
DEFAULTS = {
    "layers": None,
    "layer_stride": None,
    "max_tokens": 1_000_000,
    "batch_size": 4,
    "ctx_len": None,
    "grad_acc_steps": 1,
    "k": 192,
    "expansion_factor": 32,
    "num_latents": None,
    "optimizer": "adam",
    "lr": 0.001,
    "weight_decay": None,
    "loss_fn": "mse",
    "dead_percentage_threshold": 0.0005,
    "dead_feature_threshold": None,
    "save_dir": "./output",
    "run_name": None,
    "save_every": 1000,
    "log_to_wandb": False,
    "wandb_log_frequency": 100,
    "shuffle_seed": 42,
    "init_seeds": [42],
    "data_preprocessing_num_proc": 1,
    "exclude_special_tokens": True,
    "resume": False,
    "overwrite": False,
}


def refused(*words: str) -> str:
    with pytest.raises(SaetrainError) as caught:
        parse_train([*BASE, *words])
    return str(caught.value)


def test_defaults() -> None:
    flat = to_flat(parse_train(BASE))
    assert {name: flat[name] for name in DEFAULTS} == DEFAULTS


def test_the_original_command_is_understood() -> None:
    words = (
        "--layers 6 --batch_size 4 --k 32 --num_latents 200 --grad_acc_steps 8 --ctx_len 512 --save_dir ./x "
        "--shuffle_seed 42 --init_seeds 42 --optimizer adam --lr 0.01 --save_every 500 --run_name r "
        "--log_to_wandb true --wandb_log_frequency 10 --dead_percentage_threshold 0.1"
    )
    config = parse_train([*BASE, *words.split()])
    assert (config.where.layers, config.sae.num_latents, config.optim.lr) == ((6,), 200, 0.01)
    assert config.logs.log_to_wandb is True


@pytest.mark.parametrize(
    "words",
    ["--max-tokens 5 --grad-acc-steps 2", "--max_tokens=5 --grad_acc_steps=2", "--max_tokens 5 --grad-acc_steps 2"],
)
def test_dashes_underscores_and_equals_signs(words: str) -> None:
    train = parse_train([*words.split(), *BASE]).train
    assert (train.max_tokens, train.grad_acc_steps) == (5, 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--resume"], True),
        (["--resume", "true"], True),
        (["--resume=True"], True),
        (["--resume", "1"], True),
        (["--resume", "false"], False),
        (["--resume=no"], False),
    ],
)
def test_spellings_of_booleans(words: list[str], expected: bool) -> None:
    assert parse_train([*BASE, *words]).output.resume is expected
    assert parse_train([*words, *BASE]).output.resume is expected


def test_positionals_may_stand_anywhere() -> None:
    config = parse_train(["--layers", "1", "2", "--k", "8", *BASE])
    assert (config.model, *config.dataset, config.where.layers) == (*BASE, (1, 2))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_unknown_flags_suggest_the_nearest_wherever_they_stand(position: int) -> None:
    words = [*BASE[:position], "--layrs", "3", *BASE[position:]]
    with pytest.raises(SaetrainError, match=r"--layrs: no such flag. Did you mean --layers"):
        parse_train(words)


@pytest.mark.parametrize(
    ("flag", "suggested"),
    [
        ("learning_rate", ["lr"]),
        ("output_dir", ["save_dir"]),
        ("seed", ["init_seeds"]),
        ("epochs", ["max_tokens"]),
        ("overwrit", ["overwrite"]),
        ("verbose", []),
        ("force_run", []),
        ("cache_directory", ["cache_dir"]),
    ],
)
def test_suggestions_are_sensible_and_never_dangerous(flag: str, suggested: list[str]) -> None:
    found = re.search(
        rf"--{flag}: no such flag\.(?: Did you mean (.*)\?)? 'saetrain --help all'", refused(f"--{flag}", "1")
    )
    assert found is not None
    assert (found[1] or "").replace("--", "").split(" or ") == (suggested or [""])


@pytest.mark.parametrize(
    ("words", "layers"),
    [("all", ("all",)), ("0-5", ("0-5",)), ("0-3 7", ("0-3", 7)), ("3", (3,))],
)
def test_layers_are_numbers_ranges_or_all_before_and_after_the_positionals(words: str, layers: tuple) -> None:
    for line in ([*BASE, "--layers", *words.split()], ["--layers", *words.split(), *BASE]):
        config = parse_train(line)
        assert (config.model, *config.dataset, config.where.layers) == (*BASE, layers)


def test_layers_in_a_file_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("layers: [1, x]")
    with pytest.raises(
        SaetrainError, match="--layers 1 x: pass one or more numbers from 0, ranges such as 0-5, or all"
    ):
        parse_train([*BASE, "--config", str(tmp_path / "c.yaml")])


def test_a_pair_of_numbers_is_a_list() -> None:
    config = parse_train(["--l0_range", "9", "30", *BASE])
    assert (config.health.l0_range, config.model) == ((9.0, 30.0), BASE[0])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"saetrain {saetrain.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers 1 --hookpoints h.*", "--layers .* and --hookpoints can't be given together"),
        ("--layers 1 --layer_stride 2", "--layers and --layer_stride can't be given together"),
        ("--layers 1 1", "named twice"),
        ("--layer_stride 0", "--layer_stride 0: must be at least 1"),
        ("--max_tokens 0", "--max_tokens 0: must be at least 1"),
        ("--batch_size -3", "--batch_size -3: must be at least 1"),
        ("--grad_acc_steps 0", "--grad_acc_steps 0"),
        ("--k 0", "--k 0: must be at least 1"),
        ("--num_latents 0", "--num_latents 0"),
        ("--num_latents 8 --expansion_factor 2", "--num_latents and --expansion_factor can't be given together"),
        ("--layers 1,2", "--layers 1,2: not a number; pass numbers that are separated by spaces"),
        ("--layers -1", "--layers -1: pass one or more numbers from 0, ranges such as 0-5, or all"),
        ("--layers 5-0", "--layers 5-0: give the smaller number of a range first"),
        ("--layers 0-3 2", "--layers 0-3 2: a layer is named twice"),
        ("--layers all 2", "--layers all 2: a layer is named twice"),
        ("--layers most", "--layers: pass one or more numbers from 0, ranges such as 0-5, or all"),
        ("--max_tokens 8 16", "--max_tokens 8 16: takes one number; start one run per value, and show all with"),
        ("--lr 1e-3 1e-3", "--lr 1e-3 1e-3: has a value twice"),
        ("--expansion_factor 0", "--expansion_factor 0"),
        ("--auxk_alpha -1", "--auxk_alpha -1.0: must be at least 0"),
        ("--lr 0", "--lr 0.0: must be above 0"),
        ("--lr nan", "--lr nan"),
        ("--lr auto --optimizer sgd", "--lr auto: the rule is for adam"),
        ("--lr auto --loss_fn kl", "--lr auto: the rule is for adam, reconstruction"),
        ("--lr auto --finetune folder", "--lr auto: the rule is for adam, reconstruction and random initial weights"),
        ("--dead_bias_lift -1", "--dead_bias_lift -1.0: must be at least 0"),
        ("--dead_bias_lift 2 --optimizer sgd", "--dead_bias_lift 2: needs --optimizer adam"),
        ("--dead_bias_lift 2 --loss_fn ce", "--dead_bias_lift 2: needs --optimizer adam and --loss_fn mse"),
        ("--weight_decay -1", "--weight_decay -1.0"),
        ("--lr_warmup_steps -1", "--lr_warmup_steps -1"),
        ("--ctx_len 2", "--ctx_len 2: must be at least 4"),
        ("--dead_percentage_threshold 5", "--dead_percentage_threshold 5.0: must be at most 1"),
        ("--dead_feature_threshold 0", "--dead_feature_threshold 0"),
        ("--dead_feature_threshold 5 --dead_window_tokens 5", "the same setting"),
        ("--save_every 0", "--save_every 0"),
        ("--resume --overwrite", "--resume and --overwrite can't be given together"),
        ("--run_name a/b", "--run_name 'a/b': must be a plain folder name"),
        (
            "--loss_fn kl --init_seeds 1 2",
            "--loss_fn kl with 2 --init_seeds: each SAE needs its own forward and backward pass",
        ),
        ("--loss_fn kl --e2e_recon_weight -1", "--e2e_recon_weight -1.0: must be at least 0"),
        ("--e2e_recon_weight 0.1", "--e2e_recon_weight 0.1: works only with --loss_fn ce or kl"),
        ("--init_seeds 1 1", "--init_seeds"),
        ("--shuffle_seed -1", "--shuffle_seed -1"),
        ("--data_shards 0", "--data_shards 0"),
        ("--data_preprocessing_num_proc 0", "--data_preprocessing_num_proc 0"),
        ("--buffer_tokens 0", "--buffer_tokens 0"),
        ("--model_batch_tokens 0", "--model_batch_tokens 0"),
        ("--eval_tokens 0", "--eval_tokens 0"),
        ("--eval_every -1", "--eval_every -1"),
        ("--log_every 0", "--log_every 0"),
        ("--wandb_log_frequency 0", "--wandb_log_frequency 0"),
        ("--data_shards 100000", "--data_shards 100000: must be at most 4096"),
        ("--lr 1e40", r"--lr 1e\+40: must be at most 1000000000000"),
        ("--run_name ..", "--run_name '..': must be a plain folder name"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(SaetrainError, match=message):
        parse_train([*BASE, *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--k many", "--k: found 'many', must be a whole number$"),
        ("--k=", "--k: found '', must be a whole number$"),
        ("--k 3.5", "--k: found '3.5', must be a whole number$"),
        ("--k", "--k: its value is missing; it must be a whole number$"),
        ("--optimizer lion", "--optimizer: found 'lion', must be adam or sgd$"),
        ("--lr fast", "--lr: found 'fast', must be a number or auto$"),
        ("--init_seeds 1.5", r"--init_seeds: found \['1.5'\], must be a list of whole numbers$"),
        ("--l0_range a b", "--l0_range: its value is missing; it must be a list of numbers$"),
        ("--grad_acc_steps 8 16", "--grad_acc_steps 8 16: takes one number; start one run per value"),
        ("-x", "Unrecognized options: -x"),
    ],
)
def test_values_of_a_wrong_type_and_odd_words_are_refused_in_one_line(words: str, message: str) -> None:
    assert re.search(message, refused(*words.split()))


def test_every_flag_refuses_a_value_of_another_type() -> None:
    for name, hint in flag_types(config_class("topk")).items():
        if "str" not in str(hint):
            message = refused(f"--{name}=no number")
            assert message.startswith((f"--{name}: found", "no number: one argument too many")), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["--help", "all"]])
def test_output_to_a_full_disk_ends_in_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "saetrain", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"saetrain: error: standard output can't be written .*\n", done.stderr)


@pytest.mark.slow
def test_output_to_a_closed_pipe_ends_without_a_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "saetrain", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_lr_takes_auto() -> None:
    assert parse_train([*BASE, "--lr", "auto"]).optim.lr == "auto"


def test_yaml_round_trip_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    config = parse_train([*BASE, "--layers", "1", "2", "--lr", "auto", "--k", "7", "--init_seeds", "3", "4"])
    write_yaml(path, config)
    assert parse_train(["--config", str(path)]) == config
    assert parse_train(["--config", str(path), "--k", "9"]).sae.k == 9
    assert parse_train(["other-model", "other-data", f"--config={path}"]).model == "other-model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("expansion_facto: 3", "there is no setting 'expansion_facto'. Did you mean expansion_factor"),
        ("k: many", "k: found 'many', must be a whole number$"),
        ("k: true", "k: found True, must be a whole number$"),
        ("k: 3.5", "k: found 3.5, must be a whole number$"),
        ("k: null", "k: found None, must be a whole number$"),
        ("k: [3]", r"k: found \[3\], must be a whole number$"),
        ("lr: fast", "lr: found 'fast', must be a number or auto$"),
        ("lr: yes", "lr: found True, must be a number or auto$"),
        ("resume: maybe", "resume: found 'maybe', must be true or false$"),
        ("run_name: 7", "run_name: found 7, must be a string or null$"),
        ("layers: 1.5", "layers: found 1.5, must be a list of whole numbers or strings or null"),
        ("init_seeds: many", "init_seeds: found 'many', must be a list of whole numbers$"),
        ("optimizer: lion", "must be adam or sgd"),
        ("- 1", "must contain lines"),
        ("a: [", "is not valid YAML"),
        ("k: 3", "MODEL is missing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(SaetrainError, match=message) as caught:
        parse_train(["--config", str(path)])
    assert "c.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("layers: 3", (3,)),
        ("layers: [3, 4]", (3, 4)),
        ("layers: all", ("all",)),
        ("layers: [0-3, 7]", ("0-3", 7)),
        ("layers: null", None),
        ("hookpoints: h.1", ("h.1",)),
        ("lr: 1e-3", 0.001),
        ("lr: 1", 1.0),
        ("lr: auto", "auto"),
        ("mix: 1", (1.0,)),
        ("k: '3'", 3),
        ("resume: yes", True),
        ("resume: off", False),
        ("run_name: 1e3", "1e3"),
        ("grad-acc-steps: 2", 2),
    ],
)
def test_natural_spellings_in_a_file(tmp_path: Path, line: str, expected: object) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{line}\nmodel: m\ndataset: d\n")
    config = parse_train(["--config", str(path)])
    name = line.partition(":")[0].replace("-", "_")
    sections = [config, *(getattr(config, field.name) for field in dataclasses.fields(config))]
    value = next(getattr(section, name) for section in sections if hasattr(section, name))
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--hookpoints", "h.1.mlp"], {"layers": None, "hookpoints": ["h.1.mlp"]}),
        (["--layer_stride", "2"], {"layers": None, "layer_stride": 2}),
        (["--expansion_factor", "4"], {"num_latents": None, "expansion_factor": 4}),
        (["--dead_feature_threshold", "9"], {"dead_window_tokens": None, "dead_feature_threshold": 9}),
    ],
)
def test_a_flag_takes_the_place_of_its_rivals_in_the_file(
    tmp_path: Path, words: list[str], expected: dict[str, object]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("layers: [6]\nnum_latents: 64\ndead_window_tokens: 5\nmodel: m\ndataset: d\n")
    flat = to_flat(parse_train(["--config", str(path), *words]))
    assert {name: flat[name] for name in expected} == expected


def test_positionals_may_follow_a_list_of_numbers() -> None:
    config = parse_train(["--layers", "1", *BASE, "--init_seeds", "3", "4"])
    assert (config.model, config.where.layers, config.train.init_seeds) == ("bert-base-uncased", (1,), (3, 4))


def test_positionals_keep_their_order_around_a_list_of_numbers() -> None:
    config = parse_train(["gpt2", "--layers", "3", "wikitext", "texts.jsonl"])
    assert (config.model, config.dataset, config.where.layers) == ("gpt2", ("wikitext", "texts.jsonl"), (3,))


def test_without_arguments_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: saetrain MODEL DATASET")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaetrainError, match=r"nowhere\.yaml: can't be read"):
        parse_train([*BASE, "--config", str(tmp_path / "nowhere.yaml")])


def test_every_setting_survives_the_flat_form() -> None:
    config = parse_train(BASE)
    assert from_flat(to_flat(config), "here") == config
    assert set(to_flat(config)) == {*flag_types(config_class("topk")), "model", "dataset", "grid"}


def test_short_help_fits_on_a_screen_and_shows_real_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 43
    assert max(map(len, lines)) <= 80
    real = to_flat(parse_train(BASE))
    flags = [line for line in lines if line.startswith("  --")]
    assert len(flags) >= 12
    for line in flags:
        name = line.split()[0].removeprefix("--")
        assert name in {*flag_types(config_class("topk")), "config", "version"}, line
        default = re.search(r"\(default: (\S+)\)", line)
        if default is not None and real[name] is not None:
            assert str(real[name]).removeprefix("./").strip("[]") == default[1], line


@pytest.mark.slow
def test_help_all_names_every_flag_and_imports_neither_transformers_nor_datasets() -> None:
    code = (
        "import sys\nfrom saetrain.cli import main\n"
        "try: main(['--help', 'all'])\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'transformers', 'datasets', 'wandb', 'pydantic'} & set(sys.modules), 'slow import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in flag_types(config_class("topk")):
        assert f"--{name} " in done.stdout, name
    assert done.stdout.count("(default:") >= len(flag_types(config_class("topk")))


def test_errors_are_one_line_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*BASE, "--k", "0"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "saetrain: error: --k 0: must be at least 1\n"


@pytest.mark.parametrize(("words", "shown"), [("--debug", 1), ("--debug=true", 1), ("--debug false", 0), ("", 0)])
def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], words: str, shown: int) -> None:
    with pytest.raises(SystemExit) as end:
        main([*BASE, "--k", "0", *words.split()])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.count("Traceback (most recent call last)") == shown
    assert "saetrain: error: --k 0" in message


@pytest.mark.slow
def test_module_and_script_are_the_same_command() -> None:
    for command in ([sys.executable, "-m", "saetrain"], [str(Path(sys.executable).parent / "saetrain")]):
        done = subprocess.run([*command, *BASE, "--nope"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("saetrain: error: --nope: no such flag.")


def test_the_written_settings_are_plain_yaml(tmp_path: Path) -> None:
    write_yaml(tmp_path / "c.yaml", RunConfig(model="m", dataset=("d",)))
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["init_seeds"] == [42]


@pytest.mark.parametrize(
    ("words", "lift"),
    [("", 4.0), ("--dead_bias_lift 0", 0.0), ("--dead_bias_lift 2.5", 2.5), ("--optimizer sgd", 0.0),
     ("--loss_fn kl", 0.0), ("--loss_fn fvu --finetune folder", 4.0)],
)  # fmt: skip
def test_what_lifts_the_biases_of_dead_latents(words: str, lift: float) -> None:
    assert parse_train([*BASE, *words.split()]).dead_bias_lr_multiplier == lift
