"""`python -m kdlib cache` builds, shows and verifies caches, `probe` reads weights from outside; an
error is one sentence."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from kdlib.__main__ import main
from kdlib.cache.build import Job, build_shards, repair
from kdlib.cache.shards import Cache
from kdlib.models.networks import network_for
from kdlib.repro import files
from kdlib.steps.pipeline import failed_logs, failed_notebooks
from kdlib.study.load import load_study
from kdlib.study.models import Model
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def study(home: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The small study in a workspace of its own: 1,297 training digits in shards of 300."""
    source = Path(__file__).parents[1] / "params" / "tiny.yaml"
    text = source.read_text()
    assert "shard_size: 300" in text
    (home / "params").mkdir()
    (home / "params" / "tiny.yaml").write_text(re.sub(r"n_train: .*", "", text))
    monkeypatch.chdir(home)
    return load_study("params/tiny.yaml")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """A function that runs one command: its exit code, and what it prints, and its errors."""

    def running(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdlib", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return running


def lines(text: str) -> dict[str, str]:
    """The lines of `cache info` of one cache, by their first word."""
    found = [line.split(maxsplit=1) for line in text.splitlines()[1:]]
    return {word: rest for word, rest in found}


def test_a_study_s_image_caches_are_built_and_said_to_be_whole(study, run):
    code, output, errors = run("cache", "build", "params/tiny.yaml")
    assert (code, errors) == (0, "")
    assert output == (
        f"{study.cache}/train: whole, 1,297 examples in 5 shards\n"
        f"{study.cache}/test: whole, 500 examples in 2 shards\n"
    )
    assert Cache(study.cache / "train").header["source"] == "digits"


def test_parts_are_built_one_by_one_and_what_is_missing_is_said(study, run):
    command = ("cache", "build", "params/tiny.yaml", "--part")
    code, output, _ = run(*command, "1/2")
    assert (code, output) == (
        0,
        f"{study.cache}/train: 2 of 5 shards, 600 of 1,297 examples; missing: "
        "shards 2-4 (examples 600-1,296)\n",
    )
    assert not (study.cache / "test").exists()
    assert run(*command, "2/2", "--workers", "0")[1].endswith(
        "train: whole, 1,297 examples in 5 shards\n"
    )
    assert run(*command, "2/2", "--split", "test")[1] == (
        f"{study.cache}/test: 1 of 2 shards, 200 of 500 examples; missing: "
        "shard 0 (examples 0-299)\n"
    )
    assert sorted(p.name for p in (study.cache / "test").glob("*.npy")) == [
        "images-00001.npy",
        "labels-00001.npy",
    ]


def test_a_study_that_asks_for_a_part_gets_that_part_alone(study, run):
    text = Path("params/tiny.yaml").read_text()
    Path("params/part.yaml").write_text(text.replace("data:\n", "data:\n  part: 3/5\n", 1))
    code, output, _ = run("cache", "build", "params/part.yaml")
    assert code == 0
    assert output.splitlines() == [
        f"{study.cache}/train: 1 of 5 shards, 300 of 1,297 examples; missing: "
        "shards 0-1 (examples 0-599), shards 3-4 (examples 900-1,296)",
        f"{study.cache}/test: whole, 500 examples in 2 shards",
    ]


def test_info_says_what_a_cache_holds(study, run):
    run("cache", "build", "params/tiny.yaml", "--split", "train")
    code, output, errors = run("cache", "info", study.cache / "train")
    assert (code, errors) == (0, "")
    folder = study.cache / "train"
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert output.splitlines()[0] == str(folder)
    assert output.splitlines()[3:5] == [
        "  columns      images uint8 (1, 8, 8)",
        "               labels int64 ()",
    ]
    found = lines(output)
    assert found["holds"] == "images, digits, train"
    assert found["examples"] == "1,297"
    assert found["shards"] == "5 of up to 300 examples"
    assert found["on"] == f"disk      {size / 1000:.2f} kB"
    assert found["fingerprint"] == Cache(folder).fingerprint
    assert found["part"] == "index.json: shards 0-4 (examples 0-1,296)"
    assert found["missing"] == "nothing"
    assert "unfinished" not in found


def test_info_says_which_parts_are_there_and_how_far_others_are(study, run, monkeypatch):
    run("cache", "build", "params/tiny.yaml", "--part", "3/5")
    write, made = Job.write, []

    def stopping(job, shard, n, payload):
        if made:
            raise KeyboardInterrupt
        made.append(shard)
        return write(job, shard, n, payload)

    with monkeypatch.context() as patched:
        patched.setattr(Job, "write", stopping)
        code, _, errors = run("cache", "build", "params/tiny.yaml", "--part", "1/2")
    assert code == 130
    assert errors == "stopped; what is finished is kept: run the same again to go on\n"
    code, output, _ = run("cache", "info", "params/tiny.yaml")
    found = lines(output)
    assert code == 0
    assert found["part"] == "index-00002-00003.json: shard 2 (examples 600-899)"
    assert found["missing"] == "shards 0-1 (examples 0-599), shards 3-4 (examples 900-1,296)"
    assert found["unfinished"] == "journal-00000-00002.jsonl: 1 of 2 shards made"


def test_an_unfinished_cache_has_no_fingerprint_yet_and_cannot_be_verified(study, run):
    run("cache", "build", "params/tiny.yaml", "--split", "test")
    (study.cache / "test" / "labels-00001.npy").unlink()
    repair(study.cache / "test")
    found = lines(run("cache", "info", study.cache / "test")[1])
    assert found["fingerprint"] == "none yet"
    assert found["missing"] == "shards 0-1 (examples 0-499)"
    assert found["unfinished"] == "journal.jsonl: 1 of 2 shards made"
    code, output, errors = run("cache", "verify", study.cache / "test")
    assert (code, output) == (1, "")
    assert "holds an unfinished build" in errors


def test_what_an_unfinished_build_has_is_a_smaller_cache_and_the_build_goes_on(
    study, run, monkeypatch
):
    write = Job.write

    def stops(job: Job, shard: int, *rest: object) -> dict[str, str]:
        if shard == 3:
            raise OSError("stopped here")
        return write(job, shard, *rest)

    seal, build = (("cache", name, "params/tiny.yaml") for name in ("seal", "build"))
    assert "holds no cache" in run(*seal)[2]
    with monkeypatch.context() as patched:
        patched.setattr(Job, "write", stops)
        assert run(*build, "--split", "train")[0] == 1
    code, output, errors = run(*seal)
    assert (code, errors) == (0, "")
    assert "train: whole, 900 examples in 3 shards\n`data: {n_train: 900}` in a study" in output
    text = Path("params/tiny.yaml").read_text()
    Path("params/smaller.yaml").write_text(text.replace("data:\n", "data:\n  n_train: 900\n", 1))
    sealed = Cache(load_study("params/smaller.yaml").cache / "train")
    sealed.verify()
    assert run(*build, "--split", "train")[1].endswith("whole, 1,297 examples in 5 shards\n")
    whole = Cache(study.cache / "train")
    np.testing.assert_array_equal(sealed.resident("images"), whole.resident("images")[:900])
    shutil.rmtree(sealed.folder)
    run("cache", "build", "params/smaller.yaml", "--split", "train")
    assert Cache(sealed.folder).fingerprint == sealed.fingerprint
    assert "is whole: there is nothing to seal" in run(*seal)[2]
    (whole.folder / "labels-00000.npy").unlink()
    repair(whole.folder)
    assert "has no whole shard at its beginning" in run(*seal)[2]


def test_many_gaps_are_counted(tmp_path, run):
    for i in range(1, 40, 2):
        build_shards(
            tmp_path,
            {"kind": "numbers"},
            {"labels": ("<i8", ())},
            make_labels,
            n_examples=40,
            shard_size=1,
            part=(i, 40),
        )
    missing = lines(run("cache", "info", tmp_path)[1])["missing"]
    assert missing.startswith("shard 1 (examples 1-1), shard 3 (examples 3-3), ")
    assert missing.endswith("shard 11 (examples 11-11), and 14 more runs, 20 shards in all")


def make_labels(span: tuple[int, int]) -> dict[str, np.ndarray]:
    return {"labels": np.arange(*span)}


def test_a_study_and_a_folder_of_caches_mean_all_their_caches(study, run):
    run("cache", "build", "params/tiny.yaml")
    outputs = study.runs / "teacher" / "outputs-train"
    build_shards(
        outputs, {"kind": "teacher_outputs", "split": "train"}, {"logits": ("<i8", ())},
        lambda span: {"logits": make_labels(span)["labels"]}, n_examples=9, shard_size=4,
    )  # fmt: skip
    (study.runs / "teacher" / "outputs-test").mkdir()  # not built yet
    _, output, _ = run("cache", "info", "params/tiny.yaml")
    folders = [line for line in output.splitlines() if not line.startswith(" ")]
    assert folders == [str(study.cache / "train"), str(study.cache / "test"), str(outputs)]
    _, output, _ = run("cache", "info", study.cache, outputs)
    folders = [line for line in output.splitlines() if not line.startswith(" ")]
    assert folders == [str(study.cache / "test"), str(study.cache / "train"), str(outputs)]


def test_the_data_sets_of_probes_are_built_and_found_with_the_study_s_own(study, run, home):
    path = home / "params" / "tiny.yaml"
    content = parse_yaml(path.read_text())
    larger = {"source": "digits", "n_validation": 797, "image_size": 16}
    content["probe"]["others"] = {"large": larger}
    path.write_text(yaml.safe_dump(content))
    assert run("cache", "build", "params/tiny.yaml", "--split", "test")[0] == 0
    assert len(list(home.glob("cache/digits-*/test"))) == 1  # what was asked for, and no more
    assert run("cache", "build", "params/tiny.yaml")[0] == 0
    assert len(list(home.glob("cache/digits-*/train"))) == 2
    _, output, _ = run("cache", "info", "params/tiny.yaml")
    assert len([line for line in output.splitlines() if not line.startswith(" ")]) == 4


def test_verify_reads_every_byte_and_names_what_is_damaged(study, run):
    run("cache", "build", "params/tiny.yaml")
    code, output, errors = run("cache", "verify", "params/tiny.yaml")
    assert (code, errors) == (0, "")
    assert re.fullmatch(r".*train: 10 files, 94\.\d\d kB, whole \(\d+\.\d\d GB/s\)\n.*\n", output)
    path = study.cache / "train" / "images-00003.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    (study.cache / "train" / "labels-00004.npy").unlink()
    code, output, _ = run("cache", "verify", "params/tiny.yaml")
    assert code == 1
    assert re.match(r".*train: 2 of 10 files damaged or missing \(\d+\.\d\d GB/s\)\n", output)
    assert output.splitlines()[1:4] == [
        "  images-00003.npy",
        "  labels-00004.npy",
        "run this again with --repair: it keeps what is whole",
    ]
    assert "test: 4 files" in output.splitlines()[4]  # the other caches are verified all the same


def test_repair_keeps_what_is_whole_and_says_how_to_make_the_rest(study, run):
    run("cache", "build", "params/tiny.yaml", "--split", "test")
    folder = study.cache / "test"
    pristine = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    (folder / "labels-00000.npy").write_bytes(b"")
    code, output, _ = run("cache", "verify", "--repair", "params/tiny.yaml")
    assert code == 1
    assert output.splitlines()[-1] == (
        "whole shards are kept; run `python -m kdlib cache build params/tiny.yaml` to make the "
        "others"
    )
    assert run("cache", "build", "params/tiny.yaml", "--split", "test")[0] == 0
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*")} == pristine
    assert run("cache", "verify", "--repair", folder)[0] == 0


def test_an_index_that_cannot_be_trusted_fails_and_the_others_are_verified(study, run):
    run("cache", "build", "params/tiny.yaml")
    (study.cache / "train" / "index.json").write_text("{}")
    code, output, errors = run("cache", "verify", "params/tiny.yaml")
    assert code == 1
    assert re.fullmatch(r"CacheError: .*train/index\.json has format None; .*\n", errors)
    assert re.match(r".*test: 4 files, .* whole", output)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "params/none.yaml"], "FileNotFoundError: no study file 'params/none.yaml'; "),
        (["build", "params/tiny.yaml", "--part", "3/2"], "ValueError: part is '3/2'; expected i/k"),
        (["build", "params/tiny.yaml", "--part", "6/6"], "ValueError: part 6/6 of 5 shards; expec"),
        (["build", "params/tiny.yaml", "--workers", "-1"], "ValueError: n_workers is -1; expected"),
        (["info", "nowhere"], "FileNotFoundError: nowhere is neither a cache folder nor a study"),
        (["info", "params"], "FileNotFoundError: there is no cache in "),
        (
            ["info", "params/tiny.yaml"],
            "FileNotFoundError: there is no cache in params/tiny.yaml; ",
        ),
        (["verify", "nowhere"], "FileNotFoundError: nowhere is neither a cache folder nor a study"),
    ],
)
def test_an_error_is_one_sentence_and_exit_code_1(study, run, arguments, expected):
    code, output, errors = run("cache", *arguments)
    assert (code, output) == (1, "")
    assert errors.startswith(expected)
    assert errors.count("\n") == 1


