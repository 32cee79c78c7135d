"""A study whose steps 01 to 03 are done, and its explorer without a browser."""

import shutil

import pytest
from explorer.screen import CHROMIUM, FLAGS

from kdlib.explorer.app import App
from kdlib.explorer.state import Explorer
from kdlib.study.load import load_study


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, prepare_datamap):
    """A workspace in which steps 01 to 03 of the tiny study are done."""
    home = tmp_path_factory.mktemp("workspace")
    prepare_datamap(home)
    return home


@pytest.fixture
def study(workspace, monkeypatch):
    """The tiny study, without saved selections."""
    monkeypatch.setenv("KDLIB_HOME", str(workspace))
    study = load_study("params/tiny.yaml")
    yield study
    shutil.rmtree(study.runs / "selections", ignore_errors=True)


@pytest.fixture
def state(study):
    return Explorer(study)


@pytest.fixture
def app(state):
    return App(state)


@pytest.fixture(scope="module")
def browser():
    """A Chromium, started once for the tests of a file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()
