"""`kdlib.study.study`: a study is exactly what its file says, or a StudyError that says why not."""

import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ROOT

from kdlib.cartography.subset import Subset
from kdlib.study.study import (
    MODELS,
    SCORES,
    STRATEGIES,
    Cell,
    Objective,
    Study,
    StudyError,
    Training,
    cache_folder,
    data_path,
    load_study,
    parse_yaml,
)

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


def without(path: str) -> dict:
    content = copy.deepcopy(STUDY)
    *parents, last = path.split(".")
    section = content
    for key in parents:
        section = section[key]
    del section[last]
    return content


def validated(content: dict) -> Study:
    return Study.model_validate({"name": "case", **content})


@pytest.fixture
def write(home: Path):
    """A function that writes params/case.yaml, from a dictionary or as text."""
    (home / "params").mkdir()

    def to_file(content: dict | str) -> Path:
        path = home / "params/case.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return to_file


# --- what a file says ------------------------------------------------------------------------


def test_a_study_says_what_its_file_says_and_takes_its_name(write):
    study = load_study(write(STUDY))
    assert study.name == "case"
    assert study.students["wide"].model.options == {"width": 16}
    assert study.training.steps == 20
    assert study.axes.fraction == (0.33, 0.1)
    assert study.seeds == (0, 1)
    assert study == validated(STUDY)


def test_a_study_is_found_from_the_workspace_and_from_the_current_folder(
    write, home, tmp_path_factory, monkeypatch
):
    write(STUDY)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_study("params/case.yaml").name == "case"
    monkeypatch.chdir(home / "params")
    assert load_study("case.yaml").name == "case"


