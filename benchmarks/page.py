"""How large the page of a datamap is, how long it takes to write and to open, and how long a lasso
takes in it, in a browser without a GPU.

    PYTHONPATH=tests python -P benchmarks/page.py [params/digits.yaml ...] [--n 1000000]

Studies need their steps 01 to 03 in this workspace. `--n` adds a map of so many random points
without images. The page is opened from the disk in headless Chromium (software rendering); one
lasso of 40 mouse moves surrounds an eighth of the map.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from explorer.screen import CHROMIUM, FLAGS
from playwright.sync_api import Browser, sync_playwright

from kdlib.cartography.datamap import REGIONS
from kdlib.explorer.document import write
from kdlib.explorer.page import page
from kdlib.explorer.page_content import Content, collect
from kdlib.study.load import load_study


def random_content(n: int) -> Content:
    """A map of n random points, without curves and images."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "label": rng.integers(0, 10, n),
            "confidence": rng.random(n),
            "variability": rng.random(n) / 2,
            "correctness": rng.random(n),
            "region_variability": pd.Categorical(rng.choice(REGIONS, n), categories=REGIONS),
        },
        pd.RangeIndex(n, name="example_id"),
    )
    return Content(
        name="random", network="no network", table=table, classes=list("abcdefghij"),
        scores=["confidence", "variability", "correctness"], n_epochs=30, observed="train",
        epochs=[], gold=None, predicted=None, read=None, data="0" * 64, parent="0" * 64,
    )  # fmt: skip


def opened(browser: Browser, path: Path) -> tuple[float, float, str]:
    """Seconds until the map is drawn, seconds of a lasso, and what was selected."""
    shown = browser.new_page(viewport={"width": 1400, "height": 1000})
    shown.set_default_timeout(600_000)
    start = time.monotonic()
    shown.goto(path.as_uri())
    shown.wait_for_selector("body[data-ready]")
    shown.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    until_open = time.monotonic() - start
    glass = shown.locator(".glass")
    glass.scroll_into_view_if_needed()
    box = glass.bounding_box()
    corners = [(0.3, 0.3), (0.65, 0.3), (0.65, 0.65), (0.3, 0.65), (0.3, 0.31)]
    first, *others = [
        (box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in corners
    ]
    start = time.monotonic()
    shown.mouse.move(*first)
    shown.mouse.down()
    for corner in others:
        shown.mouse.move(*corner, steps=10)
    shown.mouse.up()
    shown.wait_for_function("document.querySelector('#gallery').childElementCount > 0")
    shown.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    lasso = time.monotonic() - start
    said = shown.inner_text("#selected")
    shown.close()
    return until_open, lasso, said


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="*", help="study files")
    parser.add_argument("--n", type=int, nargs="*", default=[], help="random points")
    given = parser.parse_args()
    contents = [lambda path=path: collect(load_study(path)) for path in given.study]
    contents += [lambda n=n: random_content(n) for n in given.n]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        print("| map | points | written in, s | MB | open after, s | lasso, s | selected |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
        for make in contents:
            start = time.monotonic()
            content = make()
            path = write(Path(folder) / "page.html", page(content))
            written, size = time.monotonic() - start, path.stat().st_size / 1e6
            until_open, lasso, said = opened(browser, path)
            print(
                f"| {content.name} | {len(content.table):,} | {written:.1f} | {size:.2f} | "
                f"{until_open:.1f} | {lasso:.1f} | {said} |",
                flush=True,
            )
        browser.close()


if __name__ == "__main__":
    main()
