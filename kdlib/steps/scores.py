"""Step 07: how far scores agree between scores, runs and models, from a study's recordings."""

import itertools
from collections.abc import Iterable

import numpy as np
import pandas as pd

from kdlib.cartography.agreement import (
    between_runs,
    rank_correlations,
    runs_needed,
    spearman,
    stability,
)
from kdlib.cartography.datamap import compute_datamap, ranked
from kdlib.cartography.variants import SAME_NAME, variants
from kdlib.compare.comparisons import Tables
from kdlib.compare.text import table, write_text
from kdlib.dataset.images import Images
from kdlib.steps.recordings import open_gradients, open_log, recordings_of
from kdlib.study.selections import SCORES
from kdlib.study.study import Study

TARGET = 0.95  # Spearman's correlation at which two averages count as one ranking


def recorded_scores(
    study: Study, images: Images, models: Iterable[str] | None = None
) -> dict[str, dict[int, pd.DataFrame]]:
    """Every score, as it ranks examples, and variant in every recorded run: model -> seed -> table
    by example id.

    Args:
        models: Some of the study's; None: all.

    Raises: StudyError for a study without recordings; FileNotFoundError for a recording that is not
        finished.
    """
    window, epoch = study.dynamics.window, study.dynamics.el2n_epoch
    recordings = recordings_of(study)
    scores: dict[str, dict[int, pd.DataFrame]] = {}
    for model in recordings.models if models is None else models:
        for seed in recordings.seeds:
            log = open_log(study, images, model, f"seed={seed}")
            of_run = compute_datamap(log, el2n_epoch=epoch, window=window)
            of_run["forgetting_events"] = ranked(of_run, "forgetting_events")
            of_run = of_run.join(variants(log, window=window))
            gradients = open_gradients(study, model, f"seed={seed}")
            if gradients is not None:
                of_run = of_run.join(gradients)
            scores.setdefault(model, {})[seed] = of_run
    return scores


def _of_each(tables: dict[int, pd.DataFrame], score: str) -> np.ndarray:
    """One score in every run, (R, N)."""
    return np.stack([of_run[score].to_numpy(np.float64) for of_run in tables.values()])


def _scores_of(of_run: pd.DataFrame) -> list[str]:
    others = [name for names in SAME_NAME.values() for name in names if name not in SCORES]
    return [name for name in (*SCORES, *others) if name in of_run]


def score_tables(study: Study, images: Images) -> Tables:
    """How scores agree: with each other, from seed to seed, from model to model.

    Returns: `correlations`, Spearman between scores (mean over the first model's seeds); `runs`,
        per model and score the agreement of two runs and how many must be averaged; `stability`,
        the agreement of averages over n runs; `models`, per score that of two models' averages.
    """
    scores = recorded_scores(study, images)
    first = next(iter(scores.values()))
    names = _scores_of(next(iter(first.values())))
    matrices = [rank_correlations(of_run[names]) for of_run in first.values()]
    tables = {"correlations": sum(matrices) / len(matrices)}
    per_run, per_n = [], []
    for model, of_model in scores.items():
        for name in _scores_of(next(iter(of_model.values()))):
            values, row = _of_each(of_model, name), {"model": model, "score": name}
            agreement = between_runs(values)
            needed = runs_needed(agreement["correlation"], TARGET)
            per_run.append(row | agreement | {"runs_needed": needed, "n_runs": len(values)})
            if not np.isnan(agreement["correlation"]):
                per_n += [row | r for r in stability(values).to_dict("records")]
    tables["runs"], tables["stability"] = pd.DataFrame(per_run), pd.DataFrame(per_n)
    between = []
    for pair in itertools.combinations(scores, 2):
        for name in names:
            if all(name in next(iter(scores[model].values())) for model in pair):
                means = [_of_each(scores[model], name).mean(axis=0) for model in pair]
                between.append((*pair, name, spearman(*means)))
    tables["models"] = pd.DataFrame(between, columns=["model", "other", "score", "correlation"])
    return tables


def describe_scores(study: Study, tables: Tables) -> str:
    """The score tables in words, as Markdown; also written to the figures folder."""
    first = next(iter(study.recordings.models))
    between, matrix = tables["models"], tables["correlations"]
    rows = []
    for row in tables["runs"].query("model == @first").to_dict("records"):
        others = between[between["score"] == row["score"]]
        other = ", ".join(f"{r.other} {r.correlation:.2f}" for r in others.itertuples()) or "-"
        cells = (
            f"{row['correlation']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            f"{row['runs_needed']:g}", other,
        )  # fmt: skip
        if np.isnan(row["correlation"]):
            cells = ("the same for every example, in one run at least", "-", "-")
        rows.append((row["score"], *cells))
    head = ("score", f"two runs, {first}", f"runs for {TARGET}", "other model")
    lines = [
        f"# {study.name}: how far a score can be trusted",
        "",
        f"Spearman's rank correlations over {len(study.recordings.seeds)} seeds. *Two runs*: mean "
        f"(extremes) over pairs of seeds. *Runs for {TARGET}*: how many must be averaged until two "
        "such averages agree that far, by the Spearman-Brown formula. *Other model*: the averages "
        "over seeds of two architectures.",
        "",
        table(head, rows, "llrl"),
        "",
        "## Same name, different score",
        "",
    ]
    for name, others in SAME_NAME.items():
        for other in others:
            if name in matrix and other in matrix:
                lines.append(f"- `{other}` goes by the name of `{name}`: "
                             f"Spearman {matrix.loc[name, other]:.2f} in one run.")  # fmt: skip
    return write_text(study, "scores.md", lines)