def test_a_missing_file_lists_the_studies_there_are(write, home):
    with pytest.raises(FileNotFoundError, match=r"no study file 'nope\.yaml'; params/ has none"):
        load_study("nope.yaml")
    write(STUDY)
    (home / "params/also.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"params/ has also\.yaml, case\.yaml"):
        load_study("params/nope.yaml")


def test_the_studies_of_this_repository_are_valid():
    found = sorted((ROOT / "params").glob("*.yaml"))
    assert found
    for path in found:
        assert load_study(path).cells()


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        validated(STUDY).training.steps = 1


SECTIONS = {  # where a key may stand: a section's path, a known key of it, and a typo of that key
    "": ("teacher", "techer"),
    "data": ("n_validation", "n_validaton"),
    "teacher": ("expected_accuracy", "expected_acuracy"),
    "teacher.model": ("options", "option"),
    "teacher.training": ("batch_size", "batchsize"),
    "teacher.training.augment": ("crop_padding", "crop_pading"),
    "teachers.small": ("learns_from", "learn_from"),
    "dynamics": ("window", "windw"),
    "recordings": ("folds", "foldes"),
    "recordings.models.tiny": ("options", "optoins"),
    "selections.mixed": ("balanced", "balancd"),
    "students.tiny": ("model", "modle"),
    "training": ("warmup_steps", "warmup_step"),
    "objectives.kd": ("temperature", "temprature"),
    "axes": ("strategy", "stratgy"),
    "probe": ("c_grid", "cgrid"),
    "compare": ("confidence_level", "confidence_levels"),
    "compute": ("channels_last", "chanels_last"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_typo_in_a_key_gives_its_section_and_the_nearest_key(write, section):
    known, typo = SECTIONS[section]
    content = changed(f"{section}.{typo}".lstrip("."), 1)
    where = section.replace(".", r"\.") or "study"
    with pytest.raises(StudyError, match=f"{where}: unknown key '{typo}'; did you mean '{known}'"):
        load_study(write(content))


def test_every_section_of_a_study_is_in_the_table_of_typos():
    def sections(content: dict, path: str = "") -> set[str]:
        named = {"students", "objectives", "teacher.model.options", "students.wide.model.options"}
        named |= {"selections", "selections.mixed.shares", "recordings.models", "teachers"}
        found = set() if path in named else {path}
        for key, value in content.items():
            if isinstance(value, dict):
                found |= sections(value, f"{path}.{key}".lstrip("."))
        return found

    siblings = {"students.wide", "students.tiny.model", "students.wide.model"}
    siblings |= {"objectives.plain", "objectives.smooth"}
    siblings |= {"teachers.small.model", "teachers.small.training"}
    assert sections(STUDY) - siblings == set(SECTIONS)


@pytest.mark.parametrize("key", [7, 2.5, True, None])
@pytest.mark.parametrize("section", ["", "data", "students", "teacher.model.options"])
def test_a_key_that_is_no_word_is_refused(write, section, key):
    content = copy.deepcopy(STUDY)
    inside = content
    for part in section.split(".") if section else []:
        inside = inside[part]
    inside[key] = 1
    with pytest.raises(StudyError, match="is not a valid study"):
        load_study(write(content))


NAMES = {  # a value that is a name: where, a typo, and the message
    "data.source": ("cifar11", r"data: unknown data source 'cifar11'; did you mean 'cifar10'"),
    "teacher.model.name": ("tiny_cn", r"model\.name: unknown model 'tiny_cn'; did you mean 'tiny_"),
    "axes.strategy": (["esy"], r"study: unknown strategy 'esy'; did you mean 'easy'"),
    "axes.student": (["tny"], r"study: unknown student on the axis 'tny'; did you mean 'tiny'"),
    "axes.objective": (["kdd"], r"study: unknown objective 'kdd'; did you mean 'kd'"),
    "probe.objective": (
        ["plan"],
        r"study: unknown objective to probe 'plan'; did you mean 'plain'",
    ),
    "probe.strategy": (["hard"], r"unknown strategy to probe 'hard'; known: easy, full, random"),
    "compare.baseline": ("randm", r"unknown baseline strategy 'randm'; did you mean 'random'"),
    "compare.objective": ("kdd", r"unknown objective to compare with 'kdd'; did you mean 'kd'"),
}


@pytest.mark.parametrize("path", NAMES)
def test_a_typo_in_a_name_gives_the_nearest_name(write, path):
    typo, message = NAMES[path]
    with pytest.raises(StudyError, match=message):
        load_study(write(changed(path, typo)))


IMPOSSIBLE = {
    "training.epochs": (2, "give the budget once"),
    "training.steps": (0, "training.steps: Input should be greater"),
    "training.schedule": ("one_cycle", "rises before it falls; give `warmup_steps`"),
    "training.milestones": ([0.5], "`milestones` belong to `schedule: step`"),
    "training.accumulate": (7, "is not a multiple of accumulate 7"),
    "training.ema": (1.0, r"ema: Input should be less than 1"),
    "training.early_stopping": (0, "early_stopping: Input should be greater"),
    "teacher.training.early_stopping": (3, "`early_stopping` is for students"),
    "teacher.trained_on": ("train", "give it with `weights` or `pretrained`, and only there"),
    "teacher.pretrained": (True, "give one of them"),
    "teacher.model.name": ("hub/a/b:c/d", "code of others, which would run here"),
    "students.tiny.model.name": ("hub/owner/repo/entry", "is no torch.hub network; expected hub/"),
    "objectives.plain.kind": ("tokens", r"tokens takes \['cls_weight', 'patch_weight'\], and may"),
    "compute.processes": (0, "processes: Input should be greater"),
    "compute.precision": ("fp16", "precision: Input should be 'float32' or 'bf16'"),
    "training.lr_peak": (0, "lr_peak: Input should be greater than 0"),
    "training.momentum": (1, "momentum: Input should be less than 1"),
    "training.optimiser": ("adam", "optimiser: Input should be 'sgd' or 'adamw'"),
    "training.checkpoint_fractions": ([0, 1.5], "checkpoint_fractions are"),
    "data.folder": ("images", "give it with `source: folder`, and only there"),
    "data.source": ("folder", "give it with `source: folder`, and only there"),
    "data.n_validation": (0, "n_validation: Input should be greater"),
    "data.split_seed": (-1, "split_seed: Input should be greater"),
    "teacher.weights": ("x.safetensors", "either trained .*, loaded .* or `pretrained`"),
    "teacher.training": (None, "either trained .*, loaded .* or `pretrained`"),
    "teacher.mean": ([0.5], "`mean` and `std` go together"),
    "teacher.expected_accuracy": (90, "expected_accuracy: Input should be less"),
    "dynamics.model": ({"name": "tiny_cnn"}, "`model` and `training` of dynamics go together"),
    "dynamics.window": (1, "window: Input should be greater"),
    "objectives.kd.alpha": (1.5, r"kd\.alpha: Input should be less"),
    "objectives.kd.temperature": (0, r"kd\.temperature: Input should be greater"),
    "objectives.plain.alpha": (0.5, r"cross_entropy takes no numbers; got \['alpha'\]"),
    "objectives.smooth.smoothing": (None, r"label_smoothing takes \['smoothing'\]; got none"),
    "axes.fraction": ([0.1, 0.0], r"fractions are .*; expected values in \(0, 1\]"),
    "axes.strategy": (["easy", "random", "easy"], "axis strategy names a value twice"),
    "probe.fraction": (0.5, "probe.fraction is 0.5; expected one of axes.fraction"),
    "axes.student": (["tiny", "tiny"], "axis student names a value twice"),
    "students": ({}, "students: Dictionary should have at least 1"),
    "compare.margin": (float("nan"), "margin: Input should be"),
    "compare.measure": ("lin", "measure: Input should be 'accuracy', 'linear' or 'knn'"),
    "probe.k": (0, "k: Input should be greater"),
    # YAML reads `yes` as true and `no` as false: neither is a number
    "training.batch_size": (True, "batch_size: Input should be a valid integer"),
    "teacher.seed": (False, "seed: Input should be a valid integer"),
    "seeds": ([0, 1.5], "seeds.1: Input should be a valid integer"),
    "objectives.a/b": ({"kind": "cross_entropy"}, "'a/b' names a folder"),
    "students.wide ": ({"model": {"name": "tiny_cnn"}}, "'wide ' names a folder"),
}


@pytest.mark.parametrize("path", IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_its_place(write, path):
    value, message = IMPOSSIBLE[path]
    with pytest.raises(StudyError, match=message):
        load_study(write(changed(path, value)))


def test_one_seed_or_a_negative_one_is_refused(write):
    for seeds in ([0], [0, -1]):
        with pytest.raises(StudyError, match="seeds"):
            load_study(write(changed("seeds", seeds)))


def test_seed_0_is_a_seed_not_an_absent_one(write):
    assert load_study(write(changed("seeds", [0, 3]))).seeds == (0, 3)


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


def test_a_loaded_teacher_needs_dynamics_of_their_own(write):
    teacher = LOADED
    with pytest.raises(StudyError, match="a loaded teacher has no recorded training"):
        load_study(write(changed("teacher", teacher)))
    assert load_study(write(loaded())).recorded_run.name == "dynamics"


def test_a_loaded_teacher_says_what_it_has_learnt_from(write):
    with pytest.raises(StudyError, match="`trained_on` says which images"):
        load_study(write(loaded(trained_on=None)))


@pytest.mark.parametrize("change", [{"early_stopping": 2}, {"schedule": "plateau"}])
def test_validation_images_the_teacher_has_learnt_from_steer_nothing(write, change):
    content = loaded()
    content["training"] = content["training"] | change
    with pytest.raises(StudyError, match=r"reads the validation images, which the teacher has le"):
        load_study(write(content))
    content["teacher"] = content["teacher"] | {"trained_on": "elsewhere"}
    assert load_study(write(content)).training.selects


def test_code_of_others_runs_where_the_study_says_so(write):
    name = "hub/facebookresearch/dinov2:main/dinov2_vits14"
    content = loaded(model={"name": name}, weights=None, pretrained=True, trust_code=True)
    assert load_study(write(content)).teacher.pretrained
    content["teacher"]["trust_code"] = False
    with pytest.raises(StudyError, match="read it, then write `trust_code: true`"):
        load_study(write(content))


@pytest.mark.parametrize("kind", ["hint", "attention", "similarity", "tokens"])
def test_grids_of_features_are_of_the_views_the_student_sees(write, kind):
    numbers = {"cls_weight": 1.0, "patch_weight": 0.5} if kind == "tokens" else {"weight": 1.0}
    content = changed("objectives.more", {"kind": kind, **numbers})
    load_study(write(content))  # nothing is augmented
    content["training"] = content["training"] | {"augment": {"flip": True}}
    with pytest.raises(StudyError, match=r"the flipped grid is not that of the flipped image"):
        load_study(write(content))
    content["teacher"] = content["teacher"] | {"outputs": {"views": 3}}
    load_study(write(content))


def test_two_views_of_an_image_need_an_augmentation(write):
    numbers = {"cls_weight": 1.0, "patch_weight": 0.5, "barlow_weight": 0.1}
    with pytest.raises(StudyError, match="compares two views of each image: give training"):
        load_study(write(changed("objectives.more", {"kind": "tokens", **numbers})))


# --- YAML ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["seeds: [0, 1]\nseeds: [2, 3]", "data: {source: digits, source: mnist}"]
)
def test_a_key_given_twice_is_refused(write, text):
    with pytest.raises(
        StudyError,
        match=r"key '\w+' is given twice.*\n.*line \d",
    ):
        load_study(write(text))


def test_the_name_of_a_study_cannot_be_written_into_it(write):
    with pytest.raises(StudyError, match=r"`name` is taken from the file name \(case\)"):
        load_study(write({"name": "other", **STUDY}))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{marker}]",
        "!!python/object/new:pathlib.PosixPath [{marker}]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!include {marker}",
    ],
)
def test_tags_are_refused_and_execute_nothing(write, tmp_path, tag):
    marker = tmp_path / "executed"
    path = write("data: " + tag.format(marker=marker))
    with pytest.raises(StudyError, match="could not determine a constructor for the tag"):
        load_study(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: !!timestamp 2025-02-30", "a: !!bool maybe", "a: !!timestamp x", "a: !!int x",
     "? [1]\n: 2", "a: &x {b: *y}", "a: " + "[" * 3000, "\0"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_text_that_is_not_yaml_is_a_study_error(write, text):
    with pytest.raises(StudyError, match=r"case\.yaml is not a readable YAML file"):
        load_study(write(text))


def test_bytes_that_are_no_text_are_a_study_error(write):
    path = write("")
    path.write_bytes(b"data: \xff")
    with pytest.raises(StudyError, match="not a readable YAML file"):
        load_study(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("1e-06", 1e-6), ("1.5e+300", 1.5e300), (".5", 0.5),
        ("5.", 5.0), ("-0.5", -0.5), ("+1", 1), ("-1", -1), ("0", 0), ("010", 10), ("-08", -8),
        ("0o10", 8), ("0x1F", 31), (".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf),
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False),
        ("FALSE", False), ("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None),
        *((text, text) for text in (
            "1:30", "1_000", "0b10", "-0x1F", "0o8", "1e", ".", "e3", "1.5.2", "+.nan", "yes", "no",
            "on", "off", "Yes", "NO", "y", "n", "tRue", "nULL", "2025-01-31", "=", "<<",
        )),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema_of_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}\n{text or 'none'}: b\n")
    assert list(found) == ["a", value if text else "none"]
    assert (type(found["a"]), found["a"]) == (type(value), value)
    if text:
        assert parse_yaml(f"['{text}']") == [text]


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number_is_a_float(text):
    assert math.isnan(parse_yaml(text))


def test_a_study_takes_numbers_as_they_are_written(write):
    text = yaml.safe_dump(STUDY).replace("lr_peak: 0.05", "lr_peak: 5e-2")
    assert "lr_peak: 5e-2" in text
    assert load_study(write(text)) == validated(STUDY)


@pytest.mark.parametrize("text", ["😀", "\ud83d", "ü", "\x7f"])
def test_text_written_as_json_is_read_as_it_was(text):
    written = json.dumps({text: [text, "a" + text]})
    if text == "\ud83d":  # half a character, which no file name has
        with pytest.raises(UnicodeDecodeError):
            parse_yaml(written)
    else:
        assert parse_yaml(written) == json.loads(written)


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", "word"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    with pytest.raises(StudyError, match="expected a mapping with data, teacher, students"):
        load_study(write(text))


def paths(content: dict, prefix: tuple = ()) -> list[tuple]:
    found = []
    for key, value in content.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


WORDS = st.sampled_from(["data", "full", "kd", "steps", "timm/resnet18", "x", ""]) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.binary(max_size=4)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_mutated_study_loads_or_is_a_study_error(write, data):
    content = copy.deepcopy(STUDY)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths(content)))
        section = content
        for key in parents:
            section = section[key]
        kind = data.draw(st.sampled_from(["delete", "rename", "replace", "add"]))
        if kind in ("delete", "rename"):
            value = section.pop(last)
        if kind == "rename":
            section[data.draw(WORDS | st.integers() | st.booleans())] = value
        elif kind != "delete":
            section[last if kind == "replace" else data.draw(WORDS)] = data.draw(VALUES)
        if not content:
            break
    path = write(content)
    try:
        study = load_study(path)
    except StudyError:
        return
    for cell in study.cells():
        assert study.cell(**dict(cell.items())) == cell
    assert set(study.probed_cells()) <= set(study.cells())
    study.step_settings("compare")


