"""Every figure of a study, from its run records, or from its committed tables.

What the notebooks show and what `make figures` redraws is the same call. Leaves to others: how a
figure looks (`plots`, `progress`, `maps`), its numbers (`compiling`).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib import cartography, dataset, looks, mapping, maps, plots, progress
from kdlib.compiling import Tables, open_tables
from kdlib.dynamics import DynamicsLog
from kdlib.params import AXES, MEASURES, Study
from kdlib.report import comparison_texts, ledger_text, objective_table, summary
from kdlib.sampling import (
    EARLIER_BATCH,
    EARLIER_BATCHES,
    EARLIER_DRAWN,
    EARLIER_SHARDS,
    EARLIER_SIZE,
    earlier_plan,
    fixed_shards,
)

MOST_LINES = 20  # strategies that can be told apart over the fractions


def draw_datamap(study: Study) -> dict[str, Path]:
    """Draw `datamap`, `forming` (the map after fewer epochs) and `regions` (the images deepest
    inside each region).

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    images = dataset.open_images(study)
    table = mapping.open_datamap(study, images)
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)
    with looks.style():
        fig_map = Figure(figsize=(looks.WIDE, 4.6))
        title = f"{study.name}, N = {len(table):,}, E = {log.n_epochs}"
        maps.datamap(fig_map, table, title, class_names=images.train.header["class_names"])
        snapshots = _snapshots(log)
        fig_forming = Figure(figsize=(looks.WIDE, 2.5 if len(snapshots) <= 3 else 4.5))
        maps.forming(fig_forming, snapshots, f"{study.name}, N = {len(table):,}")
        fig_grid = Figure(figsize=(looks.WIDE, 3.2))
        plots.region_grid(fig_grid, *_typical_images(images, table))
    return _save(study, {"datamap": fig_map, "forming": fig_forming, "regions": fig_grid})


def _snapshots(log: DynamicsLog) -> dict[int, pd.DataFrame]:
    """The map's coordinates after each of up to six numbers of epochs."""
    found = {}
    for epoch in np.unique(np.geomspace(min(2, log.n_epochs), log.n_epochs, 6).round()).astype(int):
        gold_prob, correct = log["gold_prob"][:epoch], log["correct"][:epoch]
        found[int(epoch)] = pd.DataFrame(
            {
                "confidence": cartography.confidence(gold_prob),
                "variability": cartography.variability(gold_prob),
                "correctness": cartography.correctness(correct),
            }
        )
    return found


def _typical_images(images: dataset.Images, table: pd.DataFrame, n: int = 12) -> tuple[dict, dict]:
    """The images deepest inside each region: region -> uint8 (n, C, H, W), region -> captions."""
    names = images.train.header["class_names"]
    deepest = {
        "easy": np.hypot(table["variability"], 1 - table["confidence"]),
        "ambiguous": -table["variability"],
        "hard": np.hypot(table["variability"], table["confidence"]),
    }
    pixels, captions = {}, {}
    for region, distance in deepest.items():
        ids = distance.sort_values(kind="stable").index[:n].to_numpy()
        pixels[region] = images.train.read("images", ids)
        captions[region] = [str(names[label]) for label in table.loc[ids, "label"]]
    return pixels, captions


