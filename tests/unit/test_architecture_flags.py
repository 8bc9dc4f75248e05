"""``--architecture``: its settings are flags, and neither flags nor files choose more than they may."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from saetrain.cli import main, parse_evaluate, parse_train
from saetrain.coders import CoderSettings, TopK, find_coder_class
from saetrain.config import config_class, flag_types, from_flat, to_flat
from saetrain.errors import SaetrainError

BASE = ["bert-base-uncased", "wikitext"]


def refused(*words: str) -> str:
    with pytest.raises(SaetrainError) as caught:
        parse_train([*BASE, *words])
    return str(caught.value)


@dataclass(frozen=True, kw_only=True)
class OtherSettings(CoderSettings):
    """SAE with settings of types that no other settings class has."""

    penalty: float = 32.0
    bounds: tuple[int, int] = (1, 2)


class OtherCoder(TopK):
    Settings = OtherSettings


OTHER = f"{__name__}:OtherCoder"


def test_the_architecture_chooses_the_settings_class() -> None:
    config = from_flat({"model": "m", "architecture": OTHER, "penalty": "6e1", "bounds": [3, 4], "lr": 1}, "c.yaml")
    assert (config.sae, config.optim.lr) == (OtherSettings(penalty=60.0, bounds=(3, 4)), 1.0)
    assert config.coder_class is OtherCoder
    assert from_flat(to_flat(config), "c.yaml") == config
    assert flag_types(type(config)).keys() - flag_types(config_class("topk")).keys() == {"penalty", "bounds"}
    assert parse_train([*BASE, "--architecture", OTHER, "--penalty", "3"]).sae == OtherSettings(penalty=3.0)
    with pytest.raises(SaetrainError, match=r"c\.yaml: there is no setting 'auxk_alpha'"):
        from_flat({"architecture": OTHER, "auxk_alpha": 3}, "c.yaml")
    with pytest.raises(SaetrainError, match=r"c\.yaml: bounds: found \[3\], must be a list of whole numbers"):
        from_flat({"architecture": OTHER, "bounds": [3]}, "c.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--architecture {OTHER} --auxk_alpha 1", "--auxk_alpha: a flag of --architecture topk, batchtopk"),
        ("--prefixes 0.5 1", "--prefixes: a flag of --architecture matryoshka only"),
        ("--architecture matryoshka --prefixes 0.5 0.25 1", "--prefixes 0.5 0.25 1: must increase and end with 1"),
        ("--architecture matryoshka --prefixes 0.25 0.5", "--prefixes 0.25 0.5: must increase and end with 1"),
        ("--architecture matryoshka --prefixes 0 1", "--prefixes 0.0: must be above 0"),
        ("--architecture topkk", "--architecture topkk: no such architecture. Did you mean topk"),
        ("--architecture no.such:Coder", "--architecture no.such:Coder: no.such can't be imported: ModuleNotFound"),
        (f"--architecture {__name__}:BASE", f"--architecture {__name__}:BASE: {__name__} has no class BASE"),
    ],
)
def test_architectures_and_their_flags_are_refused_by_name(words: str, message: str) -> None:
    assert message in refused(*words.split())


def test_the_help_shows_the_flags_of_the_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for words in ([], ["--architecture", OTHER]):
        with pytest.raises(SystemExit):
            main([*words, "--help", "all"])
        shown[tuple(words)] = capsys.readouterr().out
    own, other = shown.values()
    assert "--auxk_alpha" in own
    assert "--auxk_alpha" not in other


def test_a_file_does_not_import_code(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("architecture: no.such:Coder\n")
    assert "your own code is not imported because a file names it" in refused("--config", str(path))
    path.write_text("architecture: [a]\n")
    assert "no such architecture" in refused("--config", str(path))
    path.write_text("architecture: topk\n")
    assert "is for architecture topk" in refused("--config", str(path), "--architecture", OTHER)


def test_a_file_does_not_make_a_lazy_package_import(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    lazy = ModuleType("lazy_package")
    lazy.__getattr__ = read.append  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "lazy_package", lazy)
    with pytest.raises(SaetrainError, match="lazy_package has no class Coder"):
        find_coder_class("lazy_package:Coder", may_import=False)
    assert not read


def test_an_abstract_class_is_refused_with_its_missing_methods() -> None:
    with pytest.raises(SaetrainError, match="SparseCoder is abstract; it does not define encode"):
        find_coder_class("saetrain.coders.base:SparseCoder", may_import=False)


def test_other_commands_do_not_advise_an_architecture() -> None:
    with pytest.raises(SaetrainError, match="--auxk_alpha: no such flag"):
        parse_evaluate(["output/first", "--auxk_alpha", "1"])
