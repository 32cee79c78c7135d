"""Step 09: every defect of two earlier studies beside the check that catches it, their published
table beside ours, and the tests of each invariant, as text and figure.
"""

import contextlib
import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from audit.invariants import INVARIANTS
from audit.small_study import Exhibit, SmallStudy
from audit.study_a import DEFECTS_A
from audit.study_b import DEFECTS_B
from kdlib.compare.committed import read_committed, read_step, write_step
from kdlib.compare.text import table as markdown_table
from kdlib.compare.text import write_text
from kdlib.dataset.images import Images
from kdlib.plots import theme
from kdlib.plots.layout import mark
from kdlib.plots.theme import BLACK, BLUE, GREY, TEXT_PT, VERMILLION
from kdlib.repro import checks, files
from kdlib.repro.run import open_run, read_table
from kdlib.repro.tables import write_parquet
from kdlib.steps.processes import prepare_device
from kdlib.study.load import load_study
from kdlib.study.study import Study

PUBLISHED = Path(__file__).resolve().parents[1] / "params" / "published.csv"
BESIDE = ("subsets", "fractions")  # our studies of the same questions on CIFAR-10

STUDENTS = {
    "efficientnet_b0": "EfficientNet-B0 (pretrained)",
    "resnet18": "ResNet-18",
    "mobilenet_v2_035": "MobileNetV2 x0.35",
}

DEFECTS = dict.fromkeys(DEFECTS_A, "A") | dict.fromkeys(DEFECTS_B, "B")


def make(study: Study, images: Images) -> pd.DataFrame:
    """Step 09: every exhibit, made once for a study's images.

    Returns: One row per exhibit, its fields as columns.
    """
    fields = [field.name for field in dataclasses.fields(Exhibit)]
    settings = {"step": study.step_settings("audit"), "inputs": images.fingerprints}
    settings |= {"fields": fields}  # a table of other columns is made again
    folder = study.runs / "audit"
    with open_run(study.runs, folder, settings) as run:
        if not run.finished:
            prepare_device(study.compute.model_copy(update={"device": "cpu"}))  # small trainings
            demand(table := exhibits(images))
            write_parquet(folder / "exhibits.parquet", table, {"settings": run.settings_sha256})
            sha256 = files.sha256_file(folder / "exhibits.parquet")
            run.finish({"step": "audit", "study": study.name, "table_sha256": sha256})
    return open_exhibits(study)


def demand(table: pd.DataFrame) -> None:
    """Demand that every check sees its defect, and is quiet where there is none.

    Raises: CheckError that names the exhibits where it is not so.
    """
    blind = table.loc[~table["caught"].astype(bool), "name"].tolist()
    loud = table.loc[~table["quiet"].astype(bool), "name"].tolist()
    said = [f"no check sees the defect of {', '.join(blind)}"] if blind else []
    said += [f"a check objects to the honest run of {', '.join(loud)}"] if loud else []
    if said:
        raise checks.CheckError(
            f"{'; '.join(said)}: of {len(table)} exhibits, made again by the code of now; mend the "
            "check, or the exhibit"
        )


def exhibits(images: Images) -> pd.DataFrame:
    """Each defect made again, in a temporary folder: its study, what happened there, and the fields
    of its exhibit."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        small = SmallStudy(images, Path(folder))
        for defect, study in DEFECTS.items():
            row = dataclasses.asdict(defect(small))
            row["sentence"] = " ".join(row["sentence"].replace(folder, "...").split())
            rows.append({"study": study, "happened": " ".join(defect.__doc__.split()), **row})
    return pd.DataFrame(rows)


def open_exhibits(study: Study) -> pd.DataFrame:
    """The table of step 09.

    Raises: FileNotFoundError that names notebook 09; ValueError for a table that was changed.
    """
    settings = study.step_settings("audit")
    return read_table(study.runs / "audit" / "exhibits.parquet", settings)


def published() -> pd.DataFrame:
    """Study A's accuracies in % by strategy, fraction and student, as it printed them."""
    return pd.read_csv(PUBLISHED, comment="#")


def ours(table: pd.DataFrame, strategy: str, fraction: float) -> str:
    """Mean and standard deviation over seeds (ddof=1) of the accepted runs of one subset, by
    objective, in %; `-` where there are none.

    Args:
        table: Rows of one student, from `kdlib.steps.results.results`.
    """
    rows = table[~table["refused"].astype(bool) & (table["strategy"] == strategy)]
    rows = rows[np.isclose(rows["fraction"], fraction)]
    cells = []
    for objective, of_objective in rows.groupby("objective", sort=True):
        accuracy = 100 * of_objective["test_accuracy"]
        cells.append(f"{objective} {accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f}")
    return ", ".join(cells) or "-"


