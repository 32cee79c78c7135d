"""Further recordings of a study whose labels are partly wrong, and what is asked of them."""

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import TINY, files_below

from kdlib.__main__ import main
from kdlib.cartography.scores import aum
from kdlib.steps import recordings
from kdlib.steps.cache import cache_images
from kdlib.steps.compare import finish_tables
from kdlib.steps.figures import draw_scores, redraw_step
from kdlib.steps.noise import describe_noise, noise_tables
from kdlib.steps.scores import describe_scores, recorded_scores, score_tables
from kdlib.study.base import StudyError
from kdlib.study.load import load_study
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml

MORE = {
    "base": str(TINY),
    "data": {"relabel": {"noise": 0.3}},
    "recordings": {
        "models": {
            "tiny": {"name": "tiny_cnn", "options": {"width": 8}},
            "wide": {"name": "tiny_cnn", "options": {"width": 12}},
        },
        "training": {"epochs": 6, "batch_size": 64, "lr_peak": 0.1},
        "seeds": [0, 3],
        "folds": 3,
        "threshold_samples": True,
    },
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study with wrong labels, its images cached and everything recorded."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        (home / "params").mkdir()
        (home / "params" / "wrong.yaml").write_text(yaml.safe_dump(MORE))
        study = load_study("params/wrong.yaml")
        images = cache_images(study)
        evidences = recordings.record_all(study, images)
    return home, study, images, evidences


@pytest.fixture
def study(made, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(made[0]))
    return made[1]


def test_labels_were_replaced_and_the_source_s_own_are_beside_them(study, made):
    images = made[2]
    labels, own = (images.train.read(c, images.train_ids) for c in ("labels", "original_labels"))
    assert abs((labels != own).mean() - 0.3) < 0.05  # 1,100 draws: s.d. 0.014
    assert "original_labels" not in images.test.header["columns"]
    plain = load_study(TINY)
    assert plain.cache != study.cache


def test_every_recording_has_its_evidence_and_its_own_draws(study, made):
    evidences = made[3]
    assert list(evidences) == study.recordings.runs()
    initial = {e["initialisation"]["weights_sha256"] for e in evidences.values()}
    # two seeds of two models; folds begin as seed 0 does; one more class is another network
    assert len(initial) == 5
    assert all(c["passed"] for e in evidences.values() for c in e["checks"])


def test_finished_recordings_are_read_and_not_made_again(study, made, monkeypatch):
    monkeypatch.setattr(recordings, "train_run", lambda *_, **__: pytest.fail("trained again"))
    assert recordings.record_all(study, made[2]) == made[3]


def test_folds_part_the_images_and_each_is_judged_by_a_network_that_has_not_learnt_it(study, made):
    images, evidences = made[2], made[3]
    ids = images.train_ids
    folds = recordings.fold_of(ids, 3)
    assert np.ptp(np.bincount(folds)[1:]) <= 1
    np.testing.assert_array_equal(folds[::-1], recordings.fold_of(ids[::-1], 3))
    probs = recordings.open_held_out(study, images)
    np.testing.assert_array_equal(probs.index, ids)
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    for k in (1, 2, 3):
        assert evidences["tiny", f"fold={k}"]["subset"]["n_examples"] == (folds != k).sum()


def test_threshold_samples_are_two_disjoint_draws_of_one_more_class(study, made):
    images = made[2]
    ids = images.train_ids
    first, second = (recordings.threshold_samples(ids, 10, k) for k in (1, 2))
    assert len(first) == len(second) == 1100 // 11
    assert not set(first) & set(second)
    log = recordings.open_log(study, images, "tiny", "threshold=1")
    assert log.n_classes == 11
    np.testing.assert_array_equal(np.sort(log.example_ids[log.labels == 10]), first)


def test_gradients_are_those_of_the_first_model_s_seeds(study, made):
    scores = recorded_scores(study, made[2])
    assert {"grand", "grand_last"} <= set(scores["tiny"][0])
    assert "grand" not in scores["wide"][0]
    for of_run in scores["wide"].values():  # as they rank: never learned is hardest
        events, never = of_run["forgetting_events"], of_run["never_learned"]
        assert (events[never] == of_run["forgetting_unlearned_first"].max() + 1).all()
        assert (events[~never] == of_run["forgetting_unlearned_first"][~never]).all()
    assert not np.allclose(scores["tiny"][0]["grand"], scores["tiny"][3]["grand"])


def test_wrong_labels_are_found_better_than_by_chance(study, made):
    tables = noise_tables(study, made[2])
    found = tables["detectors"].set_index("detector")
    assert {"aum", "loss", "grand", "cleanlab", "held-out loss"} <= set(found.index)
    assert found.loc["aum", "auroc"] > 0.75
    assert found.loc["held-out loss", "auroc"] > 0.75
    assert found.loc["aum", "n_runs"] == 2
    assert set(tables["rules"]["rule"]) == {"cleanlab: label issues", "AUM below threshold samples"}
    text = describe_noise(study, tables)
    assert f"{tables['labels']['wrong'][0]:,} of 1,100" in text


def test_scores_agree_with_themselves_and_the_text_says_how_far(study, made):
    tables = score_tables(study, made[2])
    matrix = tables["correlations"]
    assert np.allclose(np.diag(matrix)[~matrix.isna().all().to_numpy()], 1)
    assert matrix.loc["aum", "aum_softmax"] > 0.8
    # of two runs there is one pair
    runs = tables["runs"].set_index(["model", "score"])
    log = [recordings.open_log(study, made[2], "tiny", f"seed={s}") for s in (0, 3)]
    aums = [aum(x["margin"]) for x in log]
    expected = pd.Series(aums[0]).corr(pd.Series(aums[1]), method="spearman")
    assert runs.loc[("tiny", "aum"), "correlation"] == pytest.approx(expected)
    assert "| aum |" in describe_scores(study, tables)
    drawn = draw_scores(study, made[2], tables)
    finish_tables(study, "scores", tables)
    finish_tables(study, "noise", noise_tables(study, made[2]))
    assert set(drawn) == {"same_name", "stability", "map_against"}
    before = {path: path.read_bytes() for path in drawn.values()}
    again = redraw_step(study, "scores") | redraw_step(study, "noise")
    assert set(again) == {*drawn, "detectors", "suspects"}
    assert all(path.stat().st_size > 5_000 for path in again.values())
    assert all(path.read_bytes() == content for path, content in before.items())
    # And from the committed tables, where neither recordings nor images are.
    everything = files_below(study.figures)
    elsewhere = study.runs.rename(study.runs.with_name("elsewhere"))
    assert redraw_step(study, "scores") | redraw_step(study, "noise") == again
    elsewhere.rename(study.runs)
    assert files_below(study.figures) == everything


def test_a_recording_the_study_does_not_ask_for_is_refused(study, made, capsys):
    with pytest.raises(StudyError, match=r"no recording tiny/seed=9 .* tiny/seed=0"):
        recordings.record(study, made[2], "tiny", "seed=9")
    path = made[0] / "params" / "wrong.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["kdlib", "record", str(path), "--model", "no", "--part", "seed=0"]
        )
        assert main() == 1
    assert "no recording no/seed=0" in capsys.readouterr().err


