"""Step 08: scores as detectors of wrong labels."""

import numpy as np
import pandas as pd

from kdlib.cartography import label_noise
from kdlib.cartography.scores import aum
from kdlib.compare.comparisons import Tables
from kdlib.compare.text import table, write_text
from kdlib.dataset.images import Images
from kdlib.steps.recordings import open_held_out, open_log, recordings_of, threshold_samples
from kdlib.steps.scores import recorded_scores
from kdlib.study.base import StudyError
from kdlib.study.selections import DIFFICULTY
from kdlib.study.study import Study

DETECTORS = ("aum", "loss", "confidence", "el2n", "forgetting_events", "held-out margin")


def noise_tables(study: Study, images: Images) -> Tables:
    """How well scores find the labels that are wrong.

    Returns: `detectors`, AUROC and average precision of each (mean and extremes over seeds, one
        value of what comes from cross-validation); `curves` of the first seed; `over_epochs`, AUROC
        against epochs recorded (mean over seeds); `rules`, what rules with a threshold flag;
        `labels`, how many are wrong.
    Raises: StudyError when the study's labels are those of its source, or it has no recordings.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    demand_relabelled(study)
    ids = images.train_ids
    labels, originals = (images.train.read(c, ids) for c in ("labels", "original_labels"))
    wrong = labels != originals
    if not wrong.any():
        raise StudyError(f"`data.relabel` of {study.name} changes no label: none is wrong")
    model = next(iter(recordings_of(study).models))
    scores = recorded_scores(study, images, [model])[model]
    rows, curves, epochs = [], [], []

    def add(name: str, suspicions: list[np.ndarray]) -> None:
        roc = [roc_auc_score(wrong, s) for s in suspicions]
        precision = [average_precision_score(wrong, s) for s in suspicions]
        row = {"detector": name, "auroc": np.mean(roc), "low": min(roc), "high": max(roc)}
        row |= {"average_precision": np.mean(precision), "n_runs": len(roc)}
        rows.append(row)
        curves.append(
            label_noise.thinned(label_noise.curves(suspicions[0], wrong)).assign(detector=name)
        )

    for name, sign in DIFFICULTY.items():
        if sign and name in next(iter(scores.values())):
            add(name, [sign * of_run[name].to_numpy(np.float64) for of_run in scores.values()])
    rules = {}
    if study.recordings.folds:
        probs = open_held_out(study, images).to_numpy()
        for name, suspicion in label_noise.held_out_scores(probs, labels).items():
            add(name, [suspicion])
        suspicion, flagged = label_noise.confident_learning(probs, labels)
        add("cleanlab", [suspicion])
        rules["cleanlab: label issues"] = flagged
    if study.recordings.threshold_samples:
        rules["AUM below threshold samples"] = _below_threshold(study, images)
    for seed in study.recordings.seeds:
        log = open_log(study, images, model, f"seed={seed}")
        epochs.append(label_noise.over_epochs(log, wrong))
    return {
        "detectors": pd.DataFrame(rows).sort_values("auroc", ascending=False, ignore_index=True),
        "curves": pd.concat(curves, ignore_index=True),
        "over_epochs": pd.concat(epochs).groupby(["detector", "epoch"], as_index=False).mean(),
        "rules": pd.DataFrame(
            [{"rule": k} | label_noise.precision_recall(v, wrong) for k, v in rules.items()],
            columns=["rule", "flagged", "precision", "recall"],
        ),
        "labels": pd.DataFrame({"wrong": [int(wrong.sum())], "n_examples": [len(wrong)]}),
    }


def demand_relabelled(study: Study) -> None:
    """Raises: StudyError when the study's labels are those of its source."""
    if study.data.relabel is None:
        raise StudyError(
            f"no label of {study.name} is known to be wrong, since all are those of its source: "
            "open a study with `data: {relabel: ...}`, such as params/digits_noise.yaml"
        )


def _below_threshold(study: Study, images: Images) -> np.ndarray:
    model, ids = next(iter(study.recordings.models)), images.train_ids
    margins, pretending = [], []
    for which in (1, 2):
        log = open_log(study, images, model, f"threshold={which}")
        margins.append(aum(log["margin"]))
        drawn = threshold_samples(ids, images.n_classes, which)
        pretending.append(np.isin(ids, drawn))
    return label_noise.below_threshold_samples(tuple(margins), tuple(pretending))


def suspects(study: Study, images: Images, n: int = 12) -> tuple[dict, dict]:
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
    """The noise tables in words, as Markdown; also written to the figures folder."""
    counts = tables["labels"].iloc[0]
    rows = []
    for row in tables["detectors"].to_dict("records"):
        extremes = f" ({row['low']:.3f} to {row['high']:.3f})" if row["n_runs"] > 1 else ""
        auroc, precision = f"{row['auroc']:.3f}{extremes}", f"{row['average_precision']:.3f}"
        rows.append((row["detector"], auroc, precision, row["n_runs"]))
    lines = [
        f"# {study.name}: which scores find wrong labels",
        "",
        f"{counts['wrong']:,} of {counts['n_examples']:,} training labels differ from those of the "
        f"source ({counts['wrong'] / counts['n_examples']:.1%}). AUROC: mean (extremes) over runs; "
        "0.5 is chance. Held-out scores and cleanlab judge each image by a network that was not "
        "trained on it.",
        "",
        table(("detector", "AUROC", "average precision", "runs"), rows, "llrr"),
    ]
    if len(tables["rules"]):
        rows = [
            (row["rule"], f"{row['flagged']:,}", f"{row['precision']:.3f}", f"{row['recall']:.3f}")
            for row in tables["rules"].to_dict("records")
        ]
        head = ("rule with a threshold", "flagged", "precision", "recall")
        lines += ["", table(head, rows, "lrrr")]
    return write_text(study, "noise.md", lines)
