"""``saetrain report RUN``: one HTML page from the files of a run, or one per hookpoint and an index if it is large."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from saetrain.atomic_io import replace_non_finite, write_atomic
from saetrain.config import ReportConfig
from saetrain.errors import SaetrainError
from saetrain.features.features import Features
from saetrain.logs.console import log_rank0
from saetrain.report.columns import ColumnStore
from saetrain.report.decoder_map import project_decoder, summarize_nearest_cosines
from saetrain.report.features import (
    PageText,
    add_context_columns,
    add_latent_columns,
    describe_features,
    is_feature_folder,
)
from saetrain.report.run_data import gather_run_data
from saetrain.runs.evaluate.load_saes import LoadedSaes, SavedSae, load_saes
from saetrain.runs.run_dir import REPORT_DIR, REPORT_FILE, SAES_DIR, find_features_folder, report_write_errors
from saetrain.runs.share.local_paths import PathShortener

HERE = Path(__file__).parent
SCRIPTS = ("dom", "data", "plot", "compare_view", "run_view", "sae_view", "search", "browser", "latent_view", "main")
STYLES = ("page.css",)
PROMPT_SCRIPTS, PROMPT_STYLE = ("prompt_view", "prompt_change"), "prompt.css"
"""What only served pages have."""
MAX_PAGE_BYTES = 40_000_000
"""Largest page; a larger one is divided into one page per hookpoint."""


@dataclass(frozen=True)
class SaeSource:
    """What a page needs of one SAE; ``href``: its page, relative to the run directory."""

    name: str
    saved: SavedSae
    features: Features | None
    href: str = REPORT_FILE

    @property
    def hookpoint(self) -> str:
        """Hookpoint of the SAE, or the SAE's name if the metadata do not contain one."""
        return self.saved.metadata.hookpoint or self.name


def write_report(run: Path, max_page_bytes: int = MAX_PAGE_BYTES) -> list[Path]:
    """Write ``report.html`` into the run directory, and return the pages, the index first.

    Raises SaetrainError if the run contains no SAE, if one of its files is damaged, or if the page can't be written.
    """
    pages = render_pages(run, load_run_saes(run), max_page_bytes)
    with report_write_errors(run, "while the report was written", has_checkpoint=False, retry_flag="saetrain report"):
        for href, content in pages.items():
            (run / href).parent.mkdir(exist_ok=True)
            write_atomic(run / href, content)
    return [run / href for href in pages]