def test_a_cache_of_other_images_is_refused_and_kept(study, run):
    run("cache", "build", "params/tiny.yaml", "--split", "test")
    shutil.copytree(study.cache / "test", study.cache / "train")
    before = {path.name: path.read_bytes() for path in (study.cache / "train").iterdir()}
    code, _, errors = run("cache", "build", "params/tiny.yaml")
    assert code == 1
    assert re.match(r"CacheError: .*was made of something else .*split: test -> train", errors)
    assert {p.name: p.read_bytes() for p in (study.cache / "train").iterdir()} == before


def test_near_duplicates_are_listed_and_drawn(lab, run):
    code, printed, _ = run("near", "params/tiny.yaml", "--similarity", "0.9", "--show", "2")
    assert code == 0
    lines = printed.splitlines()
    assert lines[1].startswith("| split | example_id | label | other_split |")
    assert [line[:2] for line in lines[2:6]] == ["| ", "| ", "| ", "1,"]
    assert lines[5].endswith("near_duplicates.parquet")
    assert lines[6].endswith("figures/tiny/near_duplicates.png")


@pytest.mark.parametrize("command", [["--help"], ["cache", "build", "--help"]])
def test_help_comes_without_torch(home, command):
    code = (
        "import sys\nfrom kdlib.__main__ import main\n"
        f"sys.argv = ['kdlib', *{command}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: kdlib" in done.stdout or "usage: python -m kdlib" in done.stdout


@pytest.mark.parametrize(
    ("asked", "passed_on"),
    [
        ([], ["--cores", "2"]),
        (["--cores", "8", "-n"], ["--cores", "8", "-n"]),
        (["--profile", "profiles/slurm"], ["--profile", "profiles/slurm"]),
        (["--profile", "mine", "--cores", "1"], ["--profile", "mine", "--cores", "1"]),
    ],
)
def test_cores_are_two_unless_given_or_left_to_a_profile_and_paths_are_absolute(
    study, run, home, monkeypatch, asked, passed_on
):
    commands = []

    class Stopped:
        def wait(self) -> int:
            return 1

    def start(command: list[str], **options: object) -> Stopped:
        commands.append(command)
        return Stopped()

    monkeypatch.setattr(subprocess, "Popen", start)
    assert run("study", "params/tiny.yaml", *asked)[0] == 1
    place = commands[0].index("--config") + 1
    assert commands[0][place] == f"study={home}/params/tiny.yaml"
    profile = [str(ROOT / "profiles/slurm") if o == "profiles/slurm" else o for o in passed_on]
    assert commands[0][place + 1 :] == profile
    directory = commands[0].index("--directory") + 1
    assert commands[0][directory] == str(home / "runs")


def test_jobs_get_this_environment_and_absolute_places_whatever_the_shell_says(
    study, run, home, monkeypatch
):
    """A kernel of the user's own, named python3 too, is not taken for that of this environment."""
    foreign = home / "jupyter" / "kernels" / "python3" / "kernel.json"
    files.write_json(foreign, {"argv": ["/bin/false"], "display_name": "foreign", "language": "x"})
    (home / "below").mkdir()
    monkeypatch.chdir(home / "below")
    for name, value in (("KDLIB_HOME", ".."), ("KDLIB_DATA", "data"), ("PATH", "/usr/bin:/bin")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PATH", str(home / "jupyter"))
    environments = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env: environments.append(env))
    monkeypatch.setattr("kdlib.steps.pipeline.wait", lambda process: 1)
    assert run("study", "params/tiny.yaml")[0] == 1
    (environment,) = environments
    assert environment["KDLIB_HOME"] == str(home)
    assert environment["KDLIB_DATA"] == str(home / "below" / "data")
    monkeypatch.undo()
    code = "from jupyter_client import kernelspec as k; print(k.get_kernel_spec('python3').argv)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "/bin/false" not in done.stdout
    assert "ipykernel_launcher" in done.stdout


@pytest.fixture
def weights(study: Study, home: Path) -> Path:
    """A weight file of the small network, for a study whose images are cached."""
    from kdlib.models.weights import save_weights
    from kdlib.steps.cache import cache_images

    images = cache_images(study)
    network = network_for(images, Model(name="tiny_cnn", options={"width": 6}), 3, "cpu")
    save_weights(network, home / "outside.safetensors", {})
    return home / "outside.safetensors"


OPTIONS = ("--options", '{"width": 6}')


def test_probe_prints_a_table_of_weights_from_outside(run: Run, weights: Path):
    command = ("probe", "params/tiny.yaml", "--weights", weights, "--model", "tiny_cnn", *OPTIONS)
    code, output, errors = run(*command, "--layers", "features", "stage1", "--few-shot", "2")
    assert (code, errors) == (0, "")
    assert "| on | layer | D | linear | knn | few_shot_2 |" in output
    found = re.search(r"\| own \| features \| 12 \| ([0-9.]+) \| ([0-9.]+) \| ([0-9.]+) \|", output)
    assert all(10 < float(accuracy) <= 100 for accuracy in found.groups())
    assert "| own | stage1 | 6 |" in output
    assert "effective rank (isotropic)" in output
    other = run(*command, "--mean", "0", "--std", "0.02")
    assert other[0] == 0
    assert other[1] != output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--options": '{"width": 8}'}, r"does not fit this TinyCNN; in \d+ keys"),
        ({"--weights": "absent.safetensors"}, "there is no weight file absent.safetensors"),
        ({"--model": "tiny_cn"}, "unknown model 'tiny_cn'; did you mean 'tiny_cnn'"),
        ({"--layers": "stage9", "--mean": "0"}, "expected features, and stage1"),
        ({"--mean": "0"}, "--mean and --std go together"),
    ],
)
def test_probe_refuses_foreign_weights_in_one_sentence(run: Run, weights: Path, changes, said):
    options = {"--weights": weights, "--model": "tiny_cnn", "--options": OPTIONS[1]} | changes
    code, output, errors = run(
        "probe", "params/tiny.yaml", *(part for pair in options.items() for part in pair)
    )
    assert (code, output) == (1, "")
    assert re.search(said, errors)
    assert errors.count("\n") == 1


