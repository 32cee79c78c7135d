"""What did the two earlier studies measure? Their published table beside ours, every defect beside
the tripwire that catches it, and the test that holds each invariant: what notebook 09 shows.

Leaves to others: the defects (`subset_defects`, `feature_defects`), drawing (`plots`).
"""

import contextlib
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from audit.bench import Bench, Exhibit
from audit.invariants import INVARIANTS
from audit.study_a import DEFECTS as study_a_DEFECTS
from audit.study_b import DEFECTS as study_b_DEFECTS
from kdlib.compare.committed import read
from kdlib.dataset.images import Images
from kdlib.plots import theme
from kdlib.plots.results import defects
from kdlib.repro import files
from kdlib.repro.run import open_run, read_table
from kdlib.repro.tables import write_parquet
from kdlib.steps.training import use
from kdlib.study.load import load_study
from kdlib.study.study import Study

MAKER = "notebooks/09_audit.ipynb"


PUBLISHED = Path(__file__).resolve().parents[1] / "params" / "published.csv"


BESIDE = ("subsets", "fractions")  # our studies of the same questions on CIFAR-10


STUDENTS = {
    "efficientnet_b0": "EfficientNet-B0 (pretrained)",
    "resnet18": "ResNet-18",
    "mobilenet_v2_035": "MobileNetV2 x0.35",
}


DEFECTS = (*study_a_DEFECTS, *study_b_DEFECTS)


def make(study: Study, images: Images) -> pd.DataFrame:
    """Step 09: every exhibit, made once for a study's images.

    Returns: One row per exhibit, its fields as columns.
    """
    settings = {"step": study.step_settings("audit"), "inputs": images.fingerprints}
    folder = study.runs / "audit"
    with open_run(study.runs, folder, settings) as run:
        if not run.finished:
            use(study.compute.model_copy(update={"device": "cpu"}))  # small trainings
            table = pd.DataFrame([dataclasses.asdict(e) for e in exhibits(images)])
            write_parquet(folder / "exhibits.parquet", table, {"settings": run.settings_sha256})
            sha256 = files.sha256_file(folder / "exhibits.parquet")
            run.finish({"step": "audit", "study": study.name, "table_sha256": sha256})
    return open_exhibits(study)


def exhibits(images: Images) -> list[Exhibit]:
    """Each defect made again; what they train is left nowhere."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(images, Path(place))
        for defect in DEFECTS:
            made = defect(bench)
            told = " ".join(made.sentence.replace(place, "...").split())
            found.append(dataclasses.replace(made, sentence=told))
    return found


def open_exhibits(study: Study) -> pd.DataFrame:
    """What step 09 made.

    Raises: FileNotFoundError that names notebook 09; ValueError for a table that was changed.
    """
    own = study.step_settings("audit")
    return read_table(study.runs / "audit" / "exhibits.parquet", own, MAKER)


def published() -> pd.DataFrame:
    """Study A's accuracies in % by strategy, fraction and student, as it printed them."""
    return pd.read_csv(PUBLISHED, comment="#")


def ours(table: pd.DataFrame, strategy: str, fraction: float) -> str:
    """Mean and standard deviation over seeds (ddof=1) of the accepted runs of one subset, by
    objective, in %; `-` where there are none.

    Args:
        table: Rows of one student, as `compiling.results` gives them.
    """
    rows = table[~table["refused"].astype(bool) & (table["strategy"] == strategy)]
    rows = rows[np.isclose(rows["fraction"], fraction)]
    told = []
    for objective, runs_of in rows.groupby("objective", sort=True):
        accuracy = 100 * runs_of["test_accuracy"]
        told.append(f"{objective} {accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f}")
    return ", ".join(told) or "-"


def results_beside() -> dict[str, pd.DataFrame]:
    """Run tables of our own studies of these questions, by study; those that are not there, or
    belong to other settings of the study, are left out."""
    found = {}
    for name in BESIDE:
        with contextlib.suppress(FileNotFoundError, ValueError):  # of the study, or its tables
            study = load_study(files.workspace() / "params" / f"{name}.yaml")
            found[name] = read(study)["results"]
    return found


