"""How single examples were learned, worked out by hand."""

import numpy as np
import pytest

from kdlib.cartography.course import courses, regions_of
from kdlib.cartography.datamap import compute_datamap
from kdlib.cartography.log import DynamicsLog

IDS, LABELS = np.array([10, 20, 30]), np.array([0, 1, 2])
#          id 10: 0, 1, 1, 0   id 20: 1 at every epoch   id 30: 0 0 0, then 2
PREDICTED = np.array([[0, 1, 0], [1, 1, 0], [1, 1, 0], [0, 1, 2]])


def record(folder, logits=True):
    log = DynamicsLog.create(folder, IDS, LABELS, n_epochs=4, n_classes=3, observed="train",
                             logits=logits, provenance={})  # fmt: skip
    for epoch, classes in enumerate(PREDICTED):
        log.record(np.full(3, epoch), np.arange(3), 2.0 * np.eye(3)[classes], LABELS)
    return log.finish()


def test_the_course_of_an_example_is_its_probability_and_what_was_predicted(tmp_path):
    course = courses(record(tmp_path), np.array([30, 10]))
    assert course.predicted.T.tolist() == [[0, 0, 0, 2], [0, 1, 1, 0]]
    assert course.correct.T.tolist() == [[False] * 3 + [True], [True, False, False, True]]
    assert course.changes(0) == [(1, 0), (4, 2)]
    assert course.changes(1) == [(1, 0), (2, 1), (4, 0)]
    right = np.exp(2) / (np.exp(2) + 2)
    wrong = 1 / (np.exp(2) + 2)
    assert np.allclose(course.label_prob[:, 1], [right, wrong, wrong, right], atol=5e-4)


def test_a_tie_of_rounded_logits_follows_what_was_found_before_rounding(tmp_path):
    log = DynamicsLog.create(tmp_path, np.array([4, 5]), np.array([1, 0]), n_epochs=1, n_classes=3,
                             observed="eval", logits=True, provenance={})  # fmt: skip
    close = np.array([[2.0, 2.00001, 0.0], [2.0, 2.00001, 0.0]])
    log.record(np.zeros(2, np.int64), np.arange(2), close, np.array([1, 0]))
    assert courses(log.finish(), np.array([4, 5])).predicted.tolist() == [[1, 1]]


def test_without_logits_the_predictions_are_asked_for_by_their_setting(tmp_path):
    course = courses(record(tmp_path, logits=False), np.array([20]))
    assert course.correct.all()
    with pytest.raises(ValueError, match=r"dynamics: \{logits: true\}"):
        course.changes(0)


def test_an_id_of_no_example_is_refused(tmp_path):
    log = record(tmp_path)
    for unknown in (15, 31):
        with pytest.raises(ValueError, match=f"no record of example {unknown}"):
            courses(log, np.array([10, unknown]))


def test_regions_are_those_of_the_datamap(tmp_path):
    log = record(tmp_path)
    table = compute_datamap(log, el2n_epoch=1, window=3)
    for rule in ("variability", "corner"):
        assert regions_of(log, rule).tolist() == table[f"region_{rule}"].tolist()
