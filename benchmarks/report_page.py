"""Size and loading times of the report's page, for synthetic SAEs of 3,072 and 24,576 latents.

python -m benchmarks.report_page [--latents 3072 24576] [--tokens 200000] [--run RUN]

The browser is Debian's Chromium, without a network. Times are the fastest of several loads: first contentful paint, and
the time until a view is complete and takes input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from benchmarks.synthetic_run import RunSize, write_synthetic_run
from saetrain.report.build import write_report
from saetrain.runs.evaluate.load_saes import load_saes

LOADS = 5
VIEWS = {"run": "", "SAE": "#v=sae", "list and first latent": "#v=latents", "permalink": "#l=1234"}
TIMES = """() => ({
  paint: performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? NaN,
  usable: performance.getEntriesByName("usable")[0].startTime,
})"""


def measure_page(browser: Browser, page: Path, address: str) -> dict[str, float]:
    """Return the fastest first paint and usable time of a view, in seconds."""
    found = []
    for _ in range(LOADS):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
        tab = context.new_page()
        tab.goto(page.as_uri() + address)
        tab.wait_for_selector("html[data-painted]", timeout=120_000)
        found.append(tab.evaluate(TIMES))
        context.close()
    return {name: min(times[name] for times in found) / 1000 for name in ("paint", "usable")}


def measure_run(browser: Browser, run: Path) -> dict[str, Any]:
    """Write the report of a run, and return its size and times."""
    started = time.perf_counter()
    page = write_report(run)[0]
    seconds = time.perf_counter() - started
    latents = sum(sae.coder.num_latents for sae in load_saes(str(run)).saes.values())
    size = page.stat().st_size
    views = {name: measure_page(browser, page, address) for name, address in VIEWS.items()}
    return {"latents": latents, "bytes": size, "bytes_per_latent": size / latents, "build": seconds, "views": views}


def main() -> None:
    """Measure, and print one table per run in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[3072, 24_576])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--run", type=Path, help="a real run instead of the synthetic ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        runs = [options.run] if options.run else []
        for latents in [] if options.run else options.latents:
            size = RunSize(latents=latents, d_in=64, tokens=options.tokens, vocabulary=20_000, k=32)
            runs.append(write_synthetic_run(Path(folder) / str(latents), size))
        for run in runs:
            found = measure_run(browser, run)
            print(f"\n{json.dumps({name: value for name, value in found.items() if name != 'views'})}\n")
            print("| view | first paint (s) | usable (s) |\n|---|---:|---:|")
            for name, times in found["views"].items():
                print(f"| {name} | {times['paint']:.2f} | {times['usable']:.2f} |")


if __name__ == "__main__":
    main()
