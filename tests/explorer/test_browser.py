"""The explorer in a real JupyterLab in a headless Chromium: see, select, save, restore, train."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import TINY, flip

from kdlib.cartography.subset import Subset
from kdlib.explorer.state import Explorer
from kdlib.repro import files
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_datamap
from kdlib.steps.distill import open_student
from kdlib.study.load import load_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
LACKING = [
    what
    for what, there in (
        ("a Chromium in the PATH (apt install chromium)", CHROMIUM),
        ("playwright (pip install playwright)", importlib.util.find_spec("playwright")),
        ("JupyterLab", importlib.util.find_spec("jupyterlab")),
    )
    if not there
]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"needs {' and '.join(LACKING)}")

FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
LIMIT_S = 300.0  # of every wait for a condition: reached by a failure alone, also on a busy machine
AGAIN_S = 20.0  # after which what the front end may have missed is done once more
BAD_NAME = "<img src=x onerror=alert(1)>"
CODE = f"""from kdlib.explorer.app import App, explore
from kdlib.study import load_study
app = explore(load_study("params/tiny.yaml"))
app.state.names[3] = {BAD_NAME!r}
app = App(app.state)
app"""


@pytest.fixture(scope="module")
def study(tmp_path_factory, prepare_datamap):
    """The tiny study, its steps 01 to 03 done, in a workspace of its own."""
    home = tmp_path_factory.mktemp("lab")
    study = prepare_datamap(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        yield study


@pytest.fixture(scope="module")
def lab(study, tmp_path_factory):
    """A running JupyterLab: the address of a notebook in it."""
    home = files.workspace()
    write_notebook(home / "explore.ipynb", CODE)
    with serving(home, tmp_path_factory.mktemp("jupyter")) as address:
        yield address("explore.ipynb")


def write_notebook(path, code):
    """A notebook of one cell."""
    cell = {"cell_type": "code", "id": "one", "metadata": {}, "execution_count": None,
            "outputs": [], "source": code}  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    content = {"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4,
               "nbformat_minor": 5}  # fmt: skip
    path.write_text(json.dumps(content))


@contextlib.contextmanager
def serving(home, own):
    """JupyterLab on a folder, its settings in another: from a notebook's name to its address."""
    page = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (own / "labconfig").mkdir(parents=True)
    (own / "labconfig" / "page_config.json").write_text(json.dumps(page))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    address, token = f"http://127.0.0.1:{port}", "explorer"
    with open(own / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
             "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
             "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home}",
             f"--IdentityProvider.token={token}"],
            env=os.environ | {name: str(own) for name in folders} | {"OMP_NUM_THREADS": "1"},
            cwd=home, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait(lambda: answers(f"{address}/api/status?token={token}"), "JupyterLab")
        yield lambda name: f"{address}/doc/tree/{name}?token={token}"
    finally:
        server.send_signal(signal.SIGTERM)  # it takes its kernels down
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False


def wait(true, what, again=None, limit_s=LIMIT_S):
    """Until `true()` is, which is returned; an error that says what did not come.

    Args:
        again: Called at first and every AGAIN_S, to bring the condition about.
    """
    end, next_try = time.monotonic() + limit_s, 0.0
    while not (found := true()):
        assert time.monotonic() < end, f"{what} did not come within {limit_s:g} s"
        if again is not None and time.monotonic() >= next_try:
            again()
            next_try = time.monotonic() + AGAIN_S
        time.sleep(0.1)
    return found


