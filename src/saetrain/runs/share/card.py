"""The model card (``README.md``) of an SAE, and that of a repository with several SAEs.

The text below KEPT_MARKER and the front matter that saetrain does not write, such as the license, are the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from saetrain.atomic_io import write_atomic
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import INTERVAL_COVERAGE
from saetrain.interop import saelens, saetrain_format, sparsify
from saetrain.interop.formats import WRITTEN_FORMATS
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.evaluate.report import BASELINE_NAMES
from saetrain.runs.run_dir import SAES_DIR
from saetrain.runs.share.local_paths import PathShortener, is_hub_id
from saetrain.runs.share.records import SaeRecord, read_sae_record
from saetrain.untrusted import escape_text

CARD_FILE = "README.md"
KEPT_MARKER = "<!-- saetrain replaces the text above this line, and keeps the text below it. -->"
MARKDOWN_SYNTAX = re.compile(r"[\\`*_\[\]{}<>&|~#$@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
LIMITS = (
    "The figures measure reconstruction and sparsity. They do not show whether a latent has a clear meaning, and a "
    "passed verdict does not either.",
    "The figures hold for the text, the model weights and the token policy above. Evaluate the SAE again on text of "
    "your own: `saetrain evaluate`.",
    "Intervals cover the choice of documents. They do not cover another seed or another training run.",
)


def escape_markdown(text: object) -> str:
    """Return text from data as one line in which nothing is Markdown, HTML, a link or an invisible character."""
    return MARKDOWN_SYNTAX.sub(lambda match: f"\\{match[0]}", escape_text(str(text)))


def write_sae_cards(run_dir: Path, folders: Iterable[Path]) -> None:
    """Write the card of each SAE of the run in ``folders`` from the run's files; SaetrainError if that fails."""
    for folder in (folder for folder in folders if folder.is_relative_to(run_dir / SAES_DIR)):
        record, path = read_sae_record(run_dir, folder), folder / CARD_FILE
        existing = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        shortener = PathShortener([record.config, record.settings, record.assessment], {})
        try:
            write_atomic(path, build_sae_card(record, shortener, existing))
        except OSError as error:
            raise SaetrainError(f"{path}: can't be written: {error.strerror}") from error


def build_sae_card(record: SaeRecord, shortener: PathShortener, existing: str = "", repo: str | None = None) -> str:
    """Return the card of one SAE, which also has the user's parts of the ``existing`` card.

    ``repo``: the repository from which the examples load the SAE; None for the folder of the card.
    """
    try:
        body = _describe_sae(record, shortener, repo)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SaetrainError(
            f"{record.folder}: its files are not in saetrain's format ({type(error).__name__}: {error}); run "
            "`saetrain evaluate` on the run to write them again"
        ) from error
    return merge_card(build_front_matter([record], shortener), body, existing, str(record.folder / CARD_FILE))


def build_run_card(records: Sequence[SaeRecord], shortener: PathShortener, existing: str, repo: str) -> str:
    """Return the card of the repository ``repo`` with the SAEs ``records``, and the user's parts of ``existing``."""
    model = escape_markdown(shortener.shorten_paths(records[0].metadata.model or "an unknown model"))
    rows = [
        (
            f"[{escape_markdown(record.name)}]({SAES_DIR}/{quote(record.name)})",
            f"{record.coder['d_sae']:,}",
            escape_markdown(record.coder.get("k", "")),
            _format_metric((record.judged or {}).get("figures", {}).get("explained_variance", {})),
            escape_markdown((record.judged or {}).get("verdict", "not evaluated")),
        )
        for record in records
    ]
    load = f'import saetrain\n\nsae = saetrain.load("{repo}", hookpoint={records[0].name!a})\n'
    body = (
        f"# Sparse autoencoders of {model}\n\nTrained with saetrain {version('saetrain')}. "
        "The card of each SAE has its training settings, its figures next to their baselines, "
        "and its limits.\n\n"
        + _build_table(("SAE", "latents", "k", "explained variance", "checks passed"), rows)
        + f"\n```python\n{load}```\n"
    )
    return merge_card(build_front_matter(records, shortener), body, existing, f"{repo}/{CARD_FILE}")


def build_front_matter(records: Sequence[SaeRecord], shortener: PathShortener) -> dict[str, Any]:
    """Return the metadata of a card for the hub; models and data sets that are local paths are omitted."""
    from huggingface_hub import ModelCardData

    metadata = records[0].metadata
    # The other names that the shortener gives to paths are no hub ids.
    model = shortener.given.get(metadata.model or "", metadata.model)
    data_sets = metadata.dataset if isinstance(metadata.dataset, list) else [metadata.dataset]
    architectures = dict.fromkeys(str(record.coder.get("architecture")).rpartition(":")[2] for record in records)
    formats = dict.fromkeys(name for record in records for name in list_formats(record))
    data = ModelCardData(
        library_name="saetrain",
        base_model=model if is_hub_id(model) else None,
        datasets=[name for name in data_sets if is_hub_id(name)] or None,
        tags=["sparse-autoencoder", "interpretability", *filter(str.isidentifier, architectures), *formats],
    )
    return data.to_dict()


