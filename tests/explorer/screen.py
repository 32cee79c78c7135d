"""JupyterLab in a headless Chromium, and its page as a person uses it."""

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
FLAGS = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
LIMIT_S = 300.0  # of every wait for a condition: reached by a failure alone, also on a busy machine
AGAIN_S = 20.0  # after which what the front end may have missed is done once more
BAD_NAME = "<img src=x onerror=alert(1)>"


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

    def scroll_to_the_map(self):
        """As a person does whose window shows a part of it: the mouse reaches no hidden point."""
        self.page.eval_on_selector(
            ".jp-OutputArea canvas", "c => c.scrollIntoView({block: 'nearest'})"
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
            self.scroll_to_the_map()
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
            self.scroll_to_the_map()
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

    def toggle_class(self, label):
        self.page.locator(f".kdlib-class[data-label='{label}']").click()

    def box(self, css):
        return self.page.locator(css).first.bounding_box()

    def brush(self, score, first, last, n_bins):
        """Draw a range in the histogram of a score, over bins [first, last)."""
        plot = self.page.locator(f".kdlib-plot[data-score={score}]")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        ends = [box["x"] + box["width"] * (bin_ + 0.5) / n_bins for bin_ in (first, last - 1)]
        middle = box["y"] + box["height"] / 2
        self.page.mouse.move(ends[0], middle)
        self.page.mouse.down()
        self.page.mouse.move(ends[1], middle, steps=5)
        self.page.mouse.up()

    def handle(self, score, which):
        """The lowest or the highest end of a range."""
        return self.page.get_by_label(f"{which} {score} that is shown")

    def bars(self, score, layer):
        """The drawing of a layer of a histogram."""
        css = f".kdlib-plot[data-score={score}] .kdlib-{layer}"
        return self.page.locator(css).get_attribute("d")

    def wear(self, theme):
        """Take JupyterLab's dark or light theme."""
        self.page.get_by_role("menuitem", name="Settings").first.click()
        self.page.get_by_text("Theme", exact=True).first.hover()
        self.page.get_by_text(f"JupyterLab {theme}", exact=True).first.click()
        is_light = str(theme == "Light").lower()
        is_worn = f"body[data-jp-theme-light={is_light}]"
        self.page.wait_for_selector(is_worn, state="attached")  # a body has no size of its own

    def contrasts(self):
        """Contrast of texts of the app to what is behind them, by WCAG 2.2."""
        return self.page.evaluate("""() => {
            const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
            const light = (colour) => colour.slice(0, 3).map((c) => c / 255).map(
                (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce(
                (sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
            function behind(node) {
                const [r, g, b, a = 1] = numbers(getComputedStyle(node).backgroundColor);
                return a > 0.5 ? [r, g, b] : behind(node.parentElement);
            }
            const found = {axis: '.x-axis .tick text', status: '.kdlib-status',
                class: '.kdlib-class-name', title: '.kdlib-app .widget-html .kdlib-quiet',
                button: '.kdlib-app .widget-button', menu: '.kdlib-app select',
                legend: '.legend'};
            return Object.fromEntries(Object.entries(found).flatMap(([name, css]) => {
                const node = document.querySelector(css);
                if (!node) return [];
                const back = behind(node);
                const [r, g, b, a = 1] = numbers(getComputedStyle(node).color);
                const ink = light([r, g, b].map((c, i) => a * c + (1 - a) * back[i]));
                const paper = light(back);
                return [[name, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]];
            })); }""")

    def text(self, css, svg=False):
        found = self.page.locator(css)
        if not found.count():
            return ""
        return found.first.text_content() if svg else found.first.inner_text()

    def says(self, pattern):
        return wait(lambda: re.search(pattern, self.text(".kdlib-status")), pattern)


@contextlib.contextmanager
def looking(browser, folder, width=1380, height=1180):
    """A screen of a page of this size, whose picture is kept where the test fails."""
    page = browser.new_page(viewport={"width": width, "height": height})
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
