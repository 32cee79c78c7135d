"""Every figure of a study, from its run records or from its committed tables.

Notebooks and `make figures` draw by the same calls. What a step draws from its records it commits
first, as small tables, and draws from these.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.cartography.datamap import compute_datamap
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.scores import confidence, correctness, variability
from kdlib.cartography.variants import SAME_NAME
from kdlib.compare.committed import is_committed, is_committed_step, read_step, write_step
from kdlib.compare.comparisons import Tables
from kdlib.dataset.images import Images
from kdlib.plots import theme
from kdlib.plots.datamaps import MAX_CLASSES, draw_map, draw_pair, forming
from kdlib.plots.images import image_table, images_of, region_grid
from kdlib.plots.map_tables import class_table, map_points, pair_table, region_table
from kdlib.plots.scores import detectors, rank_correlations, stability
from kdlib.plots.theme import WIDE
from kdlib.repro.commands import run_to_make
from kdlib.steps.cache import open_images
from kdlib.steps.compare import open_tables
from kdlib.steps.comparison_figures import draw_comparison
from kdlib.steps.datamap import commit_map, open_datamap
from kdlib.steps.display import TEXTS
from kdlib.steps.near import near_images
from kdlib.steps.noise import DETECTORS, noise_tables, suspects
from kdlib.steps.recordings import open_log
from kdlib.steps.saved_figures import save
from kdlib.steps.scores import score_tables
from kdlib.study.study import Study

RULE = "region_variability"  # of the regions that are drawn
# Drawn; the tables hold all scores.
DRAWN = ("confidence", "variability", "aum", "el2n", "grand", "forgetting_events", "dual", "tdds")


def datamap_tables(study: Study) -> Tables:
    """What the figures of step 03 are drawn from, of its records: `points` after each of some
    numbers of epochs (the last is the datamap), `regions`, `classes` and the `images` deepest
    inside each region."""
    images = open_images(study)
    table = open_datamap(study, images)
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)
    maps = _snapshots(log) | {log.n_epochs: table}
    points = pd.concat([map_points(m).assign(epochs=epoch) for epoch, m in maps.items()])
    shrunk = {"variability": np.float32, "confidence": np.float32, "correctness": np.float32}
    tables = {
        "points": points.astype(shrunk | {"n": np.int32, "epochs": np.int32}),
        "regions": region_table(table, RULE),
        "images": image_table(*_typical_images(images, table)),
    }
    names = images.train.header["class_names"]
    if len(names) <= MAX_CLASSES:
        tables["classes"] = class_table(table, RULE, names)
    return {name: t.reset_index(drop=True) for name, t in tables.items()}


def draw_datamap(study: Study, tables: Tables | None = None) -> dict[str, Path]:
    """Draw `datamap`, `forming` (the map after fewer epochs) and `regions` (the images deepest
    inside each region).

    Args:
        tables: From `read_step`; None: of the study's records, and committed.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    if tables is None:
        tables = write_step(study, "datamap", datamap_tables(study))
        images = open_images(study)
        commit_map(study, images, open_datamap(study, images))
    snapshots = {int(epoch): part for epoch, part in tables["points"].groupby("epochs")}
    n_epochs = max(snapshots)
    whole, classes = snapshots[n_epochs], tables["classes"]
    with theme.style():
        fig_map = Figure(figsize=(WIDE, 4.6))
        title = f"{study.name}, N = {whole['n'].sum():,}, E = {n_epochs}"
        draw_map(fig_map, whole, tables["regions"], classes if len(classes) else None, title, RULE)
        fig_forming = Figure(figsize=(WIDE, 2.5 if len(snapshots) <= 3 else 4.5))
        forming(fig_forming, snapshots, study.name)
        fig_grid = Figure(figsize=(WIDE, 3.2))
        region_grid(fig_grid, *images_of(tables["images"]))
    figures = {"datamap": fig_map, "forming": fig_forming, "regions": fig_grid}
    return save(study, "datamap", figures)


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