def merge_card(data: dict[str, Any], body: str, existing: str, name: str) -> str:
    """Return a card with front matter ``data`` and ``body``, and with the user's parts of the ``existing`` card."""
    from huggingface_hub import ModelCard, ModelCardData

    kept = ""
    if existing.strip():
        try:
            card = ModelCard(existing if existing.startswith("---") else f"---\n{{}}\n---\n{existing}")
        except (ValueError, TypeError, yaml.YAMLError) as error:
            problem = str(error).splitlines()[0]
            raise SaetrainError(f"{name}: its front matter is invalid ({problem}); correct it or delete it") from error
        kept_data = card.data.to_dict()
        tags = dict.fromkeys([*data["tags"], *kept_data.get("tags", [])])
        data = {**kept_data, **data, "tags": list(tags)}
        kept = card.text.partition(KEPT_MARKER)[2] if KEPT_MARKER in card.text else card.text
    front_matter = ModelCardData(**data).to_yaml()
    return str(ModelCard(f"---\n{front_matter}\n---\n\n{body}\n{KEPT_MARKER}\n\n{kept.strip()}")).rstrip() + "\n"


def list_formats(record: SaeRecord) -> list[str]:
    """Return the names of the formats in which the folder of the SAE contains it."""
    others = [each for each in WRITTEN_FORMATS if each is not saetrain_format]
    found = [each.NAME for each in others if (record.folder / each.WEIGHTS_FILE).exists()]
    # Earlier versions also wrote weights to SAELens' file that only saetrain reads.
    is_shared = "architecture" in record.config
    return [saetrain_format.NAME, *(name for name in found if name != saelens.NAME or is_shared)]