class Screen:
    """The page as a person uses it."""

    def __init__(self, page, folder):
        self.page, self.folder, self.n = page, folder, 0

    def shot(self, name):
        self.n += 1
        folders = [self.folder, os.environ.get("KDLIB_SCREENSHOTS")]
        for folder in filter(None, folders):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{self.n}_{name}.png")

    def open(self, address):
        self.page.set_default_timeout(1000 * LIMIT_S)
        self.page.goto(address)
        self.page.wait_for_selector(".jp-Cell .cm-content")
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        prompt = self.page.locator(".jp-CodeCell .jp-InputPrompt").first
        before = prompt.inner_text()

        def run():  # a first key press straight after idle can be lost
            if "*" in prompt.inner_text():
                return
            if (dialog := self.page.locator(".jp-Dialog .jp-mod-accept")).count():
                dialog.first.click()
            self.page.locator(".jp-Cell .cm-content").first.click()
            self.page.keyboard.press("Control+Enter")

        def ran():
            return (text := prompt.inner_text()) != before and re.search(r"\d", text)

        wait(ran, "the end of the cell", run)
        self.page.wait_for_selector(".jp-OutputArea canvas")
        wait(lambda: self.axis("x") and self.axis("y"), "the axes")

    def axis(self, axis):
        """(values, pixels) of the ticks of an axis; empty before it is drawn."""
        ticks = self.page.eval_on_selector_all(
            f".jp-OutputArea .{axis}-axis .tick",
            """(ticks, axis) => ticks.filter(
                t => t.parentElement === ticks[0].parentElement).map(t => {
                const box = t.querySelector('line').getBoundingClientRect();
                const middle = axis == 'x' ? (box.left + box.right) : (box.top + box.bottom);
                return [Number(t.textContent.replace('\u2212', '-')), middle / 2]; })""",
            axis,
        )
        return list(zip(*ticks, strict=True)) if len(ticks) > 1 else []

    def at(self, x, y):
        """Where on the page a point of the map lies, from the ticks of its axes."""
        places = []
        for axis, value in (("x", x), ("y", y)):
            numbers, pixels = self.axis(axis)
            places.append(float(np.polyval(np.polyfit(numbers, pixels, 1), value)))
        return places

    def canvas(self):
        """Left, top, right and bottom of the map's canvas on the page."""
        return self.page.eval_on_selector(
            ".jp-OutputArea canvas",
            """c => { const r = c.getBoundingClientRect(); return [r.left, r.top, r.right,
            r.bottom]; }""",
        )

    def drawn(self, row):
        """Where on the page the map draws a row of its table."""
        return self.page.evaluate(
            """row => {
                const map = [...document.querySelectorAll('.jp-OutputArea div')].find(d => d.api);
                const box = map.querySelector('canvas').getBoundingClientRect();
                const [x, y] = map.api.getScreenPosition(row);
                return [box.left + x, box.top + y]; }""",
            row,
        )

    def lasso(self, low, high, n=None, box=False):
        """Draw around a rectangle of (variability, confidence), or from one corner of it to the
        other, until n examples are selected, or any number: the front end can miss a lasso."""
        corners = [low, high] if box else [low, (high[0], low[1]), high, (low[0], high[1]), low]

        def draw():
            points = [self.at(*corner) for corner in corners]
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            if box:  # it begins where the first move finds the mouse
                time.sleep(0.3)
                self.page.mouse.move(points[0][0] + 0.5, points[0][1] - 0.5)
                time.sleep(0.3)
            for point in points[1:]:
                self.page.mouse.move(*point, steps=10)
                time.sleep(0.05)
            for _ in range(2):  # the map follows the mouse some moves late where the CPU draws
                time.sleep(0.2)
                self.page.mouse.move(*points[-1])
            self.page.mouse.up()

        said = "^" + (r"[\d,]+" if n is None else f"{n:,}") + " selected"
        wait(lambda: re.search(said, self.text(".kdlib-status")), said, draw)

    def hover(self, x, y, picture):
        """Rest on a point until its tooltip shows this image."""

        def rest():  # from outside of the point: a move within it asks for no tooltip
            place = self.at(x, y)
            self.page.mouse.move(place[0] - 40, place[1] + 40)
            self.page.mouse.move(*place, steps=5)

        script = """p => [...document.querySelectorAll('.jp-OutputArea div')].some(
            d => d.style.backgroundImage.includes(p)
                && d.checkVisibility({opacityProperty: true, visibilityProperty: true}))"""
        wait(lambda: self.page.evaluate(script, picture), "its image in the tooltip", rest)

    def fill(self, placeholder, text):
        self.page.get_by_placeholder(placeholder, exact=True).fill(text)

    def menu(self, description):
        label = self.page.locator(".widget-label", has_text=re.compile(f"^{description}$")).first
        return label.locator("xpath=..").locator("select")

    def button(self, text):
        return self.page.locator(".jp-OutputArea .widget-button", has_text=text).first

    def text(self, css, svg=False):
        found = self.page.locator(css)
        if not found.count():
            return ""
        return found.first.text_content() if svg else found.first.inner_text()

    def says(self, pattern):
        return wait(lambda: re.search(pattern, self.text(".kdlib-status")), pattern)


@contextlib.contextmanager
def looking(browser, folder, width=1380):
    """A screen of a page of this width, whose picture is kept where the test fails."""
    page = browser.new_page(viewport={"width": width, "height": 1180})
    screen, dialogs = Screen(page, folder), []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    try:
        yield screen
    except BaseException:
        screen.shot("failed")
        raise
    finally:
        page.close()
    assert dialogs == []  # a class name is never run as HTML


