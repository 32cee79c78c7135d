"""What the studies found, from their committed tables alone: the list in the README.

Leaves to others: the comparisons (compiling), and their every row in words (telling).
"""

import itertools
from collections.abc import Iterator

import pandas as pd

from kdlib.compare.committed import read, there
from kdlib.compare.comparisons import comparisons
from kdlib.compare.statistics import VERDICTS
from kdlib.compare.text import count
from kdlib.repro.files import workspace
from kdlib.study.load import load_study
from kdlib.study.study import Study

NAMED = 2  # rows of one verdict that a line names


ASKS = "Study "  # how the first comment of a study file begins that asks a question of the paper


def findings() -> list[str]:
    """One item of a Markdown list for each study of the two questions whose tables are committed,
    in the order of what their files ask first.

    Raises: ValueError for tables that were changed or belong to other settings.
    """
    asked = []
    for path in (workspace() / "params").glob("*.yaml"):
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().split("\n"))
        told = " ".join(line.removeprefix("#").strip() for line in lines)
        if told.startswith(ASKS) and there(study := load_study(path)):
            question = told.split("?")[0] + "?"
            asked.append((question, finding(study, question)))
    return [line for _, line in sorted(asked)]


def finding(study: Study, question: str) -> str:
    """What one study found, after what it asked: an item of a list, and one below it for each
    student, and objective or fraction."""
    tables = comparisons(study, read(study))
    kind = "strategies" if study.compare.objective is None else "controls"
    kind = kind if kind in tables else "objectives"  # the control is the plain training itself
    table, name = tables[kind], study.name
    against = study.compare.objective or study.compare.baseline
    pictures = {"strategies": "differences", "controls": "control_differences",
                "objectives": "objective_differences"}  # fmt: skip
    picture = pictures[kind]
    links = (
        f"[figure](figures/{name}/{picture}.png), [table](figures/{name}/comparison.md), "
        f"[study](params/{name}.yaml), {count(len(study.seeds), 'seed')}"
    )
    told = "".join(f"\n  - {line}." for line in _groups(table, kind))
    refused = tables["results"]["refused"]
    lost = f", {count(int(refused.sum()), 'run')} refused" if refused.any() else ""
    training = study.training
    budget = "at equal epochs" if training.steps is None else f"{training.steps:,} steps"
    return (
        f"- **{question}** {budget} of {training.batch_size} images, against {against}{lost} "
        f"({links}).{told}"
    )


def _groups(table: pd.DataFrame, kind: str) -> Iterator[str]:
    """The verdicts of each student, and objective or fraction, in words."""
    by = ["student", "objective"] if kind == "strategies" else ["student", "fraction"]
    table = table[table["difference"].notna()]  # the others have no pair: they are refused
    subsets = table[table["strategy"] != "full"]
    if kind == "strategies" and len(subsets):  # else there is nothing but the full set to compare
        table = subsets
    several = table["student"].nunique() > 1
    for (student, part), rows in table.groupby(by, sort=False):
        label = part if kind == "strategies" else f"{100 * part:.4g} % of the images"
        said = [_verdict(rows, verdict, kind) for verdict in VERDICTS]
        yield f"{f'{student}, ' if several else ''}{label}: {'; '.join(filter(None, said))}"


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
            name = f"full against {100 * row.against_fraction:.4g} %"
        elif kind == "strategies" and rows["fraction"].nunique() > 1:
            name += f" at {100 * row.fraction:.4g} %"
        ends = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
        ends = "one seed" if pd.isna(row.low) else ends
        more = "" if pd.isna(row.seeds_needed) else f", about {row.seeds_needed:.0f} seeds"
        names.append(f"{name} {100 * row.difference:+.1f} ({ends}{more})")
    rest = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
    return f"{len(some)} {verdict}: {', '.join(names)}{rest}"
