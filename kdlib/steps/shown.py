"""Figures and texts of each step by name, in the form that JupyterLab shows."""

from pathlib import Path

from kdlib.compare.comparisons import Tables
from kdlib.compare.report import comparison_texts, ledger_text, objective_table, summary
from kdlib.dataset.images import Images
from kdlib.repro.files import nearest
from kdlib.steps.noise import describe_noise
from kdlib.steps.scores import describe_scores
from kdlib.study.study import Study

WIDTH = 800  # pixels of a figure in a notebook
FIGURES = {
    "cache": ("shard_visits",),
    "datamap": ("datamap", "forming", "regions"),
    "compare": ("accuracy", "differences", "objective_differences", "control_differences",
                "fractions", "curves", "probes", "diagnostics", "places"),
    "scores": ("same_name", "stability", "map_against"),
    "noise": ("detectors", "suspects"),
}  # fmt: skip
TEXTS = {
    "compare": {"summary": summary, "comparison": comparison_texts, "objectives": objective_table,
                "ledger": ledger_text},
    "scores": {"scores": describe_scores},
    "noise": {"noise": describe_noise},
}  # fmt: skip


class Picture:
    """A PNG file that JupyterLab shows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return str(self.path)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.path.read_bytes(), {"width": WIDTH}


class Text(str):
    """Markdown that JupyterLab shows formatted."""

    def _repr_markdown_(self) -> str:
        return str(self)


def step_of(name: str, of: dict) -> str:
    """The step that makes a figure or text.

    Args:
        name: Of the figure or text.
        of: `FIGURES` or `TEXTS`.

    Raises: KeyError with the nearest name.
    """
    for step, names in of.items():
        if name in names:
            return step
    raise KeyError(f"no {name!r}; {nearest(name, [n for names in of.values() for n in names])}")


def draw(study: Study, images: Images, step: str, tables: Tables) -> dict[str, Picture]:
    """Draw all figures of one step of `FIGURES` that the study has, and save them."""
    from kdlib.steps import figures  # matplotlib, where something is drawn

    drawn = {
        "cache": lambda: figures.draw_shard_visits(study),
        "datamap": lambda: figures.draw_datamap(study),
        "compare": lambda: figures.draw_comparison(study, tables),
        "scores": lambda: figures.draw_scores(study, images, tables),
        "noise": lambda: figures.draw_noise(study, images, tables),
    }[step]()
    return {name: Picture(path) for name, path in drawn.items()}


def describe(study: Study, name: str, tables: Tables) -> Text:
    """One text of `TEXTS`, also written to the figures folder."""
    return Text(TEXTS[step_of(name, TEXTS)][name](study, tables))
