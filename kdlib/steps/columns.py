"""What the columns mean of the tables that a notebook shows."""

import inspect

import pandas as pd

from kdlib.cartography import feature_scores, scores

SCORES = {**vars(scores), **vars(feature_scores)}  # the column of a score has its function's name

MEANINGS = {
    "label": "class of the example, as trained",
    "region_variability": "easy, ambiguous or hard: the third of highest variability is ambiguous",
    "region_corner": "easy, ambiguous or hard: the nearest corner of the map",
    "grand": "norm of the loss gradient over all weights, early in the recorded training",
    "grand_last": "norm of the loss gradient over the last layer",
    "student": "name of the student in the study file",
    "strategy": "how its training examples were chosen; of probes also `untrained` and `teacher`",
    "fraction": "share of the training images it learnt from",
    "objective": "name of its loss in the study file",
    "seed": "decides initial weights, order of batches and the draw of the subset",
    "test_accuracy": "share of the test images it classifies rightly after the last step",
    "test_accuracy_best": "the same at the best epoch on validation images; NaN where the teacher "
    "learnt from these",
    "best_step": "the step of that epoch",
    "steps": "optimiser steps",
    "samples": "images seen, repetitions counted",
    "unique_examples": "distinct images seen",
    "checks": "number of checks on the run's evidence that passed; the others stop the run",
    "folder": "of the run: weights, metrics and evidence",
    "weights_sha256": "fingerprint of the weights",
    "refused": "whether a check fails, so that the run enters no mean",
    "reason": "why it is refused",
    "run": "folder of the run, below `runs/<study>/`",
    "command": "makes the run again",
    "declared_steps": "optimiser steps as planned; likewise the next two",
    "declared_samples": "images seen, as planned",
    "declared_unique_examples": "distinct images seen, as planned",
    "budget": "what is equal in all runs: `equal_steps` or `equal_epochs`",
    "linear_accuracy": "test accuracy of a linear classifier on the frozen features",
    "knn_accuracy": "test accuracy of the nearest neighbours on the frozen features",
    "step": "optimiser step of the checkpoint; 0 is untrained",
    "on": "the data set of the probe; `own` is the study's",
    "layer": "where the features are from; `features` is the input of the last layer",
    "probe": "`linear`, `knn` or few-shot",
    "accuracy": "test accuracy of the probe, or of the teacher",
    "chosen": "regularisation or number of neighbours of the probe",
    "converged": "whether the fit of the probe converged",
    "effective_rank": "exponential of the entropy of the features' spectrum",
    "rank_ratio": "effective rank over that of isotropic features",
    "rank_threshold": "ratio below which features count as collapsed",
    "mean_cosine": "mean cosine of two images' features; 0 when isotropic",
    "unit_variance": "variance of unit features per dimension; 1 / D when isotropic",
    "alignment": "mean squared distance of unit features of one class",
    "uniformity": "log of the mean Gaussian potential of unit features; lower is more even",
    "uniformity_even": "the same of evenly spread features",
    "cka_teacher": "linear CKA with the teacher's features",
    "n_features": "dimensions of the features",
    "n_train": "examples the probe learnt from",
    "n_test": "examples it was tested on",
}


def meanings(table: pd.DataFrame) -> dict[str, str]:
    """Column -> what it means, for the columns that are known: those of the datamap, of tables of
    runs and of probes. A score's meaning is the first sentence of its function."""
    known = {}
    for name in table.columns:
        if name in MEANINGS:
            known[name] = MEANINGS[name][0].upper() + MEANINGS[name][1:]
        elif callable(SCORES.get(name)):
            first = inspect.getdoc(SCORES[name]).split("\n\n")[0]
            known[name] = " ".join(first.split()).removesuffix(".")
    return known