def describe_published() -> str:
    """Their table beside ours, as Markdown."""
    theirs, beside = published(), results_beside()
    columns = {
        f"ours: {study}, {student}": table[table["student"] == student]
        for study, table in beside.items()
        for student in table["student"].unique()
    }
    heads = [*(f"theirs: {name}" for name in STUDENTS.values()), *columns]
    lines = [
        "Accuracy on CIFAR-10, %. Theirs: on validation images, 10 epochs, teacher ResNet-50 "
        "(84.1), every student distilled. Ours: on the test images, last step, mean ± s.d. over "
        "seeds, other networks and another budget; within a column orders compare, across "
        "columns no number.",
        "",
        f"| subset | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(heads)}",
    ]
    for row in theirs.to_dict("records"):
        strategy, fraction = row["strategy"], row["fraction"]
        name = f"{theme.in_words(strategy)}, {100 * fraction:g} %"
        if strategy == "random_as_published":
            name = f"random, {100 * fraction:g} %, as published (in fact the full set)"
        cells = [f"{row[student]:.1f}" for student in STUDENTS]
        cells += [ours(table, strategy, fraction) for table in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, table in columns.items():
        fewest, most = table["steps"].min(), table["steps"].max()
        steps = f"{fewest:g}" if fewest == most else f"{fewest:g} to {most:g}"
        lines += ["", f"{name}: {steps} steps, {table['seed'].nunique()} seeds."]
    missing = [name for name in BESIDE if name not in beside]
    if missing:
        told = " and ".join(f"`{name}`" for name in missing)
        lines += ["", f"No run table here that belongs to {told}: `make study STUDY=params/"
                  f"{missing[0]}.yaml` makes it."]  # fmt: skip
    lines += [
        "",
        "Study B printed: probe of the teacher on CIFAR-10 98.71, of a random projection of the "
        "teacher 98.27, of an untrained ViT-S/16 36.94, of its trained student 11.9: that last "
        "number is the first exhibit of study B.",
    ]
    return "\n".join(lines)


def describe_exhibits(table: pd.DataFrame) -> str:
    """Every defect with its numbers and what its tripwire says, as Markdown."""
    lines = [
        "| study | defect | what both numbers are | with it | without | tripwire | caught |",
        "| --- | --- | --- | ---: | ---: | --- | --- |",
    ]
    for row in table.to_dict("records"):
        caught = "yes" if row["caught"] and row["quiet"] else "**no**"
        lines.append(
            f"| {row['study']} | {row['name']} | {row['measure']} | {100 * row['defect']:.1f} | "
            f"{100 * row['honest']:.1f} | `{row['tripwire']}` | {caught} |"
        )
    lines += ["", "## In their own words", ""]
    for row in table.to_dict("records"):
        lines.append(f"- **{row['name']}** ({row['study']}). {row['happened']} "
                     f"`{row['tripwire']}`: {_cut(row['sentence'])}")  # fmt: skip
    return "\n".join(lines)


def _cut(sentence: str, most: int = 400) -> str:
    """Hashes are shown by their beginning, and long sentences too."""
    short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", sentence)
    return short if len(short) <= most else short[:most].rstrip() + " …"


def describe_invariants() -> str:
    """Each invariant and the tests that hold it, as Markdown."""
    lines = ["| study | invariant | tests |", "| --- | --- | --- |"]
    for study, invariant, tests in INVARIANTS:
        shown = ", ".join(f"`{name}`" for name in tests)
        lines.append(f"| {study} | {invariant} | {shown} |")
    return "\n".join(lines)


def write(study: Study, table: pd.DataFrame) -> Path:
    """Write `audit.md` into the figures folder."""
    n, caught = len(table), int((table["caught"] & table["quiet"]).sum())
    parts = [
        f"# {study.name}: what the two earlier studies measured",
        f"{n} defects of two earlier studies (A: subsets by training dynamics; B: features over "
        f"fixed or random shards), made again in miniature on {study.data.source}; a tripwire "
        f"catches {caught} of {n} and lets the honest number pass. All numbers are in %.",
        describe_exhibits(table),
        "## What study A printed",
        describe_published(),
        "## Invariants and their tests",
        describe_invariants(),
    ]
    text = "\n\n".join(parts) + "\n"
    return files.write_atomic(study.figures / "audit.md", lambda file: file.write(text.encode()))


def draw(study: Study, table: pd.DataFrame) -> dict[str, Any]:
    """Draw `audit`: each defect's number against the honest one.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 0.29 * len(table) + 0.9))
        defects(fig.subplots(), table, f"{study.name}: {len(table)} defects in miniature")
    return {"audit": theme.save_figure(fig, study.figures, "audit")[1]}


def redraw(study: Study) -> dict[str, Any]:
    """The figure and text of notebook 09, where it is finished."""
    if not (study.runs / "audit" / "evidence.json").is_file():
        return {}
    table = open_exhibits(study)
    write(study, table)
    return draw(study, table)
