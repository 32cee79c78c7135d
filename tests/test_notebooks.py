"""Every notebook: its form, its parameters, and one result whichever way it is run."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill.cli
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

from kdlib.repro import files
from kdlib.study import evaluation
from kdlib.study.base import StudyError
from kdlib.study.selections import STRATEGIES

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
AXES = ("04_distill", "05_probe")


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_no_notebook_is_left_out():
    names = ["01_cache", "02_teacher", "03_datamap", "04_distill", "05_probe", "06_compare"]
    names += ["07_scores", "08_noise", "09_audit"]
    assert [path.stem for path in NOTEBOOKS] == names
    snakefile = (FOLDER.parent / "Snakefile").read_text()
    assert all(f"{name}.ipynb" in snakefile for name in names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_a_question_and_holds_calls_text_and_pictures(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    head = notebook.cells[0].source.splitlines()
    assert head[0].endswith("?")
    assert not head[2].startswith("- ")  # what the answer is about; the paths come last
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    found = [re.findall("^- (Reads|Writes): ", text, re.MULTILINE) for text in texts]
    assert found == [[]] * (len(texts) - 1) + [["Reads", "Writes"]]
    code = _code(notebook)
    shown = ["lab.settings(" in cell.source for cell in code]  # results before settings
    assert not any(shown[:-1])
    assert shown[-1] or path.stem == "09_audit"  # which reads no section of its own
    assert "parameters" in code[0].metadata.tags
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len(code) <= 15
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 30
    for node in (node for cell in code for node in ast.walk(ast.parse(cell.source))):
        assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        assert not isinstance(node, ast.Assert) or node.msg is not None
    assert "written to" in code[-1].source or "cached in" in code[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_the_study_and_its_axes_with_a_type_and_a_help_text(path):
    found = papermill.inspect_notebook(path)
    axes = (*evaluation.AXES[:3], "shards", *evaluation.AXES[3:]) if path.stem in AXES else ()
    assert tuple(found) == ("study", *axes)
    for parameter in found.values():
        assert parameter["inferred_type_name"] in ("str", "float", "int")
        assert len(parameter["help"]) > 10


@pytest.fixture
def checkout(tmp_path):
    """The notebooks and the Makefile, with a jupyter that writes into the notebook it opens."""
    shutil.copytree(FOLDER, tmp_path / "notebooks")
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(FOLDER.parent / name, tmp_path)
    jupyter = tmp_path / ".venv" / "bin" / "jupyter"
    jupyter.parent.mkdir(parents=True)
    jupyter.write_text('#!/bin/sh\nfor last; do :; done\nprintf "an output" >> "$last"\n')
    jupyter.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


def _make_lab(checkout):
    command = ["make", "--no-print-directory", "lab"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_look_in_jupyterlab_changes_no_notebook_that_git_tracks(checkout):
    _make_lab(checkout)
    for path in NOTEBOOKS:
        assert (checkout / "notebooks" / path.name).read_bytes() == path.read_bytes()
    opened = checkout / "lab" / "01_cache.ipynb"
    assert opened.read_text() == NOTEBOOKS[0].read_text() + "an output"
    copies = sorted((checkout / "lab").iterdir())
    assert [path.name for path in copies] == [path.name for path in NOTEBOOKS]
    assert copies[1].read_bytes() == NOTEBOOKS[1].read_bytes()
    assert "/lab/" in (FOLDER.parent / ".gitignore").read_text().splitlines()


def test_a_copy_lasts_and_is_kept_where_its_notebook_has_changed(checkout):
    _make_lab(checkout)
    assert "has changed" not in _make_lab(checkout)
    opened = checkout / "lab" / "01_cache.ipynb"
    before = NOTEBOOKS[0].read_text() + 2 * "an output"
    assert opened.read_text() == before
    source, copied_s = checkout / "notebooks" / "01_cache.ipynb", opened.stat().st_mtime
    source.write_text("new")
    os.utime(source, (copied_s + 1, copied_s + 1))
    said = _make_lab(checkout)
    assert opened.read_text() == "newan output"
    [kept] = (checkout / "lab").glob("01_cache.*-*.ipynb")
    assert kept.read_text() == before
    assert f"is now lab/{kept.name}" in said


@pytest.fixture(scope="module")
def home(tmp_path_factory, prepare_datamap):
    """A workspace with the tiny study's cache, teacher and datamap; the study sweeps over every
    strategy there is."""
    home = tmp_path_factory.mktemp("home")
    prepare_datamap(home)
    path = home / "params" / "tiny.yaml"
    tiny = path.read_text()
    assert "strategy: [random, easy]" in tiny
    every = f"strategy: [{', '.join(STRATEGIES)}]"
    path.write_text(tiny.replace("strategy: [random, easy]", every))
    return home


def _papermill(home, name, *options):
    """Run a notebook with the command line, from a folder that is neither repository nor home."""
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "papermill", "--engine", "ipc", "--no-progress-bar"]
    study = ["-p", "study", "params/tiny.yaml"]
    done = subprocess.run(
        [*command, str(FOLDER / f"{name}.ipynb"), "out.ipynb", *study, *options],
        cwd=elsewhere,
        env=os.environ | {"KDLIB_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _given(monkeypatch, *options):
    """The parameters that papermill's command makes of its options."""
    given = []
    monkeypatch.setattr(
        papermill.cli, "execute_notebook", lambda *_, parameters, **__: given.append(parameters)
    )
    papermill.cli.papermill(["in.ipynb", "out.ipynb", *options], standalone_mode=False)
    return given[0]


