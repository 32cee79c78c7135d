"""Take the pictures of the interactive datamap again: figures/explorer/*.png.

    python tests/screenshots.py

Needs Chromium, and the studies `digits` and `tiny` made in this workspace as far as the datamap; it
trains ten students of each objective on the 50-odd digits it picks.
"""

import tempfile
import time
from pathlib import Path

from explorer.screen import CHROMIUM, FLAGS, Screen, serving, write_notebook
from playwright.sync_api import sync_playwright

from kdlib.explorer.state import Explorer
from kdlib.repro import files
from kdlib.study.load import load_study

LASSO = [(0.25, 0.05), (0.05, 0.02), (0.02, 0.2), (0.12, 0.4), (0.22, 0.47), (0.3, 0.42),
         (0.34, 0.25)]  # fmt: skip
ONE = """from kdlib.explorer import explore
from kdlib.study import load_study
explore(load_study("params/digits.yaml"))"""
TWO = """from kdlib.explorer import explore
from kdlib.study import load_study
study, against = (load_study(f"params/{name}.yaml") for name in ("digits", "tiny"))
explore(study, against)"""


def shot(screen: Screen, name: str) -> None:
    """The app alone, once it has come to rest."""
    time.sleep(1)
    path = files.workspace() / "figures" / "explorer" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    screen.page.locator(".jp-OutputArea-output").first.screenshot(path=path)


def walk(screen: Screen) -> None:
    """Lasso the hardest digits, look at one, save them, train on them."""
    screen.scroll_to_the_map()
    before = None
    while before != (places := [screen.at(*point) for point in LASSO]):  # until the layout rests
        before = places
        time.sleep(1)
    first, *others = places
    screen.page.mouse.move(*first)
    screen.page.mouse.down()
    for point in others:
        screen.page.mouse.move(*point, steps=10)
    screen.page.mouse.up()
    screen.says("selected")
    state = Explorer(load_study("params/digits.yaml"))
    table = state.table[state.table["variability"].between(0.1, 0.25)]
    example = table.sort_values("confidence").iloc[0]
    screen.hover(example["variability"], example["confidence"], state.pictures([example.name])[0])
    shot(screen, "lasso")
    screen.fill("letters, digits, _ -", "bottom_left")
    screen.button("Save").click()
    screen.says("saved in")
    screen.button("Train students on it").click()
    screen.says("^The students of bottom_left are trained")
    shot(screen, "trained")


def main() -> None:
    """Take all pictures."""
    with tempfile.TemporaryDirectory() as own, sync_playwright() as playwright:
        home = files.workspace()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1420})
        screen = Screen(page, own)
        notebooks = {"runs/walk.ipynb": ONE, "runs/linked.ipynb": TWO}
        with serving(home, Path(own) / "jupyter") as address:
            for name, code in notebooks.items():
                write_notebook(home / name, code)
                screen.open(address(name))
                if code == ONE:
                    walk(screen)
                else:
                    screen.lasso((0.28, 0.4), (0.48, 0.8))
                    shot(screen, "linked")
                (home / name).unlink()
        browser.close()


if __name__ == "__main__":
    main()
