"""The same bytes on every processor: what is held, and what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import TINY, tiny_study

from kdlib.repro import processor
from kdlib.study.base import StudyError
from kdlib.study.yaml_text import parse_yaml

HELD = processor.KERNELS | processor.LIBRARIES
has_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="this processor has no AVX2",
)


def _python(code, **environment):
    """What a process of its own, which nobody has held, prints."""
    free = {key: value for key, value in os.environ.items() if key not in HELD}
    done = subprocess.run(
        [sys.executable, "-c", code], env=free | environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr


@has_avx2
def test_a_held_process_computes_with_avx2_whatever_the_processor_can_do():
    printed = _python(
        "from kdlib.repro import processor; processor.hold(); print(processor.name())"
    )
    assert printed.strip().endswith(", AVX2")


@has_avx2
def test_a_process_that_has_computed_with_other_instructions_is_refused():
    code = "import torch; torch.ones(64).exp(); from kdlib.repro import processor; processor.hold()"
    printed = _python(code, ATEN_CPU_CAPABILITY="default")
    assert "torch computes with DEFAULT here; expected AVX2: restart this process" in printed


def test_numpy_of_a_child_takes_nothing_newer():
    child = "from numpy._core._multiarray_umath import __cpu_features__ as f; print(f)"
    printed = _python(
        "from kdlib.repro import processor; import subprocess, sys; processor.hold_children(); "
        f"subprocess.run([sys.executable, '-W', 'error', '-c', {child!r}], check=True)"
    )
    for name in processor.LIBRARIES["NPY_DISABLE_CPU_FEATURES"].split():
        assert f"'{name}': False" in printed


@pytest.mark.parametrize(
    ("other", "printed"),
    [
        ({"precision": "bf16"}, "portable: true and precision: bf16 exclude each other"),
        ({"device": "cuda"}, "portable: true and device: cuda exclude each other"),
        ({"compile": True}, "portable: true and compile: True exclude each other"),
    ],
)
def test_what_is_of_one_machine_is_not_portable(home, other, printed):
    with pytest.raises(StudyError, match=printed):
        tiny_study(home, compute={"portable": True} | other)


@pytest.mark.parametrize(
    ("section", "values", "printed"),
    [
        (
            "training",
            {"steps": 60, "batch_size": 64, "lr_peak": 0.1, "optimiser": "adamw"},
            "adamw",
        ),
        ("teacher__outputs", {"top_k": 3}, "outputs: top_k"),
        (
            "objectives__kd",
            {"kind": "rkd", "distance_weight": 1.0, "angle_weight": 2.0},
            "objective kd",
        ),
        (
            "objectives__kd",
            {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "standardise": True},
            "objective kd",
        ),
    ],
)
def test_roots_that_differ_between_processors_are_not_portable(home, section, values, printed):
    printed = rf"compute\.portable: true cannot be kept with .*{printed}.*square roots"
    with pytest.raises(StudyError, match=printed):
        tiny_study(home, compute={"portable": True}, **{section: values})


def test_settings_of_a_study_that_is_not_portable_read_as_before(home):
    assert tiny_study(home).step_settings("teacher")["compute"]["portable"] is False
    asked = tiny_study(home, compute={"portable": True})
    assert asked.step_settings("teacher")["compute"]["portable"] is True


@pytest.mark.long
@has_avx2
def test_a_portable_study_gives_the_same_bytes_in_its_pipeline_and_by_hand(tmp_path):
    pipeline = [sys.executable, "-m", "kdlib", "study", "params/tiny.yaml", "--cores", "1"]
    pipeline += ["--until", "teacher"]
    by_hand = [
        sys.executable, "-c",
        "from kdlib.steps.cache import cache_images; from kdlib.study import load_study; "
        "from kdlib.steps.teacher import make_teacher; "
        "study = load_study('params/tiny.yaml'); "
        "make_teacher(study, cache_images(study))",
    ]  # fmt: skip
    content = parse_yaml(TINY.read_text()) | {"compute": {"portable": True}}
    home, other = tmp_path / "by_hand", tmp_path / "pipeline"
    (home / "params").mkdir(parents=True)
    (home / "params" / "tiny.yaml").write_text(yaml.safe_dump(content))
    made = []
    for folder, command in ((home, by_hand), (other, pipeline)):
        if folder == other:  # which makes the teacher of the same images
            shutil.copytree(home, other, ignore=shutil.ignore_patterns("teacher"))
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"KDLIB_HOME": str(folder)}, text=True,
            capture_output=True,
        )  # fmt: skip
        path = folder / "runs" / "tiny" / "teacher" / "evidence.json"
        assert path.is_file(), done.stdout + done.stderr
        made.append(json.loads(path.read_text()))
    assert all(one["made"]["device"].endswith(", AVX2)") for one in made)
    for key in ("checkpoints", "order_sha256", "teacher"):
        assert made[0][key] == made[1][key]
