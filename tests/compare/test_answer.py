"""The answer of a study: one sentence for each verdict, worked by hand, and what it covers."""

import numpy as np
import pandas as pd
import pytest
from a_study import STUDY, changed, validated
from compare.test_differences import EASY, RANDOM, cell, table

from kdlib.compare.answer import answers, covered, covers, first_comment, question
from kdlib.compare.differences import objective_differences, paired_differences

STEADY = np.array([0.001, -0.001, 0.001, -0.001, 0.0])  # of sd 0.001


def tables_of(*cells, wall_s=None, **columns):
    results = table(*cells)
    strategies = paired_differences(results, "random", 0.01, 0.95).assign(**columns)
    costs = results.assign(what="student")
    costs = costs if wall_s is None else costs.assign(wall_s=wall_s)
    probes = pd.DataFrame({"on": ["own"], "n_test": [500]})
    return {"results": results, "strategies": strategies, "costs": costs, "probes": probes}


def first(*cells, **options):
    [answer, *_] = answers(validated(STUDY), tables_of(cell("random", RANDOM), *cells, **options))
    return answer


def test_better_names_the_best_with_its_interval():
    # Differences of hard: 0.1 + STEADY, mean .1, standard error .001 / sqrt(5) = .000447, t 2.776
    answer = first(cell("easy", EASY), cell("hard", np.add(RANDOM, 0.1) + STEADY))
    assert answer.sentence == (
        "Where tiny learns from 33 % of the images with kd, hard is better than random by 10.0 "
        "points, the most of 2 strategies (95 % interval +9.9 to +10.1, 5 paired seeds)."
    )
    assert (answer.verdict, answer.comparison) == ("better", "strategies")


def test_worse_names_the_nearest():
    answer = first(cell("easy", EASY), cell("hard", np.subtract(EASY, 0.2)))
    assert answer.sentence == (
        "Where tiny learns from 33 % of the images with kd, both strategies are worse than random; "
        "the nearest, easy, is so by 3.4 points (95 % interval -4.1 to -2.7, 5 paired seeds)."
    )
    assert first(cell("easy", EASY)).sentence == (
        "Where tiny learns from 33 % of the images with kd, easy is worse than random by 3.4 "
        "points (95 % interval -4.1 to -2.7, 5 paired seeds)."
    )


def test_equivalent_says_the_margin_and_the_interval_of_its_test():
    # standard error .000447, t(4) at 90 % 2.132: 0.0 to 0.2 around 0.1
    answer = first(cell("easy", EASY), cell("hard", np.add(RANDOM, 0.001) + STEADY))
    assert answer.sentence == (
        "Where tiny learns from 33 % of the images with kd, neither of 2 strategies is better than "
        "random by 1 point or more: hard is as good as random within 1 point, at +0.1 points "
        "(90 % interval 0.0 to +0.2, 5 paired seeds)."
    )


def test_undecided_says_what_it_would_cost():
    # Differences 0, .02, 0, .02, .01: mean .01, sd .01, standard error .00447, t 2.776: -0.2 to 2.2
    noisy = cell("hard", np.add(RANDOM, [0, 0.02, 0, 0.02, 0.01]))
    answer = first(cell("easy", EASY), noisy, wall_s=600.0)
    assert answer.sentence == (
        "Undecided: where tiny learns from 33 % of the images with kd, neither of 2 strategies is "
        "known to be better than random; the largest difference, of hard, +1.0 points (95 % "
        "interval -0.2 to +2.2, 5 paired seeds); about 11 paired seeds would settle it: 12 further "
        "runs of 100 steps, some 2.0 hours of training."
    )
    assert answer.verdict == "undecided"
    alone = first(noisy)
    assert "kd, hard may be better or worse than random: +1.0 points" in alone.sentence
    assert alone.sentence.endswith("12 further runs of 100 steps.")  # times are not known


def test_a_difference_that_is_the_same_in_every_seed_has_no_interval():
    answer = first(cell("hard", RANDOM))
    assert answer.sentence.endswith("0.0 points (no interval: the same in every seed, 5 paired "
                                    "seeds).")  # fmt: skip


def test_without_a_pair_of_accepted_runs_nothing_can_be_compared():
    refused = cell("hard", EASY).assign(refused=True)
    answer = first(refused)
    assert "nothing can be compared: no pair of runs was accepted" in answer.sentence
    assert (answer.verdict, answer.row) == ("undecided", None)


