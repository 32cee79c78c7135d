"""How a network learned single examples, epoch by epoch, from the log of its training."""

from dataclasses import dataclass

import numpy as np

from kdlib.cartography import scores
from kdlib.cartography.datamap import regions
from kdlib.cartography.log import DynamicsLog


@dataclass(frozen=True)
class Courses:
    """The recorded epochs of some examples.

    Attributes:
        example_ids: (n,) int64, in the order asked for.
        label_prob: (E, n) float32 in [0, 1], p(label).
        correct: (E, n) bool, whether the label was predicted.
        predicted: (E, n) int64, the class predicted; None where the log holds no logits.
    """

    example_ids: np.ndarray
    label_prob: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray | None

    def changes(self, which: int) -> list[tuple[int, int]]:
        """What was predicted of one example: (epoch from 1, class) at first and at each change.

        Raises: ValueError without logits in the log.
        """
        if self.predicted is None:
            raise ValueError(
                "the log of training dynamics holds no logits, and so not the classes predicted; "
                "`dynamics: {logits: true}` in the study records them"
            )
        classes = self.predicted[:, which]
        starts = np.flatnonzero(np.append(True, classes[1:] != classes[:-1]))
        return [(int(start) + 1, int(classes[start])) for start in starts]


def courses(log: DynamicsLog, example_ids: np.ndarray) -> Courses:
    """The recorded epochs of some examples; no other example is read.

    Raises: ValueError for an id that the log does not hold.
    """
    ids = np.asarray(example_ids, np.int64)
    places = np.searchsorted(log.example_ids, ids)
    known = places < log.n_examples
    known[known] = np.asarray(log.example_ids)[places[known]] == ids[known]
    if not known.all():
        raise ValueError(f"{log.folder} holds no record of example {ids[~known][0]}")
    correct, predicted = np.asarray(log["correct"][:, places]) == 1, None
    if log.has_logits:
        labels = np.asarray(log.labels)[places]
        logits = np.asarray(log["logits"][:, places], np.float32)
        logits[:, np.arange(len(ids)), labels] = -np.inf
        # `correct` was found in float32; the logits are rounded, and may tie
        predicted = np.where(correct, labels, logits.argmax(axis=2))
    prob = np.asarray(log["gold_prob"][:, places], np.float32)
    return Courses(ids, prob, correct, predicted)


def regions_of(log: DynamicsLog, rule: str = "variability") -> np.ndarray:
    """The region of each example of a log, (N,) str, by the rule of `regions`."""
    confidence, variability = np.empty((2, log.n_examples))
    for start, stop in scores.blocks(log.n_epochs * log.n_examples, log.n_examples):
        prob = np.asarray(log["gold_prob"][:, start:stop], np.float64)
        confidence[start:stop] = scores.confidence(prob)
        variability[start:stop] = scores.variability(prob)
    return regions(confidence, variability, rule=rule)
