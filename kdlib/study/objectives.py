"""The kinds of objective: formula, paper, and what each reads of a teacher."""

from dataclasses import dataclass

from kdlib.study.study import UNTAUGHT, Objective


@dataclass(frozen=True)
class Kind:
    """What is said of one kind of objective.

    Attributes:
        formula: The loss, in one line; T is the temperature.
        paper: Authors, year, identifier.
        test: The test that works its value by hand.
    """

    formula: str
    paper: str
    test: str


_L, _F = "tests/trainer/test_logit_losses.py::test_", "tests/trainer/test_feature_losses.py::test_"


KINDS = {
    "cross_entropy": Kind("CE", "-", _L + "a_cross_entropy_worked_by_hand"),
    "label_smoothing": Kind(
        "CE with labels (1 - smoothing) onehot + smoothing / C",
        "Szegedy et al. 2016, arXiv 1512.00567",
        _L + "label_smoothing_worked_by_hand",
    ),
    "kd": Kind(
        "(1 - alpha) CE + alpha T² KL(teacher || student)",
        "Hinton et al. 2015, arXiv 1503.02531; standardise: Sun et al. 2024, arXiv 2403.01427",
        _L + "a_kd_loss_worked_by_hand",
    ),
    "mse": Kind(
        "(1 - alpha) CE + alpha mean (student - teacher)²",
        "Ba and Caruana 2014, arXiv 1312.6184",
        _L + "a_squared_difference_of_logits_worked_by_hand",
    ),
    "dkd": Kind(
        "CE + T² (target_weight TCKD + rest_weight NCKD)",
        "Zhao et al. 2022, arXiv 2203.08679",
        _L + "decoupled_parts_worked_by_hand",
    ),
    "dist": Kind(
        "CE + T² (inter_weight (1 - r over classes) + intra_weight (1 - r over examples))",
        "Huang et al. 2022, arXiv 2205.10536",
        _L + "correlations_worked_by_hand",
    ),
    "hint": Kind(
        "CE + weight mean (projected stage - teacher's stage)²",
        "Romero et al. 2015, arXiv 1412.6550",
        _F + "a_hint_worked_by_hand",
    ),
    "attention": Kind(
        "CE + weight Σ over stages of |map - teacher's map|",
        "Zagoruyko and Komodakis 2017, arXiv 1612.03928",
        _F + "attention_maps_worked_by_hand",
    ),
    "rkd": Kind(
        "CE + distance_weight Huber(distances) + angle_weight Huber(angles)",
        "Park et al. 2019, arXiv 1904.05068",
        _F + "relations_worked_by_hand",
    ),
    "similarity": Kind(
        "CE + weight mean (Gram - teacher's Gram)²",
        "Tung and Mori 2019, arXiv 1907.09682",
        _F + "similarities_worked_by_hand",
    ),
    "crd": Kind(
        "CE + weight (-log h(own) - Σ log(1 - h(other))), both ways, negatives of the batch",
        "Tian et al. 2020, arXiv 1910.10699",
        _F + "a_contrast_worked_by_hand",
    ),
    "tokens": Kind(
        "cls_weight (1 - cos CLS) + patch_weight (1 - cos patches) + barlow_weight Barlow; "
        "labels train the last layer alone",
        "barlow: Zbontar et al. 2021, arXiv 2103.03230",
        _F + "tokens_worked_by_hand",
    ),
    "own": Kind(
        "the study's own code",
        "-",
        "tests/trainer/test_objectives.py::test_an_own_objective_is_what_its_file_says",
    ),
}


def needs_teacher(objective: Objective) -> bool:
    """Whether the objective reads teacher outputs."""
    return objective.kind not in UNTAUGHT and objective.reads != ()
