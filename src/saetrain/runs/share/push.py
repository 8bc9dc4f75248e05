"""``saetrain push RUN USER/REPO``: upload the SAEs of a run to the Hugging Face hub, without local paths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saetrain.config import PushConfig
from saetrain.errors import SaetrainError
from saetrain.hub import explain_hub_errors, is_hub_reachable
from saetrain.interop.formats import WRITTEN_FORMATS, find_sae_folders
from saetrain.interop.schema import SAE_CONFIG_FILE
from saetrain.logs.console import log_rank0, print_lines
from saetrain.runs.run_dir import ASSESSMENT_FILE, CONFIG_FILE, EVALUATION_DIR, REPORT_FILE, SAES_DIR, is_run_dir
from saetrain.runs.share.card import CARD_FILE, build_run_card, build_sae_card
from saetrain.runs.share.local_paths import PathShortener, is_hub_id, is_local_path
from saetrain.runs.share.records import REMEDY, SaeRecord, read_sae_record
from saetrain.small_files import read_json_object, read_settings

WEIGHTS_FILES = tuple(each.WEIGHTS_FILE for each in WRITTEN_FORMATS)
HUB_FILES = (".gitattributes", CARD_FILE, CONFIG_FILE, ASSESSMENT_FILE, REPORT_FILE)
"""Files that a repository of a run may contain next to its SAEs, from an earlier upload or from the hub."""


@dataclass(frozen=True)
class Upload:
    """What goes to the hub: {path in the repository: text, or a local file of weights}; without the top card."""

    records: list[SaeRecord]
    shortener: PathShortener
    files: dict[str, str | Path]

    def build_top_card(self, existing: str, repo: str) -> str:
        """Return the card of the repository, with the user's parts of the ``existing`` card."""
        return build_run_card(self.records, self.shortener, existing, repo)


def push_run(config: PushConfig) -> None:
    """Upload the SAEs of a run; SaetrainError for what the user can correct."""
    if config.repo.count("/") != 1 or not is_hub_id(config.repo):
        raise SaetrainError(f"{config.repo!r} is not the name of a repository on the hub: pass USER/REPO")
    upload = collect_upload(config)
    files = {CARD_FILE: upload.build_top_card("", config.repo), **upload.files}
    if config.dry_run:
        print_lines(describe_files(files, config.repo))
        return
    if REPORT_FILE in files:
        log_rank0(f"{REPORT_FILE} contains excerpts of the text (--report false omits it)")
    print_lines(f"uploaded {len(files)} files to {_upload_files(config, upload)}")


def collect_upload(config: PushConfig) -> Upload:
    """Read the run, and return what to upload; SaetrainError if it is not a finished run or a file is broken."""
    run = Path(config.run)
    if not is_run_dir(run):
        raise SaetrainError(f"{config.run}: is not a run directory; pass the folder of a finished run")
    saes = find_sae_folders(run)
    if not saes:
        raise SaetrainError(f"{config.run}: contains no SAE; its run is not finished: continue it with --resume")
    records = [read_sae_record(run, folder) for folder in saes.values()]
    documents: dict[str, Any] = {f"{SAES_DIR}/{each.name}/{SAE_CONFIG_FILE}": each.config for each in records}
    for path in (run / ASSESSMENT_FILE, *sorted((run / EVALUATION_DIR).glob("*.json"))):
        if path.exists():
            documents[path.relative_to(run).as_posix()] = read_json_object(path, REMEDY)
    settings = read_settings(str(run / CONFIG_FILE), flag="")
    names = {str(run.resolve()): run.resolve().name, **_name_model(config.model, records[0].metadata.model)}
    shortener = PathShortener([settings, *documents.values(), *(each.assessment for each in records)], names)
    files: dict[str, str | Path] = {
        name: json.dumps(shortener.shorten_paths(content), indent=2) + "\n" for name, content in documents.items()
    }
    files[CONFIG_FILE] = yaml.safe_dump(shortener.shorten_paths(settings), sort_keys=False, allow_unicode=True)
    for record in records:
        place = f"{SAES_DIR}/{record.name}"
        existing = record.folder / CARD_FILE
        kept = existing.read_text(encoding="utf-8", errors="replace") if existing.exists() else ""
        card = build_sae_card(record, shortener, shortener.shorten_paths(kept), config.repo)
        files[f"{place}/{CARD_FILE}"] = card
        files |= {f"{place}/{name}": record.folder / name for name in WEIGHTS_FILES if (record.folder / name).exists()}
    if config.report and (run / REPORT_FILE).exists():
        files[REPORT_FILE] = _read_report(run / REPORT_FILE, shortener)
    return Upload(records, shortener, files)


def _name_model(given: str | None, recorded: str | None) -> dict[str, str]:
    """Return {path of the run's model: hub id that the user gives it}."""
    if given is None:
        return {}
    if not is_hub_id(given):
        raise SaetrainError(f"--model {given}: is not the name of a model on the hub")
    if recorded is None or not is_local_path(recorded):
        raise SaetrainError(f"--model {given}: the run used the hub model {recorded}; omit --model")
    return {recorded: given}


def _read_report(path: Path, shortener: PathShortener) -> str:
    text = path.read_text(encoding="utf-8")
    found = shortener.find_paths(text)
    if found:
        raise SaetrainError(f"{path}: contains the local path {found[0]}; write it again, or pass --report false")
    return text


def describe_files(files: dict[str, str | Path], repo: str) -> str:
    """Return a list of the files with their sizes in bytes."""
    sizes = {
        name: content.stat().st_size if isinstance(content, Path) else len(content.encode())
        for name, content in files.items()
    }
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files would go to {repo}"])


def _upload_files(config: PushConfig, upload: Upload) -> str:
    """Create the repository and the branch if necessary, upload the files in one commit, and return its address."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    repo, branch = config.repo, config.revision or "main"
    if get_token() is None:
        raise SaetrainError("there is no token of the hub: log in with `hf auth login`, or set HF_TOKEN")
    if not is_hub_reachable():
        raise SaetrainError(f"{repo}: the hub can't be reached (no network, or HF_HUB_OFFLINE is set); try again later")
    with explain_hub_errors(repo):
        api = HfApi(library_name="saetrain")
        api.create_repo(repo, private=config.private or None, exist_ok=True)
        if config.private and not api.model_info(repo).private:
            raise SaetrainError(
                f"--private: {repo} exists and is public; make it private on the hub, or rename this one"
            )
        if config.revision:
            api.create_branch(repo, branch=branch, exist_ok=True)
        present = api.list_repo_files(repo, revision=branch)
        require_own_files(repo, present, upload.files)
        existing = ""
        if CARD_FILE in present:
            path = api.hf_hub_download(repo, CARD_FILE, revision=branch)
            existing = Path(path).read_text(encoding="utf-8", errors="replace")
        files = {CARD_FILE: upload.build_top_card(existing, repo), **upload.files}
        additions = [
            CommitOperationAdd(name, content if isinstance(content, Path) else content.encode())
            for name, content in files.items()
        ]
        message = f"Upload {len(upload.records)} SAEs of run {Path(config.run).resolve().name}"
        return str(api.create_commit(repo, additions, commit_message=message, revision=branch).commit_url)


def require_own_files(repo: str, present: Sequence[str], files: dict[str, str | Path]) -> None:
    """Raise SaetrainError if the repository contains files that no upload of this run writes."""
    others = [
        name
        for name in present
        if name not in files and name not in HUB_FILES and not name.startswith(f"{EVALUATION_DIR}/")
    ]
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise SaetrainError(
            f"{repo}: already contains other files ({shown}); choose another repository, or delete them on the hub"
        )
