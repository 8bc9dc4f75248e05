"""``saetrain push`` and ``saetrain.load("user/repo")`` against a hub on this machine, which stores real uploads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

import saetrain
from saetrain import hub as saetrain_hub
from saetrain.cli import main
from saetrain.errors import SaetrainError
from saetrain.runs.evaluate import load_saes as saes_of_hub
from saetrain.runs.evaluate.load_saes import load_saes
from tests.fake_hub import READ_TOKEN, WRITE_TOKEN, FakeHub
from tests.unit.interop.layouts import (
    draw_thresholds,
    draw_weights,
    name_as_linear,
    write_dictionary,
    write_gemma_scope,
)

REPO = "me/saes"
WHOLE = {
    "README.md",
    "config.yaml",
    "final_assessment.json",
    "evaluation/my_texts.json",
    *(
        f"sae/encoder.layer.{layer}/{name}"
        for layer in (1, 2)
        for name in ("README.md", "cfg.json", "sae.safetensors", "sae_weights.safetensors")
    ),
}


def push(run_dir: Path, *words: str, repo: str = REPO) -> None:
    main(["push", str(run_dir), repo, *words])


def refused(capsys: pytest.CaptureFixture[str], run_dir: Path | str, *words: str, repo: str = REPO) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["push", str(run_dir), repo, *words])
    said = capsys.readouterr()
    assert caught.value.code == 2, said
    for token in (WRITE_TOKEN, READ_TOKEN, "hf_bäd", "bad"):
        assert token not in said.out + said.err
    return said.err.splitlines()[-1]


def test_what_is_pushed_is_loaded(run_dir: Path, hub: FakeHub) -> None:
    push(run_dir)
    for layer in (1, 2):
        name = f"encoder.layer.{layer}"
        sae, own = saetrain.load(REPO, hookpoint=name), saetrain.load(run_dir / "sae" / name)
        assert sae.hookpoint == name
        for key, value in own.coder.state_dict().items():
            assert torch.equal(sae.coder.state_dict()[key], value)
    assert sae.metadata.model == "tiny_bert"
    assert sae.metadata.held_out_figures == own.metadata.held_out_figures
    assert torch.equal(saetrain.load(run_dir, hookpoint=name).W_dec, own.W_dec)


def test_nothing_else_is_uploaded_and_no_path_of_this_machine(
    run_dir: Path, home: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "report.html").write_text("<p>a report</p>")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    push(run_dir)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    files = hub.repos[REPO].files()
    assert files.keys() - {".gitattributes"} == WHOLE | {"report.html"}
    for name, content in files.items():
        for part in ("alice", str(home.parents[1]), str(Path.cwd()), WRITE_TOKEN):
            assert part.encode() not in content, name
    entry = json.loads(files["sae/encoder.layer.1/cfg.json"])
    assert (entry["saetrain"]["dataset"], entry["metadata"]["model_name"]) == ("my texts.jsonl", "tiny_bert")
    assert entry["saetrain"]["finetuned_from"] == "other"
    settings = yaml.safe_load(files["config.yaml"])
    assert (settings["model"], settings["save_dir"], settings["lr"]) == ("tiny_bert", "output", 0.004)
    assert (
        json.loads(files["final_assessment.json"])["judged_on"]["held_out"]
        == "documents of my texts.jsonl chosen by a hash"
    )
    shown = capsys.readouterr()
    assert "report.html contains excerpts of the text (--report false omits it)" in shown.err
    assert f"uploaded 13 files to {hub.url}/{REPO}/commit/" in shown.out
    assert WRITE_TOKEN not in shown.out + shown.err
    push(run_dir, "--report", "false", repo="me/without")
    assert "report.html" not in hub.repos["me/without"].files()


def test_cards_on_the_hub(run_dir: Path, hub: FakeHub) -> None:
    push(run_dir, "--model", "bert-base-uncased")
    files = hub.repos[REPO].files()
    top, card = (ModelCard(files[name].decode()) for name in ("README.md", "sae/encoder.layer.1/README.md"))
    assert top.data.base_model == card.data.base_model == "bert-base-uncased"
    assert "| [encoder.layer.1](sae/encoder.layer.1) | 20 | 3 | 0.7123 (0.7 to 0.72) | 3/4 |" in top.text
    assert f"saetrain.load(\"{REPO}\", hookpoint='encoder.layer.1')" in top.text
    for call in (f'SAE.from_pretrained("{REPO}", ', f'SparseCoder.load_from_hub("{REPO}", '):
        assert f"{call}'sae/encoder.layer.1')" in card.text
    assert json.loads(files["sae/encoder.layer.1/cfg.json"])["metadata"]["model_name"] == "bert-base-uncased"


def test_a_second_push_keeps_the_license_and_the_text_of_the_hub(run_dir: Path, hub: FakeHub) -> None:
    hub.add_repo(REPO, {"README.md": b"---\nlicense: mit\n---\nMy text.\n"})
    push(run_dir)
    push(run_dir)
    card = ModelCard(hub.repos[REPO].files()["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.library_name == "saetrain"
    assert card.text.endswith("My text.\n")
    assert card.text.count("My text") == 1


def test_dry_run_lists_files_with_sizes_and_asks_no_hub(
    run_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    push(run_dir, "--dry_run")
    *rows, total = capsys.readouterr().out.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in (row.split(maxsplit=1) for row in rows)}
    assert not hub.requests
    assert total.split(maxsplit=1) == [f"{sum(listed.values()):,}", f"bytes in 12 files would go to {REPO}"]
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    push(run_dir)
    uploaded = {name: len(content) for name, content in hub.repos[REPO].files().items()}
    del uploaded[".gitattributes"]
    assert listed == uploaded


def test_private_repositories_and_branches(run_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(run_dir, "--private", "--revision", "v2")
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.files("main").keys() == {".gitattributes"}
    assert repo.files("v2").keys() >= WHOLE
    push(run_dir, "--private", "--revision", "v2")
    sae = saetrain.load(REPO, hookpoint="encoder.layer.1", revision="v2")
    assert sae.num_latents == 20
    with pytest.raises(SaetrainError, match="me/saes: contains no SAE"):
        saetrain.load(REPO)
    with pytest.raises(SaetrainError, match="me/saes: has no such revision; pass a branch, a tag or a commit"):
        saetrain.load(REPO, revision="v3")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SaetrainError, match=r"is not on the hub \(or it is private: log in with `hf auth login`"):
        saetrain.load(REPO, hookpoint="encoder.layer.1", revision="main")


def set_token(token: str | None) -> Callable[[FakeHub, pytest.MonkeyPatch], None]:
    def change(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)

    return change


def fail_on(part: str, status: int) -> Callable[[FakeHub, pytest.MonkeyPatch], None]:
    return lambda hub, monkeypatch: hub.failing.update({part: status})


def add_repo(*files: str) -> Callable[[FakeHub, pytest.MonkeyPatch], None]:
    return lambda hub, monkeypatch: hub.add_repo(REPO, dict.fromkeys(files, b"x")) and None


def go_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def lose_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is reached at first, and the connection of the next request is refused."""
    assert saetrain_hub.is_hub_reachable()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (set_token(None), [], "there is no token of the hub: log in with `hf auth login`, or set HF_TOKEN"),
        (set_token("hf_wrong"), [], "me/saes: the hub refuses the token; log in again with `hf auth login`"),
        (set_token(READ_TOKEN), [], "me/saes: the token has no permission for that; use a token that may write to me"),
        (
            set_token("hf_bäd"),
            [],
            "the token of the hub contains characters that no token has; set HF_TOKEN, or log in",
        ),
        (set_token("hf_\x01bad"), [], "the token of the hub contains characters that no token has"),
        (fail_on("/commit/", 403), [], "me/saes: the token has no permission for that"),
        (fail_on("/lfs/", 403), [], "me/saes: the token has no permission for that"),
        (fail_on("/preupload/", 413), [], "me/saes: the hub's answer is an error: "),
        (go_offline, [], "me/saes: the hub can't be reached (no network, or HF_HUB_OFFLINE is set)"),
        (lose_network, [], "me/saes: the connection to the hub failed ("),
        (
            add_repo("model.safetensors", "config.json", "a", "b"),
            [],
            "me/saes: already contains other files (model.safetensors, config.json, a, …); choose another repository",
        ),
        (add_repo("sae/h.9/cfg.json"), [], "me/saes: already contains other files (sae/h.9/cfg.json)"),
        (add_repo(), ["--private"], "--private: me/saes exists and is public"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    run_dir: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[FakeHub, pytest.MonkeyPatch], None],
    words: list[str],
    said: str,
) -> None:
    change(hub, monkeypatch)
    assert said in refused(capsys, run_dir, *words)
    assert REPO not in hub.repos or len(hub.repos[REPO].commits) == 1, "nothing was committed"


