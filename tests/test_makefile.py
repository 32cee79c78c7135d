"""`make` in a folder whose name has spaces, of a study file whose name has one."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SAYS = '#!/bin/sh\nprintf "%s\\n" "$VIRTUAL_ENV" "$@" >> said.txt\n'


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The Makefile and what it reads, with a python and a uv that write down their arguments."""
    home = tmp_path / "a folder" / "with spaces"
    (home / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, home)
    for path in (home / ".venv" / "bin" / "python", tmp_path / "bin" / "uv"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(SAYS)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    return home


def made(clone, *arguments):
    """What python and uv were asked: their environment's folder, then their arguments."""
    subprocess.run(["make", *arguments], cwd=clone, check=True, capture_output=True)
    said = (clone / "said.txt").read_text().splitlines()
    (clone / "said.txt").unlink()
    return said


def test_uv_installs_into_the_environment_of_the_folder_once(clone):
    said = made(clone, ".venv/installed")
    assert said[:3] == [f"{clone}/.venv", "pip", "install"]
    assert said.count(f"{clone}/.venv") == 2
    assert "requirements.lock" in said
    assert "--no-deps" in said
    again = subprocess.run(["make", ".venv/installed"], cwd=clone, capture_output=True, text=True)
    assert "up to date" in again.stdout


def test_a_study_and_a_profile_with_spaces_are_one_argument_each(clone):
    (clone / ".venv" / "installed").touch()
    said = made(clone, "study", "STUDY=params/my study.yaml", "PROFILE=my profile", "STEP=scores")
    assert said[1:] == [
        "-m", "kdlib", "study", "params/my study.yaml", "scores", "--profile", "my profile",
    ]  # fmt: skip
    assert made(clone, "figures", "STUDY=my study.yaml")[1:] == [
        "-m", "kdlib", "figures", "my study.yaml",
    ]  # fmt: skip
    assert made(clone, "report", "STUDY=my study.yaml")[1:] == [
        "-m", "kdlib", "report", "my study.yaml",
    ]  # fmt: skip
    drawn = ["-m", "kdlib", "figures", "all"]
    assert made(clone, "figures")[1:] == [*drawn, "", "-m", "audit", "all", "--redraw"]