def render_pages(
    run: Path, loaded: LoadedSaes, max_page_bytes: int = MAX_PAGE_BYTES, prompt: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return {address relative to the run directory: page}, the index first.

    ``prompt``: what the view of prompts needs to know about the model, if a server answers it (``saetrain explore``).
    """
    sources = open_sources(loaded)
    data = gather_run_data(run)
    page = render_page(data, sources, sources, run, prompt=prompt)
    hookpoints = sorted({source.hookpoint for source in sources})
    if len(page) <= max_page_bytes or len(hookpoints) == 1:
        return {REPORT_FILE: page}
    hrefs = {name: f"{REPORT_DIR}/{number:03d}.html" for number, name in enumerate(hookpoints)}
    sources = [dataclasses.replace(source, href=hrefs[source.hookpoint]) for source in sources]
    pages = {REPORT_FILE: render_page(data, [], sources, run, prompt=prompt)}
    for name, href in hrefs.items():
        own = [source for source in sources if source.hookpoint == name]
        pages[href] = render_page(data, own, sources, run, parent="../", prompt=prompt)
    return pages


def report_run(config: ReportConfig) -> None:
    """Write the report of a run, and log where it is."""
    run = Path(config.run)
    pages = write_report(run)
    size = sum(page.stat().st_size for page in pages)
    more = f" and {len(pages) - 1} pages in {run / REPORT_DIR}" if len(pages) > 1 else ""
    log_rank0(f"report: {pages[0]}{more} ({size / 1e6:.1f} MB); open it in a browser")


def load_run_saes(run: Path) -> LoadedSaes:
    """Load the SAEs of a run; SaetrainError if ``run`` is not the directory of a finished run."""
    if not run.is_dir():
        raise SaetrainError(f"{run}: there is no such folder; pass the directory of a run")
    if not (run / SAES_DIR).is_dir():
        raise SaetrainError(f"{run}: contains no folder {SAES_DIR}/; pass the directory of a finished run")
    return load_saes(str(run / SAES_DIR))


def open_sources(loaded: LoadedSaes) -> list[SaeSource]:
    """Return the SAEs of a run with their feature folders."""
    return [
        SaeSource(name, saved, Features(folder) if is_feature_folder(folder) else None)
        for name, saved in loaded.saes.items()
        if (folder := find_features_folder(saved.folder))
    ]


def render_page(
    data: dict[str, Any],
    shown: Sequence[SaeSource],
    listed: Sequence[SaeSource],
    run: Path,
    parent: str = "",
    prompt: Mapping[str, Any] | None = None,
) -> str:
    """Return the page with all data of the SAEs ``shown``, and links to the others that are ``listed``.

    ``parent`` leads from the folder of the page to the run directory; ``prompt`` is that of :func:`render_pages`.
    """
    store = ColumnStore()
    with_features = [source.features for source in shown if source.features is not None]
    text = PageText(with_features)
    saes: list[dict[str, Any]] = []
    for source in listed:
        entry = describe_sae(source)
        if any(source is own for own in shown):
            entry["prefix"] = f"s{len(saes)}"
            add_sae(store, entry, source, text)
        else:
            entry["href"] = parent + quote(source.href)
        saes.append(entry)
    if with_features:
        text.add_columns(store)
    identity = hashlib.sha256(repr([data["settings"], [source.name for source in listed]]).encode("utf-8", "replace"))
    described = {**data, "saes": saes, "saetrain": version("saetrain"), "id": identity.hexdigest()[:16]}
    # A page is often sent to others, and `saetrain push` can't look into its columns.
    shortener = PathShortener([described], {str(run.resolve()): run.resolve().name})
    answered = {} if prompt is None else {"prompt": {**prompt, "api": f"{parent}api"}}
    store.add_json("run", {**shortener.shorten_paths(described), **answered})
    return fill_template(store, is_served=prompt is not None)


def describe_sae(source: SaeSource) -> dict[str, Any]:
    """Return name, sizes and metadata of an SAE."""
    coder = source.saved.coder
    metadata = dataclasses.asdict(dataclasses.replace(source.saved.metadata, held_out_figures={}))
    return {
        "name": source.name,
        "hookpoint": source.hookpoint,
        "architecture": type(coder).__name__,
        "latents": coder.num_latents,
        "d_in": coder.d_in,
        "expected_l0": coder.expected_l0(),
        "metadata": replace_non_finite(metadata),
    }


def add_sae(store: ColumnStore, entry: dict[str, Any], source: SaeSource, text: PageText) -> None:
    """Add the decoder's map and the features of an SAE to the page, and describe them in ``entry``."""
    W_dec_FD, prefix = source.saved.coder.W_dec, entry["prefix"]
    points, entry["map_shares"] = project_decoder(W_dec_FD)
    store.add_integers(f"{prefix}.map", points)
    entry["nearest_cosines"] = summarize_nearest_cosines(W_dec_FD)
    if source.features is None:
        return
    if len(source.features.latents) != entry["latents"]:
        raise SaetrainError(
            f"{source.features.folder}: has {len(source.features.latents):,} latents, but the SAE has "
            f"{entry['latents']:,}; collect the features again"
        )
    entry["features"] = describe_features(source.features, text.stream_number(source.features))
    add_latent_columns(store, prefix, source.features, text)
    add_context_columns(store, prefix, source.features)


def fill_template(store: ColumnStore, is_served: bool) -> str:
    """Return the page: the frame, style and scripts, and the columns as elements that no browser runs."""
    script, style = read_sources(is_served)
    store.add_json("manifest", store.manifest)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    return environment.get_template("page.html.j2").render(
        script=Markup(script),
        style=Markup(style),
        policy=Markup(build_policy(script, style, is_served)),
        columns=store.payloads,
    )


def read_sources(is_served: bool) -> tuple[str, str]:
    """Return the script and the style of a page."""
    scripts = [*SCRIPTS[:-1], *PROMPT_SCRIPTS, SCRIPTS[-1]] if is_served else SCRIPTS
    script = "\n".join((HERE / "js" / f"{name}.js").read_text(encoding="utf-8") for name in scripts)
    styles = [*STYLES, PROMPT_STYLE] if is_served else STYLES
    style = "\n".join((HERE / name).read_text(encoding="utf-8") for name in styles)
    return f'"use strict";\n(() => {{\n{script}}})();\n', style


def build_policy(script: str, style: str, is_served: bool) -> str:
    """Return the content-security policy of a page with its script and style; a served page may call its server."""
    sources = f"default-src 'none'; script-src '{hash_for_policy(script)}'; style-src '{hash_for_policy(style)}'"
    connect = "connect-src 'self'; " if is_served else ""
    return f"{sources}; {connect}base-uri 'none'; form-action 'none'"


def hash_for_policy(content: str) -> str:
    """Return the hash by which a content-security policy allows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
