"""The figures of a study's comparison: those that answer a question with its data.

Curves need four points or more, and two cells to compare; where all curves lie on each other, their
differences are drawn.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.compare.comparisons import Tables, by_place, names_shards
from kdlib.plots import layout, theme
from kdlib.plots.accuracy import accuracy_by_fraction, accuracy_by_objective, accuracy_by_strategy
from kdlib.plots.curves import apart, difference_curves, learning_curves, losses, measured
from kdlib.plots.differences import forest_plot_by_student
from kdlib.plots.probes import (
    REFERENCES,
    diagnostics,
    probe_curves,
    probe_levels,
    probe_places,
    probed,
)
from kdlib.plots.theme import WIDE
from kdlib.steps.saved_figures import save
from kdlib.study.evaluation import AXES
from kdlib.study.study import Study

FEWEST_POINTS = 4  # of a curve
MOST_LINES = 20  # strategies that are drawn over the fractions, at most
MOST_PANELS = 8


@names_shards
def draw_comparison(study: Study, tables: Tables) -> dict[str, Path]:
    """Draw what the study has data for: `accuracy` (unless `fractions` shows the same numbers),
    `differences` of strategies, or of objectives where there are many, `objective_differences` and
    `control_differences`, `fractions` of three or more; `curves` and of the first student `losses`;
    `probes`, `diagnostics` in which cells can be told apart, and `places` where probes are of
    several layers or data sets. Those of accuracies and features are drawn for each data set; of
    the first that is compared on, `accuracy`, of another one `accuracy_on_<name>`.

    Returns: Figure name -> its PNG; a PDF lies beside it. Files of figures that this study had
        before, and has not now, are removed.
    """
    with theme.style():
        figures = {}
        for on, column in study.compare.columns.items():
            drawn = _result_figures(study, tables, on, column)
            figures |= {study.compare.placed(name, on): fig for name, fig in drawn.items()}
        figures |= _curve_figures(study, _common(study, tables["curves"], ["objective"]))
        figures |= _probe_figures(study, tables)
    return save(study, "compare", figures)


def _result_figures(study: Study, tables: Tables, on: str, measure: str) -> dict[str, Figure]:
    """How accurate the students are and by how much they differ, by one column of the results."""
    accepted, margin = tables["results"][~tables["results"]["refused"]], study.compare.margin
    tables = {
        name: dict(by_place(table)).get(on if study.compare.on else "", table)
        for name, table in tables.items()
        if name in ("strategies", "objectives", "controls")
    }
    comparisons = {"differences": "strategies", "objective_differences": "objectives",
                   "control_differences": "controls"}  # fmt: skip
    subsets = accepted[accepted["strategy"] != "full"]
    names, figures = study.axes.objective, {"accuracy": Figure(figsize=(WIDE, 4.4))}
    if len(names) <= theme.MOST_OBJECTIVES and len(subsets):
        accuracy_by_strategy(figures["accuracy"], accepted, tables["strategies"], measure)
    else:
        accuracy_by_objective(figures["accuracy"], accepted, names, measure)
        if "objectives" in tables:
            comparisons = {"differences": "objectives", "control_differences": "controls"}
    for name, comparison in comparisons.items():
        if len(tables.get(comparison, ())):
            figures[name] = Figure(figsize=(WIDE, 5.0))
            forest_plot_by_student(figures[name], _in_order(study, tables[comparison]), margin)
    if subsets["fraction"].nunique() >= 3 and subsets["strategy"].nunique() <= MOST_LINES:
        figures["fractions"] = Figure(figsize=(WIDE, 3.2))
        accuracy_by_fraction(figures["fractions"], accepted, measure)
        if subsets["strategy"].nunique() == 1:  # the same numbers
            del figures["accuracy"]
    return figures


def _curve_figures(study: Study, rows: pd.DataFrame) -> dict[str, Figure]:
    """How the compared cells learn: curves, and the losses of the first student at one size."""
    by, panels = _panels(rows)
    if not panels or _fewest_steps(rows) < FEWEST_POINTS:
        return {}
    figures, value = {"curves": Figure(figsize=(WIDE, 3.4))}, measured(rows)
    baseline, several = _baseline(study, by), rows["student"].nunique() > 1
    told_apart = any(apart(part, value) for part in panels)
    n_lines = max(part[by].nunique() for part in panels)
    axs = layout.panel_grid(
        figures["curves"], len(panels), max(2.1, 0.5 + 0.14 * n_lines), 2, sharey=False
    )
    for ax, part in zip(axs, panels, strict=True):
        if told_apart or baseline not in set(part[by]):
            learning_curves(ax, part, by)
        else:
            difference_curves(ax, part, value, by, baseline)
        if several:
            title = f"{theme.in_words(part['student'].iloc[0])}\n{ax.get_title(loc='left')}"
            ax.set_title(title, fontsize=theme.TEXT_PT)
    if by != "objective":  # losses of different objectives do not compare
        first = [p for p in panels if p["student"].iloc[0] == panels[0]["student"].iloc[0]]
        sizes = [set(part.loc[part["strategy"] != "full", "fraction"]) for part in first]
        same = [p for p, size in zip(first, sizes, strict=True) if size == sizes[0]]
        fig = losses(Figure(figsize=(WIDE, 3.4)), pd.concat(same, ignore_index=True), by)
        figures |= {"losses": fig} if fig.axes else {}
    return figures


def _panels(rows: pd.DataFrame) -> tuple[str, list[pd.DataFrame]]:
    """The cells that are compared, those that belong into one panel together, at most
    `MOST_PANELS`; and the axis in which they differ there.

    Panels are of a student, objective and fraction, their lines strategies; with one strategy at
    three fractions or more lines are fractions, of many objectives, or of full sets alone, lines
    are objectives. A panel with one cell compares nothing and is left out.
    """
    is_full = rows["strategy"] == "full"
    subsets = rows[~is_full]
    by, parts = "strategy", ["student", "objective", "fraction"]
    if subsets.empty:
        by, parts = "objective", ["student"]
    elif rows["objective"].nunique() > theme.MOST_OBJECTIVES:
        by, parts = "objective", ["student", "strategy", "fraction"]
    elif subsets["strategy"].nunique() == 1 and subsets["fraction"].nunique() >= 3:
        by, parts = "fraction", ["student", "objective"]
        rows = rows.assign(strategy=subsets["strategy"].iloc[0])
    panels = []
    for key, part in (subsets if by == "strategy" else rows).groupby(parts, sort=False):
        if by == "strategy":
            whole = rows[is_full & (rows["student"] == key[0]) & (rows["objective"] == key[1])]
            part = pd.concat([whole, part])
        if part[by].nunique() > 1:
            panels.append(part.reset_index(drop=True))
    if len(panels) > MOST_PANELS:
        first = panels[0]["student"].iloc[0]
        panels = [part for part in panels if part["student"].iloc[0] == first][:MOST_PANELS]
    return by, panels


def _baseline(study: Study, by: str) -> str | float:
    """What the other lines of a panel are compared with."""
    plain = [n for n in study.axes.objective if study.objectives[n].kind == "cross_entropy"]
    of_objectives = [study.compare.objective, *plain, study.axes.objective[0]]
    found = {"strategy": study.compare.baseline, "fraction": 1.0}
    return found.get(by) or next(filter(None, of_objectives))


def _fewest_steps(rows: pd.DataFrame) -> int:
    return int(rows.groupby([*AXES, "seed"])["step"].nunique().min())


def _probe_figures(study: Study, tables: Tables) -> dict[str, Figure]:
    """How good the features of the compared cells are, and what shape they have."""
    table = _accepted_probes(tables["probes"], tables["results"])
    table = _common(study, table, ["objective", "probe"])
    trained = table[~table["strategy"].isin(REFERENCES)]
    last_layer = trained[(trained["layer"] == "features") & (trained["probe"] == "linear")]
    figures, by, panels = {}, *_panels(last_layer[last_layer["on"] == last_layer["on"].iloc[0]])
    for on in dict.fromkeys(table["on"]) if panels else ():
        name = study.compare.placed("probes", on)
        figures[name] = Figure(figsize=(WIDE, 3.4))
        if _fewest_steps(last_layer) < FEWEST_POINTS:
            probe_levels(figures[name], table, on)
            continue
        _probes_over_steps(study, figures[name], table, on, by, panels)
        first = table[table["student"] == table["student"].iloc[0]]
        shape = diagnostics(Figure(figsize=(WIDE, 4.2)), first, on)
        if shape.axes:
            figures[study.compare.placed("diagnostics", on)] = shape
    if len(table[["on", "layer"]].drop_duplicates()) > 1:
        figures["places"] = Figure(figsize=(WIDE, 3.0))
        probe_places(figures["places"], table)
    return figures


def _probes_over_steps(
    study: Study, fig: Figure, table: pd.DataFrame, on: str, by: str, panels: list[pd.DataFrame]
) -> None:
    """A row of panels for each part of the cells: linear and k-NN probe."""
    fig.set_figheight(min(0.6 + 2.8 * len(panels), layout.TALL))
    axs, baseline = fig.subplots(len(panels), 2, squeeze=False), _baseline(study, by)
    cells = [set(map(tuple, part[list(AXES)].to_numpy())) for part in panels]
    of = pd.Series(map(tuple, table[list(AXES)].to_numpy()), table.index)
    is_reference = table["strategy"].isin(REFERENCES)
    parts = [
        table[of.isin(cell) | (is_reference & table["student"].isin([*part["student"], ""]))]
        for cell, part in zip(cells, panels, strict=True)
    ]
    trained = [part[~part["strategy"].isin(REFERENCES)] for part in parts]
    told_apart = any(
        apart(probed(part, kind, on), "accuracy") for part in trained for kind in ("linear", "knn")
    )
    for (i, j), ax in np.ndenumerate(axs):
        kind = ("linear", "knn")[j]
        if told_apart or baseline not in set(trained[i][by]):
            probe_curves(ax, parts[i], kind, on, by=by)
        else:
            what = f"{theme.in_words(kind)} probe" + ("" if on == "own" else f" on {on}")
            difference_curves(ax, probed(trained[i], kind, on), "accuracy", by, baseline, what)
        if table["student"].nunique() > 1:
            title = f"{theme.in_words(trained[i]['student'].iloc[0])}\n{ax.get_title(loc='left')}"
            ax.set_title(title, fontsize=theme.TEXT_PT)


def _in_order(study: Study, comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison with the students in the order of the study."""
    place = comparison["student"].map(study.axes.student.index)
    return comparison.iloc[np.argsort(place.to_numpy(), kind="stable")]


def _accepted_probes(probes: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Probe rows of accepted runs; a cell of which every run is refused stays, with `(refused)` in
    its name."""
    cell = list(AXES)
    marked = results.assign(lost=results.groupby(cell)["refused"].transform("all"))
    known = marked[[*cell, "seed", "refused", "lost"]]
    rows = probes.merge(known, on=[*cell, "seed"], how="left")  # references are no runs
    refused, lost = (rows[name].eq(True) for name in ("refused", "lost"))
    names = rows["strategy"].where(~lost, rows["strategy"] + "_(refused)")
    kept = rows.assign(strategy=names)[~refused | lost]
    return kept.drop(columns=["refused", "lost"])


def _common(study: Study, rows: pd.DataFrame, more: list[str]) -> pd.DataFrame:
    """Of a study whose runs may stop early, the steps that every seed of a cell has reached."""
    if study.training.early_stopping is None:
        return rows
    cell = ["student", "strategy", "fraction", *more]
    of_step = rows.groupby([*cell, "step"])["seed"].transform("nunique")
    return rows[of_step == rows.groupby(cell)["seed"].transform("nunique")]
