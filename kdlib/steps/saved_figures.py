"""The files of a study's figures: what is drawn is written, what is drawn no more is removed."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from kdlib.plots.theme import save_figures
from kdlib.steps.display import FIGURES
from kdlib.study.evaluation import named_place
from kdlib.study.study import Study


def save(study: Study, step: str, figures: Mapping[str, Figure]) -> dict[str, Path]:
    """Write the figures of a step, and remove the files of those that it has no more.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    for path in (*study.figures.glob("*.png"), *study.figures.glob("*.pdf")):
        if named_place(path.stem)[0] in FIGURES[step] and path.stem not in figures:
            path.unlink()
    return save_figures(figures, study.figures)
