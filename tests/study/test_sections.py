"""The sections of a study, each by itself and beside the others."""

from pathlib import Path

import pytest
from a_study import LOADED, OWN, STUDY, changed, loaded, taught, validated
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.study.base import StudyError
from kdlib.study.data import cache_folder, data_path
from kdlib.study.load import load_study
from kdlib.study.models import MODELS
from kdlib.study.objectives import KD
from kdlib.study.selections import SCORES, STRATEGIES
from kdlib.study.training import Training


def test_a_loaded_teacher_needs_dynamics_of_their_own(write):
    with pytest.raises(StudyError, match="a loaded teacher has no recorded training"):
        load_study(write(changed("teacher", LOADED)))
    assert load_study(write(loaded())).recorded_run.name == "dynamics"


def test_a_loaded_teacher_says_what_it_has_learnt_from(write):
    with pytest.raises(StudyError, match=r"teacher\.trained_on: Field required"):
        load_study(write(loaded(trained_on=None)))


def test_what_a_training_begins_from_stands_beside_it(write):
    published = {"model": {"name": "timm/resnet10t.c3_in1k"}, "pretrained": True}
    content = changed("teacher", STUDY["teacher"] | published)
    content = changed("students.wide", published | {"freeze": "backbone"}, content)
    content = changed("students.tiny.weights", "w.safetensors", content)
    study = load_study(write(content))
    assert study.teacher.trained_on == "kept"
    assert study.recorded_training == study.teacher.training
    assert study.teacher.model.options == study.students["wide"].model.options
    assert study.teacher.model.options == {"stem": "original"}  # that of the published weights
    assert study.students["tiny"].model.options == {}
    content["students"]["wide"]["model"]["options"] = {"stem": "small"}
    assert load_study(write(content)).students["wide"].model.options == {"stem": "small"}


def test_features_that_do_not_change_are_compared_with_no_teacher(write):
    student = {"model": {"name": "tiny_cnn"}, "weights": "w.pt", "freeze": "backbone"}
    content = changed("objectives.kd", {"kind": "rkd", "distance_weight": 1.0, "angle_weight": 2.0})
    load_study(write(content))
    with pytest.raises(StudyError, match="objective kd compares features, and those of student wi"):
        load_study(write(changed("students.wide", student, content)))


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
    if kind == "tokens":  # whose grids have no weight
        load_study(write(changed("objectives.more.patch_weight", 0.0, content)))
    content["teacher"] = content["teacher"] | {"outputs": {"views": 3}}
    load_study(write(content))


def test_two_views_of_an_image_need_an_augmentation(write):
    numbers = {"cls_weight": 1.0, "patch_weight": 0.5, "barlow_weight": 0.1}
    with pytest.raises(StudyError, match="compares two views of each image: give training"):
        load_study(write(changed("objectives.more", {"kind": "tokens", **numbers})))


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


def test_the_default_grid_of_c_is_that_of_public_linear_probes():
    grid = validated(STUDY).probe.c_grid
    assert len(grid) == 45
    assert (grid[0], grid[-1]) == pytest.approx((1e-6, 1e5))


def test_other_data_to_probe_on_share_the_cache_of_a_study_of_them():
    content = changed("probe.others", {"more": STUDY["data"] | {"split_seed": 3}})
    study = validated(content)
    assert cache_folder(study.probe.others["more"]) == study.cache


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "objectives.heard.teacher",
            "owl",
            "unknown teacher of objective heard 'owl'; did you mean 'own'",
        ),
        (
            "objectives.heard",
            {"kind": "cross_entropy", "teacher": "own"},
            "heard uses no teacher: remove",
        ),
        ("teachers.own.outputs", {"views": 2}, "students of one study see the same views"),
        (
            "teachers.own",
            OWN | {"training": None, "weights": "a.pt", "trained_on": "kept"},
            "unknown key 'learns_from'",
        ),
        ("teacher.learns_from", "subset", "stands under `teachers`"),
    ],
)
def test_a_further_teacher_that_cannot_be_meant_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        validated(changed(path, value, taught()))


def test_an_objective_takes_the_numbers_of_its_kind_and_no_others():
    assert KD(alpha=0, temperature=1).alpha == 0
    with pytest.raises(ValueError, match=r"(?s)temperature.*Field required"):
        KD(alpha=0.5)


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
        with pytest.raises(ValueError, match=r"twice|greater than or equal to 0|not allowed here"):
            validated(changed("recordings", more | bad))


def test_a_normalisation_is_one_mean_and_one_deviation_of_each_channel(write):
    with pytest.raises(StudyError, match="`mean` and `std` go together"):
        load_study(write(loaded(mean=[0.5])))
    with pytest.raises(StudyError, match="expected a number per channel, std > 0"):
        load_study(write(loaded(mean=[0.5, 0.5], std=[0.5, 0.0])))


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
    with pytest.raises(StudyError, match="picked_mine has the fraction it was saved with"):
        load_study(write(content))
