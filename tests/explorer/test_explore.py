"""The app appears where a person sees the cell, else the datamap as a picture.

A notebook that runs without a person is `test_notebooks.py`'s.
"""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from kdlib.explorer import app as app_module
from kdlib.explorer.app import explore
from kdlib.explorer.still import still_map

# jupyter-scatter 1.0.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")


def test_without_a_front_end_the_still_map_is_shown(study, capsys):
    assert explore(study) is None
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert str(study.figures / "datamap.png") in text
    with Image.open(study.figures / "datamap.png") as picture:
        assert picture.width > 1000


def test_plain_python_can_explore_without_importing_widgets(study):
    code = (
        "import sys; from kdlib.explorer import explore\nfrom kdlib.study import load_study\n"
        "explore(load_study('params/tiny.yaml'))\n"
        "print(sorted({'ipywidgets', 'jscatter', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "still map" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_a_newer_datamap_is_drawn_again(study, monkeypatch):
    from kdlib.steps import figures

    path = still_map(study)
    monkeypatch.setattr(figures, "draw_datamap", lambda study: {"datamap": "drawn again"})
    assert still_map(study) == path
    os.utime(path, (0, 0))
    assert still_map(study) == "drawn again"


@pytest.mark.parametrize(
    ("metadata", "person"), [({"cellId": "a1"}, True), ({}, False), (None, False)]
)
def test_a_person_is_known_by_the_id_of_the_cell(monkeypatch, metadata, person):
    class Kernel:
        def get_parent(self, channel):
            return {} if metadata is None else {"metadata": metadata}

    monkeypatch.setattr(app_module, "_kernel", Kernel)
    assert app_module._front_end() is person


def test_an_app_carries_the_still_map_for_where_no_widget_is(study):
    app = explore(study, widgets=True)
    data, metadata = app._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert json.dumps([data, metadata])
