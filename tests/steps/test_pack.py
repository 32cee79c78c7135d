"""A pack comes back as it was packed, and is refused when anything in it is not as it should be."""

import json
import shutil
import sys
import types
import zipfile

import pandas as pd
import pytest
from tiny import TINY, files_below, first_run, forge, tiny_study

from kdlib.__main__ import main
from kdlib.compare.committed import committed_folder
from kdlib.repro.tables import read_parquet, write_parquet
from kdlib.steps.compare import compile_tables, finish_tables
from kdlib.steps.pack import MANIFEST, PackError, fetch, pack, unpack
from kdlib.steps.recheck import recheck
from kdlib.study.load import load_study


@pytest.fixture(scope="module")
def home(made, tmp_path_factory):
    """A workspace with the compared tiny study, and a pack of it."""
    home = tmp_path_factory.mktemp("packed")
    shutil.copytree(made, home, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = load_study("params/tiny.yaml")
        finish_tables(study, "compare", compile_tables(study))
        pack(study, home / "params" / "tiny.yaml", home / "tiny.zip")
    return home


@pytest.fixture
def packed(home, tmp_path, monkeypatch):
    """A copy of it: the study, and the pack."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return load_study("params/tiny.yaml"), tmp_path / "home" / "tiny.zip"


@pytest.fixture
def source(home):
    """The pack alone."""
    return home / "tiny.zip"


@pytest.fixture
def run(monkeypatch, capsys):
    def running(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdlib", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return running


def rewritten(source, target, change, manifest=None):
    """A copy of a pack whose entries, name -> bytes, and manifest were changed."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(entries.pop(MANIFEST))
    change(entries)
    if manifest:
        manifest(content)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(MANIFEST, json.dumps(content))
        for name, data in entries.items():
            archive.writestr(name, data)
    return target


def test_a_pack_comes_back_byte_for_byte_and_the_same_study_gives_the_same_pack(packed):
    study, source = packed
    home = study.figures.parents[1]
    again = home / "again.zip"
    pack(study, home / "params" / "tiny.yaml", again)
    assert again.read_bytes() == source.read_bytes()
    manifest = unpack(source, home / "elsewhere")
    there = files_below(home / "elsewhere")
    assert set(there) == set(manifest["files"])
    assert all((home / name).read_bytes() == content for name, content in there.items())
    kinds = {name.rsplit(".", 1)[1] for name in there}
    assert kinds == {"yaml", "json", "parquet"}
    assert len([name for name in there if name.endswith("subset.parquet")]) == 12
    assert "runs/tiny/datamap/datamap.parquet" in there
    assert not any(
        "/compare/" in name for name in there
    )  # tables are then those that are committed
    unpack(source, home / "elsewhere")  # what is there with the same content stays


def test_weights_are_packed_when_they_are_asked_for(packed):
    study, _ = packed
    home = study.figures.parents[1]
    manifest = pack(study, home / "params" / "tiny.yaml", home / "all.zip", weights=True)
    weights = [name for name in manifest["files"] if name.endswith(".safetensors")]
    assert len(weights) >= 12
    assert set(unpack(home / "all.zip", home / "elsewhere")["files"]) == set(manifest["files"])


def test_a_stranger_unpacks_checks_and_redraws_without_training(packed, run, monkeypatch):
    study, source = packed
    home = study.figures.parents[1]
    code, output, errors = run("unpack", source, "--into", home / "new")
    assert (code, errors) == (0, "")
    assert "12 of 12 rows have evidence here, no fault(s) in it" in output
    assert output.splitlines()[-1] == (
        f"KDLIB_HOME={home / 'new'} python -m kdlib report params/tiny.yaml"
    )
    monkeypatch.setenv("KDLIB_HOME", str(home / "new"))
    monkeypatch.setattr("kdlib.steps.figures.draw_comparison", lambda study, tables: {})
    assert run("report", "params/tiny.yaml", "--html")[0] == 0
    assert (home / "new" / "figures" / "tiny" / "report.html").is_file()


def test_records_that_disagree_are_named(packed):
    study, _ = packed
    forge(first_run(study), lambda e: e["checkpoints"]["last"].update(test_accuracy=0.99))
    path = study.runs / "distill/student=tiny/strategy=easy/fraction=0.33/objective=kd/seed=0"
    table, metadata = read_parquet(path / "subset.parquet")
    write_parquet(path / "subset.parquet", table, metadata | {"strategy": "hard"})
    table = pd.read_parquet(path / "metrics.parquet", partitioning=None)
    table.assign(validation_accuracy=1.0).to_parquet(path / "metrics.parquet")
    found = recheck(study)
    assert (found["runs"], found["with_evidence"]) == (12, 12)
    assert len(found["faults"]) == 2
    assert "the table has another test_accuracy than its evidence" in found["faults"][0]
    assert "metrics.parquet is missing or was changed" in found["faults"][1]
    evidence = json.loads((path / "evidence.json").read_text())
    (path / "evidence.json").write_text(json.dumps(evidence | {"step": "other"}))
    assert "was changed after it was written" in recheck(study)["faults"][1]
    shutil.rmtree(path)
    assert recheck(study)["with_evidence"] == 11


NAMES = ["../evil.json", "/tmp/evil.json", "runs/tiny/../../evil.json", "runs/tiny/a/evil.py",
         "runs/other/a/evil.json", "notebooks/evil.yaml", "params/.hidden.yaml",
         "runs/tiny/a\\evil.json", "C:/evil.json", "runs/tiny/a/evil.json\n", "kdlib/lab.yaml",
         "figures/tiny/evil.html", "runs/tiny/evil.json/"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_no_workspace_has_is_refused_and_nothing_is_written(source, tmp_path, name):
    evil = rewritten(
        source, tmp_path / "evil.zip", lambda entries: entries.update({name: b"{}"}),
        lambda m: m["files"].update({name: {"bytes": 2, "sha256": "0" * 64}}),
    )  # fmt: skip
    with pytest.raises(PackError, match="the pack names"):
        unpack(evil, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def first_json(entries):
    return sorted(name for name in entries if name.endswith("evidence.json"))[0]


FAULTS = {
    "changed": (lambda e: e.update({first_json(e): b"x" * len(e[first_json(e)])}), None,
                "is not what the manifest says"),
    "longer": (lambda e: e.update({first_json(e): e[first_json(e)] + b" "}), None,
               "has not the size"),
    "missing": (lambda e: e.pop(first_json(e)), None, "manifest and entries differ in"),
    "further": (lambda e: e.update({"runs/tiny/a/b.json": b"{}"}), None,
                "manifest and entries differ in 'runs/tiny/a/b.json'"),
    "format": (lambda e: None, lambda m: m.update(format=2), "has format 2; expected 1"),
    "study": (lambda e: None, lambda m: m.update(studies=["../x"]), "is not one of a pack"),
    "size": (lambda e: None, lambda m: m["files"]["params/tiny.yaml"].update(bytes="9"),
             "is not one of a pack"),
    "file": (lambda e: None, lambda m: m.update(file="params/other.yaml"), "lacks its study file"),
    "large": (lambda e: None, lambda m: m["files"]["params/tiny.yaml"].update(bytes=10**12),
              "holds 1000.00 GB; expected at most 4.00 GB"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pack_that_is_not_what_its_manifest_says_is_refused(source, tmp_path, fault):
    change, manifest, says = FAULTS[fault]
    with pytest.raises(PackError, match=says):
        unpack(rewritten(source, tmp_path / "bad.zip", change, manifest), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_no_zip_or_is_cut_is_refused_in_a_sentence(source, tmp_path):
    whole = source.read_bytes()
    for content in (b"", b"no zip", whole[:-40], whole[: len(whole) // 2]):
        (tmp_path / "cut.zip").write_bytes(content)
        with pytest.raises(PackError, match="is no pack, or is cut"):
            unpack(tmp_path / "cut.zip", tmp_path / "new")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(PackError, match=r"it has no manifest\.json"):
        unpack(tmp_path / "other.zip", tmp_path / "new")


def test_an_entry_that_is_named_twice_is_refused(source, tmp_path):
    shutil.copy(source, tmp_path / "twice.zip")
    with (
        zipfile.ZipFile(tmp_path / "twice.zip", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("params/tiny.yaml", "evil: true")
    with pytest.raises(PackError, match="names one twice"):
        unpack(tmp_path / "twice.zip", tmp_path / "new")


def test_a_file_of_other_content_is_not_overwritten(source, tmp_path):
    mine = tmp_path / "new" / "params" / "tiny.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="has other content than the pack"):
        unpack(source, tmp_path / "new")
    assert files_below(tmp_path / "new") == {"params/tiny.yaml": b"mine"}


def test_bases_are_packed_and_missing_tables_or_runs_are_said(lab):
    study = tiny_study(lab)
    (lab / "params" / "small.yaml").write_text("base: tiny.yaml\nseeds: [0, 1]\n")
    small = load_study("params/small.yaml")
    file = lab / "params" / "small.yaml"
    with pytest.raises(FileNotFoundError, match=r"results.parquet; run `python -m kdlib step comp"):
        pack(small, file, lab / "small.zip")
    compile_tables(study)
    shutil.copytree(study.figures, small.figures)
    with pytest.raises(FileNotFoundError, match="runs/small/cache holds no finished run"):
        pack(small, file, lab / "small.zip")
    shutil.copytree(study.runs, small.runs)
    names = pack(small, file, lab / "small.zip")["files"]
    assert {"params/small.yaml", "params/tiny.yaml"} <= set(names)
    assert committed_folder(small).is_dir()
    with pytest.raises(ValueError, match="expected a study file of the workspace"):
        pack(study, TINY, lab / "x.zip")


def test_a_pack_is_fetched_from_the_hub_and_its_absence_is_one_sentence(monkeypatch, tmp_path):
    asked = []

    def download(repository, file, repo_type, revision):
        asked.append((repository, file, repo_type, revision))
        if file == "gone.zip":
            raise OSError("offline:\n no network")
        return tmp_path / file

    hub = types.SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert fetch("hf://datasets/me/packs@v1/a/tiny.zip") == tmp_path / "a/tiny.zip"
    assert fetch("hf://me/packs/tiny.zip") == tmp_path / "tiny.zip"
    assert asked == [("me/packs", "a/tiny.zip", "dataset", "v1"),
                     ("me/packs", "tiny.zip", "model", None)]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"cannot fetch hf://me/p/gone.zip \(offline: no netw"):
        fetch("hf://me/p/gone.zip")
    with pytest.raises(ValueError, match="names no file; expected hf://datasets/OWNER/NAME"):
        fetch("hf://datasets/me")
    with pytest.raises(FileNotFoundError, match=r"no file 'gone.zip'; expected a pack"):
        fetch("gone.zip")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        fetch("hf://me/p/tiny.zip")