# --- what follows from it --------------------------------------------------------------------


def test_steps_are_the_same_for_every_subset():
    training = Training(steps=350, batch_size=64, lr_peak=0.1)
    assert [training.n_steps(n) for n in (10, 1000, 50_000)] == [350] * 3
    assert training.comparison == "equal_steps"


def test_epochs_become_steps_by_the_size_of_the_subset_rounded_up():
    training = Training(epochs=10, batch_size=64, lr_peak=0.1)
    # 10 * 1100 / 64 = 171.875 and 10 * 64 / 64 = 10 and 10 * 1 / 64 = 0.16
    assert [training.n_steps(n) for n in (1100, 64, 1)] == [172, 10, 1]
    assert training.comparison == "equal_epochs"
    half = Training(epochs=0.5, batch_size=10, lr_peak=0.1)
    assert [half.n_steps(n) for n in (100, 101)] == [5, 6]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 5000), st.integers(1, 200))
def test_epochs_in_hundredths_are_exact(hundredths, n, batch_size):
    training = Training(epochs=hundredths / 100, batch_size=batch_size, lr_peak=0.1)
    assert training.n_steps(n) == -(-hundredths * n // (100 * batch_size))  # integers alone


def test_cells_are_every_point_of_the_axes_with_the_full_set_once_per_student_and_objective():
    cells = validated(STUDY).cells()
    # 2 students * (1 full + 2 strategies * 2 fractions) * 2 objectives
    assert len(cells) == len(set(cells)) == 20
    assert cells[:2] == [Cell("tiny", "full", 1.0, "kd"), Cell("tiny", "full", 1.0, "plain")]
    assert [c for c in cells if c.strategy == "easy" and c.student == "wide"] == [
        Cell("wide", "easy", f, o) for f in (0.33, 0.1) for o in ("kd", "plain")
    ]
    assert {c.fraction for c in cells if c.strategy == "full"} == {1.0}


def test_probed_cells_are_the_named_ones_at_the_named_fraction():
    # 2 students * (full at 1.0, easy at 0.1) * 1 objective
    assert validated(STUDY).probed_cells() == [
        Cell(student, strategy, fraction, "kd")
        for student in ("tiny", "wide")
        for strategy, fraction in (("full", 1.0), ("easy", 0.1))
    ]


def test_every_cell_has_a_folder_of_its_own():
    cells = validated(STUDY).cells()
    assert len({cell.path for cell in cells}) == len(cells)
    assert cells[2].path.as_posix() == "student=tiny/strategy=random/fraction=0.33/objective=kd"


def test_a_cell_takes_the_first_value_of_an_axis_that_is_not_given():
    study = validated(STUDY)
    assert study.cell() == Cell("tiny", "random", 0.33, "kd")
    assert study.cell(student="wide", fraction=0.1) == Cell("wide", "random", 0.1, "kd")
    assert study.cell(strategy=None).strategy == "random"
    assert study.cell(strategy="full", fraction=0.1).fraction == 1.0
    assert study.cell(objective="smooth", strategy="aum_top", fraction=0.5) == Cell(
        "tiny", "aum_top", 0.5, "smooth"
    )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"strategi": "easy"}, "unknown axis 'strategi'; did you mean 'strategy'"),
        ({"student": "tinny"}, "unknown student 'tinny'; did you mean 'tiny'"),
        ({"strategy": "eazy"}, "unknown strategy 'eazy'; did you mean 'easy'"),
        ({"objective": "kdd"}, "unknown objective 'kdd'; did you mean 'kd'"),
        ({"fraction": 0.0}, r"fraction is 0\.0; expected a number in \(0, 1\]"),
        ({"fraction": 1.1}, "fraction is 1.1; expected"),
        ({"fraction": math.nan}, "fraction is nan; expected"),
        ({"fraction": "a third"}, "fraction is 'a third'; expected"),
        ({"fraction": [0.1]}, r"fraction is \[0.1\]; expected"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(axes, message):
    with pytest.raises(StudyError, match=message):
        validated(STUDY).cell(**axes)


def test_the_names_of_strategies_and_models_are_distinct():
    # 8 of old, random_balanced, six rules of their own that need no numbers, two ends of each score
    assert len(set(STRATEGIES)) == len(STRATEGIES) == 8 + 1 + 6 + 2 * len(SCORES)
    assert len(set(MODELS)) == len(MODELS)


def test_studies_of_the_same_images_share_a_cache_and_others_do_not(home):
    study = validated(STUDY)
    assert study.cache.parent == home / "cache"
    for path, value in [("data.n_validation", 50), ("data.split_seed", 1), ("training.steps", 9)]:
        assert validated(changed(path, value)).cache == study.cache
    others = [("data.source", "mnist"), ("data.image_size", 16), ("data.shard_size", 64)]
    caches = {validated(changed(path, value)).cache for path, value in others}
    assert len(caches | {study.cache}) == 4


def test_runs_and_figures_of_a_study_carry_its_name(home):
    study = validated(STUDY)
    assert (study.runs, study.figures) == (home / "runs/case", home / "figures/case")
    assert study.recorded_run == home / "runs/case/teacher"


def test_a_weight_file_is_looked_up_in_the_data_folder(home, monkeypatch):
    assert data_path("a/b.safetensors") == home / "data/a/b.safetensors"
    assert data_path("/x/b.safetensors") == Path("/x/b.safetensors")


READERS = {  # a value, and the steps that read it themselves (distill of which cells, see below)
    "data.n_validation": {"cache"},
    "data.split_seed": {"cache"},
    "data.shard_size": {"cache"},
    "data.image_size": {"cache"},
    "teacher.model.options.width": {"teacher"},
    "teacher.seed": {"teacher"},
    "teacher.training.epochs": {"teacher", "record"},
    "teacher.training.augment.flip": {"teacher", "record"},
    "teacher.expected_accuracy": {"teacher"},
    "teachers.small.seed": set(),  # its own step reads it, and students of a teacher of a subset
    "shares": None,
    "dynamics.observed": {"teacher", "record"},
    "dynamics.logits": {"teacher", "record"},
    "dynamics.seed": {"teacher"},
    "dynamics.el2n_epoch": {"datamap", "scores", "noise"},
    "dynamics.window": {"datamap", "scores", "noise"},
    "dynamics.gradient_epoch": {"teacher", "record"},
    "dynamics.clusters": {"datamap", "scores", "noise"},
    "recordings.seeds": {"record", "scores", "noise"},
    "audit": set(),
    "selections.mixed.shares": set(),
    "students.tiny.model.name": {"distill tiny kd", "distill tiny plain"},
    "students.wide.model.options.width": {"distill wide kd", "distill wide plain"},
    "objectives.kd.alpha": {"distill tiny kd", "distill wide kd"},
    "objectives.smooth.smoothing": set(),
    "training.steps": {"distill"},
    "training.weight_decay": {"distill"},
    "probe.k": {"probe"},
    "probe.c_grid": {"probe"},
    "probe.seed": {"probe"},
    "probe.few_shot": {"probe"},
    "probe.few_shot_draws": {"probe"},
    "probe.layers": {"probe"},
    "probe.others": {"probe"},
    "probe.strategy": set(),
    "compare.margin": set(),
    "compare.objective": set(),
    "axes.fraction": set(),
    "seeds": set(),
    "compute.threads": {"teacher", "record", "audit", "distill", "probe"},
    "compute.channels_last": {"teacher", "record", "audit", "distill", "probe"},
    "compute.precision": {"teacher", "record", "audit", "distill", "probe"},
    "tracking.wandb": None,  # changes no result, and so no settings
}
NEW = {
    "shares": "other.yaml",
    "dynamics.observed": "eval",
    "dynamics.logits": False,
    "teacher.training.augment.flip": True,
    "students.tiny.model.name": "cifar_resnet8",
    "probe.c_grid": [1.0],
    "probe.few_shot": [1, 5],
    "probe.layers": ["features", "stage1"],
    "probe.others": {"more": {"source": "digits", "n_validation": 9}},
    "probe.strategy": ["full"],
    "compare.objective": "plain",
    "axes.fraction": [0.33, 0.1, 0.5],
    "audit": True,
    "seeds": [0, 1, 2],
    "recordings.seeds": [0, 1, 2],
    "dynamics.gradient_epoch": 2,
    "selections.mixed.shares": {"easy": 0.25, "hard": 0.75},
    "compute.channels_last": False,
    "compute.precision": "bf16",
    "tracking.wandb": True,
}
# reach `compare` through the datamap, or not at all
UNSEEN = {
    "dynamics.el2n_epoch",
    "dynamics.window",
    "dynamics.clusters",
    "recordings.seeds",
    "audit",
}
READ_BY_ALL = (
    "cache", "teacher", "datamap", "record", "scores", "noise", "audit", "probe", "compare",
)  # fmt: skip


def settings_by_step(content: dict) -> dict[str, dict]:
    study = validated(content)
    steps = {s: study.step_settings(s) for s in READ_BY_ALL}
    for student in ("tiny", "wide"):
        for objective in ("kd", "plain"):
            cell = Cell(student, "easy", 0.1, objective)
            steps[f"distill {student} {objective}"] = study.step_settings("distill", cell)
    return steps


@pytest.mark.parametrize("path", READERS)
def test_one_value_changes_the_settings_of_exactly_the_steps_that_read_it(path):
    value = NEW.get(path, 0.02 if path == "compare.margin" else None)
    if value is None:
        value = 0.5 if "alpha" in path or "smooth" in path or "accuracy" in path else 17
        value = 0.5 if path == "training.weight_decay" else value
    before, after = settings_by_step(STUDY), settings_by_step(changed(path, value))
    if READERS[path] is None:
        assert before == after
        return
    differing = {step for step in before if before[step] != after[step]}
    expected = {s for s in before if s in READERS[path] or s.split()[0] in READERS[path]}
    assert differing == expected | (set() if path in UNSEEN else {"compare"})


def test_a_probe_is_compared_only_where_every_cell_has_one():
    content = changed("compare.measure", "linear")
    with pytest.raises(ValueError, match="is linear, but not every cell is probed"):
        validated(content)
    for path, value in (
        ("axes.fraction", [0.1]),
        ("probe.objective", ["kd", "plain"]),
        ("probe.strategy", ["full", "easy", "random"]),
    ):
        with pytest.raises(ValueError, match=rf"probe lacks \{{.*'{path.split('.')[1]}': "):
            validated(content)
        content = changed(path, value, content)
    study = validated(content)
    assert study.probed_cells() == study.cells()
    with pytest.raises(ValueError, match="picked_mine has a fraction of its own"):
        validated(
            changed(
                "probe.strategy",
                ["full", "easy", "random", "picked_mine"],
                changed("axes.strategy", ["random", "easy", "full", "picked_mine"], content),
            )
        )


def test_a_feature_objective_asks_the_teacher_for_more():
    before = settings_by_step(STUDY)
    more = settings_by_step(changed("objectives.more", {"kind": "hint", "weight": 1.0, "stage": 2}))
    assert more["teacher"]["features_for"] == ["hint 2"]
    assert {s for s in before if before[s] != more[s]} == {"teacher", "compare"}
    for kind in ({"kind": "mse", "alpha": 0.5}, {"kind": "cross_entropy"}):
        more = settings_by_step(changed("objectives.more", kind))
        assert more["teacher"] == before["teacher"]


def test_every_part_of_a_study_is_in_the_table_of_readers():
    assert {path.split(".")[0] for path in READERS} == set(Study.model_fields) - {"name"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", ["stage1"], "expected features, and stage1"),
        ("layers", ["features", "stage0"], "expected features, and stage1"),
        ("layers", ["features", "features"], "each once"),
        ("layers", ["features", "logits"], "expected features, and stage1"),
        ("few_shot", [0], "expected different integers >= 1"),
        ("few_shot", [5, 5], "expected different integers >= 1"),
        ("few_shot_draws", 0, "greater than or equal to 1"),
        ("others", {"own": {"source": "digits", "n_validation": 9}}, "not `own`"),
        ("others", {"a/b": {"source": "digits", "n_validation": 9}}, "names rows and a folder"),
        ("others", {"more": {"source": "digts", "n_validation": 9}}, "did you mean 'digits'"),
    ],
)
def test_probes_that_cannot_be_meant_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        validated(changed(f"probe.{key}", value))


