"""`python -m kdlib demo`: the committed map of the digits, where no step has run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tiny import ROOT

from kdlib.cartography.subset import Subset
from kdlib.explorer.app import App
from kdlib.explorer.demo import STUDY, demo, write_demo
from kdlib.explorer.selections import training_commands
from kdlib.explorer.state import Explorer
from kdlib.repro import files
from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import open_map
from kdlib.study.load import load_study

# jupyter-scatter 1.0.1 with pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")
LIMIT_S = 300  # of the start of JupyterLab on a busy machine


@pytest.fixture
def clone(home):
    """What a fresh clone holds of the digits."""
    (home / "params").mkdir()
    shutil.copy(ROOT / STUDY, home / "params")
    shutil.copytree(ROOT / "figures" / "digits", home / "figures" / "digits")
    (home / "figures" / "digits" / "datamap.html").touch()
    return home


def test_the_committed_map_is_walked_in_before_any_training(clone, capsys):
    notebook = json.loads(write_demo().read_text())
    study = load_study(clone / STUDY)
    state = Explorer(study)
    assert state.file == clone / "figures" / "digits" / "tables" / "datamap.parquet"
    assert len(state.table) == len(state.images.train_ids) == 1100
    hard = state.table.index[state.table["confidence"] < 0.3]
    assert state.select(hard) == f"{len(hard)} selected."
    saved = Subset.load(state.save("hardest"))
    assert saved.parent == files.sha256_file(state.file)
    assert App(state)._repr_mimebundle_()[0]["image/png"]
    with pytest.raises(FileNotFoundError, match=r"step teacher params/digits\.yaml` or"):
        training_commands(study, "hardest")
    [code] = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    exec(code, {})
    assert "this is the still map" in capsys.readouterr().out
    assert not {path.name for path in study.runs.iterdir()} & {"teacher", "datamap", "distill"}


def test_a_committed_map_of_other_settings_is_refused(clone):
    path = clone / STUDY
    path.write_text(path.read_text().replace("el2n_epoch: 10", "el2n_epoch: 5"))
    study = load_study(path)
    with pytest.raises(ValueError, match=r"dynamics.el2n_epoch: 10 -> 5; run `python -m kdlib"):
        open_map(study, cache_images(study))


def test_the_command_starts_jupyterlab_on_it_and_ends_with_it(clone, tmp_path_factory):
    own = str(tmp_path_factory.mktemp("jupyter"))
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=demo"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "kdlib", "demo", *options],
        env=os.environ | dict.fromkeys(names, own),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/api/contents/lab/demo.ipynb?token=demo"
    try:
        end, shown = time.monotonic() + LIMIT_S, None
        while shown is None and process.poll() is None and time.monotonic() < end:
            try:
                shown = json.load(urllib.request.urlopen(address, timeout=2))
            except OSError:
                time.sleep(0.1)
        assert shown is not None, process.communicate(timeout=10)[0]
        assert "explore()" in shown["content"]["cells"][1]["source"]
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[0]
    assert f"Opening {clone / 'lab' / 'demo.ipynb'} in JupyterLab" in said
    assert "without JupyterLab: " in said


def test_without_jupyterlab_the_page_is_opened_where_there_is_one(clone, monkeypatch):
    opened = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    page = clone / "figures" / "digits" / "datamap.html"
    assert demo() == 0
    assert opened == [page.as_uri()]
    page.unlink()
    with pytest.raises(ModuleNotFoundError, match="neither JupyterLab nor"):
        demo()
