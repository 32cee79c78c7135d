"""Each check lets honest evidence pass and stops the lie it is there for."""

import copy

import numpy as np
import pytest

from kdlib.repro import checks, files

HELD_OUT = {"n": 9, "sha256": "ab"}
HONEST = {
    "budget": {
        "declared": {"unique_examples": 30, "samples": 640, "steps": 20},
        "recorded": {"unique_examples": 30, "samples": 640, "steps": 20},
    },
    "coverage": {
        "unique": 30,
        "fewest": 21,
        "most": 22,
        "outside_subset": 0,
        "unlike_plan": 0,
        "shards_per_pass": None,
    },
    "subset": {"n_examples": 30},
    "gradient": {"norm": 0.7, "tensors": 8, "tensors_without": 0},
    "pairing": {"paired": 0.2, "permuted": 1.4, "teacher_accuracy": 0.97, "stored_accuracy": 0.97},
    "teacher": {
        "claimed": 0.95,
        "tolerance": 0.01,
        "measured": 0.945,
        "chance": 0.13,
        "uninformed": False,
        "measured_train": 0.97,
        "split": "test",
        "measured_by": "logits",
        "trained_on": "kept",
    },
    "read": {"validation": [HELD_OUT]},
    "selection": {
        "held_out": HELD_OUT,
        "overlap": 0,
        "teacher_overlap": 0,
        "steers": None,
    },
    "floor": {"trained": 0.6, "untrained": 0.4, "slack": 0.02},
    "probes": [{"train_weights": "a", "test_weights": "a"}],
    "collapse": {"ratio": 0.4, "threshold": 0.1},
}
ALL = (*checks.STUDENT, *checks.PROBE)


def _broken(*path_and_value):
    *path, value = path_and_value
    evidence = copy.deepcopy(HONEST)
    place = evidence
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return evidence


def test_honest_evidence_passes_every_check():
    assert all(check["passed"] for check in checks.demand(ALL, HONEST))


@pytest.mark.parametrize(
    ("evidence", "name", "sentence"),
    [
        # a subset of a third that trained on the full set, as in the first earlier study
        (_broken("budget", "recorded", "unique_examples", 90), "budget", "30 -> 90"),
        (_broken("budget", "recorded", "steps", 156), "budget", "steps: 20 -> 156"),
        (_broken("coverage", "unique", 29), "coverage", "29 of 30 examples"),
        # the last third of the data read forty times less often, as in the second one
        (_broken("coverage", "fewest", 1), "coverage", "visited 1 to 22 times"),
        (_broken("coverage", "unlike_plan", 4), "coverage", "4 not as often as planned"),
        (_broken("coverage", "outside_subset", 5), "coverage", "5 visits outside the subset"),
        (_broken("gradient", "norm", 0.0), "gradient", "gradient norm 0;"),
        (_broken("gradient", "tensors_without", 1), "gradient", "1 of 8 parameter tensors"),
        (_broken("pairing", "permuted", 0.2), "pairing", "term 0.2, 0.2 with permuted rows"),
        # squared norms of unit vectors, as in the second earlier study: 0 but for rounding
        (
            HONEST | {"pairing": HONEST["pairing"] | {"paired": 2.6e-32, "permuted": 2.7e-32}},
            "pairing", "term 2.6e-32, 2.7e-32 with permuted rows",
        ),
        (_broken("pairing", "teacher_accuracy", 0.11), "pairing", "rows 11.00% right"),
        (_broken("teacher", "measured", 0.93), "teacher_card", "measured 93.00%"),
        (_broken("teacher", "chance", 0.95), "teacher_card", "such answers reach 95.00% by chance"),
        (
            _broken("read", "validation", [{"n": 50, "sha256": "cd"}]),
            "untouched_test", "chosen on 50 images that are not the 9 held out",
        ),
        (
            _broken("read", "validation", [HELD_OUT, {"n": 9, "sha256": "cd"}]),
            "untouched_test", "chosen on 9 images that are not the 9 held out",
        ),
        (_broken("read", "validation", []), "untouched_test", "no epoch was evaluated"),
        (
            HONEST | {"selection": HONEST["selection"] | {
                "teacher_overlap": 5, "steers": "early_stopping",
            }},
            "untouched_test", "learnt from 5: .* yet `early_stopping` read them",
        ),
        (_broken("selection", "overlap", 2), "untouched_test", "2 of them were trained on"),
        (_broken("floor", "trained", 0.119), "probe_floor", "extracted with the weights"),
        (_broken("probes", [{"train_weights": "a", "test_weights": "b"}]), "same_weights", "mix"),
        (_broken("collapse", "ratio", 0.05), "not_collapsed", "effective rank is 5.0%"),
    ],
)  # fmt: skip
def test_each_lie_is_stopped_by_its_check_alone(evidence, name, sentence):
    with pytest.raises(checks.CheckError, match=sentence) as stopped:
        checks.demand(ALL, evidence)
    assert [line.split(":")[0].strip() for line in str(stopped.value).splitlines()[1:]] == [name]


@pytest.mark.parametrize("key", sorted(HONEST))
def test_missing_evidence_is_a_failure_and_not_an_exemption(key):
    evidence = {k: v for k, v in HONEST.items() if k != key}
    with pytest.raises(checks.CheckError, match="the evidence this needs is missing"):
        checks.demand(ALL, evidence)


def test_a_run_without_teacher_needs_no_teacher():
    evidence = HONEST | {"pairing": None, "teacher": None}
    assert all(check["passed"] for check in checks.demand(checks.STUDENT, evidence))


