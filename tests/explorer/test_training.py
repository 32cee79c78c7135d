"""Students are trained beside the kernel; progress and errors stand on the screen."""

import os
import sys
import time
from pathlib import Path

import nbformat
import pytest
from explorer.on_screen import below_the_button, finished, lasso, status, train

from kdlib.explorer import app as app_module
from kdlib.explorer.background import BackgroundTraining

# jupyter-scatter 1.0.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")


def test_training_runs_beside_the_kernel_and_its_log_is_followed(app, monkeypatch):
    shown = []
    app.controls.log.observe(lambda change: shown.append(change.new), "value")
    monkeypatch.setattr(app_module, "results_html", lambda study, name: f"results of {name}")
    bar = "picked_mine 0.1 kd, seed 0:   5%|5    | 3/60 [00:01<00:10, 7.1step/s]"
    line = f"import time; print({bar!r}, flush=True); time.sleep(1.2)"
    train(app, monkeypatch, line, "print('second')")
    assert (app.controls.train.disabled, app.controls.stop.disabled) == (True, False)
    finished(app)
    assert "0 of 8 students done" in shown[0]
    assert any("step 3 of 60" in text for text in shown)
    assert status(app) == "The students of mine are trained."
    assert app.controls.results.value == "results of mine"
    assert (app.controls.train.disabled, app.controls.stop.disabled) == (False, True)
    assert app.training.log.read_text() == f"{bar}\nsecond\n"


def test_a_failed_training_says_why_and_where_its_log_lies_and_stops_there(app, monkeypatch):
    code = "print('Output Notebook: out.ipynb')\nraise ValueError('no <b>such</b> thing:\\n  here')"
    train(app, monkeypatch, code, "print('second')")
    finished(app)
    assert (
        status(app) == "The training of students on mine failed; its error stands below the button."
    )
    assert below_the_button(app) == (
        "The training of students on mine failed: ValueError: no <b>such</b> thing: here"
        f"The whole log: {app.training.log}"
    )
    assert "<b>such" not in app.controls.log.value
    assert "second" not in app.training.log.read_text()
    assert (app.controls.train.disabled, app.controls.stop.disabled) == (False, True)


def test_the_error_of_an_earlier_training_goes_with_the_next_one(app, monkeypatch):
    monkeypatch.setattr(app_module, "results_html", lambda study, name: f"results of {name}")
    train(app, monkeypatch, "raise SystemExit(3)")
    finished(app)
    assert "exit code 3; its last line: none" in below_the_button(app)
    app.controls.restore.value = "mine"
    assert app.controls.log.value == ""
    train(app, monkeypatch, "raise SystemExit(3)")
    finished(app)
    train(app, monkeypatch, "pass")
    finished(app)
    assert (app.controls.log.value, app.controls.results.value) == ("", "results of mine")


def test_a_training_that_cannot_start_says_so(app, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    train(app, monkeypatch, "pass")
    finished(app)
    assert "FileNotFoundError: [Errno 2]" in below_the_button(app)
    assert "/no/such/python" in below_the_button(app)
    assert not app.controls.train.disabled


def test_a_training_whose_commands_cannot_be_made_leaves_the_button_free(app, monkeypatch):
    def broken(study, name):
        raise OSError("the disk is full")

    lasso(app.plots[0], app.state.table.index[:110])
    app.controls.name.value = "mine"
    monkeypatch.setattr(app_module, "training_commands", broken)
    app.controls.train.click()
    assert status(app) == "OSError: the disk is full"
    assert (app.controls.train.disabled, app.controls.stop.disabled) == (False, True)


@pytest.mark.parametrize(
    ("log", "code", "error"),
    [
        (
            "Executing notebook with kernel: python3\nTraceback (most recent call last):\n"
            "papermill.exceptions.PapermillExecutionError: \n---\n"
            'Exception encountered at "In [3]":\n---\n'
            "\x1b[31mStudyError\x1b[39m        Traceback (most recent call last)\n"
            "\x1b[31mStudyError\x1b[39m: a.yaml is not a valid study:\n  probe.k: not a number\n\n",
            1,
            "StudyError: a.yaml is not a valid study: probe.k: not a number",
        ),
        ("torch.OutOfMemoryError: CUDA\r\n\r\nleaked semaphores\n", 1,
         "torch.OutOfMemoryError: CUDA"),
        ("KeyError: 1\n\nDuring handling of it:\n\nAssertionError\n", 1, "AssertionError"),
        ("Output Notebook: out.ipynb\n\n", 1,
         "the process ended with exit code 1; its last line: Output Notebook: out.ipynb"),
        ("", -9, "the process ended with signal 9; its last line: none"),
    ],
)  # fmt: skip
def test_the_error_of_a_log_is_its_last_exception(tmp_path, log, code, error):
    training = BackgroundTraining([], tmp_path / "log", lambda line: None, lambda t: None)
    training.thread.join()
    training.log.write_text(log, newline="")
    training.code = code
    assert training.error() == error


def test_a_training_can_be_stopped(app, monkeypatch):
    line = "import time; print('started', flush=True); time.sleep(60)"
    train(app, monkeypatch, line, line)
    end = time.monotonic() + 20
    while "started" not in app.training.lines() and time.monotonic() < end:
        time.sleep(0.1)
    app.controls.stop.click()
    finished(app)
    assert status(app).startswith("Stopped; finished students stay")
    assert app.training.log.read_text().count("started") == 1


def test_stopping_papermill_takes_its_kernel_down(study, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(notebook, tmp_path / "slow.ipynb")
    names = [str(tmp_path / "slow.ipynb"), str(tmp_path / "out.ipynb")]
    command = [sys.executable, "-m", "kdlib.papermill_engine", *names, "--cwd", str(tmp_path)]
    training = BackgroundTraining([command], tmp_path / "log", lambda line: None, lambda t: None)
    pid, end = tmp_path / "pid", time.monotonic() + 40
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end, training.last_line()
        time.sleep(0.1)
    training.stop()
    training.thread.join(30)
    assert training.code not in (0, None)
    while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