def _as_in_jupyterlab(home, name, monkeypatch, **values):
    """Run all cells as JupyterLab does after `make lab`: the parameters cell edited, the kernel in
    `lab/`."""
    monkeypatch.setenv("KDLIB_HOME", str(home))
    lab = home / "lab"
    lab.mkdir(exist_ok=True)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    lines = _code(notebook)[0].source.splitlines()
    for key, value in values.items():
        lines = [f"{key} = {value!r}" if line.startswith(f"{key}:") else line for line in lines]
    _code(notebook)[0].source = "\n".join(lines)
    client = NotebookClient(notebook, resources={"metadata": {"path": str(lab)}})
    client.execute()
    return notebook


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-p", "fraction", "0"), r"fraction is 0; expected a number in \(0, 1\]"),
        (("-p", "fraction", "true"), "fraction is 'true'; expected a number"),
        (("-y", "fraction: true"), "fraction is True; expected a number"),
        (("-p", "strategy", ""), "unknown strategy ''; known: "),
        (("-y", "objective: false"), "unknown objective False; known: "),
    ],
)
def test_a_value_that_is_given_and_empty_is_refused(home, monkeypatch, options, message):
    given = _given(monkeypatch, "-p", "study", "params/tiny.yaml", *options)
    with pytest.raises(ValueError, match=message):
        _by_exec(home, "04_distill", monkeypatch, **given)


