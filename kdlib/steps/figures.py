"""Every figure of a study, from its run records or from its committed tables.

Notebooks and `make figures` draw by the same calls.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.cartography.datamap import compute_datamap
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.scores import confidence, correctness, variability
from kdlib.cartography.variants import SAME_NAME
from kdlib.compare.committed import is_committed
from kdlib.compare.comparisons import Tables, by_place, names_shards
from kdlib.dataset.images import Images
from kdlib.dataset.plan import Plan, fixed_shards
from kdlib.plots import theme
from kdlib.plots.accuracy import accuracy_by_fraction, accuracy_by_objective, accuracy_by_strategy
from kdlib.plots.curves import (
    REFERENCES,
    diagnostics,
    learning_curves_by_student,
    losses,
    probe_curves,
    probe_places,
)
from kdlib.plots.datamaps import against, datamap, forming
from kdlib.plots.differences import forest_plot_by_student
from kdlib.plots.images import region_grid, shard_visits
from kdlib.plots.scores import detectors, rank_correlations, stability
from kdlib.plots.theme import WIDE, save_figures
from kdlib.repro.commands import run_to_make
from kdlib.steps.cache import open_images
from kdlib.steps.compare import open_tables
from kdlib.steps.datamap import open_datamap
from kdlib.steps.display import FIGURES, TEXTS
from kdlib.steps.near import near_images
from kdlib.steps.noise import DETECTORS, noise_tables, suspects
from kdlib.steps.recordings import open_log
from kdlib.steps.scores import score_tables
from kdlib.study.evaluation import AXES
from kdlib.study.selections import SHARD_POLICIES
from kdlib.study.study import Study

# Drawn as lines; the tables hold all scores.
DRAWN = ("confidence", "variability", "aum", "el2n", "grand", "forgetting_events", "dual", "tdds")
FEWEST_POINTS = 4  # of a curve of losses
MOST_LINES = 20  # strategies that are drawn over the fractions, at most


def draw_datamap(study: Study) -> dict[str, Path]:
    """Draw `datamap`, `forming` (the map after fewer epochs) and `regions` (the images deepest
    inside each region).

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    images = open_images(study)
    table = open_datamap(study, images)
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)
    with theme.style():
        fig_map = Figure(figsize=(WIDE, 4.6))
        title = f"{study.name}, N = {len(table):,}, E = {log.n_epochs}"
        datamap(fig_map, table, title, class_names=images.train.header["class_names"])
        snapshots = _snapshots(log)
        fig_forming = Figure(figsize=(WIDE, 2.5 if len(snapshots) <= 3 else 4.5))
        forming(fig_forming, snapshots, f"{study.name}, N = {len(table):,}")
        fig_grid = Figure(figsize=(WIDE, 3.2))
        region_grid(fig_grid, *_typical_images(images, table))
    figures = {"datamap": fig_map, "forming": fig_forming, "regions": fig_grid}
    return save_figures(figures, study.figures)


def _snapshots(log: DynamicsLog) -> dict[int, pd.DataFrame]:
    """The map's coordinates after each of up to six numbers of epochs."""
    snapshots = {}
    for epoch in np.unique(np.geomspace(min(2, log.n_epochs), log.n_epochs, 6).round()).astype(int):
        gold_prob, correct = log["gold_prob"][:epoch], log["correct"][:epoch]
        scores = confidence(gold_prob), variability(gold_prob), correctness(correct)
        columns = ("confidence", "variability", "correctness")
        snapshots[int(epoch)] = pd.DataFrame(dict(zip(columns, scores, strict=True)))
    return snapshots