def draw_shard_visits(study: Study) -> dict[str, Path]:
    """Draw `shard_visits`: how often the shard policies read each shard, and how often the scheme
    did that sorts the drawn shards and cuts every pass short.

    The numbers are those of an earlier study: 122 shards of 2,048 images, 25 of them per pass, 200
    passes of 500 batches of 64 (800 would be needed to read 25 shards).

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    n_passes, size, ids = 200, EARLIER_SIZE, np.arange(EARLIER_SHARDS * EARLIER_SIZE)

    def visits(shards: np.ndarray | None = None, **how: bool) -> np.ndarray:
        """Of each shard; of none but `shards`, whose examples every pass has."""
        if shards is None:
            return earlier_plan(n_passes, **how).shard_visits()
        found, own = np.zeros(EARLIER_SHARDS), ids[np.isin(ids // size, shards)]
        found[shards] = earlier_plan(n_passes, drawn=False, example_ids=own, **how).shard_visits()
        return found

    chosen = np.unique(fixed_shards(ids, size, EARLIER_DRAWN, seed=0) // size)
    told = {
        "all": visits(drawn=False),
        "fixed": visits(chosen),
        f"random, {EARLIER_DRAWN} a pass": visits(),
        "earlier scheme (sorted, cut short), fixed": visits(np.arange(EARLIER_DRAWN), biased=True),
        "earlier scheme (sorted, cut short), random": visits(biased=True),
    }
    with looks.style():
        fig = Figure(figsize=(looks.WIDE, 5.6))
        n_batches = n_passes * EARLIER_BATCHES
        title = f"{n_batches:,} batches of {EARLIER_BATCH} from {EARLIER_SHARDS} shards of {size:,}"
        plots.shard_visits(fig, told, f"{title} images")
    return _save(study, {"shard_visits": fig})


def draw_comparison(study: Study, tables: Tables) -> dict[str, Path]:
    """Draw `accuracy`, `differences` (of strategies, or of objectives where there are many),
    `objective_differences` and `control_differences` where there are such, `fractions` where there
    are three or more, `curves`, `probes`, of the first student `diagnostics`, and `places` where
    probes are of several layers or data sets.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    accepted = tables["results"][~tables["results"]["refused"]]
    figures, names = {}, study.axes.objective
    measure, margin = MEASURES[study.compare.measure], study.compare.margin
    kinds = {"differences": "strategies", "objective_differences": "objectives",
             "control_differences": "controls"}  # fmt: skip
    with looks.style():
        figures["accuracy"] = Figure(figsize=(looks.WIDE, 4.4))
        if len(names) <= len(looks.OBJECTIVES) and set(accepted["strategy"]) != {"full"}:
            plots.accuracy_by_strategy(figures["accuracy"], accepted, tables["strategies"], measure)
        else:
            plots.accuracy_by_objective(figures["accuracy"], accepted, names, measure)
            if "objectives" in tables:
                kinds = {"differences": "objectives", "control_differences": "controls"}
        for name, kind in kinds.items():
            if len(tables.get(kind, ())):
                figures[name] = Figure(figsize=(looks.WIDE, 5.0))
                plots.differences(figures[name], _in_order(study, tables[kind]), margin)
        subsets = accepted[accepted["strategy"] != "full"]
        if subsets["fraction"].nunique() >= 3 and subsets["strategy"].nunique() <= MOST_LINES:
            figures["fractions"] = Figure(figsize=(looks.WIDE, 3.2))
            plots.accuracy_by_fraction(figures["fractions"], accepted, measure)
        figures["curves"] = Figure(figsize=(looks.WIDE, 3.4))
        rows, by = _shown_curves(study, _common(study, tables["curves"], ["objective"]))
        progress.learning_curves_by_student(figures["curves"], rows, by)
        probed = _judged(tables["probes"], tables["results"])
        probed = _common(study, probed, ["objective", "probe"])
        # lines are strategies, or, where nothing but the full set is probed, objectives
        several = probed[~probed["strategy"].isin(progress.REFERENCES)]["strategy"].nunique() > 1
        panels = list(probed.groupby(["student", "objective"][: 1 + several], sort=False))
        figures["probes"] = Figure(figsize=(looks.WIDE, 0.6 + 2.8 * len(panels)))
        axs = figures["probes"].subplots(len(panels), 2, squeeze=False)
        for (i, j), ax in np.ndenumerate(axs):
            (student, *_), rows = panels[i]
            progress.probe_curves(ax, rows, probe=("linear", "knn")[j])
            if probed["student"].nunique() > 1:
                title = f"{looks.in_words(student)}\n{ax.get_title(loc='left')}"
                ax.set_title(title, fontsize=looks.TEXT_PT)
        figures["diagnostics"] = Figure(figsize=(looks.WIDE, 4.2))
        first = probed["student"] == probed["student"].iloc[0]
        progress.diagnostics(figures["diagnostics"], probed[first])
        if len(probed[["on", "layer"]].drop_duplicates()) > 1:
            figures["places"] = Figure(figsize=(looks.WIDE, 3.0))
            progress.probe_places(figures["places"], probed)
    return _save(study, figures)


def _in_order(study: Study, comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison with the students in the order of the study."""
    place = comparison["student"].map(study.axes.student.index)
    return comparison.iloc[np.argsort(place.to_numpy(), kind="stable")]


def _judged(probes: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Probe rows of accepted runs; a cell of which every run is refused stays, and is called so."""
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


def _shown_curves(study: Study, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The curves of the probed cells of one objective; of all objectives on the full set, where
    nothing else is probed. And what tells them apart."""
    full = rows["strategy"] == "full"
    shown = [s for s in study.probe.strategy if s != "full"]
    if not shown:
        return rows[full], "objective"
    of_subsets = rows["strategy"].isin(shown) & (rows["fraction"] == study.probe.fraction)
    of_objective = rows["objective"] == study.probe.objective[0]
    return rows[of_objective & (full | of_subsets)], "strategy"


def redraw(study: Study) -> tuple[dict[str, Path], str]:
    """Every figure and text of the comparison, from the study's runs, or from its committed tables
    where the runs are elsewhere.

    Returns: Figure name -> its PNG, and what they were drawn from.
    Raises: As `open_tables`.
    """
    tables, origin = open_tables(study)
    drawn = draw_comparison(study, tables)
    summary(study, tables)
    objective_table(study, tables)
    comparison_texts(study, tables)
    ledger_text(study, tables)
    return drawn, origin


def _save(study: Study, figures: dict[str, Figure]) -> dict[str, Path]:
    return {n: looks.save_figure(figure, study.figures, n)[1] for n, figure in figures.items()}
