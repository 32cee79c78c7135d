"""What each figure shows, in a sentence or two, for the report and the paper."""

from kdlib.study.evaluation import named_place

CAPTIONS = {
    "datamap": "Every training image on the datamap: confidence (mean probability of its label "
    "over the recorded epochs) against variability (its standard deviation); colour is "
    "correctness, the share of epochs in which it was classified rightly.",
    "forming": "The datamap after fewer epochs.",
    "regions": "The images deepest inside each region of the datamap, with their classes.",
    "shard_visits": "How often a training on all shards, on fixed ones and on random ones reads "
    "each shard; an invented example.",
    "accuracy": "Test accuracy of every strategy, fraction and objective, one dot a seed.",
    "differences": "Paired differences of each strategy from the baseline, with intervals; inside "
    "the grey band a difference does not matter.",
    "objective_differences": "What the teacher adds on the same subset: paired differences from "
    "the training without one, with intervals.",
    "control_differences": "Paired differences of every objective from the one that the study "
    "compares with, on the same subset.",
    "fractions": "Accuracy over the fraction of the training images.",
    "curves": "Learning curves at equal steps: accuracy on the validation images.",
    "losses": "Training loss, validation loss and each term of the training loss.",
    "probes": "Probes of the frozen features over checkpoints, beside the untrained network and "
    "the teacher.",
    "diagnostics": "The shape of the features over training.",
    "places": "Probe accuracy of each layer on each data set.",
    "same_name": "Rank correlations of scores that share one name.",
    "stability": "Over how many runs a score has to be averaged until its ranking is stable.",
    "map_against": "The datamaps of two networks against each other.",
    "detectors": "Which scores find wrong labels: precision, recall, and over epochs.",
    "suspects": "The images whose labels are suspected most.",
    "audit": "What two earlier studies measured, in miniature: each number with a defect, without "
    "it, and the check that finds the defect.",
}


def caption(name: str) -> str:
    """The caption of a figure, also of one of a further data set.

    >>> caption("places"), caption("places_on_mnist")[-12:]
    ('Probe accuracy of each layer on each data set.', '. On: mnist.')
    """
    base, on = named_place(name)
    return CAPTIONS[base] + (f" On: {on}." if on else "")
