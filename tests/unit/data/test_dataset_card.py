"""The YAML that describes a data set is refused by its line before a library reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from saetrain.data.dataset_card import MAX_CARD_BYTES, check_dataset_card, check_remote_card
from saetrain.data.sources import SourceSettings, open_dataset
from saetrain.errors import SaetrainError
from tests.fake_hub import serve_hub, use_hub

GOOD = '{"text": "some words"}\n'
LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", f"---\n{LAUGHS}---\n", r"README\.md: the front matter: is not valid YAML: line 2: anchors"),
        (
            "README.md",
            f"---\n# {'x' * MAX_CARD_BYTES}\n---\n",
            r"README\.md: its YAML is larger than 1,000,000 bytes",
        ),
        (".huggingface.yaml", LAUGHS, r"\.huggingface\.yaml: is not valid YAML: line 1: anchors"),
    ],
)
def test_the_card_of_a_data_set_is_checked(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    check_dataset_card(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(SaetrainError, match=message):
        open_dataset(str(tmp_path), SourceSettings())


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        (
            "---\na: !!python/object/apply:os.system [ls]\n---\n",
            "README.md: the front matter: .* line 2: anchors",
        ),
        (
            "---\na: 1\na: 2\n---\ntext",
            "README.md: .* line 3: the key 'a' occurs twice",
        ),
        ("---\na: " + "[" * 9999 + "\n---\n", "README.md: the front matter: .* is nested more than 64 levels deep"),
        ("---\na: &a [1]\nb: [*a]\n---\n", "README.md: the front matter: .* anchors"),
        ("---\nconfigs: 3\n---\n", "could not be read"),
        ("---\nconfigs:\n- config_name: a\n  data_files: ../../*\n---\n", "could not be read|was not found"),
        ("\xff", "README.md: line 1 is not UTF-8"),
    ],
)
def test_an_odd_description_next_to_the_data_is_named(tmp_path: Path, readme: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "README.md").write_text(readme, encoding="latin-1")
    with pytest.raises(SaetrainError, match=message):
        open_dataset(str(tmp_path), SourceSettings())


@pytest.mark.parametrize("name", ["someone/thing", "no name", "a/b/c"])
def test_a_data_set_that_is_not_downloaded_is_left_to_its_loader(hub_cache: Path, name: str) -> None:
    check_remote_card(name)


def test_the_card_of_a_data_set_on_the_hub_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub() as hub:
        use_hub(hub, monkeypatch, str(tmp_path))
        files = {"README.md": f"---\n{LAUGHS}---\n".encode(), "train.jsonl": GOOD.encode()}
        hub.add_repo("someone/thing", files)
        with pytest.raises(SaetrainError, match=r"README\.md: the front matter: is not valid YAML: line 2: anchors"):
            check_remote_card("someone/thing")
    assert not list(tmp_path.rglob("train.jsonl"))
