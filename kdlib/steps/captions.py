"""What each figure shows, in a sentence or two, for the report and the paper."""

from kdlib.study.evaluation import named_place

CAPTIONS = {
    "datamap": "Every training image on the datamap: confidence (mean probability of its label "
    "over the recorded epochs) against variability (its standard deviation); colour is "
    "correctness, the share of epochs in which it was classified rightly.",
    "forming": "The datamap after fewer epochs.",
    "regions": "The images deepest inside each region of the datamap, with their classes.",
    "accuracy": "Test accuracy of every strategy, fraction and objective, one dot a seed.",
    "differences": "Paired differences of each strategy from the baseline, with intervals; inside "
    "the grey band a difference does not matter.",
    "objective_differences": "What the teacher adds on the same subset: paired differences from "
    "the training without one, with intervals.",
    "control_differences": "Paired differences of every objective from the one that the study "
    "compares with, on the same subset.",
    "fractions": "Accuracy over the fraction of the training images.",
    "curves": "How the compared cells learn: accuracy on the validation images, or, where all "
    "curves lie on each other, their differences to the baseline, seed by seed.",
    "losses": "Training loss, each of its terms, and validation loss of each objective.",
    "probes": "Probes of the frozen features, beside the untrained network and the teacher.",
    "diagnostics": "The shape of the features over training, by the measures in which the cells "
    "differ.",
    "places": "Probe accuracy of each layer on each data set.",
    "same_name": "Rank correlations of scores that share one name.",
    "stability": "How far two averages of a score over different runs rank the images alike.",
    "map_against": "The datamaps of two networks against each other.",
    "detectors": "Which scores find wrong labels: precision, recall, and over epochs.",
    "suspects": "The images whose labels are suspected most.",
    "near_duplicates": "Images that look alike to the teacher, each above its twin.",
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
