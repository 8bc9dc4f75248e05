"""The picture of the page in the README: it shows the page as it is now, and the test can write it again.

`make screenshot` runs the demo and writes docs/report.png. Without a demo, the page of a synthetic run is compared.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saetrain.features.features import Feature, Features
from saetrain.report.build import load_run_saes, render_pages
from tests.report.conftest import OpenedPage
from tests.report.test_browse import listed

Open = Callable[..., OpenedPage]
REPOSITORY = Path(__file__).parents[2]
PICTURE = REPOSITORY / "docs" / "report.png"
DEMO = REPOSITORY / "demo" / "minilm_layer3"
QUERY = "january"
WRITE = "SAETRAIN_WRITE_SCREENSHOT"
WIDTH, HEIGHT = 1060, 600
MAX_BYTES = 150_000
MIN_TOKENS = 4
"""Different tokens in the strongest contexts of the latent that is shown, so that it is no single word."""
GRID = (28, 16)
MAX_DIFFERENCE = 12
"""Mean difference of the grey of a cell, of 255. Another view differs by more than 20."""
COMPARE = """async ([pictures, [columns, rows]]) => {
  const found = [];
  for (const source of pictures) {
    const image = new Image();
    image.src = `data:image/png;base64,${source}`;
    await image.decode();
    const canvas = new OffscreenCanvas(columns, rows);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, columns, rows);
    const { data } = context.getImageData(0, 0, columns, rows);
    const cells = Array.from({ length: columns * rows }, (_, i) => 4 * i);
    const grey = cells.map((i) => (data[i] + data[i + 1] + data[i + 2]) / 3);
    found.push({ width: image.naturalWidth, height: image.naturalHeight, grey });
  }
  return found;
}"""


def has_several_tokens(feature: Feature) -> bool:
    strongest = {context.token.strip().lower() for context in feature.contexts if context.band == 0}
    return len(strongest) >= MIN_TOKENS


def take_picture(open_page: Open, page: Path, features: Features, query: str) -> bytes:
    """Search, open the first latent of the list that is no single word, and return the picture."""
    opened = open_page(page, WIDTH, HEIGHT, color_scheme="light")
    opened.visit("#v=latents")
    opened.page.get_by_role("searchbox").fill(query)
    opened.page.wait_for_timeout(500)
    shown = listed(opened)
    found = next((latent for latent in shown if has_several_tokens(features[latent])), shown[0])
    opened.page.locator(f"#option-{found}").click()
    opened.page.wait_for_function(f"() => document.title.startsWith('Latent {found} ')")
    opened.page.mouse.move(WIDTH / 2, 20)
    opened.page.wait_for_timeout(300)
    picture: bytes = opened.page.screenshot()
    return picture


def test_the_picture_in_the_readme_is_that_of_the_page(open_page: Open, run: Path, tmp_path: Path) -> None:
    is_demo, must_write = (DEMO / "features").exists(), WRITE in os.environ
    assert is_demo or not must_write, "run `make demo` first"
    shown, query = (DEMO, QUERY) if is_demo else (run, "")
    (page := tmp_path / "report.html").write_text(render_pages(shown, load_run_saes(shown))[page.name], "utf-8")
    features = Features(min(path.parent for path in shown.glob("features/*/metadata.json")))
    picture = take_picture(open_page, page, features, query)
    if must_write:
        PICTURE.write_bytes(picture)
    stored = PICTURE.read_bytes()
    assert len(stored) < MAX_BYTES
    assert f"docs/{PICTURE.name}" in (REPOSITORY / "README.md").read_text()
    opened = open_page(page, WIDTH, HEIGHT)
    opened.visit("#v=sae")
    other = opened.page.screenshot()
    opened.page.goto("about:blank")
    encoded = [base64.b64encode(each).decode() for each in (stored, picture, other)]
    first, second, third = opened.page.evaluate(COMPARE, [encoded, GRID])
    assert (first["width"], first["height"]) == (second["width"], second["height"]) == (WIDTH, HEIGHT)
    same, different = (np.abs(np.array(first["grey"]) - each["grey"]).mean() for each in (second, third))
    print(f"difference from the page {same:.1f}, from another view {different:.1f}")
    assert same < MAX_DIFFERENCE < different
