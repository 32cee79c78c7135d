"""Students of a saved selection against students of as many random images: how far their training
is, and what it gave."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kdlib.cartography.subset import Subset
from kdlib.compare.differences import paired_differences
from kdlib.explorer.background import BackgroundTraining
from kdlib.explorer.selections import BASELINE, selection_path, selection_runs, students
from kdlib.study.study import Study

BLUE, GREY = "#0072B2", "#888888"
_STEP = re.compile(r"(\d+)/(\d+) \[[^\]]*step")  # the progress bar of a training


@dataclass(frozen=True)
class Progress:
    """How far the training is.

    Attributes:
        done: (objective, strategy, seed) -> the error of its student, "" without one.
        step, n_steps: Of the student that is trained at present; None before its first step.
    """

    done: dict[tuple[str, str, int], str]
    step: int | None
    n_steps: int | None


def progress_of(lines: Sequence[str]) -> Progress:
    """What `python -m kdlib step distill` printed so far: a JSON line for each student, between
    them the progress bar of the present one."""
    done, step, n_steps = {}, None, None
    for line in lines:
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # half of it is written
                continue
            key = (row["objective"], row["strategy"], row["seed"])
            done[key], step, n_steps = row.get("error", ""), None, None
        elif bar := _STEP.search(line):
            step, n_steps = map(int, bar.groups())
    return Progress(done, step, n_steps)


def progress_html(study: Study, name: str, lines: Sequence[str]) -> str:
    """A row per objective and subset, a cell per seed: done, failed, at which step, or to come."""
    progress, wanted = progress_of(lines), students(study, name)
    keys = [(cell.objective, cell.strategy, seed) for cell, seed in wanted]
    now = next((key for key in keys if key not in progress.done), None)
    head = "".join(f"<th>seed {seed}</th>" for seed in study.seeds)
    body = ""
    for objective in study.axes.objective:
        for strategy in dict.fromkeys(cell.strategy for cell, _ in wanted):
            cells = ""
            for seed in study.seeds:
                key = (objective, strategy, seed)
                text = "to come"
                if key in progress.done:
                    text = "failed" if progress.done[key] else "done"
                elif key == now:
                    text = "begins"
                    if progress.step is not None:
                        text = f"step {progress.step:,} of {progress.n_steps:,}"
                cells += f"<td class='kdlib-{text.split()[0]}'>{text}</td>"
            subset = "random" if strategy == BASELINE else name
            body += f"<tr><th>{html.escape(objective)}, {html.escape(subset)}</th>{cells}</tr>"
    n_done = sum(not error for error in progress.done.values())
    return (
        f"<div class='kdlib-log'>{n_done} of {len(keys)} students done.<table "
        f"class='kdlib-progress'><tr><td></td>{head}</tr>{body}</table></div>"
    )


def failure_html(name: str, training: BackgroundTraining) -> str:
    """The errors of a training, and the path of its log."""
    progress = progress_of(training.lines())
    errors = dict.fromkeys(filter(None, progress.done.values())) or [training.error()]
    shown = "<br>".join(html.escape(" ".join(error.split())) for error in errors)
    which = [f"{o}, {s}, seed {i}" for (o, s, i), error in progress.done.items() if error]
    where = f" ({html.escape('; '.join(which))})" if which else ""
    return (
        f"<div class='kdlib-failure kdlib-wrong'><b>The training of students on "
        f"{html.escape(name)} failed{where}:</b> {shown}<br>The whole log: "
        f"<code>{html.escape(str(training.log))}</code></div>"
    )


def results_html(study: Study, name: str) -> str:
    """Paired differences of test accuracy, in points: interval, verdict, and a dot per seed; empty
    where no seed has both students."""
    runs, size = selection_runs(study, name), len(Subset.load(selection_path(study, name)))
    settings = study.compare
    level = 100 * settings.confidence_level
    if runs.empty or runs["strategy"].nunique() < 2:
        return ""
    table = paired_differences(runs, BASELINE, settings.margin, settings.confidence_level)
    table = table[table["n_seeds"] > 0]
    if table.empty:
        return ""
    scale = _scale(runs, table)
    rows = [_row(row, _differences(runs, row.objective), scale) for row in table.itertuples()]
    lines = "".join(rows)
    heads = ("objective", name, "random", "difference", f"{level:g} % interval", "seed by seed",
             "verdict")  # fmt: skip
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return (
        f"<div class='kdlib-results'>Test accuracy at the last step of students trained on "
        f"<b>{html.escape(name)}</b> minus that of students trained on as many random examples "
        f"({size:,}), paired by seed, in points. Equivalent: certainly within "
        f"{100 * settings.margin:g} (grey).<table><tr>{head}</tr>{lines}</table></div>"
    )


def _differences(runs: pd.DataFrame, objective: str) -> pd.Series:
    """Picked minus random by seed, in points, of the seeds that have both."""
    rows = runs[runs["objective"] == objective].assign(b=lambda t: t["strategy"] == BASELINE)
    wide = rows.pivot(index="seed", columns="b", values="test_accuracy").dropna()
    return 100 * (wide[False] - wide[True])


def _scale(runs: pd.DataFrame, table: pd.DataFrame) -> float:
    """Points at either end of the picture, the same for each objective."""
    ends = [100 * table[["low", "high"]].abs().max(axis=None), 100 * table["margin"].max()]
    ends += [_differences(runs, objective).abs().max() for objective in table["objective"]]
    return 1.1 * float(np.nanmax(ends))


def _row(row, differences: pd.Series, scale: float) -> str:
    """One objective's line of the table."""
    interval, said = "", row.verdict
    if np.isfinite(row.low):
        interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
        if row.verdict == "inconclusive" and not pd.isna(row.seeds_needed):
            said += f"; about {row.seeds_needed} seeds would settle it"
    else:
        why = "one seed" if row.n_seeds == 1 else "no spread between the seeds"
        interval = said = f"none: {why}"
    texts = (row.objective, f"{100 * row.mean:.2f} %", f"{100 * row.against_mean:.2f} %",
             f"{100 * row.difference:+.2f}", interval)  # fmt: skip
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
    dots = _dots_svg(row, differences, scale)
    return f"<tr>{cells}<td>{dots}</td><td><b>{html.escape(said)}</b></td></tr>"


