"""Studies that ask of images without labels, or of a teacher without a recorded training, what
these do not have are refused when they are read."""

import pytest
from a_study import LOADED, STUDY, changed, validated
from tiny import ROOT
from unlabelled import UNLABELLED

from kdlib.study.base import StudyError
from kdlib.study.objectives import OBJECTIVES, why_labels
from kdlib.study.yaml_text import parse_yaml

FROZEN = {"model": {"name": "tiny_cnn"}, "weights": "w.pt", "freeze": "backbone"}
BOTH = ["random", "fixed_shards"]
HUB = {"dataset": "owner/wild", "test_split": "train"}
CRD = {"kind": "crd", "temperature": 0.1, "weight": 1.0}
HINT = {"kind": "hint", "weight": 1.0}
KD = {"kind": "kd", "alpha": 1, "temperature": 4.0}
OWN = {"kind": "own", "code": "a.py", "trust_code": True, "reads": ["logits", "features"]}
TRAINED = {"model": {"name": "tiny_cnn"}, "training": STUDY["training"]}
RECORDED = {"model": {"name": "tiny_cnn"}, "training": STUDY["training"]}
RECORDINGS = {"models": {"tiny": {"name": "tiny_cnn"}}, "seeds": [0, 1]}


def test_the_study_on_the_page_is_read():
    page = (ROOT / "docs" / "your-own.md").read_text()
    (shown,) = (part for part in page.split("```") if "labelled: false, image_size" in part)
    assert validated(parse_yaml(shown.removeprefix("yaml"))).recorded_training is None


def test_a_study_without_labels_is_read():
    study = validated(UNLABELLED)
    assert study.data.splits == ("train",)
    assert study.recorded_training is None
    hub = {"dataset": "owner/wild", "test_split": None}
    data = {"source": "huggingface", "huggingface": hub, "labelled": False, "n_validation": 5}
    assert validated(changed("data", data, UNLABELLED)).data.splits == ("train",)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("objectives.more", KD, "objective more needs labels, and the images have none: it com"),
        ("objectives.more", {"kind": "cross_entropy"}, "objective more needs labels"),
        ("objectives.more", CRD, "its negatives are examples of other classes"),
        ("objectives.more", HINT, "nothing trains what lies behind its stage: write `stage: last`"),
        ("objectives.more", OWN, "it is to read features or stages, not logits"),
        ("teacher", TRAINED, "teacher has `training`, which is of labels"),
        ("teacher.expected_accuracy", 0.5, "teacher has `expected_accuracy`, which is of labels"),
        ("teacher.outputs", {"top_k": 2}, r"teacher has `outputs\.top_k`, which is of labels"),
        ("teachers", {"b": TRAINED}, "b has `training`, which is of labels"),
        ("axes.strategy", [*BOTH, "easy"], "strategy easy reads the datamap, and images without"),
        ("axes.strategy", [*BOTH, "random_balanced"], "random_balanced reads the datamap"),
        ("axes.strategy", [*BOTH, "picked_mine"], "strategy picked_mine reads the datamap"),
        ("dynamics", RECORDED, "`dynamics` trains with labels, and the images have none"),
        ("recordings", RECORDINGS, "`recordings` trains with labels, and the images have none"),
        ("audit", True, "`audit` trains with labels"),
        ("compare", {}, r"have no labels, by which students could be compared: name labelled data"),
        ("compare", {"measure": "linear"}, r"write compare: \{measure: linear, on: \[\.\.\.\]\}"),
        ("students.tiny", FROZEN, "without labels there is no last layer to train"),
        ("data.n_validation", 0, r"data\.n_validation is 0: hold some out"),
        ("data.test_folder", "val", "have no test split; .*: leave `test_folder` out"),
        ("data", {"source": "huggingface", "huggingface": HUB, "labelled": False,
                  "n_validation": 5}, "have no test split; .*: leave `test_split` out"),
    ],
)  # fmt: skip
def test_what_needs_labels_is_refused_with_a_sentence(path, value, says):
    with pytest.raises(StudyError, match=says):
        validated(changed(path, value, UNLABELLED))


def test_the_teacher_of_labelled_images_has_an_expected_accuracy():
    teacher = {k: v for k, v in STUDY["teacher"].items() if k != "expected_accuracy"}
    with pytest.raises(StudyError, match="teacher has no `expected_accuracy`"):
        validated(changed("teacher", teacher))


def shards(**changes):
    """A labelled study on shards, with a teacher from a file and nothing recorded."""
    content = changed("teacher", LOADED)
    for key in ("dynamics", "recordings", "selections"):
        del content[key]
    content["axes"]["strategy"] = ["random", "fixed_shards", "random_shards"]
    content["probe"]["strategy"] = ["full"]
    return content | changes


def test_a_study_on_shards_needs_no_recorded_training():
    study = validated(shards())
    assert study.recorded_training is None
    assert not any(study.reads_datamap(s) for s in ("full", *study.axes.strategy))
    with pytest.raises(
        StudyError, match="strategy hard reads the datamap, and a loaded teacher ha"
    ):
        validated(changed("axes.strategy", ["random", "hard"], shards()))
    with pytest.raises(StudyError, match="or leave `dynamics` out, as no strategy here reads"):
        validated(shards(dynamics={"window": 3}))
    with pytest.raises(StudyError, match="`recordings` without a training repeat the recorded one"):
        validated(shards(recordings=RECORDINGS))


def test_every_objective_either_needs_no_labels_or_says_why():
    free = {"hint", "attention", "rkd", "similarity", "tokens", "own"}
    assert set(OBJECTIVES) - free == {
        "cross_entropy", "label_smoothing", "kd", "mse", "dkd", "dist", "crd",
    }  # fmt: skip
    kd = OBJECTIVES["kd"](alpha=1, temperature=1)
    assert why_labels(kd) == "it compares classes"