def test_the_default_grid_of_c_is_that_of_public_linear_probes():
    grid = validated(STUDY).probe.c_grid
    assert len(grid) == 45
    assert (grid[0], grid[-1]) == pytest.approx((1e-6, 1e5))


def test_other_data_to_probe_on_share_the_cache_of_a_study_of_them():
    content = changed("probe.others", {"more": STUDY["data"] | {"split_seed": 3}})
    study = validated(content)
    assert cache_folder(study.probe.others["more"]) == study.cache


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


def test_students_read_the_settings_of_a_teacher_of_their_subset_alone():
    cell = {"objective": "heard"}
    before, after = (validated(taught(seed=seed)) for seed in (0, 1))
    settings = [s.step_settings("distill", s.cell(**cell)) for s in (before, after)]
    assert settings[0]["teacher"]["seed"] == 0
    assert settings[1]["teacher"]["seed"] == 1
    assert "teacher" not in before.step_settings("distill", before.cell(objective="kd"))
    whole = validated(taught(learns_from="train"))
    assert "teacher" not in whole.step_settings("distill", whole.cell(**cell))
    assert whole.step_settings("teacher", teacher="own")["teacher"]["seed"] == 0


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "objectives.heard.teacher",
            "owl",
            "unknown teacher of objective heard 'owl'; did you mean 'own'",
        ),
        ("objectives.heard", {"kind": "cross_entropy", "teacher": "own"}, "hears no teacher"),
        ("teachers.own.outputs", {"views": 2}, "students of one study see the same views"),
        (
            "teachers.own",
            OWN | {"training": None, "weights": "a.pt", "trained_on": "kept"},
            "a teacher of the subset alone is trained here",
        ),
        ("teacher.learns_from", "subset", "stands under `teachers`"),
    ],
)
def test_a_further_teacher_that_cannot_be_meant_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        validated(changed(path, value, taught()))


