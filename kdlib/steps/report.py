"""The report of a study: one HTML file that loads nothing, and a PDF where a browser prints it."""

import base64
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from kdlib.compare.answer import Answer, answers, covered, covers, question
from kdlib.compare.checklist import checklist
from kdlib.compare.classes import FEW, class_sentences
from kdlib.compare.comparisons import Tables
from kdlib.compare.report import (
    again,
    class_section,
    further_sections,
    ledger_sections,
    notes,
    objectives,
    refusals,
    titled,
)
from kdlib.compare.text import Section, Table, comparison_table, points, summary_lines
from kdlib.repro import files
from kdlib.steps.captions import caption
from kdlib.steps.compare import open_tables
from kdlib.steps.display import FIGURES
from kdlib.study.cells import shards_counted, share_in_words
from kdlib.study.evaluation import AXES
from kdlib.study.study import Study

HERE = Path(__file__).parent
# a verdict's shape, so that none rests on a colour
MARKS = {"better": "▲", "worse": "▼", "equivalent": "●", "inconclusive": "◇", "undecided": "◇"}
HASHES = {"subset": "subset_sha256", "weights": "weights_sha256", "teacher": "teacher_sha256",
          "settings": "settings_sha256", "code": "code_sha256", "commit": "git_commit"}  # fmt: skip
