"""How long the interactive datamap takes in a browser without a GPU: until the points are there,
and from the beginning of a lasso to the images of what it selected.

    PYTHONPATH=tests python -P benchmarks/explorer.py [--n 100000 1000000]

Opens random maps of n points in JupyterLab in headless Chromium (software rendering), in a
workspace of its own with the images of `params/tiny.yaml`, and draws one lasso of 40 mouse moves
around an eighth of the points.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from explorer.screen import CHROMIUM, FLAGS, Screen, serving, wait, write_notebook
from playwright.sync_api import sync_playwright

from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study

ROOT = Path(__file__).resolve().parents[1]
CODE = """import numpy as np, pandas as pd
from kdlib.explorer.app import App
from kdlib.explorer.state import Explorer, data_uri
from kdlib.study import load_study
state, rng, n = Explorer(load_study("params/tiny.yaml")), np.random.default_rng(0), {n}
region = pd.Categorical(rng.choice(["easy", "ambiguous", "hard"], n))
columns = dict(label=rng.integers(0, 10, n), confidence=rng.random(n),
               variability=rng.random(n) / 2, correctness=rng.random(n),
               region_variability=region, region_corner=region)
state.table = state.shown = pd.DataFrame(columns, pd.RangeIndex(n, name="example_id"))
state.scores = ["confidence", "variability", "correctness"]
state.clear_filter()
def pictures(ids):
    return [data_uri(p) for p in state.images.train.read("images", np.asarray(ids) % 999)]
state.pictures = pictures
App(state)"""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[100_000, 1_000_000])
    sizes = parser.parse_args().n
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        home, own = Path(folder) / "home", Path(folder) / "own"
        (home / "params").mkdir(parents=True)
        shutil.copy(ROOT / "params" / "tiny.yaml", home / "params")
        os.environ["KDLIB_HOME"] = str(home)
        study = load_study("params/tiny.yaml")
        images = cache_images(study)
        make_teacher(study, images)
        make_datamap(study, images)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        screen = Screen(browser.new_page(viewport={"width": 1400, "height": 1100}), own)
        print("| points | on the screen after, s | lasso, s | selected |")
        print("| ---: | ---: | ---: | ---: |")
        with serving(home, own) as address:
            for n in sizes:
                write_notebook(home / f"map{n}.ipynb", CODE.replace("{n}", str(n)))
                start = time.monotonic()
                screen.open(address(f"map{n}.ipynb"))
                opened = time.monotonic() - start
                time.sleep(5 + n / 2e5)  # it comes to rest
                start = time.monotonic()
                selected = screen.lasso((0.1, 0.2), (0.3, 0.5))
                gallery = screen.page.locator(".kdlib-gallery img")
                wait(lambda gallery=gallery: gallery.count() == 48, "the gallery", 120)
                lasso = time.monotonic() - start
                print(f"| {n:,} | {opened:.0f} | {lasso:.0f} | {selected:,} |", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
