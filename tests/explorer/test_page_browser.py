"""A datamap's page in a headless Chromium, opened from the disk: lasso, filters, curve, ids."""

import contextlib
import dataclasses
import json

import pandas as pd
import pytest
from explorer.screen import LACKING, LIMIT_S

from kdlib.explorer.document import write
from kdlib.explorer.page import page
from kdlib.explorer.page_content import collect
from kdlib.explorer.sent import read_selection
from kdlib.repro import files
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_datamap

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"needs {' and '.join(LACKING)}")

BAD = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def study(tmp_path_factory, prepare_datamap):
    """The tiny study, its steps 01 to 03 done."""
    home = tmp_path_factory.mktemp("page")
    study = prepare_datamap(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        yield study


@pytest.fixture(scope="module")
def table(study):
    return open_datamap(study, open_images(study))


@pytest.fixture(scope="module")
def path(study, table):
    """Its page, with a class of a hostile name and half of the images on a second map."""
    content = collect(study, table.iloc[::2], BAD)
    row = {"student": "tiny", "objective": BAD, "share": "33 %", "strategy": BAD, "few": True,
           "against": "random", "hard": 0, "mean": 0.5, "difference": -0.1, "low": -0.2,
           "high": 0.0, "verdict": "worse"}  # fmt: skip
    results = {"title": BAD, "about": BAD, "n_hard": 3, "rows": [row], "without": [BAD]}
    names = [BAD, *content.classes[1:]]
    content = dataclasses.replace(content, classes=names, results=results)
    return write(files.workspace() / "page.html", page(content))


class Screen:
    """The page as a person uses it."""

    def __init__(self, page, wrong):
        self.page, self.wrong = page, wrong

    def text(self, css):
        return self.page.inner_text(css)

    def lasso(self, low, high, which=0, keys=()):
        """Draw around a rectangle of (variability, confidence) on a map."""
        glass = self.page.locator(".glass").nth(which)
        glass.scroll_into_view_if_needed()
        box = glass.bounding_box()

        def at(x, y):  # the ends of the axes lie a little beyond the values
            return (box["x"] + box["width"] * (x + 0.01) / 0.52,
                    box["y"] + box["height"] * (1.02 - y) / 1.04)  # fmt: skip

        corners = [low, (high[0], low[1]), high, (low[0], high[1]), low]
        for key in keys:
            self.page.keyboard.down(key)
        self.page.mouse.move(*at(*corners[0]))
        self.page.mouse.down()
        for corner in corners[1:]:
            self.page.mouse.move(*at(*corner), steps=3)
        self.page.mouse.up()
        for key in keys:
            self.page.keyboard.up(key)

    def download(self, folder, name):
        self.page.fill("#name", name)
        with self.page.expect_download() as download:
            self.page.click("#download")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def ids(self, folder):
        return set(json.loads(self.download(folder, "some").read_text())["example_ids"])


@contextlib.contextmanager
def looking(browser, path, **options):
    """The page, open; nothing else was asked for, no dialog came, and nothing went wrong."""
    context = browser.new_context(viewport={"width": 1300, "height": 900}, **options)
    shown, asked, blocked, wrong = context.new_page(), [], [], []
    shown.set_default_timeout(1000 * LIMIT_S)
    shown.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    context.on("request", lambda request: asked.append(request.url))
    context.on("requestfailed", lambda request: blocked.append((request.url, request.failure)))
    try:
        shown.goto(path.as_uri())
        shown.wait_for_selector("body[data-ready]")
        yield Screen(shown, wrong)
        inside = {url for url in asked if url.startswith(("blob:", "data:"))}
        sent = set(asked) - {url for url, why in blocked if why == "csp"}  # an error, in `wrong`
        assert sent - inside == {path.as_uri()}
        assert wrong == []
    finally:
        context.close()


def within(table, low, high, margin):
    """Ids in a rectangle of (variability, confidence) that is smaller, or larger, by a margin."""
    inside = pd.Series(True, table.index)
    for axis, start, end in zip(("variability", "confidence"), low, high, strict=True):
        inside &= table[axis].between(start + margin, end - margin)
    return set(table.index[inside])


def test_a_person_selects_looks_and_takes_the_ids_home(study, table, path, browser, tmp_path):
    low, high, half = (0.0, 0.0), (0.45, 0.2), table.iloc[::2]
    inner, outer = (within(table, low, high, margin) for margin in (0.01, -0.01))
    assert 100 < len(inner) <= len(outer) < 800
    with looking(browser, path) as screen:
        screen.lasso(low, high)
        file = screen.download(tmp_path, "hard-ones")
        assert file.name == "tiny-hard-ones.json"
        subset = read_selection(study, file)
        ids = set(subset.example_ids.tolist())
        assert subset.strategy == "picked_hard-ones"
        assert inner <= ids <= outer
        assert screen.text("#selected") == f"{len(ids)} of 1,100 images are selected."
        assert screen.page.locator("#gallery .image").count() == 60

        # the second map, of every second image, selects in the first; Shift adds, Alt takes away
        screen.lasso(low, high, which=1)
        second = screen.ids(tmp_path)
        assert within(half, low, high, 0.01) <= second <= within(half, low, high, -0.01)
        screen.lasso(low, high, keys=["Shift"])
        assert screen.ids(tmp_path) == second | ids
        screen.lasso(low, high, which=1, keys=["Alt"])
        assert screen.ids(tmp_path) == (second | ids) - second
        screen.lasso((0.4, 0.9), (0.49, 0.99))
        assert screen.text("#selected") == "Nothing is selected."
        assert screen.page.is_disabled("#download")

        # one image: its curve, an epoch each, and what it was taken for
        screen.page.fill("#id", str(table.index[7]))
        screen.page.press("#id", "Enter")
        assert screen.text("#selected") == "1 of 1,100 images are selected."
        assert f"image {table.index[7]}: " in screen.text("#detail")
        assert screen.page.get_attribute("#detail .curve", "d").count("L") == 4  # of 5 epochs
        assert screen.page.locator("#detail .right, #detail .wrong").count() == 5
        assert "of 5 epochs" in screen.text("#detail")
        screen.page.fill("#id", "999999")
        screen.page.click("#find")
        assert screen.text("#selected") == "There is no image 999999 here."
        assert BAD in screen.text("#classes")
        assert BAD in screen.text("#results-table")


def test_a_page_filters_by_the_keyboard_alone(table, path, browser, tmp_path):
    edge = 0.2
    with looking(browser, path) as screen:
        screen.page.locator("#classes input").nth(0).press("Space")
        kept = table[table["label"] != 0]
        assert screen.text("#passing") == f"{len(kept):,} of 1,100 images pass the filters."
        screen.page.locator(".histogram input").nth(1).fill(f"{edge}")
        screen.page.locator(".histogram input").nth(1).press("Enter")
        screen.page.press("#select-passing", "Enter")
        ids = screen.ids(tmp_path)
        near = (kept["confidence"] - edge).abs() < 1e-4  # scores are rounded to 16 bits
        assert ids - set(kept.index[near]) == set(kept.index[(kept["confidence"] < edge) & ~near])
        bars = screen.page.locator(".histogram").nth(0).locator(".lit")
        assert bars.count() > 3  # the selected part of each histogram
        screen.page.press("body", "Escape")
        assert screen.text("#selected") == "Nothing is selected."
        screen.page.press("#unfilter", "Enter")
        assert screen.text("#passing") == "All 1,100 images are shown."
        screen.page.fill("#name", "no name")
        screen.page.press("#select-passing", "Enter")
        screen.page.press("#download", "Enter")
        assert screen.text("#selected").startswith("A name has letters, digits")


def test_a_page_fits_its_window_follows_the_theme_and_sends_nothing(path, browser):
    backs = {}
    for theme in ("light", "dark"):
        with looking(browser, path, color_scheme=theme) as screen:
            backs[theme] = screen.page.evaluate("getComputedStyle(document.body).backgroundColor")
            for width in (900, 1440, 1920):
                screen.page.set_viewport_size({"width": width, "height": 900})
                assert screen.page.evaluate("document.documentElement.scrollWidth") <= width
            sent = screen.page.evaluate(
                """() => new Promise(done => {
                    document.addEventListener('securitypolicyviolation',
                        e => done(e.effectiveDirective), {once: true});
                    const image = new Image();
                    image.src = 'http://127.0.0.1:9/secret'; })"""
            )
            assert sent == "img-src"
            blocked = screen.page.evaluate(
                """() => { const bad = document.createElement('div');
                    bad.innerHTML = '<img src=x onerror="window.ran = 1">';
                    const script = document.createElement('script');
                    script.textContent = 'window.ran = 1';
                    document.body.append(bad, script);
                    return window.ran === undefined; }"""
            )
            assert blocked
            assert all("Content Security Policy" in message for message in screen.wrong)
            screen.wrong.clear()
    assert backs["light"] != backs["dark"]


def test_without_webgl_a_sentence_stands_in_place_of_the_map(path, browser):
    context = browser.new_context()
    try:
        shown = context.new_page()
        shown.add_init_script(
            """const get = HTMLCanvasElement.prototype.getContext;
            HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
                return kind.startsWith('webgl') ? null : get.call(this, kind, ...rest); };"""
        )
        shown.goto(path.as_uri())
        shown.wait_for_selector("body[data-ready]")
        assert "cannot draw with WebGL" in shown.inner_text("#maps")
        shown.click("#select-passing")
        assert shown.inner_text("#selected").startswith("1,100 of 1,100")
    finally:
        context.close()
