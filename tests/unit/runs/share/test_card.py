"""Model cards: what they contain, that text from data stays text, and that the user's parts are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from saetrain.coders import CODERS
from saetrain.errors import SaetrainError
from saetrain.interop.formats import load_sae, save_sae
from saetrain.runs.share.card import KEPT_MARKER, build_sae_card, escape_markdown, write_sae_cards
from saetrain.runs.share.local_paths import PathShortener, is_local_path
from saetrain.runs.share.records import read_sae_record

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) ![i](http://e.vil/i) *b* _c_ `d` "
    "| pipe | </td> {{ x }} {% y %} https://e.vil www.e.vil <http://e.vil> &lt; $x$ # h \\ \n\n"
    "# heading\n- item\x1b[31m\u202e"
)


@pytest.fixture
def sae(run_dir: Path) -> Path:
    return run_dir / "sae" / "encoder.layer.1"


def write_card(run_dir: Path, sae: Path) -> str:
    write_sae_cards(run_dir, [sae])
    return (sae / "README.md").read_text()


def change_config(sae: Path, **entries: Any) -> None:
    path = sae / "cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "saetrain": {**config["saetrain"], **entries}}))


@pytest.mark.parametrize(
    ("architecture", "remark"), [("batchtopk", "  # as jumprelu, the same codes"), ("standard", "")]
)
def test_only_libraries_that_can_load_it_are_named(run_dir: Path, sae: Path, architecture: str, remark: str) -> None:
    coder_class = CODERS[architecture]
    save_sae(sae, coder_class.build(coder_class.Settings(k=3, num_latents=20), 6), load_sae(sae)[1])
    text = write_card(run_dir, sae)
    assert f'sae = SAE.load_from_disk("path/to/this/folder"){remark}\n' in text
    assert "sparsify" not in text
    assert {"SAELens", "saetrain", architecture} <= set(ModelCard(text).data.to_dict()["tags"])


def test_the_card_describes_the_sae(run_dir: Path, sae: Path, home: Path) -> None:
    text = write_card(run_dir, sae)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "saetrain"
    assert {"sparse-autoencoder", "topk", "SAELens", "sparsify"} <= set(data["tags"])
    assert not {"license", "base_model", "datasets"} & data.keys(), "local paths are no hub ids"
    for part in (
        "# Sparse autoencoder: encoder.layer.1 of tiny\\_bert",
        "20 latents, of which 3 are active per token",
        "| data | my texts.jsonl |",
        "| training tokens | 6,400 in 50 steps |",
        "| optimizer, peak learning rate | adam, 0.004 |",
        "| seeds | weights 0, order of the text 42 |",
        "| metric | SAE | random decoder | mean | measured on |",
        "(small denominator) | 0.7123 (0.7 to 0.72) | 0.4 (0.39 to 0.41) | 0 | 5,000 |",
        "3/4 checks pass.",
        "- explained\\_variance: the SAE explains 71% of the variance",
        "was not trained on special tokens, activations with a norm above 56.5",
        'saetrain.load("path/to/this/folder")',
        'SAE.load_from_disk("path/to/this/folder")',
        'SparseCoder.load_from_disk("path/to/this/folder")',
    ):
        assert part in text
    assert str(home) not in text


def test_only_hub_ids_are_in_the_front_matter(run_dir: Path, sae: Path) -> None:
    data_sets = ["wikitext", "/data/own.jsonl", "a\n---\nb: c", "!!python/object:os.system"]
    change_config(sae, model="bert-base-uncased", dataset=data_sets)
    data = ModelCard(write_card(run_dir, sae)).data
    assert (data.base_model, data.datasets) == ("bert-base-uncased", ["wikitext"])


def test_only_formats_in_the_folder_are_explained(run_dir: Path, sae: Path) -> None:
    (sae / "sae.safetensors").unlink()
    text = write_card(run_dir, sae)
    assert "SAE.load_from_disk" in text
    assert "sparsify" not in text
    config = json.loads((sae / "cfg.json").read_text())
    coder = {"architecture": "package.module:Own", "d_in": 6, "d_sae": 20}
    (sae / "cfg.json").write_text(json.dumps({"saetrain": {**config["saetrain"], "coder": coder}}))
    text = write_card(run_dir, sae)
    assert "sae_lens" not in text
    assert "Own" in ModelCard(text).data.tags


def test_without_an_evaluation_the_card_has_the_figures_of_the_training(run_dir: Path, sae: Path) -> None:
    (run_dir / "final_assessment.json").unlink()
    text = write_card(run_dir, sae)
    assert "| fvu | 0.25 |" in text
    assert "without intervals and baselines" in text
    assert "## Verdict" not in text


def test_the_newer_assessment_counts(run_dir: Path, sae: Path) -> None:
    own = json.loads((run_dir / "final_assessment.json").read_text())
    entry = {**own["saes"]["encoder.layer.1"], "verdict": "1/4"}
    (sae / "final_assessment.json").write_text(json.dumps({**own, "saes": {"encoder.layer.1": entry}}))
    assert "1/4 checks pass" in write_card(run_dir, sae)
    (run_dir / "final_assessment.json").write_text(json.dumps(own))
    assert "3/4 checks pass" in write_card(run_dir, sae)


def test_text_from_data_stays_text(run_dir: Path, sae: Path) -> None:
    record = read_sae_record(run_dir, sae)
    entry = {**record.config["saetrain"], "dataset": HOSTILE, "hookpoint": HOSTILE, "model": f"m{HOSTILE}"}
    assert record.assessment is not None
    assert record.judged is not None
    check = {**record.judged["metrics"]["explained_variance"], "reason": HOSTILE, "advice": HOSTILE}
    figures = {**record.judged["figures"], HOSTILE: {**record.judged["figures"]["explained_variance"], "flag": HOSTILE}}
    hostile = dataclasses.replace(
        record,
        config={**record.config, "saetrain": entry},
        assessment={**record.assessment, "judged_on": {"data_set": HOSTILE, "in_sample": False, "held_out": HOSTILE}},
        judged={"verdict": HOSTILE, "metrics": {HOSTILE: check}, "figures": figures},
    )
    harmless, card = (ModelCard(build_sae_card(each, PathShortener([], {}))) for each in (record, hostile))
    assert card.data.to_dict() == harmless.data.to_dict()
    markdown = MarkdownIt("commonmark").enable("table")
    kinds = [[token.type for token in markdown.parse(each.text)] for each in (harmless, card)]
    # The only new elements are the rows of the table for the second metric.
    assert set(kinds[1]) == set(kinds[0])
    assert kinds[1].count("heading_open") == kinds[0].count("heading_open")
    inline = {child.type for token in markdown.parse(card.text) for child in token.children or ()}
    assert inline <= {"text", "text_special", "code_inline", "softbreak"}, inline
    assert not {"\x1b", "\u202e"} & set(str(card))


def test_escaped_text_reads_like_the_text() -> None:
    plain = HOSTILE.partition("\n")[0]
    (block,) = (token for token in MarkdownIt("commonmark").parse(escape_markdown(plain)) if token.type == "inline")
    assert "".join(child.content for child in block.children or ()).rstrip() == plain.rstrip()


def test_the_user_s_license_and_text_are_kept(run_dir: Path, sae: Path) -> None:
    text = write_card(run_dir, sae)
    card = ModelCard(text + "\nFeature 7 fires on dates.\n")
    card.data.license = "mit"
    card.data.tags = [*card.data.tags, "mine"]
    (sae / "README.md").write_text(str(card).replace("## Training", "## Replaced"))
    for _ in range(2):
        again = write_card(run_dir, sae)
    data = ModelCard(again).data
    assert data.license == "mit"
    assert "mine" in data.tags
    assert again.endswith(f"{KEPT_MARKER}\n\nFeature 7 fires on dates.\n")
    assert again.count("## Training") == 1
    assert "## Replaced" not in again
    assert again.count(KEPT_MARKER) == 1


def test_a_card_that_saetrain_did_not_write_is_kept_as_a_whole(run_dir: Path, sae: Path) -> None:
    (sae / "README.md").write_text("My notes\n")
    assert write_card(run_dir, sae).endswith(f"{KEPT_MARKER}\n\nMy notes\n")


@pytest.mark.parametrize("front_matter", ["[a", "- a", "a: b: c", "model-index: 3\nmodel_name: 1"])
def test_invalid_front_matter_is_named(run_dir: Path, sae: Path, front_matter: str) -> None:
    (sae / "README.md").write_text(f"---\n{front_matter}\n---\n")
    with pytest.raises(SaetrainError, match=r"README\.md: its front matter is invalid \(.+\); correct it or delete it"):
        write_card(run_dir, sae)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"saes": {"encoder.layer.1": 3}}', '{"saes": {"encoder.layer.1": {"a": 1}}}']
)
def test_a_broken_assessment_is_named(run_dir: Path, sae: Path, content: str) -> None:
    (run_dir / "final_assessment.json").write_text(content)
    with pytest.raises(SaetrainError, match=r"write (it|them) again"):
        write_card(run_dir, sae)


def test_saving_an_sae_again_keeps_its_card(run_dir: Path, sae: Path) -> None:
    text = write_card(run_dir, sae)
    save_sae(sae, *load_sae(sae))
    assert (sae / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("text", "is_local"),
    [
        ("/home/alice/model", True),
        ("~/model", True),
        ("./output", True),
        ("../data/text.jsonl", True),
        ("C:\\Users\\alice\\model", True),
        ("bert-base-uncased", False),
        ("owner/name", False),
        ("encoder.layer.1", False),
        ("3/4", False),
        ("", False),
    ],
)
def test_local_paths_are_recognized(text: str, is_local: bool) -> None:
    assert is_local_path(text) == is_local


@pytest.mark.parametrize(
    ("value", "shortened"),
    [
        ("/srv/models/my bert", "bert-base-uncased"),
        ("of /srv/models/my bert and /srv/models/my bert2", "of bert-base-uncased and /srv/models/my bert2"),
        ("x/srv/models/my bert", "x/srv/models/my bert"),
        ({"/data/a.jsonl": ["/data/a.jsonl", 3, None, True]}, {"a.jsonl": ["a.jsonl", 3, None, True]}),
        ("read /data/a.jsonl, then", "read a.jsonl, then"),
        ("3/4 of / and ..", "3/4 of / and .."),
        ("file://{home}/x", "file://~/x"),
        ("{home}", "~"),
    ],
)
def test_local_paths_become_names(home: Path, value: Any, shortened: Any) -> None:
    documents = [{"model": "/srv/models/my bert", "dataset": ["/data/a.jsonl", "/", ".."]}]
    value = value.replace("{home}", str(home)) if isinstance(value, str) else value
    assert PathShortener(documents, {"/srv/models/my bert": "bert-base-uncased"}).shorten_paths(value) == shortened


@pytest.mark.parametrize("home", ["/", "/root"])
def test_a_home_at_the_root_changes_no_other_text(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    shortener = PathShortener([], {})
    assert shortener.shorten_paths("3/4 at /rooted") == "3/4 at /rooted"
    assert shortener.shorten_paths("in /root/x") == ("in ~/x" if home == "/root" else "in /root/x")