def written_studies(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [folder / f"{name}.yaml" for name in files]


def test_a_study_shares_what_comes_before_the_students(home):
    other = {"base": "one.yaml", "shares": "one.yaml", "training": {"steps": 7}}
    one, two = written_studies(home, one=STUDY, two=other)
    above, study = load_study(one), load_study(two)
    assert study.upstream == above
    assert study.recorded_run == above.recorded_run
    assert study.runs != above.runs
    assert above.upstream is above
    assert "shares" not in study.step_settings("compare")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"split_seed": 3}}, r"(?s)cannot share.*data.split_seed: 0 -> 3"),
        ({"dynamics": {"window": 4}}, r"(?s)cannot share.*scoring.window"),
        (
            {"objectives": {"more": {"kind": "hint", "weight": 1.0, "stage": 2}}},
            "no teacher outputs for hint 2",
        ),
        ({"shares": "three.yaml"}, "expected another study file beside it"),
        ({"shares": "two.yaml"}, "expected another study file beside it"),
    ],
)
def test_a_study_that_asks_for_something_else_cannot_share(home, change, message):
    two = {"base": "one.yaml", "shares": "one.yaml"} | change
    _, path = written_studies(home, one=STUDY, two=two)
    with pytest.raises(StudyError, match=message):
        load_study(path)


