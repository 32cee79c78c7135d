"""What a study's recordings say about its scores: tables and figures of notebooks 07 and 08.

Leaves to others: the recordings, what agreement and detection mean (agreement, noise), drawing
(maps).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib import agreement, files, looks, maps, noise, plots, recordings, runs
from kdlib.cartography import aum, datamap
from kdlib.dataset import Images
from kdlib.params import DIFFICULTY, SCORES, Study, StudyError
from kdlib.recordings import open_log
from kdlib.variants import SAME_NAME, variants

TARGET = 0.95  # Spearman's correlation at which two averages count as one ranking
# Drawn as lines; the tables hold all scores.
DRAWN = ("confidence", "variability", "aum", "el2n", "grand", "forgetting_events", "dual", "tdds")
DETECTORS = ("aum", "loss", "confidence", "el2n", "forgetting_events", "held-out margin")
Tables = dict[str, pd.DataFrame]


def recorded_scores(
    study: Study, images: Images, models: Iterable[str] | None = None
) -> dict[str, dict[int, pd.DataFrame]]:
    """Every score and variant in every recorded run: model -> seed -> table by example id.

    Args:
        models: Some of the study's; None: all.

    Raises: FileNotFoundError for a recording that is not finished.
    """
    window, epoch = study.dynamics.window, study.dynamics.el2n_epoch
    found: dict[str, dict[int, pd.DataFrame]] = {}
    for model in study.recordings.models if models is None else models:
        for seed in study.recordings.seeds:
            log = open_log(study, images, model, f"seed={seed}")
            table = datamap(log, el2n_epoch=epoch, window=window)
            table = table.join(variants(log, window=window))
            gradients = recordings.open_gradients(study, model, f"seed={seed}")
            if gradients is not None:
                table = table.join(gradients)
            found.setdefault(model, {})[seed] = table
    return found


def _of_each(tables: dict[int, pd.DataFrame], score: str) -> np.ndarray:
    """One score in every run, (R, N)."""
    return np.stack([table[score].to_numpy(np.float64) for table in tables.values()])


def _scores_of(table: pd.DataFrame) -> list[str]:
    others = [name for names in SAME_NAME.values() for name in names if name not in SCORES]
    return [name for name in (*SCORES, *others) if name in table]


def score_tables(study: Study, images: Images) -> Tables:
    """How scores agree: with each other, from seed to seed, from model to model.

    Returns: `correlations`, Spearman between scores (mean over the first model's seeds); `runs`,
        per model and score the agreement of two runs and how many must be averaged; `stability`,
        the agreement of averages over n runs; `models`, per score that of two models' averages.
    """
    scores = recorded_scores(study, images)
    first = next(iter(scores.values()))
    names = _scores_of(next(iter(first.values())))
    matrices = [agreement.rank_correlations(table[names]) for table in first.values()]
    tables = {"correlations": sum(matrices) / len(matrices)}
    per_run, per_n = [], []
    for model, of_model in scores.items():
        for name in _scores_of(next(iter(of_model.values()))):
            values, row = _of_each(of_model, name), {"model": model, "score": name}
            found = agreement.between_runs(values)
            needed = agreement.runs_needed(found["correlation"], TARGET)
            per_run.append(row | found | {"runs_needed": needed, "n_runs": len(values)})
            if not np.isnan(found["correlation"]):
                per_n += [row | r for r in agreement.stability(values).to_dict("records")]
    tables["runs"], tables["stability"] = pd.DataFrame(per_run), pd.DataFrame(per_n)
    between = []
    models = list(scores)
    for i, one in enumerate(models):
        for other in models[i + 1 :]:
            shared = [n for n in names if n in next(iter(scores[other].values()))]
            for name in shared:
                means = [_of_each(scores[m], name).mean(axis=0) for m in (one, other)]
                row = {"model": one, "other": other, "score": name}
                between.append(row | {"correlation": agreement.spearman(*means)})
    tables["models"] = pd.DataFrame(between, columns=["model", "other", "score", "correlation"])
    return _write(study, "scores", tables)


def draw_scores(study: Study, images: Images, tables: Tables) -> dict[str, Any]:
    """Draw `same_name`, `stability` and, with two models, `map_against`.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    matrix, models = tables["correlations"], list(study.recordings.models)
    groups = {}
    for name, others in SAME_NAME.items():
        there = [n for n in (name, *others) if n in matrix and not matrix[n].isna().all()]
        if len(there) > 1:
            groups[looks.in_words(name)] = there
    shown = [name for group in groups.values() for name in group]
    figures = {}
    with looks.style():
        if shown:  # at least one name with a variant that is not constant
            figures["same_name"] = Figure(figsize=(looks.WIDE, 5.2))
            axis = figures["same_name"].subplots()
            maps.rank_correlations(axis, matrix.loc[shown, shown], groups)
        figures["stability"] = Figure(figsize=(looks.WIDE, 3.4))
        rows = tables["stability"]
        rows = rows[(rows["model"] == models[0]) & rows["score"].isin(DRAWN)]
        maps.stability(figures["stability"].subplots(), rows)
        if len(models) > 1:
            figures["map_against"] = Figure(figsize=(looks.WIDE, 2.55))
            part = f"seed={study.recordings.seeds[0]}"
            pair = [_map(study, images, model, part) for model in models[:2]]
            title = f"{study.name}, {part.replace('=', ' ')}, N = {len(pair[0]):,}"
            maps.against(figures["map_against"], *pair, tuple(models[:2]), title)
    return _save(study, figures)


def _map(study: Study, images: Images, model: str, part: str) -> pd.DataFrame:
    log = open_log(study, images, model, part)
    return datamap(log, el2n_epoch=study.dynamics.el2n_epoch, window=study.dynamics.window)


def describe_scores(study: Study, tables: Tables) -> str:
    """What the score tables say, as Markdown; also written to the figures folder."""
    first = next(iter(study.recordings.models))
    between, matrix = tables["models"], tables["correlations"]
    lines = [
        f"# {study.name}: how far a score can be trusted",
        "",
        f"Spearman's rank correlations over {len(study.recordings.seeds)} seeds. *Two runs*: mean "
        f"(extremes) over pairs of seeds. *Runs for {TARGET}*: how many must be averaged until two "
        "such averages agree that far, by the Spearman-Brown formula. *Other model*: the averages "
        "over seeds of two architectures.",
        "",
        f"| score | two runs, {first} | runs for {TARGET} | other model |",
        "| --- | --- | ---: | --- |",
    ]
    for row in tables["runs"].query("model == @first").to_dict("records"):
        others = between[between["score"] == row["score"]]
        told = ", ".join(f"{r.other} {r.correlation:.2f}" for r in others.itertuples()) or "-"
        if np.isnan(row["correlation"]):
            lines.append(
                f"| {row['score']} | the same for every example, in one run at least | - | - |"
            )
            continue
        lines.append(
            f"| {row['score']} | {row['correlation']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
            f"| {row['runs_needed']:g} | {told} |"
        )
    lines += ["", "## Same name, different score", ""]
    for name, others in SAME_NAME.items():
        for other in others:
            if name in matrix and other in matrix:
                lines.append(f"- `{other}` goes by the name of `{name}`: "
                             f"Spearman {matrix.loc[name, other]:.2f} in one run.")  # fmt: skip
    return _tell(study, "scores", lines)


def noise_tables(study: Study, images: Images) -> Tables:
    """How well scores find the labels that are wrong.

    Returns: `detectors`, AUROC and average precision of each (mean and extremes over seeds, one
        value of what comes from cross-validation); `curves` of the first seed; `over_epochs`, AUROC
        against epochs recorded (mean over seeds); `rules`, what rules with a threshold of their own
        flag.
    Raises: StudyError when the study's labels are those of its source.
    """
    if study.data.relabel is None:
        raise StudyError(
            f"the labels of {study.name} are those of its source, so that none is known to be "
            "wrong: give `data` a `relabel`, as params/digits_noise.yaml has"
        )
    ids = images.train_ids
    labels, originals = (images.train.read(c, ids) for c in ("labels", "original_labels"))
    wrong = labels != originals
    model = next(iter(study.recordings.models))
    scores = recorded_scores(study, images, [model])[model]
    rows, curves, epochs = [], [], []

    def add(name: str, suspicions: list[np.ndarray]) -> None:
        roc = [noise.auroc(s, wrong) for s in suspicions]
        precision = [noise.average_precision(s, wrong) for s in suspicions]
        row = {"detector": name, "auroc": np.mean(roc), "low": min(roc), "high": max(roc)}
        row |= {"average_precision": np.mean(precision), "n_runs": len(roc)}
        rows.append(row)
        curves.append(noise.thinned(noise.curves(suspicions[0], wrong)).assign(detector=name))

    for name, sign in DIFFICULTY.items():
        if sign and name in next(iter(scores.values())):
            add(name, [sign * table[name].to_numpy(np.float64) for table in scores.values()])
    rules = {}
    if study.recordings.folds:
        probs = recordings.open_held_out(study, images).to_numpy()
        for name, suspicion in noise.held_out_scores(probs, labels).items():
            add(name, [suspicion])
        suspicion, flagged = noise.confident_learning(probs, labels)
        add("cleanlab", [suspicion])
        rules["cleanlab: label issues"] = flagged
    if study.recordings.threshold_samples:
        rules["AUM below threshold samples"] = _below_threshold(study, images)
    for seed in study.recordings.seeds:
        log = open_log(study, images, model, f"seed={seed}")
        epochs.append(noise.over_epochs(log, wrong))
    judged = {name: noise.Flagged.judged(flags, wrong) for name, flags in rules.items()}
    tables = {
        "detectors": pd.DataFrame(rows).sort_values("auroc", ascending=False, ignore_index=True),
        "curves": pd.concat(curves, ignore_index=True),
        "over_epochs": pd.concat(epochs).groupby(["detector", "epoch"], as_index=False).mean(),
        "rules": pd.DataFrame(
            [
                {"rule": name, "flagged": int(found.flagged.sum()), "precision": found.precision,
                 "recall": found.recall}
                for name, found in judged.items()
            ],
            columns=["rule", "flagged", "precision", "recall"],
        ),
        "labels": pd.DataFrame({"wrong": [int(wrong.sum())], "n_examples": [len(wrong)]}),
    }  # fmt: skip
    return _write(study, "noise", tables)


def _below_threshold(study: Study, images: Images) -> np.ndarray:
    model, ids = next(iter(study.recordings.models)), images.train_ids
    margins, pretending = [], []
    for which in (1, 2):
        log = open_log(study, images, model, f"threshold={which}")
        margins.append(aum(log["margin"]))
        drawn = recordings.threshold_samples(ids, images.n_classes, which)
        pretending.append(np.isin(ids, drawn))
    return noise.below_threshold_samples(tuple(margins), tuple(pretending))


def draw_noise(study: Study, images: Images, tables: Tables) -> dict[str, Any]:
    """Draw `detectors` and `suspects`, the images whose labels AUM suspects most.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    shown = [n for n in (*DETECTORS, "cleanlab") if n in set(tables["detectors"]["detector"])]
    curves = tables["curves"][tables["curves"]["detector"].isin(shown)]
    over = tables["over_epochs"]
    counts = tables["labels"].iloc[0]
    figures = {}
    with looks.style():
        figures["detectors"] = Figure(figsize=(looks.WIDE, 3.0))
        summary = tables["detectors"][tables["detectors"]["detector"].isin(shown)]
        maps.detectors(
            figures["detectors"], curves, summary, over[over["detector"].isin(shown)],
            noise_rate=counts["wrong"] / counts["n_examples"],
        )  # fmt: skip
        figures["suspects"] = Figure(figsize=(looks.WIDE, 2.4))
        plots.region_grid(figures["suspects"], *_suspects(study, images))
    return _save(study, figures)


def _suspects(study: Study, images: Images, n: int = 12) -> tuple[dict, dict]:
    """The lowest AUM (mean over seeds) among wrong and among right labels, with captions."""
    ids = images.train_ids
    model, seeds = next(iter(study.recordings.models)), study.recordings.seeds
    logs = [open_log(study, images, model, f"seed={seed}") for seed in seeds]
    mean = np.mean([aum(log["margin"]) for log in logs], axis=0)
    labels, originals = (images.train.read(c, ids) for c in ("labels", "original_labels"))
    names = images.train.header["class_names"]
    pixels, captions = {}, {}
    rows = (("wrong label", labels != originals), ("right label", labels == originals))
    for name, mask in rows:
        chosen = np.flatnonzero(mask)[np.argsort(mean[mask], kind="stable")[:n]]
        pixels[name] = images.train.read("images", ids[chosen])
        captions[name] = [str(names[label]) for label in labels[chosen]]
    return pixels, captions


def describe_noise(study: Study, tables: Tables) -> str:
    """What the noise tables say, as Markdown; also written to the figures folder."""
    counts = tables["labels"].iloc[0]
    lines = [
        f"# {study.name}: which scores find wrong labels",
        "",
        f"{counts['wrong']:,} of {counts['n_examples']:,} training labels differ from those of the "
        f"source ({counts['wrong'] / counts['n_examples']:.1%}). AUROC: mean (extremes) over runs; "
        "0.5 is chance. Held-out scores and cleanlab judge each image by a network that has not "
        "learnt it.",
        "",
        "| detector | AUROC | average precision | runs |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in tables["detectors"].to_dict("records"):
        spread = f" ({row['low']:.3f} to {row['high']:.3f})" if row["n_runs"] > 1 else ""
        lines.append(
            f"| {row['detector']} | {row['auroc']:.3f}{spread} | {row['average_precision']:.3f} "
            f"| {row['n_runs']} |"
        )
    if len(tables["rules"]):
        lines += ["", "| rule with a threshold | flagged | precision | recall |",
                  "| --- | ---: | ---: | ---: |"]  # fmt: skip
        for row in tables["rules"].to_dict("records"):
            lines.append(f"| {row['rule']} | {row['flagged']:,} | {row['precision']:.3f} "
                         f"| {row['recall']:.3f} |")  # fmt: skip
    return _tell(study, "noise", lines)


def redraw(study: Study, images: Images) -> dict[str, Any]:
    """Every figure of notebooks 07 and 08, whichever of them is finished, with its text.

    Raises: FileNotFoundError and ValueError for recordings that are gone or of another study.
    """
    drawn: dict[str, Any] = {}
    for step, compute, draw, describe in (
        ("scores", score_tables, draw_scores, describe_scores),
        ("noise", noise_tables, draw_noise, describe_noise),
    ):
        if (study.runs / step / "evidence.json").is_file():
            tables = compute(study, images)
            drawn |= draw(study, images, tables)
            describe(study, tables)
    return drawn


def finish(study: Study, step: str, tables: Tables) -> dict[str, Any]:
    """Mark the step `scores` or `noise` made."""
    folder = study.runs / step
    inputs = {name: files.sha256_file(folder / f"{name}.parquet") for name in tables}
    settings = {"own": study.step_settings(step), "inputs": inputs}
    files.write_json(folder / "settings.json", settings)
    return runs.Run(folder, settings).finish({"step": step, "study": study.name})


def _write(study: Study, step: str, tables: Tables) -> Tables:
    for name, table in tables.items():
        path = study.runs / step / f"{name}.parquet"
        files.write_atomic(path, lambda f, t=table: t.to_parquet(f))
    return tables


def _tell(study: Study, name: str, lines: list[str]) -> str:
    text = "\n".join(lines).rstrip() + "\n"
    files.write_atomic(study.figures / f"{name}.md", lambda file: file.write(text.encode()))
    return text


def _save(study: Study, figures: dict[str, Figure]) -> dict[str, Any]:
    return {n: looks.save_figure(f, study.figures, n)[1] for n, f in figures.items()}