def _typical_images(images: Images, table: pd.DataFrame, n: int = 12) -> tuple[dict, dict]:
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
    """Draw `shard_visits`: how often a training on all shards, on fixed ones and on random ones
    reads each shard, in an example of 100,000 batches of 64 from 122 shards of 2,048 images.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    n_shards, size, n_drawn, batch_size, n_batches = 122, 2048, 25, 64, 100_000

    def visits(ids: np.ndarray, shards_per_pass: int | None = None) -> np.ndarray:
        plan = Plan(ids, batch_size, n_batches, 0, shard_size=size, shards_per_pass=shards_per_pass)
        return plan.shard_visits()

    ids = np.arange(n_shards * size)
    fixed_ids, fixed = fixed_shards(ids, size, n_drawn, seed=0), np.zeros(n_shards)
    fixed[np.unique(fixed_ids // size)] = visits(fixed_ids)
    random = visits(ids, n_drawn)
    by_policy = {"all": visits(ids), "fixed": fixed, f"random, {n_drawn} a pass": random}
    with theme.style():
        fig = Figure(figsize=(WIDE, 3.6))
        title = f"{n_batches:,} batches of {batch_size} from {n_shards} shards of {size:,} images"
        shard_visits(fig, by_policy, title)
    return save_figures({"shard_visits": fig}, study.figures)


@names_shards
def draw_comparison(study: Study, tables: Tables) -> dict[str, Path]:
    """Draw `accuracy`, `differences` (of strategies, or of objectives where there are many),
    `objective_differences` and `control_differences` where there are such, `fractions` where there
    are three or more, `curves`, of the first student `losses` where its curves have four points or
    more, `probes`, of the first student `diagnostics`, and `places` where
    probes are of several layers or data sets. Those of accuracies and features are drawn for each
    data set; of the first that is compared on, `accuracy`, of another one `accuracy_on_<name>`.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    with theme.style():
        figures = {}
        for on, column in study.compare.columns.items():
            drawn = _result_figures(study, tables, on, column)
            figures |= {study.compare.placed(name, on): fig for name, fig in drawn.items()}
        figures["curves"] = Figure(figsize=(WIDE, 3.4))
        rows, by = _shown_curves(study, _common(study, tables["curves"], ["objective"]))
        learning_curves_by_student(figures["curves"], rows, by)
        first = rows[rows["student"] == rows["student"].iloc[0]]
        if first.groupby([*AXES, "seed"])["step"].nunique().min() >= FEWEST_POINTS:
            figures["losses"] = Figure(figsize=(WIDE, 3.4))
            losses(figures["losses"], first, by)
        figures |= _probe_figures(study, tables)
    return save_figures(figures, study.figures)


def _result_figures(study: Study, tables: Tables, on: str, measure: str) -> dict[str, Figure]:
    """The figures of one column of the results table."""
    accepted, margin = tables["results"][~tables["results"]["refused"]], study.compare.margin
    tables = {
        name: dict(by_place(table)).get(on if study.compare.on else "", table)
        for name, table in tables.items()
        if name in ("strategies", "objectives", "controls")
    }
    comparisons = {"differences": "strategies", "objective_differences": "objectives",
                   "control_differences": "controls"}  # fmt: skip
    names, figures = study.axes.objective, {"accuracy": Figure(figsize=(WIDE, 4.4))}
    if len(names) <= len(theme.OBJECTIVES) and set(accepted["strategy"]) != {"full"}:
        accuracy_by_strategy(figures["accuracy"], accepted, tables["strategies"], measure)
    else:
        accuracy_by_objective(figures["accuracy"], accepted, names, measure)
        if "objectives" in tables:
            comparisons = {"differences": "objectives", "control_differences": "controls"}
    for name, comparison in comparisons.items():
        if len(tables.get(comparison, ())):
            figures[name] = Figure(figsize=(WIDE, 5.0))
            forest_plot_by_student(figures[name], _in_order(study, tables[comparison]), margin)
    subsets = accepted[accepted["strategy"] != "full"]
    if subsets["fraction"].nunique() >= 3 and subsets["strategy"].nunique() <= MOST_LINES:
        figures["fractions"] = Figure(figsize=(WIDE, 3.2))
        accuracy_by_fraction(figures["fractions"], accepted, measure)
    return figures