def test_what_is_shared_is_not_shared_on(home):
    two = {"base": "one.yaml", "shares": "one.yaml"}
    three = {"base": "one.yaml", "shares": "two.yaml"}
    *_, path = written_studies(home, one=STUDY, two=two, three=three)
    with pytest.raises(StudyError, match=r"it shares those of one.yaml itself: name that one"):
        load_study(path)


def test_the_cell_itself_is_part_of_what_distill_reads():
    study = validated(STUDY)
    cells = [*study.cells(), study.cell(fraction=0.5)]
    assert len({str(study.step_settings("distill", cell)) for cell in cells}) == len(cells)


def test_the_name_of_a_study_is_no_setting():
    other = Study.model_validate({"name": "other", **STUDY})
    assert validated(STUDY).step_settings("compare") == other.step_settings("compare")


def test_an_objective_takes_the_numbers_of_its_kind_and_no_others():
    assert Objective(kind="kd", alpha=0, temperature=1).alpha == 0
    with pytest.raises(ValueError, match=r"kd takes \['alpha', 'temperature'\].*; got \['alpha'\]"):
        Objective(kind="kd", alpha=0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "esy"}, "unknown selection 'esy'; did you mean 'easy'"),
        ({"kind": "easy", "cutoff": 0.1}, r"easy takes no numbers; got \['cutoff'\]"),
        ({"kind": "ccs", "shares": {"easy": 1.0}}, r"ccs takes .*; got \['shares'\]"),
        ({"kind": "ccs", "score": "trend"}, "unknown score of difficulty 'trend'"),
        ({"kind": "mixture"}, "a mixture needs `shares`"),
        ({"kind": "mixture", "shares": {"easy": 0.5, "hard": 0.4}}, "sum to 1"),
        ({"kind": "mixture", "shares": {"easy": 1.5, "hard": -0.5}}, "sum to 1"),
        ({"kind": "mixture", "shares": {"ccs": 1.0}}, "unknown ranking 'ccs'"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        validated(changed("selections.mixed", value))


def test_a_selection_may_not_take_the_name_of_a_strategy():
    for name in ("easy", "picked_mine"):
        with pytest.raises(ValueError, match="has the name of a built-in strategy"):
            validated(changed(f"selections.{name}", {"kind": "random"}))


def test_a_selection_s_numbers_are_part_of_what_its_students_read():
    study = validated(changed("axes.strategy", ["random", "easy", "mixed"]))
    rule = study.step_settings("distill", study.cell(strategy="mixed"))["subset"]["rule"]
    assert rule["shares"] == {"easy": 0.5, "hard": 0.5}
    assert "rule" not in study.step_settings("distill", study.cell(strategy="random"))["subset"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"noise": 0.1, "file": "a.npz", "key": "b"}, "drawn .* or read"),
        ({}, "drawn .* or read"),
        ({"file": "a.npz"}, "drawn .* or read"),
        ({"noise": 0.0}, "greater than 0"),
    ],
)
def test_other_labels_have_one_origin(value, message):
    with pytest.raises(ValueError, match=message):
        validated(changed("data.relabel", value))