def test_a_verdict_that_does_not_outlive_the_correction_says_so():
    # Differences .06, 0, .05, .01, .05: mean .034, sd .0270, t 2.81, p .048, of two tests .096
    weak = cell("hard", np.add(RANDOM, [0.06, 0.0, 0.05, 0.01, 0.05]))
    weaker = cell("easy", np.add(RANDOM, [0, 0.02, 0, 0.02, 0.01]))
    assert first(weaker, weak).sentence.endswith(
        "(95 % interval 0.0 to +6.8, 5 paired seeds, p 0.096 after Holm's correction for all "
        "comparisons)."
    )
    assert "Holm" not in first(weak).sentence


def test_a_subset_that_lacks_classes_is_no_silent_winner():
    answer = first(cell("hard", EASY), fewest=["0 (lacks 6 of 10 classes)"])
    assert ", and its subset lacks 6 of 10 classes)." in answer.sentence


def test_the_first_point_of_the_axes_comes_first():
    cells = [
        cell(strategy, np.add(accuracies, 0.01 * i), fraction=fraction, objective=objective)
        for i, (fraction, objective) in enumerate(
            [(0.1, "plain"), (0.33, "plain"), (0.1, "kd"), (0.33, "kd")]
        )
        for strategy, accuracies in (("random", RANDOM), ("easy", EASY))
    ]
    found = answers(validated(STUDY), tables_of(*cells))
    points = [one.sentence.split("learns from ")[1].split(",")[0] for one in found]
    assert points == [f"{n} % of the images with {o}" for o in ("kd", "plain") for n in (33, 10)]


def test_where_only_the_full_set_is_compared_each_size_of_the_baseline_has_an_answer():
    full = cell("full", np.add(RANDOM, 0.1) + STEADY, fraction=1.0)
    found = answers(validated(STUDY), tables_of(cell("random", RANDOM), full))
    assert [one.sentence for one in found] == [
        "Where tiny learns with kd, the full set is better than random at 33 % by 10.0 points "
        "(95 % interval +9.9 to +10.1, 5 paired seeds)."
    ]


def test_a_study_of_objectives_is_answered_by_its_objectives():
    study = validated(changed("compare.objective", "kd"))
    cells = [cell("random", RANDOM), cell("random", EASY, objective="plain")]
    tables = tables_of(*cells)
    tables["controls"] = objective_differences(tables["results"], "kd", 0.01, 0.95)
    [answer] = answers(study, tables)
    assert answer.sentence == (
        "Where tiny learns from 33 % of the images, chosen by random, plain is worse than kd by "
        "3.4 points (95 % interval -4.1 to -2.7, 5 paired seeds)."
    )
    assert answer.comparison == "controls"


def test_what_the_answer_covers_is_said_by_subject_and_in_one_sentence():
    tables = tables_of(cell("random", RANDOM), cell("full", RANDOM, fraction=1.0))
    of = covers(validated(STUDY), tables)
    assert of["Data"] == "digits, 900 training images, 97 held out, 500 test images"
    assert of["Budget"] == "100 steps of 64 images"
    assert of["Runs"] == "10 of 10 accepted"
    short = tables["results"].assign(samples=800)  # less than a pass: how many there are is unknown
    of_short = covers(validated(STUDY), tables | {"results": short})
    assert of_short["Data"] == "digits, 97 held out, 500 test images"
    assert covered(validated(STUDY), tables) == (
        "This holds for digits, 900 training images, 97 held out, 500 test images; the students "
        "tiny (tiny_cnn); wide (tiny_cnn of width 16); the teacher tiny_cnn of width 32, trained "
        "here; 100 steps of 64 images; 2 paired seeds on one split and one teacher."
    )


@pytest.mark.parametrize(
    ("text", "comment", "asked"),
    [
        ("# Which third? And why?\n# Makes figures.\n\nbase: a", "Which third? And why? Makes "
         "figures.", "Which third? And why?"),
        ("# It works. In a minute.\ndata: {}", "It works. In a minute.", "It works"),
        ("data: {}", "", "case"),
    ],
)  # fmt: skip
def test_the_question_is_the_first_comment_up_to_its_last_question_mark(
    tmp_path, text, comment, asked
):
    path = tmp_path / "case.yaml"
    path.write_text(text)
    assert (first_comment(path), question(path)) == (comment, asked)