def notebook(outputs: list | None = None, status: str = "completed") -> dict:
    """An executed notebook of one cell."""
    cell = {"cell_type": "code", "metadata": {"papermill": {"status": status}}}
    return {"cells": [cell | {"outputs": outputs or []}]}


ERROR = {"output_type": "error", "ename": "CheckError", "evalue": "no", "traceback": []}


@pytest.fixture
def piped(study: Study, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that runs a pipeline which leaves some notebooks and fails: what is said of it."""

    def running(code: int = 1, **left: dict) -> str:
        def wait(process: None) -> int:
            for name, content in left.items():
                files.write_json(study.runs / name / "01.ipynb", content)
            return code

        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: None)
        monkeypatch.setattr("kdlib.steps.pipeline.wait", wait)
        ended, output, errors = run("study", "params/tiny.yaml")
        assert (ended, output) == (1, "")
        assert errors.startswith("\nThe study is not complete.\n")
        assert "run the same command again to go on" in errors
        return errors

    return running


def test_a_pipeline_that_stops_before_a_step_says_so_and_blames_nothing(piped):
    errors = piped()
    assert "Snakemake stopped with exit code 1; no notebook or log of this call holds" in errors
    assert "failed" not in errors
    assert "killed" not in errors


def test_a_pipeline_tells_what_failed_now_what_was_killed_and_what_failed_before(piped, study):
    old = study.runs / "datamap" / "03.ipynb"
    files.write_json(old, notebook([ERROR]))
    stale = study.runs / "elsewhere" / "03.ipynb"  # of no step that is not finished
    files.write_json(stale, notebook([ERROR]))
    for path in (old, stale):
        os.utime(path, (1e9, 1e9))
    errors = piped(cache=notebook([ERROR]), teacher=notebook(status="running"))
    now, killed, before = re.split(
        r"\d notebook\(s\) ended|\d step\(s\) failed in an earlier", errors
    )
    assert f"1 step(s) failed:\n  {study.runs}/cache/01.ipynb\n    CheckError: no\n" in now
    assert "they were killed, or ran out of time or memory" in killed
    assert f"{study.runs}/teacher/01.ipynb" in killed
    assert str(old) in before
    assert str(stale) not in errors


def test_a_pipeline_that_ends_well_over_unfinished_runs_prints_no_summary(piped, study):
    study.figures.mkdir(parents=True)
    (study.figures / "summary.md").write_text("# tiny: results of another day")
    errors = piped(code=0)
    assert f"  {study.runs}/cache\n    is not made yet\n" in errors
    assert "another day" not in errors


def test_status_names_each_run_that_is_not_finished(study, run):
    code, output, errors = run("status", "params/tiny.yaml")
    assert (code, errors) == (1, "")
    assert output.startswith("runs/tiny/cache: is not made yet\n")
    assert output.splitlines()[-1].startswith("tiny: 23 run(s) are not finished")
    assert not study.runs.exists()  # it only looks


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["step", "cache", "--points", "x"], "--points is read by step distill alone"),
        (["step", "cache", "--strategy", "easy"], "--strategy is read by step distill alone"),
        (["step", "cache,probe", "--seed", "0"], "and the step is cache, probe"),
        (["step", "distill", "--teacher", "t"], "--teacher is read by step teacher alone"),
        (["step", "teacher", "--built"], "--built is read by step cache alone"),
        (["step", "distill", "--points", "-", "--seed", "0"], "--seed and --points both name"),
        (["step", "distill", "--points", "-", "--fraction", "0"], "--fraction and --points both"),
        (["study", "--corse", "3"], "has an option --corse; did you mean '--cores'?"),
        (["study", "--dryrum"], "has an option --dryrum; did you mean '--dryrun'?"),
        (["study", "--directory=/tmp"], "set KDLIB_HOME to run in another workspace"),
    ],
)
def test_an_option_that_a_command_does_not_use_is_refused(study, run, arguments, says):
    command, *rest = arguments
    rest = [*rest[:1], "params/tiny.yaml", *rest[1:]] if command == "step" else rest
    rest = ["params/tiny.yaml", *rest] if command == "study" else rest
    code, output, errors = run(command, *rest)
    assert (code, output) == (1, "")
    assert says in errors
    assert errors.count("\n") == 1
    assert not study.runs.exists()


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "all"])
def test_no_core_at_all_is_refused_and_not_taken_for_the_default(study, run, given):
    code, _, errors = run("study", "params/tiny.yaml", f"--cores={given}")
    assert code == 2
    assert f"argument --cores: '{given}' is no number of at least 1" in errors


@pytest.mark.parametrize("given", ["--work 2", "--worker=2"])
def test_an_option_is_not_taken_for_one_it_begins_and_the_nearest_is_named(study, run, given):
    code, _, errors = run("cache", "build", "params/tiny.yaml", *given.split())
    assert code == 2
    assert f"unknown arguments: {given}; did you mean '--workers'?" in errors
    assert not study.cache.exists()


def test_without_the_locks_of_linux_and_macos_the_import_is_one_sentence():
    code = "import sys; sys.modules['fcntl'] = None; import kdlib"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: kdlib runs on Linux and macOS: this Python has no fcntl")


def test_failed_notebooks_are_listed_with_their_error(study):
    files.write_json(study.runs / "a" / "bad.ipynb", notebook([ERROR]))
    files.write_json(study.runs / "a" / "good.ipynb", notebook([]))
    files.write_json(study.runs / "archive" / "x" / "old.ipynb", notebook([ERROR]))
    (study.runs / "a" / "cut.ipynb").write_text('{"cells": [')
    (study.runs / "a" / "empty.ipynb").touch()
    bad, cut, empty = failed_notebooks(study.runs)
    assert bad == (study.runs / "a" / "bad.ipynb", "CheckError: no")
    assert cut[0].name == "cut.ipynb"
    assert empty[1].startswith("did not start")


def test_logs_of_unfinished_runs_are_listed_with_their_last_line(study):
    folder = study.runs / "recorded" / "model=a"
    (folder / "seed=0").mkdir(parents=True)
    (folder / "seed=0" / "evidence.json").write_text("{}")
    (folder / "seed=0.log").write_text("fine\n")
    (folder / "seed=1.log").write_text("step 3\nValueError: no\n\n")
    teacher = study.runs / "teachers" / "small.log"
    teacher.parent.mkdir()
    teacher.write_text("RuntimeError: neither\n")
    assert failed_logs(study.runs) == [
        (folder / "seed=1.log", "ValueError: no"), (teacher, "RuntimeError: neither"),
    ]  # fmt: skip
