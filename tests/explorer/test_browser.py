"""The explorer in a real JupyterLab in a headless Chromium: see, select, save, restore, train."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from explorer.screen import (
    BAD_NAME,
    LACKING,
    looking,
    serving,
    wait,
    write_notebook,
)
from tiny import TINY, flip

from kdlib.cartography.subset import Subset
from kdlib.explorer.crossfilter import make_bins
from kdlib.explorer.state import Explorer
from kdlib.repro import files
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_datamap
from kdlib.steps.distill import open_student
from kdlib.study.load import load_study

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"needs {' and '.join(LACKING)}")

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


def test_all_stands_in_its_place_whatever_the_size_and_the_theme(study, lab, browser, tmp_path):
    table = open_datamap(study, open_images(study))
    ends = [
        at for s in ("variability", "confidence") for at in (table[s].argmin(), table[s].argmax())
    ]
    with looking(browser, tmp_path, 900, 700) as screen:
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

        def in_the_window():
            """Map, Save and Train where the first line of the app stands at the top."""
            screen.page.evaluate("document.querySelector('.kdlib-app').scrollIntoView()")
            seen = screen.box(".jp-WindowedPanel-outer")
            parts = [screen.box(".x-axis-label"), screen.box(".jp-OutputArea canvas")]
            for name in ("Save", "Train students on it", "Stop"):
                parts.append(screen.button(name).bounding_box())
            right, bottom = seen["x"] + seen["width"], seen["y"] + seen["height"]
            return all(
                part["x"] > seen["x"] and part["x"] + part["width"] < right
                and part["y"] > seen["y"] and part["y"] + part["height"] < bottom
                for part in parts
            )  # fmt: skip

        def label_at_its_axis():
            label, numbers = screen.box(".y-axis-label"), screen.box(".y-axis .tick text")
            return 0 < label["x"] - numbers["x"] - numbers["width"] < 30  # pixels

        for width in (900, 1280, 1920, 750):  # as it is opened, and after the window has changed
            screen.page.set_viewport_size({"width": width, "height": 700})
            wait(on_the_canvas, f"a whole map at {width} pixels")
            wait(as_the_axes_say, "axes that fit it")
            wait(label_at_its_axis, "the label of y")
            if width >= 900:
                wait(in_the_window, f"Save and Train in the window at {width} pixels")
            screen.shot(f"{width}")
        example = table.iloc[ends[1]]  # of the largest variability: it stands alone
        [picture] = Explorer(study).pictures([example.name])
        screen.hover(example["variability"], example["confidence"], picture)
        for theme in ("Dark", "Light"):  # the last is that of the other tests
            screen.wear(theme)
            wait(lambda: all(c >= 4.5 for c in screen.contrasts().values()), f"a legible {theme}")
            assert {"axis", "status", "class", "button", "title"} <= set(screen.contrasts())
            screen.shot(theme)


def test_ranges_classes_and_keys_select_and_steps_are_undone(study, lab, browser, tmp_path):
    table = open_datamap(study, open_images(study))
    state = Explorer(study)
    with looking(browser, tmp_path, 1280, 700) as screen:
        screen.open(lab)
        page = screen.page
        both = {}
        for score, (first, last) in {"confidence": (10, 30), "variability": (8, 32)}.items():
            screen.brush(score, first, last, 40)
            both[score] = make_bins(table, score).ends(first, last)
            state.filter(**both)
            screen.says(f"^{state.visible.sum():,} of 1,100 examples pass")
        before = screen.bars("correctness", "passing")
        screen.handle("confidence", "lowest").focus()
        page.keyboard.press("ArrowRight")
        both["confidence"] = make_bins(table, "confidence").ends(11, 30)
        state.filter(**both)
        screen.says(f"^{state.visible.sum():,} of 1,100 examples pass")
        wait(lambda: screen.bars("correctness", "passing") != before, "the other histogram")
        screen.toggle_class(7)
        state.filter([7], **both)
        n = int(state.visible.sum())
        screen.says(f"^{n} of 1,100 examples pass")
        assert 0 < n < 110
        screen.button("Select shown").focus()
        for key in ("d", "d", "Enter"):  # JupyterLab would delete the cell
            page.keyboard.press(key)
        screen.says(f"^{n} selected")
        wait(lambda: screen.bars("correctness", "selected"), "the selection in a histogram")
        screen.shot("filtered")
        screen.handle("variability", "highest").focus()
        page.keyboard.press("Delete")
        del both["variability"]
        state.filter([7], **both)
        screen.says(f"^{state.visible.sum()} of 1,100 examples pass")
        screen.button("Show all").click()
        screen.says("^1,100 of 1,100")
        page.get_by_title("Undo the last").click()
        screen.says("^Undone: 0 selected")
        page.keyboard.press("Control+Shift+z")
        screen.says(f"^Redone: {n} selected")


def test_a_map_slow_to_draw_shows_what_was_chosen_last(study, lab, browser, tmp_path):
    table = open_datamap(study, open_images(study))
    rows = [table[score].argmax() for score in ("confidence", "aum", "el2n")]
    with looking(browser, tmp_path) as screen:
        screen.open(lab)
        screen.page.evaluate("""() => {
            const [frame, held] = [window.requestAnimationFrame, []];
            window.requestAnimationFrame = (call) => held.push(call);
            window.release = () => {
                window.requestAnimationFrame = frame;
                held.forEach((call) => frame(call)); }; }""")
        for x, y, colour in (("aum", "el2n", "region_corner"), ("el2n", "confidence", "class")):
            for menu, column in (("x", x), ("y", y), ("colour", colour)):
                screen.menu(menu).select_option(column)
            wait(lambda y=y: screen.text(".y-axis-label", svg=True) == y, "the new axis")
        screen.page.evaluate("release()")  # nothing was drawn until now

        def as_chosen():
            places = [(screen.drawn(int(row)), screen.at(*table[[x, y]].iloc[row])) for row in rows]
            return np.allclose(*zip(*places, strict=True), rtol=0, atol=1)  # pixels

        wait(as_chosen, "the points on their axes")
        wait(lambda: "9" in screen.text(".legend"), "the legend of the classes")


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
    assert re.search(r"failed \(kd, picked_doomed, seed 0; .*\): CacheError: \S+", told), told


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
        screen.says("^The students of mine are trained|failed; its error stands")
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
    counts = page.locator(".kdlib-class-n").all_inner_texts()
    assert sum(int(text.split(" of ")[0]) for text in counts) == n
    screen.shot("lasso")

    page.locator(".kdlib-gallery figure").first.click()
    screen.says("^Example ")
    wait(lambda: page.locator(".kdlib-detail svg.kdlib-curve").count(), "its panel")
    screen.shot("one")
    near = page.locator(".kdlib-detail figure").first
    neighbour = near.get_attribute("data-example")
    near.press("Enter")
    screen.says(f"^Example {neighbour}: ")
    page.get_by_role("button", name="what is in it?").click()
    wait(lambda: page.locator(".kdlib-representatives figure").count() == 12, "a dozen images")
    screen.shot("representatives")
    page.get_by_role("button", name="images", exact=True).click()
    wait(lambda: page.locator(".kdlib-gallery img").count() == min(n, 48), "the gallery")

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
    for label in (1, 5):
        screen.toggle_class(label)
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
    screen.says("^The students of mine are trained")
    screen.shot("trained")
    assert page.locator(".kdlib-dots circle").count() == 4  # two seeds of two objectives
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