DATA = {"train": "data_train", "test": "data_test", "split": "data_split"}
AUDIT = "audit"  # a figure of notebook 09, which no step of `FIGURES` draws
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "msedge", "microsoft-edge")  # fmt: skip
APPLICATIONS = (  # on macOS, where browsers are not on the PATH
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FORMULA = 4  # columns of the table of objectives before the accuracies
MOST_COLUMNS = 10  # that a page shows without a scroll bar
PRINTING_S = 180  # seconds after which a browser that does not end is stopped


def write_report(study: Study, file: Path, pdf: bool = True) -> dict[str, Path | str]:
    """Write `figures/<study>/report.html`, from the study's runs or from its committed tables, and
    print it to `report.pdf`; the figures of the comparison are drawn anew of the same tables.

    Args:
        file: The study file, whose first comment is the question.

    Returns: `origin`, what it was made from, in words; `html` and `pdf`, the paths; `no_pdf`, a
        sentence why there is no PDF.
    Raises: As `open_tables`.
    """
    from kdlib.steps.figures import draw_comparison  # matplotlib, where something is drawn

    tables, origin = open_tables(study)
    drawn = pictures(study, draw_comparison(study, tables))
    folder, made = study.figures, {"origin": origin}
    page = report_html(study, file, tables, origin, drawn)
    made["html"] = files.write_atomic(folder / "report.html", lambda out: out.write(page.encode()))
    if pdf:
        page = report_html(study, file, tables, origin, drawn, unfolded=True)
        try:
            made["pdf"] = print_page(find_browser(), page, folder / "report.pdf")
        except RuntimeError as error:
            made["no_pdf"] = str(error)
    return made


def find_browser() -> str:
    """The command of an installed Chromium, Chrome or Edge.

    Raises: RuntimeError in a sentence where there is none.
    """
    found = [shutil.which(name) for name in BROWSERS]
    found += [path for path in APPLICATIONS if os.access(path, os.X_OK)]
    if not (there := list(filter(None, found))):
        raise RuntimeError(
            "no PDF was made: it is printed by Chromium, Chrome or Edge, and none is on the PATH; "
            "install one, or open report.html in any browser and print it"
        )
    return there[0]


def print_page(browser: str, page: str, path: Path) -> Path:
    """Print a page to a PDF file.

    Raises: RuntimeError in a sentence where the browser writes none.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "report.html"), Path(folder, "report.pdf")
        source.write_text(page)
        command = [browser, "--headless", "--disable-gpu", "--no-pdf-header-footer"]
        command += [f"--user-data-dir={folder}/profile", f"--print-to-pdf={target}"]
        # in a container everything runs as root, for whom Chromium has no sandbox
        command += ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
        try:
            done = subprocess.run(
                [*command, source.as_uri()], capture_output=True, text=True, timeout=PRINTING_S
            )
            said = done.stderr.strip().split("\n")[-1]
        except subprocess.TimeoutExpired:
            said = f"it did not end within {PRINTING_S} s"
        if not target.is_file():
            raise RuntimeError(f"no PDF was made: {browser} printed none ({said[:300]})")
        return files.write_atomic(path, lambda out: out.write(target.read_bytes()))


def pictures(study: Study, drawn: dict[str, Path]) -> dict[str, Path]:
    """The figures of a report: those of the comparison, which were drawn now, then those of the
    other steps that are there, in the order of the notebooks."""
    found = dict(drawn)
    for step, names in FIGURES.items():
        if step != "compare":
            paths = {name: study.figures / f"{name}.png" for name in names}
            found |= {name: path for name, path in paths.items() if path.is_file()}
    audit = study.figures / f"{AUDIT}.png"
    return found | ({AUDIT: audit} if study.audit and audit.is_file() else {})


def report_html(
    study: Study,
    file: Path,
    tables: Tables,
    origin: str,
    figures: dict[str, Path],
    unfolded: bool = False,
) -> str:
    """The report; the same tables and figures give the same bytes.

    Args:
        file: The study file.
        origin: What the tables were made from.
        figures: Name -> PNG.
        unfolded: Open every fold, for a print.
    """
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    with shards_counted(tables["results"]):
        content = _content(study, file, tables, figures)
    page = environment.get_template("report.jinja")
    style = (HERE / "report.css").read_text()
    return page.render(content, origin=origin, style=style, unfolded=unfolded) + "\n"


def _content(study: Study, file: Path, tables: Tables, figures: dict[str, Path]) -> dict[str, Any]:
    """What the template shows."""
    results = tables["results"]
    if "made" in tables:  # the runs are here
        made = tables["made"].drop(columns="run")
        results = results.merge(made, on=[*AXES, "seed"], how="left")
    runs = _evidence(study, results)
    first, *others = [_linked(one) for one in answers(study, tables)]
    reasons = refusals(study, tables)
    refused = results.index[results["refused"]]
    recorded = "failed_checks" in results
    of_checks = "Each check runs when a number is made and again when its table is compiled."
    if not recorded:
        of_checks += (
            " These tables were compiled before the names of failed checks were recorded: accepted "
            "runs passed every check that there was."
        )
    classes, named = class_section(tables), _named(file, files.workspace())
    without = "The images have no labels."
    if study.data.labelled:
        without = (
            "These tables were compiled before the classes of subsets were recorded; `python -m "
            f"kdlib step compare {named}` records them where the runs are."
        )
    sections = [
        *filter(None, further_sections(tables)),
        Section("The objectives", "", _narrow(objectives(study, tables))),
        *ledger_sections(study, tables),
    ]
    links = {"The datamap, to look at": "datamap.html"}
    return {
        "study": study.name,
        "file": named,
        "question": question(file),
        "answer": first,
        "others": others,
        "covered": covered(study, tables),
        "covers": covers(study, tables),
        "notes": notes(study, tables),
        "scarce": class_sentences(results),
        "few": FEW,
        "links": {n: h for n, h in links.items() if (study.figures / h).is_file()},
        "figures": [_picture(name, path) for name, path in figures.items()],
        "comparisons": [
            _comparison(name, title, rows) for name, title, rows in titled(study, tables)
        ],
        "sections": [section for section in sections if section.table.rows or section.text],
        "classes": classes,
        "without_classes": without,
        "n_runs": len(results),
        "evidence": runs,
        "columns": ["seed", *_measures(study, results), "steps", "images", *_hashes(results), ""],
        "anchors": {cell["key"]: cell["id"] for cell in runs},
        "shared": _shared(results),
        "refused": [
            {"id": f"run-{i}", "text": text} for i, text in zip(refused, reasons, strict=True)
        ],
        "again": again(study, tables),
        "checks": checklist(study, results),
        "of_checks": of_checks,
        "marks": MARKS,
    }


def _narrow(table: Table) -> Table:
    """The table of objectives; where there are many subsets, without the accuracies of each, which
    the comparisons hold."""
    if len(table.head) <= MOST_COLUMNS:
        return table
    return Table(table.head[:FORMULA], [row[:FORMULA] for row in table.rows], table.align)


def _named(file: Path, home: Path) -> str:
    """A study file as commands name it."""
    return str(file.relative_to(home)) if file.is_relative_to(home) else f"params/{file.name}"


def _linked(answer: Answer) -> dict[str, Any]:
    """An answer with the anchor of the row that it names."""
    href = "" if answer.row is None else f"{answer.comparison}-{answer.row}"
    return asdict(answer) | {"href": href}


def _comparison(name: str, title: str, rows: pd.DataFrame) -> dict[str, Any]:
    """A comparison by difference, the largest first, with the anchor of each row."""
    ordered = rows.sort_values("difference", ascending=False, kind="stable")
    counts = [line for line in summary_lines(rows)[:2] if line[:1].isdigit() or "Holm" in line]
    kind = name.partition("-")[0]  # of several data sets, each has rows of the same comparison
    ids = [f"{kind}-{label}" for label in ordered.index]
    table = comparison_table(ordered)
    return {"name": name, "title": title, "counts": counts, "ids": ids, "table": table}


def _picture(name: str, path: Path) -> dict[str, Any]:
    """A PNG as the page holds it."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # of its first chunk, which is IHDR
    encoded = base64.b64encode(content).decode()
    shown = {"name": name, "caption": caption(name), "content": encoded}
    return shown | {"width": width // 2, "height": height // 2}


def _measures(study: Study, results: pd.DataFrame) -> list[str]:
    """Columns of the results table that are accuracies or losses of a run."""
    known = ["test_accuracy", "validation_loss", *study.compare.columns.values()]
    return [
        name for name in dict.fromkeys(known) if name in results and results[name].notna().any()
    ]


def _hashes(results: pd.DataFrame) -> dict[str, str]:
    """What an evidence row names by hash or commit -> the column."""
    return {name: column for name, column in HASHES.items() if column in results}


def _shared(results: pd.DataFrame) -> str:
    """The hashes of the data, of all rows or, where they differ, of the most."""
    parts = []
    for name, column in DATA.items():
        if column in results and (found := results[column].dropna().unique()).size:
            parts.append(f"{name} {' or '.join(value[:12] for value in found)}")
    sentences = [f"Data of all runs: {', '.join(parts)}."] if parts else []
    if HASHES["commit"] not in results:
        sentences.append("The commit of each run stands in its evidence, where the runs are.")
    return " ".join(sentences)


def _evidence(study: Study, results: pd.DataFrame) -> list[dict[str, Any]]:
    """The evidence rows of each cell."""
    cells, measures, hashes = [], _measures(study, results), _hashes(results)
    for number, (key, rows) in enumerate(results.groupby(list(AXES), sort=False)):
        student, strategy, fraction, objective = key
        name = f"{student}, {strategy} at {share_in_words(fraction)}, {objective}"
        cells.append(
            {
                "key": key,
                "id": f"cell-{number}",
                "name": name,
                "command": rows["command"].iloc[0],
                "rows": [
                    _evidence_row(label, row, measures, hashes)
                    for label, row in zip(rows.index, rows.to_dict("records"), strict=True)
                ],
            }
        )
    return cells


def _evidence_row(
    label: int, row: dict[str, Any], measures: list[str], hashes: dict[str, str]
) -> dict[str, Any]:
    """One run: its numbers as text, and its hashes."""

    def number(column: str) -> str:
        value = row.get(column)
        return "-" if pd.isna(value) else f"{value:,.0f}"

    def measured(column: str) -> str:
        value = row[column]
        if pd.isna(value):
            return "-"
        return f"{value:.4f}" if column == "validation_loss" else points(value) + " %"

    numbers = [
        str(row["seed"]),
        *map(measured, measures),
        number("steps"),
        number("unique_examples"),
    ]
    of_row = {name: row[column] for name, column in hashes.items()}
    texts = ["" if value is None or pd.isna(value) else str(value) for value in of_row.values()]
    return {"id": f"run-{label}", "refused": row["refused"], "numbers": numbers, "hashes": texts}