def _dots_svg(row, differences: pd.Series, scale: float, width: int = 190, height: int = 24) -> str:
    """A dot per seed, their mean and its interval; the margin in grey, a line at no difference."""

    def x(points: float) -> float:
        return width / 2 * (1 + points / scale)

    middle, margin = height / 2, 100 * row.margin
    parts = [
        f"<rect x='{x(-margin):.1f}' width='{x(margin) - x(-margin):.1f}' height='{height}' "
        f"fill='{GREY}' fill-opacity='.25'/>",
        f"<path d='M{width / 2} 0V{height}' stroke='{GREY}'/>",
    ]
    if np.isfinite(row.low):
        parts.append(
            f"<path d='M{x(100 * row.low):.1f} {middle}H{x(100 * row.high):.1f}' "
            "stroke='currentColor' stroke-width='2'/>"
        )
    parts.append(
        f"<path d='M{x(100 * row.difference):.1f} {middle - 7}v14' stroke='currentColor' "
        "stroke-width='2'/>"
    )
    parts += [
        f"<circle cx='{x(points):.1f}' cy='{middle}' r='3.5' fill='{BLUE}' fill-opacity='.75'>"
        f"<title>seed {seed}: {points:+.2f} points</title></circle>"
        for seed, points in differences.items()
    ]
    text = ", ".join(f"seed {seed} {points:+.1f}" for seed, points in differences.items())
    return (
        f"<svg class='kdlib-dots' role='img' aria-label='{text}' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}'>{''.join(parts)}</svg>"
    )