def test_other_labels_have_a_cache_of_their_own(home):
    caches = [changed("data.relabel", {"noise": n}) for n in (0.1, 0.2)]
    assert len({validated(c).cache for c in (STUDY, *caches)}) == 3


def test_recordings_are_every_model_and_seed_and_what_else_is_asked_of_the_first():
    more = {"models": {"a": {"name": "tiny_cnn"}, "b": {"name": "tiny_cnn"}}, "seeds": [3, 0]}
    more |= {"folds": 2, "threshold_samples": True}
    found = validated(changed("recordings", more)).recordings.runs()
    assert found == [
        ("a", "seed=3"), ("a", "seed=0"), ("b", "seed=3"), ("b", "seed=0"), ("a", "fold=1"),
        ("a", "fold=2"), ("a", "threshold=1"), ("a", "threshold=2"),
    ]  # fmt: skip
    for bad in ({"seeds": [0, 0]}, {"seeds": [-1, 0]}, {"models": {"a/b": {"name": "tiny_cnn"}}}):
        with pytest.raises(ValueError, match=r"seeds are|names a folder"):
            validated(changed("recordings", more | bad))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {k: 1}\nb: {<<: [*a, *a]}", "unknown key"),
        ("\n".join(f"key{i}: {i}" for i in range(10_000)), "unknown key"),
        ("# " + "x" * 2**21, "2,097,154 bytes; a study has at most 262,144"),
        ("? [a, b]\n: 1\n", "a key is a list"),
        ("data: &d {source: *d}", "case.yaml is not a"),
        (f"base: {'x' * 5000}", "no file"),
        ('base: "x\\0y"', "no file"),
        ("base: /dev/zero", "no file"),
        (f"{'x' * 1000}: 1", "unknown key"),
    ],
    ids=["merged", "keys", "large", "list", "itself", "long", "NUL", "device", "name"],
)
def test_a_hostile_study_is_one_short_error_at_once(write, text, message):
    started = time.process_time()
    with pytest.raises(StudyError, match=message) as caught:
        load_study(write(text))
    assert time.process_time() - started < 10  # counting each of the keys took minutes
    assert len(str(caught.value)) < 2500


def test_a_long_list_of_faults_is_cut(write):
    content = changed("seeds", ["no integer"] * 500)
    with pytest.raises(StudyError, match=r"(?s)seeds\.0: .*and \d+ more") as caught:
        load_study(write(content))
    assert str(caught.value).count("\n") == 21


def test_two_mappings_that_contain_themselves_are_not_laid_over_each_other(home):
    (home / "params").mkdir()
    for name, base in (("below", ""), ("more", "base: below.yaml\n")):
        (home / f"params/{name}.yaml").write_text(f"{base}data: &d {{source: *d}}\n")
    with pytest.raises(StudyError, match="nested without end"):
        load_study("params/more.yaml")


