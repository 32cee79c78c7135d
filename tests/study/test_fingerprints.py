"""`kdlib.study.fingerprints`: which steps read which settings, and what studies share."""

import pytest
import yaml
from a_study import STUDY, changed, taught, validated, written_studies

from kdlib.study.base import StudyError
from kdlib.study.cells import Cell
from kdlib.study.load import load_study
from kdlib.study.study import Study

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
        ({"dynamics": {"window": 4}}, r"(?s)cannot share.*dynamics.window"),
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


def test_studies_that_share_each_other_are_refused_with_the_reason(write):
    path = write(changed("shares", "other.yaml"))
    (path.parent / "other.yaml").write_text(yaml.safe_dump(changed("shares", "case.yaml")))
    with pytest.raises(StudyError, match=r"shares those of case\.yaml itself"):
        load_study(path)
    with pytest.raises(StudyError, match="`shares` names"):
        load_study(write(changed("shares", "x" * 400)))


def test_the_cell_itself_is_part_of_what_distill_reads():
    study = validated(STUDY)
    cells = [*study.cells(), study.cell(fraction=0.5)]
    assert len({str(study.step_settings("distill", cell)) for cell in cells}) == len(cells)


def test_the_name_of_a_study_is_no_setting():
    other = Study.model_validate({"name": "other", **STUDY})
    assert validated(STUDY).step_settings("compare") == other.step_settings("compare")


def test_a_selection_s_numbers_are_part_of_what_its_students_read():
    study = validated(changed("axes.strategy", ["random", "easy", "mixed"]))
    rule = study.step_settings("distill", study.cell(strategy="mixed"))["subset"]["rule"]
    assert rule["shares"] == {"easy": 0.5, "hard": 0.5}
    assert "rule" not in study.step_settings("distill", study.cell(strategy="random"))["subset"]


def test_replayed_views_and_recorded_gradients_belong_to_the_steps_that_make_them(write):
    def asked(step, content):
        return load_study(write(content)).step_settings(step)

    views = changed("teacher.outputs", {"views": 2})
    flipped = changed("training.augment", {"flip": True}, views)
    assert asked("teacher", views) != asked("teacher", flipped)
    flipped = changed("training.augment", {"flip": True})
    assert asked("teacher", STUDY) == asked("teacher", flipped)
    assert asked("record", STUDY) != asked("record", changed("dynamics.gradient_epoch", 2))