def results_beside() -> dict[str, pd.DataFrame]:
    """Run tables of our studies of these questions, by study; those that are missing, or belong to
    other settings of the study, are left out."""
    tables = {}
    for name in BESIDE:
        with contextlib.suppress(FileNotFoundError, ValueError):  # of the study, or its tables
            study = load_study(files.workspace() / "params" / f"{name}.yaml")
            tables[name] = read_committed(study)["results"]
    return tables


def describe_published() -> str:
    """Study A's table beside ours, as Markdown."""
    beside = results_beside()
    columns = {
        f"ours: {study}, {student}": table[table["student"] == student]
        for study, table in beside.items()
        for student in table["student"].unique()
    }
    rows = []
    for row in published().to_dict("records"):
        strategy, fraction = row["strategy"], row["fraction"]
        name = f"{theme.in_words(strategy)}, {100 * fraction:g} %"
        if strategy == "random_as_published":
            name = f"random, {100 * fraction:g} %, as published (in fact the full set)"
        theirs = [f"{row[student]:.1f}" for student in STUDENTS]
        rows.append([name, *theirs, *(ours(t, strategy, fraction) for t in columns.values())])
    head = ["subset", *(f"theirs: {name}" for name in STUDENTS.values()), *columns]
    lines = [
        "Accuracy on CIFAR-10, %. Theirs: on validation images, 10 epochs, teacher ResNet-50 "
        "(84.1), every student distilled. Ours: on the test images, last step, mean ± s.d. over "
        "seeds, other networks and another budget; within a column orders compare, across "
        "columns no number.",
        "",
        markdown_table(head, rows, "l" + "r" * (len(head) - 1)),
    ]
    for name, table in columns.items():
        fewest, most = table["steps"].min(), table["steps"].max()
        steps = f"{fewest:g}" if fewest == most else f"{fewest:g} to {most:g}"
        lines += ["", f"{name}: {steps} steps, {table['seed'].nunique()} seeds."]
    missing = [name for name in BESIDE if name not in beside]
    if missing:
        names = " and ".join(f"`{name}`" for name in missing)
        lines += ["", f"No run table here that belongs to {names}: `make study STUDY=params/"
                  f"{missing[0]}.yaml` makes it."]  # fmt: skip
    lines += [
        "",
        "Study B printed: probe of the teacher on CIFAR-10 98.71, of a random projection of the "
        "teacher 98.27, of an untrained ViT-S/16 36.94, of its trained student 11.9: that last "
        "number is the first exhibit of study B.",
    ]
    return "\n".join(lines)


def describe_defects(table: pd.DataFrame, study: str) -> str:
    """What happened in one study (A or B), and each defect's number beside the one without it, as
    Markdown."""
    return "\n".join(
        f"- **{row.name[0].upper()}{row.name[1:]}**: {row.happened} *{row.measure}: "
        f"{100 * row.defect:.1f} % with the defect, {100 * row.honest:.1f} % without.*"
        for row in table[table["study"] == study].itertuples(index=False)
    )


def describe_exhibits(table: pd.DataFrame) -> str:
    """Every defect with its numbers and the message of its check, as Markdown."""
    rows, messages = [], []
    for row in table.to_dict("records"):
        caught = "yes" if row["caught"] and row["quiet"] else "**no**"
        numbers = f"{100 * row['defect']:.1f}", f"{100 * row['honest']:.1f}"
        check = ", ".join(
            f"`{name}`" if name.startswith("kdlib.") else name for name in row["check"].split(", ")
        )
        rows.append((row["study"], row["name"], row["measure"], *numbers, check, caught))
        messages.append(f"- **{row['name']}** ({row['study']}). {check}: {_cut(row['sentence'])}")
    head = ("study", "defect", "what both numbers are", "with it", "without", "check", "caught")
    parts = [markdown_table(head, rows, "lllrr"), "", "What the checks print:", "", *messages]
    return "\n".join(parts)


def _cut(sentence: str, most: int = 400) -> str:
    """The sentence with hashes shortened, and its beginning where it is long."""
    short = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", sentence)
    return short if len(short) <= most else short[:most].rstrip() + " …"


def describe_invariants() -> str:
    """Each invariant and its tests, as Markdown."""
    rows = [
        (study, invariant, ", ".join(f"`{name}`" for name in tests))
        for study, invariant, tests in INVARIANTS
    ]
    return markdown_table(("study", "invariant", "tests"), rows)


def write(study: Study, table: pd.DataFrame) -> Path:
    """Write `audit.md` into the figures folder; returns its path."""
    n, caught = len(table), int((table["caught"] & table["quiet"]).sum())
    parts = [
        f"# {study.name}: what the two earlier studies measured",
        f"{n} defects of two earlier studies (A: subsets by training dynamics; B: features over "
        f"fixed or random shards), made again in miniature on {study.data.source}. Checks catch "
        f"{caught} of {n} and let the number without the defect pass. All numbers are in %.",
        "## What happened in study A",
        describe_defects(table, "A"),
        "## What happened in study B",
        describe_defects(table, "B"),
        "## The numbers and the checks",
        describe_exhibits(table),
        "## What study A printed",
        describe_published(),
        "## Invariants and their tests",
        describe_invariants(),
    ]
    write_text(study, "audit.md", ["\n\n".join(parts)])
    return study.figures / "audit.md"


