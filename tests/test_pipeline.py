"""The whole study through Snakemake: done once, done again, changed, broken, killed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from planning import dry_run, planned

from kdlib.__main__ import main
from kdlib.repro import files
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
STUDY = "params/tiny.yaml"


def _environment(home):
    # as of a shell in which nothing is activated
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if ".venv" not in p)
    return os.environ | {"KDLIB_HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}


def _command(home, *options):
    return [sys.executable, "-m", "kdlib", "study", STUDY, "--cores", "2", *options]


def _run(home, *options):
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    process = subprocess.run(
        _command(home, *options),
        env=_environment(home), cwd=elsewhere, capture_output=True, text=True,
    )  # fmt: skip
    assert not list(elsewhere.iterdir())  # Snakemake's own records lie beside the runs
    return process


def _results(home):
    """Bytes of everything a study leaves that must not depend on when and how often it ran: all but
    what tells how long it took."""
    kinds = (".npy", ".parquet", ".safetensors", ".png", ".pdf", ".md", ".tex")
    return {
        str(path.relative_to(home)): files.sha256_file(path)
        for path in sorted(home.rglob("*"))
        if path.suffix in kinds
        and "archive" not in path.parts
        and path.stem not in ("costs", "ledger")
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A workspace in which the tiny study has run: (folder, what the command printed)."""
    home = tmp_path_factory.mktemp("done")
    (home / "params").mkdir()
    shutil.copy(ROOT / STUDY, home / STUDY)
    process = _run(home)
    assert process.returncode == 0, process.stdout + process.stderr
    return home, process.stdout


@pytest.fixture
def home(done, tmp_path):
    """A copy of it, to change; times of files are kept, as the pipeline reads them."""
    shutil.copytree(done[0], tmp_path / "home")
    return tmp_path / "home"


def test_a_study_ends_with_runs_figures_notebooks_and_one_closing_message(done):
    home, printed = done
    assert "# tiny: results" in printed
    assert f"Figures and tables: {home}/figures/tiny" in printed
    for name in (
        "datamap",
        "regions",
        "accuracy",
        "curves",
        "probes",
        "differences",
    ):
        assert (home / f"figures/tiny/{name}.pdf").stat().st_size > 5000
    study = load_study(home / STUDY)
    executed = sorted(path.name for path in (home / "runs").rglob("*.ipynb"))
    expected = {"04_distill.ipynb": 3, "05_probe.ipynb": len(study.probed_cells())}
    for name in ("01_cache.ipynb", "02_teacher.ipynb", "03_datamap.ipynb", "06_compare.ipynb"):
        expected[name] = 1
    expected["07_scores.ipynb"] = 1
    assert Counter(executed) == expected
    pictures = {"01_cache": 1, "02_teacher": 1, "03_datamap": 3, "04_distill": 1, "05_probe": 1}
    pictures |= {"06_compare": 2, "07_scores": 3}
    for path in (home / "runs").rglob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        shown = sum("image/png" in output.get("data", ()) for output in outputs)
        assert shown == pictures[path.stem], path
    logs = list((home / "runs" / "tiny").rglob("*.log"))
    recorded = [log for log in logs if log.parent.name.startswith("model=")]
    assert len(recorded) == len(study.recordings.runs())
    assert len(logs) == len(executed) + len(recorded)
    assert all("Executing Cell" in log.read_text() for log in set(logs) - set(recorded))


def test_a_second_run_makes_nothing_anew(home):
    before = _times(home)
    process = _run(home)
    assert process.returncode == 0
    assert "Nothing to be done" in process.stdout + process.stderr
    assert "# tiny: results" in process.stdout
    after = _times(home)
    assert {p.name for p in before if after[p] != before[p]} <= {"tiny", ".lock"}


def _times(home):
    paths = (home / "runs").rglob("*")
    return {path: path.stat().st_mtime_ns for path in paths if ".snakemake" not in path.parts}


ALL = {"cache": 1, "teacher": 1, "datamap": 1, "distill": 3, "probe": 2, "compare": 1}
SCORES = {"record": 4, "scores": 1}


