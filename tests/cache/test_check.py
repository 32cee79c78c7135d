"""`python -m kdlib cache check` and `cache verify --source`: every odd image by name, and an exit
code that says whether something is to be decided."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from cache.odd_images import data_of, encoded, image_folder, pixels, png16, turned, write
from cache.parquet_sets import write_parquet
from PIL import Image
from tiny import TINY

from kdlib.__main__ import main
from kdlib.cache.check import check_data
from kdlib.study.data import Data, HuggingFace
from kdlib.study.yaml_text import parse_yaml


@pytest.fixture
def study(home: Path) -> Path:
    """A study on a folder of plain images."""
    image_folder(home / "photos")
    return write_study(home)


def write_study(home: Path, **data) -> Path:
    content = parse_yaml(TINY.read_text())
    content["data"] = {"source": "folder", "folder": str(home / "photos"), "n_validation": 1} | data
    (home / "params").mkdir(exist_ok=True)
    path = home / "params/photos.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a `cache` command; returns its exit code, output and errors."""

    def running(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdlib", "cache", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return running


def test_plain_images_need_no_decision_and_nothing_is_built(study, run, home):
    code, output, errors = run("check", study)
    assert (code, errors) == (0, "")
    assert "train: 6 images, 6 of them as they are read" in output
    assert "nothing needs a decision" in output
    assert not (home / "cache").exists()


ODD = {
    "train/cat/turned.jpg": (lambda: turned(6, "JPEG"), "carries EXIF orientation 6"),
    "train/cat/clear.png": (lambda: encoded(pixels(3, channels=4)), "has transparent pixels"),
    "train/cat/large.png": (lambda: encoded(pixels(size=(5, 9))), "has 9x5 pixels"),
    "train/cat/float.tif": (
        lambda: encoded(np.zeros((4, 6), np.float32), "TIFF"),
        "more than 8 bits",
    ),
    "train/cat/empty.png": (lambda: b"", "it is empty"),
    "train/cat/text.png": (lambda: b"text", "its format is unknown"),
    "train/dog/phone.heic": (lambda: b"ftypheic", "a kind that is not read (.heic)"),
    "train/dog/forgotten.img": (lambda: encoded(pixels(4)), "is an image, but its name ends in"),
    "train/beside.png": (lambda: encoded(pixels(5)), "lies beside the class folders"),
    "test/cat/twin.png": (lambda: encoded(pixels(0)), "train/cat/0.png = test/cat/twin.png"),
    "train/dog/other_label.bmp": (
        lambda: encoded(pixels(2), "BMP"),
        "train/cat/1.png = train/dog/other_label.bmp",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_each_odd_image_alone_needs_a_decision(study, run, home, name):
    content, says = ODD[name]
    write(home / "photos" / name, content())
    code, output, _ = run("check", study)
    assert code == 1
    [line] = [line for line in output.splitlines() if says in line]
    assert name in line
    assert "1 needs a decision" in output


def test_all_are_listed_at_once_and_workers_list_the_same(study, run, home):
    for name, (content, _) in ODD.items():
        write(home / "photos" / name, content())
    (home / "photos/train/dog/lost.jpg").symlink_to("nowhere")
    code, output, _ = run("check", study)
    assert code == 1
    assert all(says in output for _, says in ODD.values())
    assert "train/dog/lost.jpg cannot be read as an image (the file is gone" in output
    assert run("check", study, "--workers", "1")[:2] == (code, output)


NOTED = {
    "train/cat/deep.png": (png16, "cut from 16 to 8 bits"),
    "train/cat/grey.png": (lambda: encoded(pixels(6)[..., 0]), "made RGB from greyscale"),
    "train/cat/two.gif": (
        lambda: encoded(
            Image.fromarray(pixels(7)), "GIF", save_all=True,
            append_images=[Image.fromarray(pixels(8))],
        ),
        "of several frames",
    ),
    "train/cat/again.png": (lambda: encoded(pixels(0)), "more than once in one class"),
    "train/cat/.DS_Store": (lambda: b"x", "files passed over (hidden)"),
    "train/cat/notes.txt": (lambda: b"x", "files passed over (.txt)"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_what_a_reader_does_by_itself_is_listed_and_needs_no_decision(study, run, home, name):
    content, says = NOTED[name]
    write(home / "photos" / name, content())
    code, output, _ = run("check", study)
    assert code == 0
    lines = output.splitlines()
    [at] = [i for i, line in enumerate(lines) if says in line]
    assert name in lines[at + 1]


def test_a_decision_in_the_study_ends_the_question(study, run, home):
    write(home / "photos/train/cat/turned.png", turned(3, seed=30))
    write(home / "photos/train/cat/clear.png", encoded(pixels(channels=4)))
    assert run("check", study)[0] == 1
    code, output, _ = run("check", write_study(home, exif="apply", alpha="white"))
    assert code == 0
    assert "turned upright by their EXIF orientation: 1" in output


def test_a_long_list_is_shortened_unless_all_is_asked_for(study, run, home):
    for i in range(23):
        write(home / f"photos/train/cat/g{i}.png", encoded(pixels(20 + i)[..., 0]))
    assert "and 3 more (--all names them)" in run("check", study)[1]
    output = run("check", study, "--all")[1]
    assert sum("/g" in line for line in output.splitlines()) == 23


def test_names_that_are_no_text_are_listed(study, run, home):
    folder = bytes(home / "photos/train/cat")
    with open(folder + b"/\xff\n.png", "wb") as file:
        file.write(b"text")
    code, output, _ = run("check", study)
    assert code == 1
    assert "cat/\\udcff\\n.png cannot be read" in output


@pytest.mark.parametrize("most", [0, 7])  # 7: the images of train alone would be decoded
def test_without_pixels_files_of_equal_bytes_are_found(tmp_path, monkeypatch, most):
    monkeypatch.setattr("kdlib.cache.check.MOST_DECODED", most)
    root = image_folder(tmp_path)
    for split in ("train", "test"):  # larger than any other of its split
        write(root / split / "cat/large.png", encoded(pixels(9, size=(40, 60))))
    write(root / "test/cat/twin.png", encoded(pixels(0)))
    write(root / "test/cat/twin.bmp", encoded(pixels(0), "BMP"))
    found = check_data(data_of(root, image_size=4)).decisions
    assert {kind: sorted(texts) for kind, texts in found.items()} == {
        "the same image in train and test": [
            "train/cat/0.png = test/cat/twin.png",
            "train/cat/large.png = test/cat/large.png",
        ]
    }


def test_arrays_have_nothing_to_check_and_an_unfit_layout_is_a_finding(tmp_path):
    digits = check_data(Data(source="digits", n_validation=1))
    assert not digits.decisions
    assert all("there is nothing to check" in line for line in digits.counts)
    (tmp_path / "train/cat").mkdir(parents=True)
    found = check_data(data_of(tmp_path)).decisions["cannot be opened"]
    assert [line.split(":")[0] for line in found] == ["train", "test"]


def test_images_in_parquet_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    for split in ("train", "test"):
        images = [encoded(pixels(i)) for i in range(2)] + [turned(6, seed=8)]
        write_parquet(tmp_path / f"set/{split}.parquet", images, [0, 1, 2])
    hub = HuggingFace(dataset="set")
    found = check_data(Data(source="huggingface", huggingface=hub, n_validation=1)).decisions
    assert [text[:45] for text in found["needs a decision or a repair"]] == [
        "train/example 2 carries EXIF orientation 6: a",
        "test/example 2 carries EXIF orientation 6: as",
    ]
    assert len(found["the same image in train and test"]) == 3


def test_what_lies_in_a_linked_class_folder_is_listed_and_a_folder_named_like_an_image(
    study, run, home
):
    (home / "photos/train/cat").rename(home / "cats")
    (home / "photos/train/cat").symlink_to(home / "cats")
    write(home / "cats/notes.txt", b"x")
    (home / "photos/train/dog/folder.jpg").mkdir()
    code, output, _ = run("check", study)
    assert code == 0
    assert "train/cat/notes.txt" in output
    assert "train/dog/folder.jpg" in output


def test_splits_that_do_not_belong_together_need_a_decision(study, run, home):
    code, output, _ = run("check", write_study(home, test_folder="train"))
    assert code == 1
    assert "both splits are read from the folder" in output


def test_a_source_is_named_by_a_study_and_repaired_by_another_command(study, run, home):
    assert run("build", study)[0] == 0
    code, _, errors = run("verify", home / "cache", "--source")
    assert code == 1
    assert "--source needs a study file" in errors
    code, _, errors = run("verify", study, "--source", "--repair")
    assert code == 1
    assert "give one" in errors


def test_both_splits_are_looked_at_before_either_is_built(study, run, home):
    for name in ("train/cat/9.png", "test/dog/9.png"):
        write(home / "photos" / name, b"text")
    code, _, errors = run("build", study)
    assert code == 1
    assert errors.count("its format is unknown") == 2
    assert not list(home.glob("cache/*/*/*.npy"))


def test_arrays_are_compared_by_their_pixels(home, run):
    path = write_study(home, source="digits", folder=None, n_train=40)
    assert run("build", path)[0] == 0
    code, output, _ = run("verify", path, "--source")
    assert (code, output.count("the source is the same")) == (0, 2)


def test_verify_compares_with_the_source_when_it_is_asked_to(study, run, home):
    assert run("verify", study, "--source")[1].count("not built") == 2
    assert run("build", study)[0] == 0
    code, output, _ = run("verify", study, "--source")
    assert (code, output.count("the source is the same")) == (0, 2)
    path = home / "photos/train/cat/0.png"
    path.write_bytes(path.read_bytes()[:-1] + b"\x83")
    code, output, _ = run("verify", study, "--source")
    assert code == 1
    assert "changed: cat/0.png" in output
    code, _, errors = run("build", study)
    assert code == 1
    assert "changed since: cat/0.png" in errors