def add_foreign_sae(run: Path) -> None:
    write_dictionary(run / "sae" / "trainer_0", "AutoEncoder", name_as_linear(draw_weights(), "bias"))


def delete_saes(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "sae")


def use_hub_model(run_dir: Path) -> None:
    for path in run_dir.glob("sae/*/cfg.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "saetrain": {**config["saetrain"], "model": "gpt2"}}))


def write_report_with_path(run_dir: Path) -> None:
    (run_dir / "report.html").write_text(f"<p>{run_dir.parents[1]}/data</p>")


@pytest.mark.parametrize(
    ("spoil", "words", "said"),
    [
        (lambda run: (run / ".saetrain").unlink(), [], "is not a run directory; pass the folder of a finished run"),
        (delete_saes, [], "contains no SAE; its run is not finished: continue it with --resume"),
        (add_foreign_sae, [], "run/sae/trainer_0: contains no cfg.json"),
        (use_hub_model, ["--model", "gpt2"], "--model gpt2: the run used the hub model gpt2; omit --model"),
        (lambda run: None, ["--model", "/x/y"], "--model /x/y: is not the name of a model on the hub"),
        (lambda run: (run / "evaluation/my_texts.json").write_text("{"), [], "my_texts.json: is not valid JSON"),
        (write_report_with_path, [], "report.html: contains the local path "),
    ],
)
def test_runs_that_cannot_be_pushed(
    run_dir: Path,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], Any],
    words: list[str],
    said: str,
) -> None:
    spoil(run_dir)
    assert said in refused(capsys, run_dir, *words)
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["saes", "a/b/c", "me/", "/saes", "me/sa es", "me/..", "", "https://huggingface.co/me/saes"]
)
def test_names_of_repositories_are_checked(
    run_dir: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert "is not the name of a repository on the hub: pass USER/REPO" in refused(capsys, run_dir, repo=name)


def test_only_the_wanted_files_are_downloaded(run_dir: Path, hub: FakeHub) -> None:
    push(run_dir)
    files = hub.repos[REPO].files()
    place = "sae/encoder.layer.1"
    hub.repos[REPO].commit(
        "main", {**files, f"{place}/sae.bin": b"pickle", f"{place}/model.py": b"code", "cfg.json.pkl": b""}
    )
    hub.requests.clear()
    saetrain.load(REPO, hookpoint="encoder.layer.1")
    assert set(hub.downloaded()) == {f"{place}/cfg.json", f"{place}/sae_weights.safetensors"}


def test_saes_of_other_libraries_are_loaded_from_the_hub(run_dir: Path, hub: FakeHub) -> None:
    """sparsify puts hookpoints at the top, and SAELens may put its only SAE there."""
    folder = run_dir / "sae" / "encoder.layer.1"
    config = json.loads((folder / "cfg.json").read_text())
    del config["saetrain"]
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    files["cfg.json"] = json.dumps(config).encode()
    hub.add_repo("o/saelens", {name: files[name] for name in ("cfg.json", "sae_weights.safetensors")})
    hub.add_repo("o/sparsify", {f"layers.1/{name}": files[name] for name in ("cfg.json", "sae.safetensors")})
    own = saetrain.load(folder)
    for sae in (
        saetrain.load("o/saelens"),
        saetrain.load("o/sparsify"),
        saetrain.load("o/sparsify", hookpoint="layers.1"),
    ):
        assert torch.equal(sae.W_dec, own.W_dec)


def test_repositories_of_other_layouts_are_loaded_file_by_file(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repositories of Gemma Scope have terabytes, and ae.pt is next to a configuration."""
    write_dictionary(tmp_path / "a", "AutoEncoder", name_as_linear(draw_weights(), "bias"))
    write_gemma_scope(tmp_path / "b", {**draw_weights(), "threshold": draw_thresholds()})
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*")}
    dictionary = {f"p/trainer_{n}/{name}": files[f"a/{name}"] for n in (0, 1) for name in ("ae.pt", "config.json")}
    hub.add_repo("o/dictionary", {**dictionary, "p/trainer_0/eval.json": b"{}"})
    places = [f"layer_{layer}/width_16k/average_l0_9" for layer in (3, 4)]
    hub.add_repo("google/gemma-scope-2b-pt-res", {f"{place}/params.npz": files["b/params.npz"] for place in places})
    for repo, name, wanted in (
        ("o/dictionary", "p/trainer_0", {"p/trainer_0/ae.pt", "p/trainer_0/config.json"}),
        ("google/gemma-scope-2b-pt-res", places[1], {f"{places[1]}/params.npz"}),
    ):
        hub.requests.clear()
        sae = saetrain.load(repo, hookpoint=name)
        assert set(hub.downloaded()) == wanted
        with pytest.raises(SaetrainError, match=r"contains 2 SAEs; select one with hookpoint=: "):
            saetrain.load(repo)
    assert sae.metadata.hook_name == "blocks.4.hook_resid_post"
    monkeypatch.setattr(saes_of_hub, "MAX_DOWNLOADED_SAES", 1)
    with pytest.raises(SaetrainError, match=r"o/dictionary: contains 2 SAEs, and at most 1 are downloaded at once"):
        load_saes("o/dictionary")
    go_offline(hub, monkeypatch)
    saetrain_hub.is_hub_reachable.cache_clear()
    for name in (places[1], None):
        assert torch.equal(saetrain.load("google/gemma-scope-2b-pt-res", hookpoint=name).W_dec, sae.W_dec)


def test_the_cache_serves_without_a_network(run_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(run_dir)
    hub.add_repo("o/text", {"README.md": b"text"})
    with pytest.raises(SaetrainError, match=r"o/text: contains no SAE \(no cfg\.json, ae\.pt or params\.npz\)"):
        saetrain.load("o/text")
    saetrain_hub.download_files("o/text", None, ["README.md"])
    saetrain.load(REPO, hookpoint="encoder.layer.1")
    go_offline(hub, monkeypatch)
    saetrain_hub.is_hub_reachable.cache_clear()
    assert saetrain.load(REPO, hookpoint="encoder.layer.1").num_latents == 20
    for name, hookpoint in (("me/unknown", None), (REPO, "encoder.layer.2"), ("o/text", None)):
        with pytest.raises(SaetrainError, match=r"is not .*in the local cache, and the hub can't be reached"):
            saetrain.load(name, hookpoint=hookpoint)


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        (REPO, {}, r"me/saes: contains 2 SAEs; select one with hookpoint=: encoder\.layer\.1, encoder\.layer\.2"),
        (REPO, {"hookpoint": "h.1"}, r"me/saes: contains no SAE 'h\.1'; it contains encoder\.layer\.1, encoder"),
        ("me/nothing", {}, r"me/nothing: there is no local folder of that name, and it is not on the hub"),
        ("{run}", {}, r"run: contains 2 SAEs; select one with hookpoint="),
        ("{run}", {"revision": "v1"}, r"revision v1: .*run is a local folder; only repositories on the hub"),
        ("{run}/none", {}, r"run/none: there is no such folder; pass"),
        ("nothing", {}, r"nothing: there is no such folder; pass a run directory, the folder of one SAE, or USER/REPO"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    run_dir: Path, hub: FakeHub, path: str, options: dict[str, str], said: str
) -> None:
    push(run_dir)
    with pytest.raises(SaetrainError, match=said):
        saetrain.load(path.replace("{run}", str(run_dir)), **options)


def test_all_saes_of_a_repository_are_loaded_for_an_evaluation(
    run_dir: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run_dir)
    loaded = load_saes(REPO)
    assert list(loaded.saes) == ["encoder.layer.1", "encoder.layer.2"]
    assert loaded.run_dir is None
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", REPO])
    assert caught.value.code == 2
    assert "--out is missing: me/saes is on the hub" in capsys.readouterr().err
