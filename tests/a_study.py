"""A study as a dictionary, changed at will, for the tests of `kdlib.study`."""

import copy

import yaml

from kdlib.study.load import study_from
from kdlib.study.study import Study

STUDY = {
    "data": {"source": "digits", "n_validation": 97, "split_seed": 0, "shard_size": 512},
    "teacher": {
        "model": {"name": "tiny_cnn", "options": {"width": 32}},
        "seed": 0,
        "training": {
            "epochs": 3.0,
            "batch_size": 64,
            "lr_peak": 0.05,
            "augment": {"crop_padding": 1, "flip": False},
        },
        "expected_accuracy": 0.9,
        "tolerance": 0.01,
    },
    "teachers": {
        "small": {
            "model": {"name": "tiny_cnn"},
            "training": {"steps": 9, "batch_size": 8, "lr_peak": 0.1},
            "expected_accuracy": 0.1,
        }
    },
    "dynamics": {"observed": "train", "logits": True, "el2n_epoch": 2, "window": 3},
    "recordings": {"models": {"tiny": {"name": "tiny_cnn"}}, "seeds": [0, 1]},
    "selections": {"mixed": {"kind": "mixture", "shares": {"easy": 0.5, "hard": 0.5}}},
    "students": {
        "tiny": {"model": {"name": "tiny_cnn"}},
        "wide": {"model": {"name": "tiny_cnn", "options": {"width": 16}}},
    },
    "training": {"steps": 20, "batch_size": 64, "lr_peak": 0.05, "checkpoint_fractions": [0, 1]},
    "objectives": {
        "kd": {"kind": "kd", "alpha": 0.7, "temperature": 4.0},
        "plain": {"kind": "cross_entropy"},
        "smooth": {"kind": "label_smoothing", "smoothing": 0.1},
    },
    "axes": {
        "student": ["tiny", "wide"],
        "strategy": ["random", "easy", "full"],
        "fraction": [0.33, 0.1],
        "objective": ["kd", "plain"],
    },
    "seeds": [0, 1],
    "probe": {"strategy": ["full", "easy"], "fraction": 0.1, "objective": ["kd"], "k": 5},
    "compare": {"baseline": "random", "margin": 0.01},
    "compute": {"device": "cpu", "threads": 1},
}


def changed(path: str, value: object, content: dict = STUDY) -> dict:
    """A copy of a study with one value, at a dotted path, replaced or added."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    section = content
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    return content


def validated(content: dict) -> Study:
    return study_from({"name": "case", **content})


LOADED = {
    "model": {"name": "tiny_cnn"},
    "weights": "t.safetensors",
    "trained_on": "train",
    "expected_accuracy": 0.9,
}


def loaded(**changes) -> dict:
    """The study with a loaded teacher, and dynamics of their own."""
    own = {"model": {"name": "tiny_cnn"}, "training": STUDY["training"]}
    return changed("dynamics", own, changed("teacher", LOADED | changes))


OWN = {
    "model": {"name": "tiny_cnn"},
    "training": {"steps": 9, "batch_size": 8, "lr_peak": 0.1},
    "expected_accuracy": 0.1,
    "learns_from": "subset",
}


def taught(**own):
    content = changed("teachers.own", OWN | own)
    content["objectives"]["heard"] = {"kind": "kd", "alpha": 1, "temperature": 1, "teacher": "own"}
    return content


def written_studies(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [folder / f"{name}.yaml" for name in files]