def _describe_sae(record: SaeRecord, shortener: PathShortener, repo: str | None) -> str:
    def shown(value: object) -> str:
        return escape_markdown(shortener.shorten_paths(value if isinstance(value, str) else str(value)))

    metadata, coder = record.metadata, record.coder
    size = f", of which {coder['k']:,} are active per token" if isinstance(coder.get("k"), int) else ""
    site = metadata.site
    purpose = (
        "reconstructs activations of" if site is None or site.is_sae else "predicts from other activations those of"
    )
    sections = [
        f"# Sparse autoencoder: {shown(record.name)} of {shown(metadata.model)}",
        f"This sparse autoencoder (SAE) {purpose} {shown(metadata.hookpoint)} in {shown(metadata.model)}. It has "
        f"{coder['d_sae']:,} latents{size}. It takes raw activations, because the normalization of the training is "
        "folded into its weights.",
        "## Training",
        _build_table(("setting", "value"), [(name, shown(value)) for name, value in _list_settings(record).items()]),
        "## Held-out figures",
        _describe_figures(record, shown),
        *(["## Verdict", _describe_verdict(record.judged, shown)] if record.judged else []),
        "## Limits",
        "\n".join(f"- {limit}" for limit in (*LIMITS, _describe_token_policy(metadata))),
        "## Load it",
        _describe_loading(record, repo),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _list_settings(record: SaeRecord) -> dict[str, Any]:
    """Return {setting: value} of the training, without those that are unknown."""
    metadata, coder, settings = record.metadata, record.coder, record.settings
    found = {
        "model": metadata.model,
        "commit of the model": metadata.model_revision,
        "SHA-256 of the model's weights": metadata.model_weights_sha256,
        "hookpoint": metadata.hookpoint,
        "input": metadata.inputs and ", ".join(metadata.inputs),
        "data": ", ".join(metadata.dataset) if isinstance(metadata.dataset, list) else metadata.dataset,
        "shares of the data sets": metadata.mix,
        "split": metadata.split,
        "training tokens": metadata.tokens_seen and f"{metadata.tokens_seen:,} in {metadata.steps or 0:,} steps",
        "tokens per sequence": metadata.ctx_len,
        "architecture": coder.get("architecture"),
        "latents": f"{coder['d_sae']:,} for width {coder['d_in']:,}",
        "k": coder.get("k"),
        "loss": metadata.loss_fn,
        "optimizer, peak learning rate": f"{settings.get('optimizer')}, {_format_number(settings.get('lr'))}",
        "seeds": f"weights {metadata.init_seed}, order of the text {settings.get('shuffle_seed')}",
        "started from": metadata.finetuned_from,
        "saetrain": record.assessment and record.assessment.get("saetrain"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _describe_figures(record: SaeRecord, shown: Any) -> str:
    if record.judged is None or record.assessment is None:
        metrics = record.metadata.held_out_figures
        plain = [(escape_markdown(name), _format_number(value)) for name, value in metrics.items()]
        origin = "Measured at the end of the training, without intervals and baselines. `saetrain evaluate` adds them."
        return f"{origin}\n\n{_build_table(('metric', 'value'), plain)}"
    judged_on, figures = record.assessment["judged_on"], record.judged["figures"]
    used = {name for figure in figures.values() for name in figure["nulls"]}
    baselines = [name for name in BASELINE_NAMES if name in used]
    rows = [
        (
            escape_markdown(name) + (f" ({shown(figure['flag'])})" if figure.get("flag") else ""),
            _format_metric(figure),
            *(_format_metric(figure["nulls"].get(baseline, {})) for baseline in baselines),
            f"{figure['count']:,}",
        )
        for name, figure in figures.items()
    ]
    origin = "from the training data set" if judged_on["in_sample"] else "from another data set"
    return (
        f"Measured on held-out text of {shown(judged_on['data_set'])} ({origin}; {shown(judged_on['held_out'])}), with "
        f"{INTERVAL_COVERAGE:.0%} intervals. A baseline is what a random decoder, PCA or the mean reaches on the same "
        "metric. `docs/metrics.md` of saetrain defines the metrics.\n\n"
        + _build_table(("metric", "SAE", *(BASELINE_NAMES[name] for name in baselines), "measured on"), rows)
    )


def _describe_verdict(judged: dict[str, Any], shown: Any) -> str:
    rows = [
        (shown(name), _format_metric(check), shown(check["threshold"]), shown(check["status"]))
        for name, check in judged["metrics"].items()
    ]
    reasons = [
        f"- {shown(name)}: {shown(check['reason'])}"
        + (f". Advice: {shown(check['advice'])}" if check["advice"] else "")
        for name, check in judged["metrics"].items()
    ]
    table = _build_table(("check", "value", "threshold", "status"), rows)
    return f"{shown(judged['verdict'])} checks pass.\n\n{table}\n" + "\n".join(reasons)


def _describe_token_policy(metadata: SaeMetadata) -> str:
    limits = metadata.norm_limits or ({"": metadata.norm_limit} if metadata.norm_limit is not None else {})
    excluded = [
        *(["special tokens"] if metadata.exclude_special_tokens else []),
        *(["position 0 of each sequence"] if metadata.exclude_sinks and metadata.causal else []),
        *(f"activations with a norm above {limit:.4g}" for limit in dict.fromkeys(limits.values())),
    ]
    if not excluded:
        return "The SAE was trained and evaluated on all tokens."
    listed = ", ".join(excluded)
    return f"The SAE was not trained on {listed}, and the figures exclude them. Do not rely on its codes there."


def _describe_loading(record: SaeRecord, repo: str | None) -> str:
    """Return the code that loads the SAE in each library, for the formats that the folder contains."""
    formats = list_formats(record)
    name = ascii(f"{SAES_DIR}/{record.name}")
    ours = f'"{repo}", hookpoint={record.name!a}' if repo else '"path/to/this/folder"'
    blocks = [f"import saetrain\n\nsae = saetrain.load({ours})\ncodes = sae.encode(activations)"]
    if saelens.NAME in formats:
        call = f'from_pretrained("{repo}", {name})' if repo else 'load_from_disk("path/to/this/folder")'
        architecture = record.config.get("architecture")
        remark = "" if architecture == record.coder.get("architecture") else f"  # as {architecture}, the same codes"
        blocks.append(f"from sae_lens import SAE\n\nsae = SAE.{call}{remark}")
    if sparsify.NAME in formats:
        call = f'load_from_hub("{repo}", {name})' if repo else 'load_from_disk("path/to/this/folder")'
        blocks.append(f"from sparsify import SparseCoder\n\nsae = SparseCoder.{call}")
    return "\n\n".join(f"```python\n{block}\n```" for block in blocks)


def _format_metric(figure: dict[str, Any]) -> str:
    """Return a value and its interval, if it has one; ``figure``: an entry of the assessment, which may be empty."""
    if not figure:
        return ""
    low, high = figure.get("low"), figure.get("high")
    interval = (
        "" if low is None or high is None or low == high else f" ({_format_number(low)} to {_format_number(high)})"
    )
    return _format_number(figure["value"]) + interval


def _format_number(value: float | None) -> str:
    # Adding 0 turns -0 into 0.
    return "unknown" if value is None else f"{value + 0.0:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _build_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the cells are escaped already."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
