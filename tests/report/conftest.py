"""Pages of synthetic runs in headless Chromium, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from benchmarks.synthetic_run import RunSize, write_synthetic_run
from saetrain.report.build import write_report

HERE = Path(__file__).parent
SIZE = RunSize(latents=300, d_in=16, tokens=6000, vocabulary=400)
CAPTURE_CLIPBOARD = (
    "if (navigator.clipboard) navigator.clipboard.writeText = async (text) => { window.copied = text; };"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; those that open a page start a browser, so they are slow."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.report)
            if "open_page" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.slow)


@dataclass
class OpenedPage:
    """A page, the addresses that it requested, and its errors: exceptions, console errors and dialogs."""

    page: Page
    place: Path | str
    """File, or address of a server."""
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Address of the page."""
        return self.place.as_uri() if isinstance(self.place, Path) else self.place

    def visit(self, address: str = "") -> None:
        """Load the page with a hash, and wait until its view is shown."""
        self.page.goto("about:blank")
        self.page.goto(self.url + address)
        self.wait()

    def wait(self, view: str = "") -> None:
        """Wait until a view is shown; ``view`` is the beginning of `view:SAE:latent`."""
        condition = f'[data-ready^="{view}"]' if view else "[data-ready]"
        self.page.wait_for_selector(f"html{condition}[data-painted]", timeout=60_000)

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        return self.page.evaluate(script)

    def texts(self, selector: str) -> list[str]:
        """Return the text of each element that matches."""
        return self.page.locator(selector).all_inner_texts()

    def assert_clean(self) -> None:
        """Check that nothing failed and that the page requested only itself and sibling pages."""
        assert not self.errors, self.errors
        folder = self.url.rpartition("/")[0]
        foreign = [url for url in self.requests if not url.startswith((folder, "about:blank", "blob:"))]
        assert not foreign, foreign

    def assert_no_overflow(self) -> None:
        """Check that nothing is wider than the window."""
        assert self.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium. CI fails without it."""
    path = shutil.which("chromium")
    if path is None and not os.environ.get("CI"):
        pytest.skip("needs Chromium: apt-get install chromium")
    assert path is not None, "apt-get install chromium"
    playwright: Playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., OpenedPage]]:
    """Open a page in a context of its own; each opened page is checked at the end of the test."""
    contexts, opened = [], []

    def open_place(place: Path | str, width: int = 1280, height: int = 800, **options: Any) -> OpenedPage:
        is_file = isinstance(place, Path)
        context = chromium.new_context(viewport={"width": width, "height": height}, offline=is_file, **options)
        if isinstance(place, str):
            context.route(lambda url: not url.startswith(place), lambda route: route.abort())
        context.add_init_script(CAPTURE_CLIPBOARD)
        contexts.append(context)
        found = OpenedPage(context.new_page(), place)
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("console", lambda text: text.type in ("error", "warning") and found.errors.append(text.text))
        found.page.on("dialog", lambda dialog: (found.errors.append(dialog.message), dialog.dismiss()))
        opened.append(found)
        return found

    yield open_place
    for found in opened:
        found.assert_clean()
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two SAEs and its report."""
    folder = write_synthetic_run(tmp_path_factory.mktemp("report") / "run", SIZE, ("h.1", "h.3"))
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def report(run: Path) -> Path:
    """The page of the run."""
    return run / "report.html"