def test_fewer_samples_than_examples_is_no_gap_in_coverage():
    evidence = _broken("budget", "declared", "unique_examples", 16)
    evidence["coverage"] |= {"unique": 16, "fewest": 0, "most": 1}
    assert checks.coverage(evidence)[0]


def test_passes_that_draw_shards_may_visit_unevenly_but_as_planned():
    evidence = _broken("coverage", "shards_per_pass", 3)
    evidence["coverage"] |= {"fewest": 2, "most": 9}
    assert checks.coverage(evidence)[0]
    evidence["coverage"]["unlike_plan"] = 1
    assert not checks.coverage(evidence)[0]


def test_coverage_evidence_counts_visits_inside_and_outside_the_subset():
    visits = np.array([3, 0, 2, 3, 1, 0])
    found = checks.coverage_evidence(visits, np.array([0, 2, 3]), np.array([3, 3, 3]), 2)
    counts = {"unique": 4, "fewest": 2, "most": 3, "outside_subset": 1}
    assert found == counts | {"unlike_plan": 1, "shards_per_pass": 2}


def test_a_checkpoint_that_is_missing_or_changed_is_named(tmp_path):
    for name in ("last", "best"):
        (tmp_path / name).write_bytes(name.encode())
    entries = {
        name: {"file": name, "file_sha256": files.sha256_file(tmp_path / name)}
        for name in ("last", "best")
    }
    evidence = {"checkpoints": entries}
    assert checks.checkpoint_hashes(tmp_path, evidence).passed
    (tmp_path / "best").write_bytes(b"other")
    assert checks.checkpoint_hashes(tmp_path, evidence).sentence.endswith("changed: best")
    (tmp_path / "last").unlink()
    assert checks.checkpoint_hashes(tmp_path, evidence).sentence.endswith("changed: last, best")
    assert not checks.checkpoint_hashes(tmp_path, {}).passed


def test_three_seeds_that_are_one_seed_are_noticed():
    def run(seed, weights, order):
        return {
            "seeds": {"requested": seed},
            "initialisation": {"weights_sha256": weights},
            "order_sha256": order,
        }

    honest = [run(0, "a", "x"), run(1, "b", "y"), run(2, "c", "z")]
    assert all(check.passed for check in checks.distinct_seeds(honest))
    same_order = [run(0, "a", "x"), run(1, "b", "x"), run(2, "c", "z")]
    assert [check.passed for check in checks.distinct_seeds(same_order)] == [False, False, True]
    assert "seed [1]" in checks.distinct_seeds(same_order)[0].sentence
    undrawn = [run(0, "a", None), run(1, "b", None)]  # a sequential order has nothing of the seed
    assert all(check.passed for check in checks.distinct_seeds(undrawn))
    given = [run(0, "a", "x"), run(1, "a", "y")]  # both begin from all of a file
    assert not any(check.passed for check in checks.distinct_seeds(given))
    for each in given:
        each["initialisation"]["drawn_sha256"] = None
    assert all(check.passed for check in checks.distinct_seeds(given))
    for each in given:  # a last layer was drawn, and not by the seed
        each["initialisation"]["drawn_sha256"] = "h"
    assert not any(check.passed for check in checks.distinct_seeds(given))


def test_a_probe_below_that_of_given_weights_is_no_fault():
    floor = {"trained": 0.5, "untrained": 0.8, "slack": 0.01}
    for given in (False, True):
        passed, sentence = checks.probe_floor({"floor": floor | {"given": given}})
        assert (passed, "began from given weights" in sentence) == (given, given)


def test_settings_that_differ_beside_the_factor_are_named():
    ours = {"step": {"subset": {"strategy": "easy"}, "training": {"steps": 50}}}
    theirs = {"step": {"subset": {"strategy": "random"}, "training": {"steps": 100}}}
    assert checks.differing(ours, theirs, ["step.subset."]) == ["step.training.steps: 100 -> 50"]


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"drift": 0.02}, False),
        ({"drift": 0.02, "precision": "bf16"}, True),
        ({"drift": float("nan"), "precision": "bf16"}, False),
        ({"weights_sha256": "other"}, False),
    ],
)
def test_live_outputs_are_those_of_the_teacher_and_of_their_examples(changes, passes):
    live = {"weights_sha256": "w", "n": 256, "drift": 1e-6, "accuracy": 0.9, "precision": "float32"}
    evidence = copy.deepcopy(HONEST)
    evidence["teacher"]["weights_sha256"] = "w"
    evidence["pairing"] |= {"teacher_accuracy": None, "live": live | changes}
    passed, sentence = checks.pairing(evidence)
    assert passed == passes
    assert "256 views" in sentence
    assert sentence.endswith("and are right for 90.00%")


@pytest.mark.parametrize(("fact", "key"), [("floor", "trained"), ("collapse", "ratio")])
def test_features_that_know_nothing_pass_where_the_study_lets_them(fact, key):
    rule = {"floor": checks.probe_floor, "collapse": checks.not_collapsed}[fact]
    broken = _broken(fact, key, 0.0)
    assert not rule(broken)[0]
    assert rule(broken | {"uninformed": True})[0]


def test_rows_of_an_uninformed_teacher_need_not_matter():
    broken = _broken("pairing", "permuted", 0.0)
    assert not checks.pairing(broken)[0]
    passed, sentence = checks.pairing(
        broken | {"teacher": broken["teacher"] | {"uninformed": True}}
    )
    assert passed
    assert "need not differ" in sentence