def draw_scores(
    study: Study, images: Images | None = None, tables: Tables | None = None
) -> dict[str, Path]:
    """Draw `same_name`, `stability` and, with two models, `map_against`.

    Args:
        images: Of the study, with the tables of `score_tables`: what is drawn is committed first.
        tables: Those, or without images the committed ones.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    models = list(study.recordings.models)
    part = f"seed={study.recordings.seeds[0]}"
    if images is not None:
        if len(models) > 1:
            tables = tables | {"pairs": pair_table(*_maps(study, images, part), tuple(models[:2]))}
        tables = write_step(study, "scores", tables)
    matrix, groups = tables["correlations"], {}
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
        rows = tables["stability"]
        rows = rows[(rows["model"] == models[0]) & rows["score"].isin(DRAWN)]
        figures["stability"] = Figure(figsize=(WIDE, 0.9 + 0.26 * rows["score"].nunique()))
        stability(figures["stability"].subplots(), rows)
        if len(tables["pairs"]):
            figures["map_against"] = Figure(figsize=(WIDE, 2.75))
            title = f"{study.name}, {part.replace('=', ' ')}"
            draw_pair(figures["map_against"], tables["pairs"], tuple(models[:2]), title)
    return save(study, "scores", figures)


def _maps(study: Study, images: Images, part: str) -> list[pd.DataFrame]:
    """The datamaps of the first two models that are recorded."""
    maps, asked = [], study.dynamics
    for model in list(study.recordings.models)[:2]:
        log = open_log(study, images, model, part)
        maps.append(compute_datamap(log, el2n_epoch=asked.el2n_epoch, window=asked.window))
    return maps


def draw_noise(
    study: Study, images: Images | None = None, tables: Tables | None = None
) -> dict[str, Path]:
    """Draw `detectors` and `suspects`, the images whose labels AUM suspects most.

    Args:
        images: Of the study, with the tables of `noise_tables`: what is drawn is committed first.
        tables: Those, or without images the committed ones.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    if images is not None:
        shown = image_table(*suspects(study, images))
        tables = write_step(study, "noise", tables | {"images": shown})
    shown = (*DETECTORS, "cleanlab")
    curves, summary, over = (
        tables[name][tables[name]["detector"].isin(shown)]
        for name in ("curves", "detectors", "over_epochs")
    )
    counts = tables["labels"].iloc[0]
    with theme.style():
        heights = {"detectors": 3.4, "suspects": 2.4}
        figures = {name: Figure(figsize=(WIDE, height)) for name, height in heights.items()}
        noise_rate, epoch = counts["wrong"] / counts["n_examples"], study.dynamics.el2n_epoch
        detectors(figures["detectors"], curves, summary, over, noise_rate, epoch)
        region_grid(figures["suspects"], *images_of(tables["images"]))
    return save(study, "noise", figures)


def draw_near(study: Study, images: Images, table: pd.DataFrame) -> dict[str, Path]:
    """Draw `near_duplicates`: the most similar pairs that are not equal in every pixel.

    Args:
        table: From `near_duplicates`.

    Returns: Figure name -> its PNG; nothing where there is no pair.
    """
    shown = write_step(study, "near", {"images": image_table(*near_images(images, table))})
    return _draw_pairs(study, shown)


def _draw_pairs(study: Study, tables: Tables) -> dict[str, Path]:
    figures = {}
    if len(tables["images"]):
        with theme.style():
            figures["near_duplicates"] = Figure(figsize=(WIDE, 2.4))
            region_grid(figures["near_duplicates"], *images_of(tables["images"]))
    return save(study, "near", figures)


def redraw(study: Study) -> None:
    """Redraw what a study has records or committed tables of, figures and texts; print what was
    drawn and what was not.

    Raises: FileNotFoundError where there is neither; ValueError for tables that were changed or
        belong to other settings.
    """
    drawn, missing = {}, []
    wrong_labels = study.recordings and study.data.relabel
    asked = {"datamap": study.recorded_training, "scores": study.recordings, "noise": wrong_labels}
    if study.shares is not None:  # images and datamap, and their figures, are of the other
        asked["datamap"] = None
    for step in (name for name, wanted in asked.items() if wanted):
        if _is_finished(study, step) or is_committed_step(study, step):
            drawn |= redraw_step(study, step)
        else:
            missing.append(f"those of step {step} ({run_to_make(study.runs / step)})")
    if is_committed_step(study, "near"):
        drawn |= _draw_pairs(study, read_step(study, "near"))
    if not drawn or _is_finished(study, "compare") or is_committed(study):
        of_comparison, origin = redraw_comparison(study)
        print(f"{study.name}: the comparison is drawn from {origin}")
        drawn = of_comparison | drawn
    print(f"{', '.join(drawn)} drawn in {study.figures}")
    if missing:
        print(f"not drawn, since neither records nor tables are there: {', '.join(missing)}")


def drawable(study: Study) -> bool:
    """Whether a study has committed tables, or records of a step that draws."""
    return is_committed(study) or any(
        _is_finished(study, step) or is_committed_step(study, step)
        for step in ("datamap", "compare", "scores", "noise")
    )


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


def redraw_step(study: Study, step: str) -> dict[str, Path]:
    """Every figure and text of step `datamap`, `scores` or `noise`, from its records where it is
    finished, else from its committed tables.

    Raises: FileNotFoundError and ValueError for records or tables that are gone, or of another
        study.
    """
    if step == "datamap":
        finished = _is_finished(study, step)
        return draw_datamap(study, None if finished else read_step(study, step))
    compute, draw = {"scores": (score_tables, draw_scores), "noise": (noise_tables, draw_noise)}[
        step
    ]
    images = open_images(study) if _is_finished(study, step) else None
    tables = read_step(study, step) if images is None else compute(study, images)
    drawn = draw(study, images, tables)
    for describe in TEXTS[step].values():
        describe(study, tables)
    return drawn


def _is_finished(study: Study, step: str) -> bool:
    return (study.runs / step / "evidence.json").is_file()
