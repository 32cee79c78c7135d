"""A sweep on a real Slurm: a run that fails, a job that is killed, a node that is lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import yaml
from test_pipeline import ROOT, _results

from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.figures import draw_datamap, redraw_comparison
from kdlib.steps.step_command import run_steps
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(slurm.missing()),
        reason=f"no Slurm here ({', '.join(slurm.missing())} missing): apt install slurm-wlm munge",
    ),
]
BOUND_S = 600  # of each wait, on a machine with much else to do; idle, all take about two minutes
STUDY = {  # three subsets, three seeds, one objective: three notebooks that train for some seconds
    "base": "tiny.yaml",
    "recordings": None,
    "objectives": {"plain": None},
    "axes": {"objective": ["kd"]},
    "training": {"steps": 150},
    "seeds": [0, 1, 2],
    "probe": {"strategy": ["full"]},
}
PROFILE = ["--profile", str(ROOT / "profiles" / "slurm"), "--retries", "0"]
PROFILE += ["--slurm-init-seconds-before-status-checks", "1"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A workspace with cache, teacher and datamap and their figures, from which each way to run the
    sweep starts."""
    home = tmp_path_factory.mktemp("start")
    (home / "params").mkdir()
    shutil.copy(ROOT / "params" / "tiny.yaml", home / "params")
    (home / "params" / "sweep.yaml").write_text(yaml.safe_dump(STUDY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = load_study("params/sweep.yaml")
        images = cache_images(study)
        make_teacher(study, images)
        make_datamap(study, images)
        draw_datamap(study)  # else the pipeline draws them first, each as a job of the cluster
    return home


def _by_hand(home):
    """The sweep in this process, without pipeline and notebooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = load_study("params/sweep.yaml")
        points = [(cell, seed) for cell in study.cells() for seed in study.seeds]
        for row in run_steps(study, ["distill", "probe", "compare"], points):
            assert "error" not in row
        redraw_comparison(study)


def _start_study(home, environment, *options):
    command = [sys.executable, "-m", "kdlib", "study", str(home / "params" / "sweep.yaml")]
    return subprocess.Popen(
        [*command, *options], env=environment | {"KDLIB_HOME": str(home)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _end(process):
    """Exit code and all that was printed."""
    printed, _ = process.communicate(timeout=BOUND_S)
    return process.returncode, printed


def _kill(process):
    """End the command and its pipeline, where they are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait(is_so, what, process):
    if not slurm.wait_for(lambda: is_so() or process.poll() is not None, BOUND_S):
        _kill(process)
    assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"


def test_a_sweep_on_slurm_ends_as_by_hand_whatever_fails_is_killed_or_lost(start, tmp_path):
    here, there = (Path(shutil.copytree(start, tmp_path / name)) for name in ("here", "there"))
    _by_hand(here)
    runs = there / "runs/sweep/distill/student=tiny"
    broken = runs / "strategy=easy/fraction=0.33/objective=kd/seed=1/state/state.safetensors"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a training state")
    with slurm.cluster() as cluster:
        process = _start_study(there, cluster.environment, *PROFILE)
        try:
            seeds = lambda: len(list(runs.glob("strategy=random/**/evidence.json")))  # noqa: E731
            _wait(lambda: seeds() == 1, "the node was lost", process)
            cluster.lose_node()
            at_loss = seeds()
            cluster.return_node()
            _wait(lambda: seeds() > at_loss, "a job was killed", process)
            job = next(id for id, _, rule in cluster.jobs() if "random" in rule)
            cluster.run("scancel", job)
            at_kill = seeds()
            code, printed = _end(process)
        finally:
            _kill(process)
        states = {rule: (id, state) for id, state, rule in cluster.jobs()}
        assert code == 1, printed
        assert (at_loss, at_kill) == (1, 2), "the job had ended by itself"
        assert states["rule_distill_wildcards_tiny_random_fraction=0.33"] == (job, "CANCELLED")
        assert states["rule_distill_wildcards_tiny_easy_fraction=0.33"][1] == "FAILED"
        assert states["rule_distill_wildcards_tiny_full_fraction=1"][1] == "COMPLETED"
        assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
        assert "1 step(s) failed" in printed
        assert "StateError" in printed
        assert len(list(runs.glob("strategy=full/**/evidence.json"))) == 3

        broken.unlink()
        one_job = ["--groups", "distill=students", "probe=end", "compare=end"]
        one_job += ["--group-components", "students=2"]
        process = _start_study(there, cluster.environment, *PROFILE, *one_job, "--cores", "1")
        try:
            code, printed = _end(process)
        finally:
            _kill(process)
        assert code == 0, printed
        further = [rule for _, _, rule in cluster.jobs() if rule not in states]
        assert len(further) == 2, further  # the two subsets as one job, then the rest
        assert "rule_students_distill" in further
    assert _results(there) == _results(here)


def test_a_cluster_ends_with_everything_it_started():
    with slurm.cluster() as cluster:
        cluster.run("sbatch", "--output=/dev/null", "--wrap", f"sleep 600 # {cluster.folder}")
        _, state, _ = cluster.jobs()[0]
        assert slurm.wait_for(lambda: cluster.jobs()[0][1] == "RUNNING", 30), state
        assert _processes(cluster.folder)
    time.sleep(0.1)
    assert not _processes(cluster.folder)
    assert not cluster.folder.exists()


def _processes(folder):
    """Command lines and environments that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            said = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        found += [path.name] if str(folder).encode() in said else []
    return found