def test_command_line_and_jupyterlab_give_the_same_bytes(home, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(home, other)
    axes = {"strategy": "easy", "fraction": 0.33, "objective": "kd"}
    options = [part for key, value in axes.items() for part in ("-p", key, str(value))]
    _papermill(home, "04_distill", *options)
    _as_in_jupyterlab(other, "04_distill", monkeypatch, study="params/tiny.yaml", **axes)
    folder = Path("runs/tiny/distill/student=tiny/strategy=easy/fraction=0.33/objective=kd")
    made = sorted(p.relative_to(home) for p in (home / folder).rglob("*.safetensors"))
    made += sorted(p.relative_to(home) for p in (home / folder).rglob("*.parquet"))
    assert len(made) >= 2 * 5
    for name in made:
        assert (home / name).read_bytes() == (other / name).read_bytes(), name


def _by_engine(folder, path, **parameters):
    """Run a notebook in a folder with the pipeline's engine; what it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return papermill.execute_notebook(
            path, None, parameters, engine_name="ipc", progress_bar=False
        )


def _by_exec(home, name, monkeypatch, **parameters):
    """Run the code of a notebook here, without a kernel."""
    monkeypatch.setenv("KDLIB_HOME", str(home))
    names = {}
    for cell in _code(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)):
        exec(cell.source, names)
        names |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}


def test_the_interactive_datamap_is_a_figure_where_there_is_no_browser(home, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(home))
    done = _by_engine(home, FOLDER / "03_datamap.ipynb", study="params/tiny.yaml")
    [shown] = [cell.outputs for cell in _code(done) if "explore" in cell.source]
    said = "".join(one.text for one in shown if one.output_type == "stream")
    assert "No widgets can be shown here, so this is the still map" in said
    pictures = [sorted(one.data) for one in shown if one.output_type != "stream"]
    assert pictures == [["image/png", "text/plain"]]


def test_wrong_labels_are_looked_for_in_a_study_that_has_some_and_no_images_yet(home, monkeypatch):
    (home / "params" / "wrong.yaml").write_text(
        "base: tiny.yaml\ndata: {relabel: {noise: 0.3}}\n"
        "axes: {strategy: [random, easy]}\n"
        "recordings: {models: {wide: null}, folds: 2, threshold_samples: true}\n"
    )
    monkeypatch.setenv("KDLIB_HOME", str(home))
    notebook = _as_in_jupyterlab(home, "08_noise", monkeypatch, study="params/wrong.yaml")
    assert "AUM below threshold samples" in str([cell.outputs for cell in _code(notebook)])
    assert (home / "runs" / "wrong" / "noise" / "evidence.json").is_file()
    assert (home / "figures" / "wrong" / "detectors.pdf").is_file()


def test_an_unknown_parameter_is_refused_before_a_kernel_starts(home, monkeypatch):
    monkeypatch.setattr(AsyncKernelManager, "start_kernel", None)
    with pytest.raises(ValueError, match="no parameter 'stratgy'; did you mean 'strategy'"):
        _by_engine(home, FOLDER / "04_distill.ipynb", study="params/tiny.yaml", stratgy="easy")


def test_a_kernel_that_is_not_here_is_refused_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.setattr(AsyncKernelManager, "start_kernel", None)
    kernel = {"kernelspec": {"name": "mine", "display_name": "Mine", "language": "python"}}
    cell = nbformat.v4.new_code_cell("1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "in.ipynb")
    message = r"asks for the kernel 'mine', .*python3.*: give one of them with `papermill -k NAME`"
    with pytest.raises(ValueError, match=message):
        _by_engine(tmp_path, tmp_path / "in.ipynb")


def test_an_unknown_value_is_refused_with_the_nearest_known_one(home, monkeypatch):
    with pytest.raises(StudyError, match="unknown strategy 'eazy'; did you mean 'easy'"):
        _by_exec(home, "04_distill", monkeypatch, study="params/tiny.yaml", strategy="eazy")


def test_a_notebook_before_its_time_names_the_step_that_is_missing(tmp_path, monkeypatch):
    study = str(files.workspace() / "params" / "tiny.yaml")
    with pytest.raises(FileNotFoundError, match="holds no finished run; run `python -m kdlib"):
        _by_exec(tmp_path, "04_distill", monkeypatch, study=study)


def test_a_kernel_starts_where_the_path_of_temporary_files_is_too_long_for_a_socket(
    tmp_path, monkeypatch
):
    long = tmp_path / ("job-" * 30)
    long.mkdir()
    cell = nbformat.v4.new_code_cell("print(6 * 7)")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "in.ipynb")
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asked for anew
    assert tempfile.gettempdir() == str(long)
    done = _by_engine(tmp_path, tmp_path / "in.ipynb")
    assert "42" in done.cells[-1].outputs[0].text
