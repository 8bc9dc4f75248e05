"""Building a page: size, division into pages, what the decoder's figures are, and errors of damaged files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.synthetic_run import RunSize, write_synthetic_run
from saetrain.cli import main
from saetrain.features.features import Features
from saetrain.metrics import expected_random_max_cosine_shares
from saetrain.report.build import load_run_saes, render_pages, write_report
from saetrain.report.columns import ColumnStore
from saetrain.report.decoder_map import MAP_STEPS, project_decoder, summarize_nearest_cosines
from saetrain.report.features import add_context_columns
from tests.report.conftest import OpenedPage

SMALL = RunSize(latents=40, d_in=8, tokens=600, vocabulary=60, k=4)
MAX_BYTES_PER_LATENT = 1200


def decode_column(store: ColumnStore, name: str) -> np.ndarray:
    entry = store.manifest[name]
    if not entry["length"]:
        return np.empty(0)
    planes = np.frombuffer(zlib.decompress(base64.b64decode(store.payloads[name])), np.uint8)
    values = planes.reshape(-1, entry["length"]).T.copy().view(entry["type"])[:, 0]
    return values * entry.get("step", 1)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 255], "u1"),
        ([0, 256], "u2"),
        ([0, 1 << 16], "u4"),
        ([-1, 127], "i1"),
        ([-1, 128], "i2"),
        ([-40000, 3], "i4"),
        ([0, 1 << 40], "f8"),
        ([], "u1"),
    ],
)
def test_integers_take_the_smallest_type(values: list[int], kind: str) -> None:
    store = ColumnStore()
    store.add_integers("x", np.array(values, np.int64))
    assert store.manifest["x"]["type"] == kind
    np.testing.assert_array_equal(decode_column(store, "x"), values)


def test_floats_keep_their_relative_error_and_special_values() -> None:
    generator = np.random.default_rng(0)
    values = (generator.normal(size=1000) * 10.0 ** generator.integers(-30, 30, 1000)).astype(np.float32)
    values[:3] = np.nan, np.inf, 0.0
    store = ColumnStore()
    store.add_floats("x", values)
    np.testing.assert_allclose(decode_column(store, "x"), values, rtol=2**-12)


def test_shares_are_multiples_of_the_step() -> None:
    store = ColumnStore()
    store.add_quantized("x", np.array([-1.0, 0.0, 0.12344, 1.0]), 1e-4)
    np.testing.assert_allclose(decode_column(store, "x"), [-1.0, 0.0, 0.1234, 1.0], rtol=1e-12)


def test_the_map_shows_the_principal_components() -> None:
    torch.manual_seed(0)
    rows_FD = torch.randn(500, 12) * torch.tensor([5.0, 3.0] + [0.3] * 10)
    points, shares = project_decoder(rows_FD)
    unit = torch.nn.functional.normalize(rows_FD, dim=1)
    _, singular, axes = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    expected = ((unit - unit.mean(0)) @ axes[:2].T).numpy()
    shown = points / MAP_STEPS * 2 - 1
    for axis in (0, 1):
        assert abs(np.corrcoef(shown[:, axis], expected[:, axis])[0, 1]) > 0.9999
    np.testing.assert_allclose(shares, (singular.square() / singular.square().sum())[:2], rtol=1e-3)


@pytest.mark.parametrize("n_latents", [1, 2, 5])
def test_tiny_decoders_have_figures(n_latents: int) -> None:
    W_dec_FD = torch.randn(n_latents, 3)
    assert project_decoder(W_dec_FD)[0].shape == (n_latents, 2)
    assert sum(summarize_nearest_cosines(W_dec_FD)["decoder"]) == pytest.approx(1)


def test_random_directions_have_the_expected_nearest_cosines() -> None:
    torch.manual_seed(0)
    found = summarize_nearest_cosines(torch.randn(3000, 32))
    assert found["rows"] == 2048
    np.testing.assert_allclose(found["decoder"], found["random"], atol=0.02)
    edges = np.linspace(-1, 1, 5)
    assert expected_random_max_cosine_shares(32, 3000, edges).sum() == pytest.approx(1)


def test_a_page_is_small_and_names_its_scripts(tmp_path: Path) -> None:
    size = RunSize(latents=2000, d_in=16, tokens=30_000, vocabulary=3000)
    (page,) = write_report(write_synthetic_run(tmp_path / "run", size))
    text = page.read_text(encoding="utf-8")
    assert len(text) / size.latents < MAX_BYTES_PER_LATENT
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert "unsafe" not in policy[1]
    assert policy[1].startswith("default-src 'none'")
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_only_a_served_page_calls_a_server(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL)
    text = write_report(run)[0].read_text(encoding="utf-8")
    served = render_pages(run, load_run_saes(run), prompt={"kind": "none"})["report.html"]
    for mark in ("connect-src 'self'", "class PromptView", ".prompt-tokens"):
        assert mark in served
        assert mark not in text


def test_a_page_has_no_local_paths(tmp_path: Path) -> None:
    names = {"model": str(tmp_path / "models" / "own"), "dataset": str(tmp_path / "texts" / "own.jsonl")}
    (page,) = write_report(write_synthetic_run(tmp_path / "run", SMALL, names=names))
    columns = re.findall(r'id="([\w.]+)">([A-Za-z0-9+/=]+)<', page.read_text(encoding="utf-8"))
    contents = {name: zlib.decompress(base64.b64decode(content)) for name, content in columns}
    assert b"own.jsonl" in contents["run"]
    assert not [name for name, content in contents.items() if str(tmp_path).encode() in content]


def test_a_large_run_is_divided_into_pages(open_page: Callable[..., OpenedPage], tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL, ("h.1", "h.2", "h.3"))
    pages = write_report(run, max_page_bytes=1000)
    assert [page.relative_to(run).as_posix() for page in pages] == [
        "report.html",
        *(f"report/{number:03d}.html" for number in range(3)),
    ]
    opened = open_page(pages[0])
    opened.visit("#s=h.2")
    opened.page.get_by_role("navigation").get_by_text("Latents").click()
    opened.wait("latents:h.2")
    assert opened.page.url.startswith(pages[2].as_uri())
    opened.page.get_by_label("SAE", exact=True).select_option("2")
    opened.wait("latents:h.3")
    assert opened.page.url.startswith(pages[3].as_uri())


def test_a_run_without_features_or_verdict_has_a_page(open_page: Callable[..., OpenedPage], tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL)
    for path in (
        "features/h.1/metadata.json",
        "final_assessment.json",
        "evaluation/text.json",
        "metrics.jsonl",
        "config.yaml",
    ):
        (run / path).unlink()
    opened = open_page(write_report(run)[0])
    opened.visit()
    assert "has no verdict" in opened.texts("main")[0]
    opened.visit("#v=sae")
    assert "Nearest decoder row" in opened.texts("main")[0]
    opened.visit("#l=3")
    assert "no features" in opened.texts("main")[0]


def cut(path: str) -> Callable[[Path], None]:
    return lambda run: (run / path).write_bytes((run / path).read_bytes()[:40])


def remove(path: str) -> Callable[[Path], None]:
    return lambda run: (run / path).unlink()


def drop_column(run: Path) -> None:
    path = run / "features/h.1/stream.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["doc"]), path)


def drop_latents(run: Path) -> None:
    path = run / "features/h.1/latents.parquet"
    pq.write_table(pq.read_table(path)[:-1], path)


def set_format(run: Path) -> None:
    (run / "features/h.1/metadata.json").write_text(json.dumps({"format": 99}))


def break_middle_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3,', '"step": ,', 1))


def block_page(run: Path) -> None:
    (run / "report.html").mkdir()


DAMAGES = {
    "latents.parquet: can't be read": cut("features/h.1/latents.parquet"),
    "contexts.parquet: can't be read": remove("features/h.1/contexts.parquet"),
    "stream.parquet: has no column 'doc'": drop_column,
    "has 39 latents, but the SAE has 40": drop_latents,
    "metadata.json: was not written by this version": set_format,
    "metadata.json: is not valid JSON": cut("features/h.1/metadata.json"),
    "final_assessment.json: is not valid JSON": cut("final_assessment.json"),
    "text.json: is not valid JSON": cut("evaluation/text.json"),
    "metrics.jsonl: line 3 is invalid": break_middle_line,
    "writing to": block_page,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL)
    DAMAGES[message](run)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(run)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "no-such-folder"], "there is no such folder"),
        (["report", "."], "contains no folder sae/"),
        (["report", "--out", "x"], "--out: no such flag"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_names_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL)
    # A killed run may leave a last line that is cut off.
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    main(["report", str(run)])
    assert f"report: {run / 'report.html'}" in capsys.readouterr().err


def test_contexts_of_signed_codes_keep_their_sign(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "run", SMALL)
    (path,) = run.rglob("contexts.parquet")
    table = pq.read_table(path)
    negative = {
        "value": [-value for value in table["value"].to_pylist()],
        "activations": [[-value for value in row] for row in table["activations"].to_pylist()],
    }
    for name, values in negative.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, path)
    features = Features(path.parent)
    store = ColumnStore()
    add_context_columns(store, "0", features)
    for name in ("context_value", "other_value"):
        shares = decode_column(store, f"0.{name}")
        assert -1 <= shares.min() < 0
        assert shares.max() <= 0