def _planned(home, study):
    """How many jobs of each rule a dry run of the pipeline plans, where Snakemake knows nothing of
    earlier runs."""
    counts = planned(study, home, home / "plan.log", environment=_environment(home))
    return {rule: n for rule, n in counts.items() if rule != "all"}


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        (("data", "split_seed"), 1, ALL | SCORES),
        (("teacher", "seed"), 1, {k: n for k, n in ALL.items() if k != "cache"}),
        (
            ("dynamics", "window"),
            4,
            dict.fromkeys(("datamap", "distill", "probe", "compare", "scores"), 1),
        ),
        (("training", "lr_peak"), 0.2, {k: ALL[k] for k in ("distill", "probe", "compare")}),
        (
            ("objectives", "plain", "kind"),
            "label_smoothing",
            {"distill": 3, "compare": 1},
        ),
        (("seeds",), [0, 1, 2], {k: ALL[k] for k in ("distill", "probe", "compare")}),
        (("recordings", "seeds"), [0, 1, 2], {"record": 2, "scores": 1}),
        (("probe", "k"), 7, {"probe": 2, "compare": 1}),
        (("compare", "margin"), 0.03, {"compare": 1}),
        (("axes", "strategy"), ["random", "easy", "hard"], {"distill": 1, "compare": 1}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_changed_value_makes_anew_only_what_depends_on_it(home, key, value, made):
    content = parse_yaml((home / STUDY).read_text())
    place = content
    for part in key[:-1]:
        place = place[part]
    place[key[-1]] = value
    if value == "label_smoothing":
        place["smoothing"] = 0.1
    (home / STUDY).write_text(yaml.safe_dump(content))
    assert _planned(home, home / STUDY) == made


def test_a_study_that_shares_a_teacher_plans_students_and_its_further_teachers_alone(home):
    study = {"base": "tiny.yaml", "shares": "tiny.yaml", "recordings": None}
    training = {"steps": 30, "batch_size": 64, "lr_peak": 0.1}
    own = {"model": {"name": "tiny_cnn"}, "training": training, "expected_accuracy": 0.1}
    kd = {"kind": "kd", "alpha": 0.5, "temperature": 2.0}
    study |= {"teachers": {"other": own}, "objectives": {"more": kd | {"teacher": "other"}}}
    study |= {"axes": {"objective": ["kd", "plain", "more"]}}
    path = home / "params" / "shared.yaml"
    path.write_text(yaml.safe_dump(study))
    made = {"distill": 3, "probe": 2, "compare": 1, "further_teacher": 1}
    assert _planned(home, path) == made


def test_a_study_on_gpus_asks_for_one_and_its_threads_for_each_process(home):
    content = parse_yaml((home / STUDY).read_text())
    content["compute"] = {"device": "cuda", "threads": 3, "processes": 2}
    (home / STUDY).write_text(yaml.safe_dump(content))
    printed = dry_run(
        home / STUDY, home, home / "plan.log", "--cores", "8", environment=_environment(home)
    )
    jobs = {rule.split(":")[0]: rule for rule in printed.split("\nrule ")}
    for rule, threads, gpus in (
        ("teacher", 6, 2),
        ("distill", 6, 2),
        ("record", 3, 1),
        ("probe", 3, 1),
    ):
        assert f"threads: {threads}\n" in jobs[rule]
        assert f"gpu={gpus}\n" in jobs[rule]
    assert "gpu" not in jobs["compare"]


def test_a_new_seed_leaves_the_finished_ones_as_they_are(home):
    content = parse_yaml((home / STUDY).read_text())
    content["seeds"] = [0, 1, 2]
    (home / STUDY).write_text(yaml.safe_dump(content))
    folder = Path("tiny/distill") / load_study(home / STUDY).cells()[0].path
    made = folder / "seed=2" / "evidence.json"  # one notebook
    folder = home / "runs" / folder
    before = {seed: (folder / f"seed={seed}" / "evidence.json").read_bytes() for seed in (0, 1)}
    process = _run(home, str(made), "--forcerun", "distill")
    assert all((folder / f"seed={s}" / "evidence.json").read_bytes() == before[s] for s in (0, 1))
    assert (folder / "seed=2" / "evidence.json").exists(), process.stderr


def _stop(home, how, there):
    """Start the pipeline, and signal it and all its processes when `there()` is."""
    process = subprocess.Popen(
        _command(home), env=_environment(home), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # a shell that runs these tests in the background has them ignore Ctrl-C, children included
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None and not there():
        time.sleep(0.05)
    assert process.poll() is None, "it had ended before the signal"
    os.killpg(process.pid, how)
    assert process.wait(timeout=300) != 0
    # kernels are in sessions of their own, and end by themselves when they see it
    while any(str(home) in kernel for kernel in _kernels()):
        assert time.monotonic() < deadline, "a kernel goes on"
        time.sleep(0.05)


def _kernels():
    """Environments of the running Jupyter kernels."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in " ".join(process.cmdline()):
                yield str(process.environ())


@pytest.mark.long
def test_a_study_that_is_killed_stopped_and_fails_ends_with_the_same_bytes(done, home):
    runs, study = home / "runs" / "tiny", load_study(home / STUDY)
    shutil.rmtree(runs / "distill")

    def finished():
        return len(list(runs.glob("distill/**/evidence.json")))

    _stop(home, signal.SIGKILL, lambda: list(runs.glob("distill/**/subset.parquet")))
    before = finished()
    _stop(home, signal.SIGINT, lambda: finished() > before)  # Ctrl-C
    assert finished() < len(study.cells()) * len(study.seeds)

    # a failing run is listed, stops no other, and is mended by the next call
    broken = runs / "distill/student=tiny/strategy=easy/fraction=0.33/objective=kd/seed=1"
    other = runs / "distill/student=tiny/strategy=random/fraction=0.33/objective=plain"
    shutil.rmtree(other, ignore_errors=True)
    shutil.rmtree(broken, ignore_errors=True)
    (broken / "state").mkdir(parents=True)
    (broken / "state" / "state.safetensors").write_bytes(b"not a training state")
    process = _run(home)
    assert process.returncode != 0
    assert "1 step(s) failed" in process.stderr
    assert "StateError" in process.stderr
    assert str(broken.parents[1] / "04_distill.ipynb") in process.stderr
    assert (other / "seed=1" / "evidence.json").exists()
    assert (broken.parent / "seed=0" / "evidence.json").exists()
    (broken / "state" / "state.safetensors").unlink()
    again = _run(home)
    assert again.returncode == 0, again.stderr
    assert _results(home) == _results(done[0])


def test_two_pipelines_of_one_study_do_not_run_at_once(home):
    with files.locked(home / "runs" / "tiny" / ".lock"):
        process = _run(home)
    assert process.returncode == 1
    assert "another process is working here" in process.stderr


def test_figures_are_redrawn_from_the_records_alone(done, home, monkeypatch):
    shutil.rmtree(home / "figures")
    monkeypatch.setenv("KDLIB_HOME", str(home))
    monkeypatch.setattr("sys.argv", ["kdlib", "figures", str(home / STUDY)])
    assert main() == 0
    assert _results(home) == _results(done[0])


def test_a_typo_in_the_study_is_one_sentence_and_starts_nothing(tmp_path):
    (tmp_path / "typo.yaml").write_text((ROOT / STUDY).read_text().replace("seeds:", "sedes:"))
    command = [sys.executable, "-m", "kdlib", "study", str(tmp_path / "typo.yaml")]
    process = subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True)
    assert process.returncode == 1
    assert "unknown key 'sedes'; did you mean 'seeds'?" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "runs").exists()


def test_a_workspace_of_any_name_is_planned_alike_and_a_linked_folder_of_runs_too(home):
    odd = home.parent / "größe {x} of 'it'"
    home.rename(odd)
    assert _planned(odd, odd / STUDY) == {}
    (odd / "runs").rename(odd.parent / "disk")
    (odd / "runs").symlink_to(odd.parent / "disk")
    (odd / "disk").mkdir()
    (odd / "runs" / "tiny").rename(odd / "disk" / "tiny")
    (odd / "runs" / "tiny").symlink_to(odd / "disk" / "tiny")
    assert _planned(odd, odd / STUDY) == {}
    (odd / "figures" / "tiny" / "regions.png").unlink()  # no later step reads it
    assert _planned(odd, odd / STUDY) == {"datamap": 1}
    text = (odd / STUDY).read_text()
    (odd / STUDY).write_text(text.replace("training: {steps: 60", "training: {steps: 50"))
    made = {"datamap": 1, "distill": 3, "probe": 2, "compare": 1}
    assert _planned(odd, odd / STUDY) == made


def test_an_edit_a_deleted_text_and_no_record_of_snakemake_end_with_the_summary_of_now(home):
    shutil.rmtree(home / "runs" / ".snakemake")
    (home / "figures" / "tiny" / "summary.md").unlink()
    text = (home / STUDY).read_text()
    assert "margin: 0.02" in text
    (home / STUDY).write_text(text.replace("margin: 0.02", "margin: 0.2"))
    process = _run(home)
    assert process.returncode == 0, process.stderr
    assert "with a margin of 20 points" in process.stdout
    assert "with a margin of 2 points" not in process.stdout
    assert "with a margin of 20 points" in (home / "figures" / "tiny" / "summary.md").read_text()