@pytest.mark.parametrize(("width", "narrower"), [(900, 750), (1440, 1100)])
def test_every_point_lies_on_the_canvas_whatever_the_width(
    study, lab, browser, tmp_path, width, narrower
):
    table = open_datamap(study, open_images(study))
    ends = [
        at for s in ("variability", "confidence") for at in (table[s].argmin(), table[s].argmax())
    ]
    with looking(browser, tmp_path, width) as screen:
        screen.open(lab)

        def on_the_canvas():
            left, top, right, bottom = screen.canvas()
            places = [screen.drawn(int(row)) for row in ends]
            places += [screen.at(*corner) for corner in ((0, 0), (0.5, 1))]  # all that is possible
            return all(left < x < right and top < y < bottom for x, y in places)

        def as_the_axes_say():
            places = [
                (screen.drawn(int(row)), screen.at(*table[["variability", "confidence"]].iloc[row]))
                for row in ends
            ]
            return np.allclose(*zip(*places, strict=True), rtol=0, atol=1)  # pixels

        for pixels in (width, narrower):  # as it is opened, and after the window has changed
            screen.page.set_viewport_size({"width": pixels, "height": 1180})
            wait(on_the_canvas, f"a whole map at {pixels} pixels")
            wait(as_the_axes_say, "axes that fit it")
            screen.shot(f"{pixels}")
        example = table.iloc[ends[0]]
        [picture] = Explorer(study).pictures([example.name])
        screen.hover(example["variability"], example["confidence"], picture)


def test_a_person_selects_saves_restores_and_trains_students(study, lab, browser, tmp_path):
    with looking(browser, tmp_path) as screen:
        _drive(screen, study, lab)


def test_a_failed_training_says_why_below_its_button(study, lab, browser, tmp_path):
    outputs = study.runs / "teacher" / "outputs-train" / "logits-00000.npy"
    with looking(browser, tmp_path) as screen:
        screen.open(lab)
        example = open_images(study).train_ids[0]
        screen.fill("id", str(example))
        screen.button("Find").click()
        screen.says(f"Example {example}: ")
        screen.fill("letters, digits, _ -", "doomed")
        flip(outputs)
        try:
            screen.button("Train students on it").click()
            told = wait(lambda: screen.text(".kdlib-failure"), "the failure")
        finally:
            flip(outputs)
        screen.shot("failure")
        assert screen.button("Train students on it").is_enabled()
    log = study.runs / "selections" / "doomed-train.log"
    assert str(log) in told
    assert outputs.name in told
    assert re.search(r"failed: CacheError: \S+", told), told