def test_changed_gradients_are_refused(study, made):
    folders = [recordings.recording_folder(study, "tiny", f"seed={s}") for s in (0, 3)]
    path, other = (folder / "gradients.parquet" for folder in folders)
    content = path.read_bytes()
    try:
        path.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match="differs from its evidence"):
            recorded_scores(study, made[2])
    finally:
        path.write_bytes(content)


def test_a_changed_fold_is_refused(study, made, tmp_path):
    folder = recordings.recording_folder(study, "tiny", "fold=2")
    path = folder / "held_out.parquet"
    content = path.read_bytes()
    try:
        other = recordings.recording_folder(study, "tiny", "fold=1") / "held_out.parquet"
        path.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match="differs from its evidence"):
            recordings.open_held_out(study, made[2])
    finally:
        path.write_bytes(content)


def test_recordings_made_before_the_study_was_changed_are_not_read(study, made):
    training = study.recordings.training.model_copy(update={"lr_peak": 0.2})
    asked = study.recordings.model_copy(update={"training": training})
    changed = study.model_copy(update={"recordings": asked})
    dynamics = study.dynamics.model_copy(update={"observed": "eval"})
    with pytest.raises(ValueError, match=r"observed: .*train.* -> .*eval"):
        score_tables(study.model_copy(update={"dynamics": dynamics}), made[2])
    for read in (score_tables, recordings.open_held_out):
        with pytest.raises(ValueError, match=r"lr_peak: 0\.1 -> 0\.2"):
            read(changed, made[2])


def test_a_study_that_asks_for_nothing_or_has_the_source_s_labels_says_so(home):
    content = parse_yaml(TINY.read_text())
    plain = Study.model_validate({"name": "plain", **content})
    with pytest.raises(StudyError, match="all are those of its source"):
        noise_tables(plain, None)
    content.pop("recordings")
    with pytest.raises(StudyError, match="asks for no further recordings"):
        recordings.record_all(Study.model_validate({"name": "plain", **content}), None)