def _probe_figures(study: Study, tables: Tables) -> dict[str, Figure]:
    probed = _accepted_probes(tables["probes"], tables["results"])
    probed = _common(study, probed, ["objective", "probe"])
    # lines are strategies, or, where nothing but the full set is probed, objectives
    several = probed[~probed["strategy"].isin(REFERENCES)]["strategy"].nunique() > 1
    panels = list(probed.groupby(["student", "objective"][: 1 + several], sort=False))
    first, figures = probed["student"] == probed["student"].iloc[0], {}
    for on in dict.fromkeys(probed["on"]):
        figures[name := study.compare.placed("probes", on)] = Figure(
            figsize=(WIDE, 0.6 + 2.8 * len(panels))
        )
        axs = figures[name].subplots(len(panels), 2, squeeze=False)
        for (i, j), ax in np.ndenumerate(axs):
            (student, *_), rows = panels[i]
            probe_curves(ax, rows, probe=("linear", "knn")[j], on=on)
            if probed["student"].nunique() > 1:
                title = f"{theme.in_words(student)}\n{ax.get_title(loc='left')}"
                ax.set_title(title, fontsize=theme.TEXT_PT)
        figures[name := study.compare.placed("diagnostics", on)] = Figure(figsize=(WIDE, 4.2))
        diagnostics(figures[name], probed[first], on)
    if len(probed[["on", "layer"]].drop_duplicates()) > 1:
        figures["places"] = Figure(figsize=(WIDE, 3.0))
        probe_places(figures["places"], probed)
    return figures


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