@pytest.fixture(scope="module")
def digits(study):
    """The default study with fewer and shorter trainings, its steps 01 to 03 done, beside tiny."""
    home = files.workspace()
    shutil.copy(TINY.with_name("digits.yaml"), home / "params")
    (home / "params" / "quick.yaml").write_text(
        "base: digits.yaml\nseeds: [0, 1]\naxes: {objective: [kd]}\n"
        "training: {steps: 20, warmup_steps: 2}\n"
        "teacher: {expected_accuracy: 0.5, training: {epochs: 12}}\n"
    )
    code = (  # a process of its own is held to the instructions that the study asks for
        "from kdlib.steps.cache import cache_images\n"
        "from kdlib.steps.datamap import make_datamap\n"
        "from kdlib.steps.teacher import make_teacher\n"
        "from kdlib.study import load_study\n"
        "study = load_study('params/quick.yaml')\n"
        "images = cache_images(study)\n"
        "make_teacher(study, images)\n"
        "make_datamap(study, images)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_study("params/quick.yaml")


def test_students_of_the_default_study_are_trained_by_the_button(digits, lab, browser, tmp_path):
    table = pd.read_parquet(digits.runs / "datamap" / "datamap.parquet")
    low = _gap(table, "variability", 0.25), _gap(table, "confidence", 0.5)
    n = int(((table["variability"] > low[0]) & (table["confidence"] > low[1])).sum())
    name = "quick.ipynb"
    write_notebook(files.workspace() / name, CODE.replace("tiny.yaml", "quick.yaml"))
    with looking(browser, tmp_path) as screen:
        screen.open(lab.replace("explore.ipynb", name))
        screen.lasso(low, (0.49, 0.99), n)
        screen.fill("letters, digits, _ -", "mine")
        screen.button("Train students on it").click()
        wait(
            lambda: screen.text(".kdlib-results") or screen.text(".kdlib-failure"),
            "the end of the training",
        )
        screen.shot("digits")
        assert screen.text(".kdlib-failure") == ""
    fraction = digits.cell(strategy="picked_mine").fraction
    for strategy in ("picked_mine", "random"):
        cell = digits.cell(strategy=strategy, fraction=fraction)
        for seed in digits.seeds:
            student = open_student(digits, cell, seed)
            assert student["budget"]["recorded"]["steps"] == 20


def _saved_outputs():
    """What the notebook on the disk holds below its cell."""
    try:
        cells = json.loads((files.workspace() / "explore.ipynb").read_text())["cells"]
    except ValueError:  # half written
        return []
    return cells[0]["outputs"]


def _gap(table, score, near):
    """The middle of the widest gap between values of a score close to a value."""
    values = np.sort(table[score][table[score].between(near, near + 0.05)])
    widest = np.diff(values).argmax()
    return values[widest : widest + 2].mean()


def _drive(screen, study, lab):
    page = screen.page
    screen.open(lab)
    screen.shot("open")

    table = open_datamap(study, open_images(study))
    # a rectangle whose sides keep away from all points
    low, high = (_gap(table, "variability", 0.1), _gap(table, "confidence", 0.2)), (0.45, 0.95)
    inside = (table["variability"] > low[0]) & (table["confidence"] > low[1])
    n = int(inside.sum())
    screen.lasso(low, high, n)
    wait(lambda: page.locator(".kdlib-gallery img").count() == min(n, 48), "the gallery")
    assert page.evaluate(
        "[...document.querySelectorAll('.kdlib-gallery img')].every(i => i.naturalWidth > 0)"
    )
    counts = page.locator(".kdlib-counts tr").all_inner_texts()
    assert sum(int(row.split("\t")[-2].replace(",", "")) for row in counts) == n
    screen.shot("lasso")

    screen.fill("letters, digits, _ -", "mine")
    screen.button("Save").click()
    screen.says(f"^{n} examples saved")
    path = study.runs / "selections" / "mine.parquet"
    saved = Subset.load(path)
    assert len(saved) == n
    assert saved.example_ids.tolist() == table.index[inside].tolist()

    screen.fill("id", str(table.index[0]))
    screen.button("Find").click()
    screen.says(f"Example {table.index[0]}: ")
    screen.says("^Example")
    screen.menu("draw").select_option("box")
    screen.lasso(low, high, n, box=True)
    screen.menu("draw").select_option("lasso")
    screen.fill("id", str(table.index[0]))
    screen.button("Find").click()
    screen.says(f"Example {table.index[0]}: ")
    screen.menu("saved").select_option("mine")
    screen.says(f"^mine: {n} selected")
    screen.shot("restored")

    screen.menu("colour").select_option("class")
    screen.menu("range of").select_option("aum")
    page.locator("select[multiple]").select_option(["1", "5"])
    some = table["label"].isin([1, 5])
    screen.says(f"^{some.sum()} of 1,100 examples pass")
    left = int(some.loc[saved.example_ids].sum())
    wait(lambda: screen.text(".kdlib-page").endswith(f" {left} selected"), "the visible part")
    point = table[some & inside].nlargest(1, "variability").iloc[0]
    look = Explorer(study)
    [picture] = look.pictures([point.name])
    screen.hover(point["variability"], point["confidence"], picture)
    screen.shot("filtered")
    screen.button("Show all").click()
    wait(lambda: screen.text(".kdlib-page").endswith(f" {n} selected"), "the whole selection")

    for axis, score in (("x", "aum"), ("y", "el2n"), ("colour", "correctness")):
        screen.menu(axis).select_option(score)  # faster than the map can be drawn
    wait(lambda: screen.text(".jp-OutputArea .y-axis-label", svg=True) == "el2n", "the new axis")
    point = table.nlargest(1, "aum").iloc[0]
    [picture] = look.pictures([point.name])
    screen.hover(point["aum"], point["el2n"], picture)
    screen.shot("axes")

    screen.button("Train students on it").click()
    wait(lambda: "of 8 students done" in screen.text(".kdlib-log"), "the log")
    screen.shot("training")
    wait(lambda: screen.text(".kdlib-results"), "the table of results")
    screen.shot("trained")
    assert len(page.locator(".kdlib-results tr").all()) == 3  # heads, two objectives
    for seed in study.seeds:
        picked = study.cell(strategy="picked_mine")
        evidence = open_student(study, picked, seed)
        assert evidence["budget"]["recorded"]["unique_examples"] <= n
        open_student(study, study.cell(strategy="random", fraction=picked.fraction), seed)

    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    found = wait(_saved_outputs, "the saved notebook")
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(found[0]["data"])