def draw_defects(ax: Axes, exhibits: pd.DataFrame, title: str = "") -> Axes:
    """The number of each defect beside the honest one: a row each, with the check that caught it.

    Args:
        ax: The axis.
        exhibits: One row per defect, drawn from top to bottom: `study`, `name`, `measure`,
            `defect` and `honest` (shares in [0, 1]), `check`, and whether it was `caught`.
        title: Above the rows.

    Returns: `ax`, its x axis in %.
    Raises: ValueError for missing columns, an empty table, or numbers that are no shares.
    """
    columns = ("study", "name", "measure", "defect", "honest", "check", "caught")
    theme.demand(exhibits, columns, "exhibits")
    numbers = 100 * exhibits[["defect", "honest"]].to_numpy()
    if not ((numbers >= 0) & (numbers <= 100)).all():
        raise ValueError(f"numbers span [{numbers.min()}, {numbers.max()}] %; expected [0, 100]")
    rows = exhibits.reset_index(drop=True)
    for y, row in rows.iterrows():
        _draw_defect(ax, y, row)
    for y in np.flatnonzero(rows["study"].to_numpy()[1:] != rows["study"].to_numpy()[:-1]):
        ax.axhline(y + 0.5, color=BLACK, linewidth=0.6)
    top = -0.6
    ax.set(xlim=(0, 100), ylim=(len(rows) - 0.4, top), yticks=[])
    ax.set_xlabel("what each row measures (%)")
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)
    handles = [
        mark("with the defect", marker="X", color=VERMILLION, linestyle=""),
        mark("without", marker="o", color=BLUE, linestyle=""),
    ]
    ax.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=0.8,
        handletextpad=0.2, borderaxespad=0.1, borderpad=0.1,
    )  # fmt: skip
    _note(ax, "check", 1, top, (65, 2), ha="left", va="bottom", fontweight="bold")
    _note(ax, title, 0, top, (-7, 2), ha="right", va="bottom", fontweight="bold")
    return ax


def _draw_defect(ax: Axes, y: float, row: pd.Series) -> None:
    wrong, honest = 100 * row["defect"], 100 * row["honest"]
    ax.plot([wrong, honest], [y, y], color=GREY, linewidth=0.8, zorder=1)
    look = {"linestyle": "", "clip_on": False}
    ax.plot(honest, y, marker="o", color=BLUE, markersize=5.5, zorder=2, **look)
    ax.plot(wrong, y, marker="X", color=VERMILLION, markersize=5, zorder=3, **look)
    _note(ax, f"{row['study']}  {row['name']}", 0, y, (-7, 0.5), ha="right", va="bottom")
    _note(ax, row["measure"], 0, y, (-7, -0.5), ha="right", va="top", color=GREY)
    _note(ax, f"{wrong:.1f}", 1, y, (30, 0), ha="right", va="center", color=VERMILLION)
    _note(ax, f"{honest:.1f}", 1, y, (57, 0), ha="right", va="center", color=BLUE)
    checks = re.sub(r"\bkdlib\.\w+\.", "", row["check"]).replace(", ", "\n")
    checks = checks if row["caught"] else f"not caught by\n{checks}"
    _note(ax, checks, 1, y, (65, 0), ha="left", va="center", linespacing=1.05)


def _note(
    ax: Axes, text: str, side: int, y: float, points: tuple[float, float], **look: Any
) -> None:
    """Text beside the left (0) or right (1) edge of the axis, at a distance in points."""
    ax.annotate(
        text, (side, y), points, ax.get_yaxis_transform(), "offset points",
        annotation_clip=False, fontsize=TEXT_PT, **look,
    )  # fmt: skip


def draw(study: Study, table: pd.DataFrame) -> dict[str, Path]:
    """Draw `audit`: each defect's number against the honest one. The table is committed first.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    return draw_committed(study, write_step(study, "audit", {"exhibits": table})["exhibits"])


def redraw(study: Study) -> list[Path]:
    """Write text and figure again from the committed table.

    Raises: FileNotFoundError without it; ValueError for one that was changed or belongs to other
        settings.
    """
    table = read_step(study, "audit")["exhibits"]
    return [write(study, table), *draw_committed(study, table).values()]


def draw_committed(study: Study, table: pd.DataFrame) -> dict[str, Path]:
    """The figure of `draw`, from a table that is committed."""
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 0.29 * len(table) + 0.9))
        draw_defects(fig.subplots(), table, f"{study.name}: {len(table)} defects in miniature")
    return theme.save_figures({"audit": fig}, study.figures)