def _shown_curves(study: Study, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The curves of the probed cells of one objective, or of all objectives on the full set where
    only that is probed; and the column in which they differ."""
    full = rows["strategy"] == "full"
    shown = [s for s in study.probe.strategy if s != "full"]
    if not shown:
        return rows[full], "objective"
    of_subsets = rows["strategy"].isin(shown) & (
        rows["fraction"].isin(study.probe.fractions)
        | (rows["strategy"].isin(SHARD_POLICIES) & (study.axes.shards is not None))
    )
    of_objective = rows["objective"] == study.probe.objective[0]
    return rows[of_objective & (full | of_subsets)], "strategy"


def draw_scores(study: Study, images: Images, tables: Tables) -> dict[str, Path]:
    """Draw `same_name`, `stability` and, with two models, `map_against`.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    matrix, models = tables["correlations"], list(study.recordings.models)
    groups = {}
    for name, others in SAME_NAME.items():
        same = [n for n in (name, *others) if n in matrix and not matrix[n].isna().all()]
        if len(same) > 1:
            groups[theme.in_words(name)] = same
    shown = [name for group in groups.values() for name in group]
    figures = {}
    with theme.style():
        if shown:  # at least one name with a variant that is not constant
            figures["same_name"] = Figure(figsize=(WIDE, 5.2))
            axis = figures["same_name"].subplots()
            rank_correlations(axis, matrix.loc[shown, shown], groups)
        figures["stability"] = Figure(figsize=(WIDE, 3.4))
        rows = tables["stability"]
        rows = rows[(rows["model"] == models[0]) & rows["score"].isin(DRAWN)]
        stability(figures["stability"].subplots(), rows)
        if len(models) > 1:
            figures["map_against"] = Figure(figsize=(WIDE, 2.55))
            part, pair = f"seed={study.recordings.seeds[0]}", []
            for model in models[:2]:
                log, asked = open_log(study, images, model, part), study.dynamics
                pair.append(compute_datamap(log, el2n_epoch=asked.el2n_epoch, window=asked.window))
            title = f"{study.name}, {part.replace('=', ' ')}, N = {len(pair[0]):,}"
            against(figures["map_against"], *pair, tuple(models[:2]), title)
    return save_figures(figures, study.figures)


def draw_noise(study: Study, images: Images, tables: Tables) -> dict[str, Path]:
    """Draw `detectors` and `suspects`, the images whose labels AUM suspects most.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    shown = (*DETECTORS, "cleanlab")
    curves, summary, over = (
        tables[name][tables[name]["detector"].isin(shown)]
        for name in ("curves", "detectors", "over_epochs")
    )
    counts = tables["labels"].iloc[0]
    with theme.style():
        heights = {"detectors": 3.0, "suspects": 2.4}
        figures = {name: Figure(figsize=(WIDE, height)) for name, height in heights.items()}
        noise_rate = counts["wrong"] / counts["n_examples"]
        detectors(figures["detectors"], curves, summary, over, noise_rate=noise_rate)
        region_grid(figures["suspects"], *suspects(study, images))
    return save_figures(figures, study.figures)


def draw_near(study: Study, images: Images, table: pd.DataFrame) -> dict[str, Path]:
    """Draw `near_duplicates`: the most similar pairs that are not equal in every pixel.

    Args:
        table: From `near_duplicates`.

    Returns: Figure name -> its PNG; nothing where there is no pair.
    """
    pixels, captions = near_images(images, table)
    if not len(pixels["image"]):
        return {}
    with theme.style():
        fig = Figure(figsize=(WIDE, 2.4))
        region_grid(fig, pixels, captions)
    return save_figures({"near_duplicates": fig}, study.figures)


def redraw(study: Study) -> None:
    """Redraw what a study has records or committed tables of, figures and texts; print what was
    drawn and what was not.

    Raises: FileNotFoundError where there is neither; ValueError for tables that were changed or
        belong to other settings.
    """
    drawn, missing = redraw_recordings(study), []
    if not drawn or _is_finished(study, "compare") or is_committed(study):
        of_comparison, origin = redraw_comparison(study)
        print(f"{study.name}: the comparison is drawn from {origin}")
        drawn |= of_comparison
        if study.shares is None:  # else images and datamap, and their figures, are of the other
            drawn |= draw_shard_visits(study)
            if _is_finished(study, "datamap"):
                drawn |= draw_datamap(study)
            elif study.recorded_training is not None:
                missing += FIGURES["datamap"]
    print(f"{', '.join(drawn)} drawn in {study.figures}")
    wrong_labels = study.recordings and study.data.relabel
    for step, asked in (("scores", study.recordings), ("noise", wrong_labels)):
        if asked and not _is_finished(study, step):
            missing.append(f"those of step {step} ({run_to_make(study.runs / step)})")
    if missing:
        print(f"not drawn, since their records are not in {study.runs}: {', '.join(missing)}")


def drawable(study: Study) -> bool:
    """Whether a study has committed tables, or records of a step that draws."""
    return is_committed(study) or any(_is_finished(study, step) for step in TEXTS)


def redraw_comparison(study: Study) -> tuple[dict[str, Path], str]:
    """Every figure and text of the comparison, from the study's runs, or from its committed tables
    where the runs are elsewhere.

    Returns: Figure name -> its PNG, and what they were drawn from.
    Raises: As `open_tables`.
    """
    tables, origin = open_tables(study)
    drawn = draw_comparison(study, tables)
    for describe in TEXTS["compare"].values():
        describe(study, tables)
    return drawn, origin


def redraw_recordings(study: Study) -> dict[str, Path]:
    """Every figure and text of notebooks 07 and 08, of those that are finished.

    Raises: FileNotFoundError and ValueError for recordings that are gone or of another study.
    """
    drawn: dict[str, Path] = {}
    compute = {"scores": (score_tables, draw_scores), "noise": (noise_tables, draw_noise)}
    for step, (tables_of, draw) in compute.items():
        if _is_finished(study, step):
            images = open_images(study)
            tables = tables_of(study, images)
            drawn |= draw(study, images, tables)
            for describe in TEXTS[step].values():
                describe(study, tables)
    return drawn


def _is_finished(study: Study, step: str) -> bool:
    return (study.runs / step / "evidence.json").is_file()
