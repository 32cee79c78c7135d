"""The findings of the studies, in words, from their committed tables (README, docs/findings.md)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.compare.answer import first_comment
from kdlib.compare.committed import is_committed, read_committed
from kdlib.compare.comparisons import asked_comparison, by_place, comparisons
from kdlib.compare.statistics import VERDICTS
from kdlib.compare.text import count, place_in_words
from kdlib.compare.text import table as markdown_table
from kdlib.repro.files import study_files
from kdlib.study.cells import shards_counted, share_in_words
from kdlib.study.load import load_study
from kdlib.study.study import Study

ASKS = "Study "  # how the first comment of a study file begins whose findings are listed
NAMED = 2  # rows of one verdict that a line names

# A sentence of the README, and for each `{}` in it one row of a comparison: the study, the
# comparison, and the values that select the row.
Row = tuple[str, str, dict[str, Any]]
Sentence = tuple[str, tuple[Row, ...]]


def _thirds(study: str, strategy: str, *points: tuple[str, str]) -> tuple[Row, ...]:
    """The rows of a third of the images against a random third, for (student, objective) pairs."""
    fixed = {"strategy": strategy, "fraction": 0.33}
    return tuple(
        (study, "strategies", fixed | {"student": student, "objective": objective})
        for student, objective in points
    )


TEN = "thirds_cifar10"  # ten passes over a third, each seed with a recording of its own
HEADLINE: Sentence = (
    "On CIFAR-10, distilling a ResNet-8 on the most ambiguous third of the images (ten passes) "
    "instead of a random third changes its test accuracy by {}.",
    _thirds(TEN, "ambiguous_corner", ("resnet8", "kd")),
)

KEY_FINDINGS: tuple[Sentence, ...] = (
    (
        "The budget decides: on CIFAR-10, the third with the highest `correctness` instead of a "
        "random third changes the accuracy of a distilled ResNet-8 by {} after 400 steps of 64 "
        "images (under two passes), and by {} after ten passes.",
        tuple(
            row
            for study in ("subsets", TEN)
            for row in _thirds(study, "correctness_top", ("resnet8", "kd"))
        ),
    ),
    (
        "On CIFAR-10, after ten passes, the third with the lowest `confidence` instead of a random "
        "third changes its accuracy by {}; all images at the same number of steps, by {}.",
        (
            *_thirds(TEN, "confidence_bottom", ("resnet8", "kd")),
            (TEN, "strategies", {"strategy": "full"}),
        ),
    ),
    (
        "On MNIST, the third that `hard` ranks first instead of a random third changes the "
        "accuracy of a ResNet-8 without a teacher by {}, and with one by {}.",
        _thirds("mnist_subsets", "hard", ("resnet8", "plain"), ("resnet8", "kd")),
    ),
    (
        "On the digits, the teacher changes the accuracy of a tiny network by {} on a random tenth "
        "of the images, and by {} on all of them, at equal steps.",
        (
            ("digits", "objectives", {"strategy": "random", "fraction": 0.1}),
            ("digits", "objectives", {"strategy": "full"}),
        ),
    ),
    (
        "On CIFAR-10, the same shards in each pass instead of shards drawn anew change the linear "
        "probe of a tiny network by {} with the teacher's features, and by {} with its logits.",
        tuple(
            ("shards", "strategies", {"strategy": "fixed_shards", "objective": objective})
            for objective in ("features", "kd")
        ),
    ),
)


def in_words(sentence: Sentence) -> str:
    """A sentence with the paired differences of its rows, from the committed tables.

    Raises: ValueError for tables that were changed or belong to other settings.
    """
    text, rows = sentence
    differences = []
    for name, comparison, values in rows:
        study = load_study(f"params/{name}.yaml")
        table = comparisons(study, read_committed(study))[comparison]
        for column, value in values.items():
            table = table[table[column] == value]
        [row] = table.itertuples()
        interval = f"95 % interval {100 * row.low:+.1f} to {100 * row.high:+.1f}"
        differences.append(f"{100 * row.difference:+.1f} points ({interval}, {row.verdict})")
    return text.format(*differences)


def question_of(path: Path) -> str | None:
    """The question of a study: the first comment of its file up to `?`, where the comment begins
    with `ASKS`."""
    comment = first_comment(path)
    return comment.split("?")[0] + "?" if comment.startswith(ASKS) else None


def findings(repository: str = "") -> list[str]:
    """One item of a Markdown list for each study whose file begins with `ASKS` and whose tables are
    committed, in the order of their questions.

    Args:
        repository: What the paths of links begin with, such as `../`.

    Raises: ValueError for tables that were changed or belong to other settings.
    """
    items = []
    for path in study_files():
        question = question_of(path)
        if question is not None and is_committed(study := load_study(path)):
            items.append((question, finding(study, question, repository)))
    return [item for _, item in sorted(items)]


def finding(study: Study, question: str, repository: str = "") -> str:
    """The findings of one study: an item of a list with the question, and one below it for each
    student, and objective or fraction."""
    tables = comparisons(study, read_committed(study))
    kind, name = asked_comparison(study, tables), study.name
    against = study.compare.baseline if kind == "strategies" else study.compare.objective
    pictures = {"strategies": "differences", "controls": "control_differences",
                "objectives": "objective_differences"}  # fmt: skip
    figures = ", ".join(
        f"[figure{f' on {place_in_words(on)}' if study.compare.on else ''}]"
        f"({repository}figures/{name}/{study.compare.placed(pictures[kind], on)}.png)"
        for on in study.compare.places
    )
    links = (
        f"{figures}, "
        f"[table]({repository}figures/{name}/comparison.md), "
        f"[study]({repository}params/{name}.yaml), {count(len(study.seeds), 'seed')}"
        + (", each with a recording of its own" if study.dynamics.per_seed else "")
    )
    with shards_counted(tables["results"]):
        verdicts = "".join(
            f"\n  - {f'on {place_in_words(on)}, ' if on else ''}{line}."
            for on, rows in by_place(tables[kind])
            for line in _groups(rows, kind)
        )
    refused = tables["results"]["refused"]
    lost = f", {count(int(refused.sum()), 'run')} refused" if refused.any() else ""
    training = study.training
    budget = "at equal epochs" if training.steps is None else f"{training.steps:,} steps"
    return (
        f"- **{question}** {budget} of {training.batch_size} images, against {against}{lost} "
        f"({links}).{verdicts}"
    )


def budgets(names: Sequence[str], student: str, objective: str) -> str:
    """A Markdown table of what several studies find of the same selections at their budgets: the
    difference of each strategy to the baseline at a fraction, largest in the last study first.

    Args:
        names: Of studies whose tables are committed, of the same baseline and fractions.

    Raises: ValueError for tables that were changed or belong to other settings.
    """
    found, heads = [], []
    for name in names:
        study = load_study(f"params/{name}.yaml")
        rows = comparisons(study, read_committed(study))["strategies"]
        rows = rows[(rows["student"] == student) & (rows["objective"] == objective)]
        found.append(rows[rows["strategy"] != "full"].set_index(["strategy", "fraction"]))
        heads.append(f"{study.training.steps:,} steps of {study.training.batch_size} images")
    last = found[-1].sort_values("difference", ascending=False, kind="stable")
    kept = [key for key in last.index if all(key in rows.index for rows in found)]
    cells = [
        [
            f"{strategy}, {share_in_words(fraction)}",
            *(
                f"{100 * row.difference:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f}) "
                f"{row.verdict}"
                for row in (rows.loc[(strategy, fraction)] for rows in found)
            ),
        ]
        for strategy, fraction in kept
    ]
    return markdown_table(["selection", *heads], cells)


def _groups(table: pd.DataFrame, kind: str) -> Iterator[str]:
    """The verdicts of each student, and objective or fraction, in words."""
    by = ["student", "objective"] if kind == "strategies" else ["student", "fraction"]
    table = table[table["difference"].notna()]  # rows of refused runs have no pair
    subsets = table[table["strategy"] != "full"]
    if kind == "strategies" and len(subsets):  # else the full set is all there is to compare
        table = subsets
    several = table["student"].nunique() > 1
    for (student, part), rows in table.groupby(by, sort=False):
        label = part if kind == "strategies" else f"{share_in_words(part)} of the images"
        verdicts = [_verdict(rows, verdict, kind) for verdict in VERDICTS]
        yield f"{f'{student}, ' if several else ''}{label}: {'; '.join(filter(None, verdicts))}"


def _verdict(rows: pd.DataFrame, verdict: str, kind: str) -> str:
    """How many rows have a verdict, and those of the largest difference by name."""
    some = rows[rows["verdict"] == verdict]
    if some.empty:
        return ""
    order = some.reindex(some["difference"].abs().sort_values(ascending=False, kind="stable").index)
    names = []
    for row in order.head(NAMED).itertuples():
        name = row.strategy if kind == "strategies" else row.objective
        if kind == "strategies" and row.strategy == "full":
            name = f"full against {share_in_words(row.against_fraction)}"
        elif kind == "strategies" and rows["fraction"].nunique() > 1:
            name += f" at {share_in_words(row.fraction)}"
            if row.against_fraction != row.fraction and row.against_strategy != "full":
                name += f" against {row.against_strategy} at {share_in_words(row.against_fraction)}"
        ends = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
        no_interval = "one seed" if row.n_seeds == 1 else "the same in every seed"
        ends = no_interval if pd.isna(row.low) else ends
        more = "" if pd.isna(row.seeds_needed) else f", about {row.seeds_needed:.0f} seeds"
        names.append(f"{name} {100 * row.difference:+.1f} ({ends}{more})")
    rest = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
    return f"{len(some)} {verdict}: {', '.join(names)}{rest}"