def test_a_file_is_laid_over_its_base(home, write):
    write(STUDY)
    more = {"base": "case.yaml", "training": {"steps": None, "epochs": 2.0}, "seeds": [5, 6, 7]}
    (home / "params/more.yaml").write_text(yaml.safe_dump(more))
    found = load_study("params/more.yaml")
    assert (found.name, found.seeds, found.training.epochs) == ("more", (5, 6, 7), 2.0)
    assert found.training.steps is None
    assert found.teacher == load_study("params/case.yaml").teacher


@pytest.mark.parametrize(("base", "message"), [("more.yaml", "itself"), ("none.yaml", "no file")])
def test_a_base_that_is_no_other_study_is_refused(home, base, message):
    (home / "params").mkdir()
    (home / "params/more.yaml").write_text(f"base: {base}\n")
    with pytest.raises(StudyError, match=message):
        load_study("params/more.yaml")


def saved_selection(study: Study, name: str, n: int, fraction: float) -> None:
    ids = np.arange(n)
    subset = Subset(ids, f"picked_{name}", fraction, 0, None, "images")
    subset.save(study.runs / "selections" / f"{name}.parquet")


def test_a_picked_selection_has_the_fraction_it_was_saved_with(home):
    study = validated(
        changed("axes.strategy", ["random", "picked_mine"], changed("probe.strategy", ["full"]))
    )
    with pytest.raises(FileNotFoundError, match="save a selection of that name"):
        study.cell(strategy="picked_mine")
    saved_selection(study, "mine", 30, 0.03)
    assert study.cell(strategy="picked_mine", fraction=0.5).fraction == 0.03
    # beside it a random subset of the same size, to compare it with
    here = {(c.strategy, c.fraction) for c in study.cells()}
    assert here == {("full", 1.0), ("random", 0.33), ("random", 0.1), ("picked_mine", 0.03),
                    ("random", 0.03)}  # fmt: skip
    with pytest.raises(StudyError, match=r"unknown strategy 'picked_\.\./x'"):
        study.cell(strategy="picked_../x")


@pytest.mark.parametrize(("fraction", "text"), [(1.0, "1"), (0.33, "0.33"), (52 / 1100, None)])
def test_a_cell_s_folder_says_its_fraction_exactly(fraction, text):
    *_, found, _ = Cell("tiny", "random", fraction, "kd").path.parts
    assert found == f"fraction={text or repr(fraction)}"
    assert float(found.removeprefix("fraction=")) == fraction


# --- what a notebook asks for ----------------------------------------------------------------


def test_a_seed_given_twice_is_refused(write):
    with pytest.raises(StudyError, match=r"seeds are .*expected distinct integers"):
        load_study(write(changed("seeds", [1, 1])))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("teacher.mean", [0.5], "`mean` and `std` go together"),
        ("dynamics.window", 2, "needs a `window` of at least 3"),
        ("probe.c_grid", [], "expected numbers > 0"),
        ("probe.c_grid", [-1.0], "expected numbers > 0"),
        ("probe.strategy", [], "at least 1 item"),
        ("selections.fixed_shards", {"kind": "easy"}, "the name of a built-in strategy"),
        ("students.wide.model", {"name": "hub/a/b:main/c"}, "a student begins from none"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(write, path, value, told):
    with pytest.raises(StudyError, match=told):
        load_study(write(changed(path, value)))


def test_a_teacher_trained_here_has_no_normalisation_of_its_own(write):
    content = changed("teacher.mean", [0.5], changed("teacher.std", [0.5]))
    with pytest.raises(StudyError, match="sees pixels normalised as its students'"):
        load_study(write(content))
    content = loaded(mean=[0.5, 0.5], std=[0.5, 0.0])
    with pytest.raises(StudyError, match="expected a number per channel, std > 0"):
        load_study(write(content))


def test_a_batch_is_split_evenly_among_processes_and_pieces(write):
    content = changed("compute.processes", 2, changed("training.accumulate", 8))
    assert load_study(write(content)).compute.processes == 2
    content["training"]["batch_size"] = 72  # 9 pieces of 8, not 4.5 of 16
    with pytest.raises(StudyError, match="expected a multiple of 16"):
        load_study(write(content))


def test_objectives_off_the_axis_and_picked_selections_cannot_be_probed(write):
    content = changed("objectives.smooth", {"kind": "label_smoothing", "smoothing": 0.1})
    content["probe"]["objective"] = ["smooth"]
    with pytest.raises(StudyError, match="objective to probe"):
        load_study(write(content))
    content = changed("axes.strategy", [*STUDY["axes"]["strategy"], "picked_mine"])
    content["probe"]["strategy"] = ["picked_mine"]
    with pytest.raises(StudyError, match="picked_mine has a fraction of its own"):
        load_study(write(content))


def test_studies_that_share_each_other_are_refused_with_the_reason(write):
    path = write(changed("shares", "other.yaml"))
    (path.parent / "other.yaml").write_text(yaml.safe_dump(changed("shares", "case.yaml")))
    with pytest.raises(StudyError, match=r"shares those of case\.yaml itself"):
        load_study(path)
    with pytest.raises(StudyError, match="`shares` names"):
        load_study(write(changed("shares", "x" * 400)))


def test_replayed_views_and_recorded_gradients_belong_to_the_steps_that_make_them(write):
    def asked(step, content):
        return load_study(write(content)).step_settings(step)

    views = changed("teacher.outputs", {"views": 2})
    flipped = changed("training.augment", {"flip": True}, views)
    assert asked("teacher", views) != asked("teacher", flipped)
    flipped = changed("training.augment", {"flip": True})
    assert asked("teacher", STUDY) == asked("teacher", flipped)
    assert asked("record", STUDY) != asked("record", changed("dynamics.gradient_epoch", 2))
