"""What a study found, in words: summary, tables of a paper, objectives, the ledger.

Leaves to others: the tables themselves (`compiling`), sentences and their layout (`telling`).
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from kdlib.compare import text as text_module
from kdlib.compare.comparisons import Tables
from kdlib.compare.costs import to_markdown
from kdlib.repro import files
from kdlib.study.evaluation import AXES, MEASURES
from kdlib.study.study import Study

LARGEST = 10  # sentences of a summary: two of counts, then the largest differences


def titles(study: Study, tables: Tables) -> dict[str, str]:
    """Comparison -> its title, of those that there are."""
    told = {
        "strategies": f"Every strategy against {study.compare.baseline}",
        "objectives": "With the teacher against without",
        "controls": f"Every objective against {study.compare.objective}",
    }
    return {name: title for name, title in told.items() if name in tables}


def summary(study: Study, tables: Tables) -> str:
    """What was found, in plain sentences, as Markdown; also written to the figures folder."""
    table = tables["results"]
    refused = table[table["refused"]]
    versions = table["code_sha256"].nunique()
    lines = [
        f"# {study.name}: what was found",
        "",
        f"{len(table) - len(refused)} of {len(table)} runs accepted, {len(study.seeds)} paired "
        f"seeds, {study.training.comparison.replace('_', ' ')}. Accuracies are those of the "
        f"{text_module.MEASURED[MEASURES[study.compare.measure]]}. {_best_epoch(study, tables)}",
        "",
    ]
    if versions > 1:
        lines += [f"The runs were made by {versions} versions of the code.", ""]
    for row in refused.to_dict("records"):
        found = row[MEASURES[study.compare.measure]]
        told = "" if pd.isna(found) else f" ({100 * found:.1f} %, which enters no mean)"
        lines.append(f"- refused: {row['run']}{told}: {row['reason']}")
    lines += [""] if len(refused) else []
    for name, title in titles(study, tables).items():
        lines += [f"## {title}", ""]
        told = text_module.summary_lines(tables[name])
        lines += [f"- {line}" for line in told[:LARGEST]]
        if len(told) > LARGEST:
            lines.append(f"- The other {len(told) - LARGEST} comparisons are in the table.")
        lines += ["", text_module.to_markdown(tables[name]), ""]
    lines += [text_module.bootstrap_line(tables["strategies"]), ""]
    lines += ["## Any cell again", "", _where_again(study, table), ""]
    lines.append(text_module.cell_table(_commands(table)))
    return _tell(study, "summary.md", lines)


def _where_again(study: Study, table: pd.DataFrame) -> str:
    """On what the runs were made, and where the same command gives the same bytes."""
    devices = sorted(table.loc[~table["refused"], "device"].unique())
    told = f"These runs were made on {', '.join(devices)}. "
    if study.compute.portable:
        return told + (
            "Held to AVX2 (`portable`), they are to be the same bytes on any x86-64 processor."
        )
    if study.compute.device == "cpu":
        return told + "The same kind of processor gives the same bytes, another one rounds anew."
    return told + "A GPU may sum in another order each time: expect the same numbers, not bytes."


def _best_epoch(study: Study, tables: Tables) -> str:
    if study.compare.measure != "accuracy":
        return "Only the last step is probed for the comparison."
    accepted = tables["results"].query("not refused")
    if accepted["test_accuracy_best"].isna().all():
        return "The best epoch is not reported: the teacher has learnt from the validation images."
    gains = (accepted["test_accuracy_best"] - accepted["test_accuracy"]).dropna()
    return text_module.inflation_line(gains.mean(), gains.max(), len(gains))


def _commands(table: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for row in table.drop_duplicates(list(AXES)).to_dict("records"):
        fraction = f"{100 * row['fraction']:.4g} %"
        yield row["student"], row["strategy"], fraction, row["objective"], row["command"]


def objective_table(study: Study, tables: Tables) -> str:
    """Every objective of the axis with its formula, paper, test and accuracies, as Markdown; also
    written to the figures folder.

    Accuracies, by the measure of the study, are means and standard deviations over seeds (ddof=1),
    in %, of the accepted runs of its first student.
    """
    accepted = tables["results"].query("not refused")
    accepted = accepted[accepted["student"] == study.axes.student[0]]
    subsets = accepted[["strategy", "fraction"]].drop_duplicates().to_records(index=False)
    heads = [s if s == "full" else f"{s} {100 * f:.4g} %" for s, f in subsets]
    lines = [
        f"| objective | loss | paper | test | {' | '.join(heads)} |",
        f"| --- | --- | --- | --- |{' ---: |' * len(heads)}",
    ]
    for name in study.axes.objective:
        settings = study.objectives[name]
        formula, paper, test = settings.described()
        numbers = settings.model_dump(
            exclude={"kind", "trust_code", "teacher"}, exclude_none=True, exclude_defaults=True
        )
        numbers |= numbers.pop("options", {})
        numbers |= {"teacher": settings.teacher} if settings.teacher else {}
        told = ", ".join(f"{key} {value}" for key, value in numbers.items())
        cells = []
        for strategy, fraction in subsets:
            point = {"strategy": strategy, "fraction": fraction, "objective": name}
            rows = accepted[np.all([accepted[axis] == v for axis, v in point.items()], axis=0)]
            found = 100 * rows[MEASURES[study.compare.measure]]
            cells.append(f"{found.mean():.2f} ± {found.std(ddof=1):.2f}" if len(found) else "-")
        loss = formula.replace("|", "\\|") + (f" ({told})" if told else "")
        test = f"`{test.removeprefix('tests/')}`"
        lines.append(f"| {name} | {loss} | {paper} | {test} | {' | '.join(cells)} |")
    return _tell(study, "objectives.md", lines)


def comparison_texts(study: Study, tables: Tables) -> str:
    """The tables of the comparison alone, as Markdown; also written to the figures folder, there
    with `comparison.tex` for a paper."""
    markdown, latex = [], [r"% \usepackage{booktabs,longtable}; from the run records"]
    for name, title in titles(study, tables).items():
        markdown += [f"**{title}**", "", text_module.to_markdown(tables[name]), ""]
        told = text_module.MEASURED[MEASURES[study.compare.measure]]
        caption = f"{study.name}: {title[0].lower()}{title[1:]}; {told}, in %."
        latex += ["", text_module.to_latex(tables[name], caption, f"{study.name}-{name}")]
    _tell(study, "comparison.tex", latex)
    return _tell(study, "comparison.md", markdown)


def ledger_text(study: Study, tables: Tables) -> str:
    """What each selection costs and when it has paid for itself, as Markdown; also written to the
    figures folder."""
    spent = tables["costs"]
    lines = [
        f"# {study.name}: what a selection costs, and when it has paid",
        "",
        "| what | wall time (s) | steps | device |",
        "| --- | ---: | ---: | --- |",
    ]
    students = spent[spent["what"] == "student"]
    for row in spent[spent["what"] != "student"].to_dict("records"):
        lines.append(f"| {row['what']} | {row['wall_s']:.3g} | {row['steps']} | {row['device']} |")
    told = f"{students['wall_s'].median():.3g} | {students['steps'].median():.0f}"
    lines += [
        f"| a student (median of {len(students)}) | {told} | {students['device'].iloc[0]} |",
        "",
        "A student is charged the steps after which the mean validation curve of its cell is first "
        f"within {text_module.count(100 * study.compare.margin, 'point')} of where the full set's "
        "students end, on either side, at the median time of a step; at equal steps a subset by "
        "itself saves nothing. A selection is charged the datamap and the training recorded for "
        "it, unless a teacher was needed anyway. Times are those of the process that finished a "
        "run, on machines that may have done other things.",
        "",
        to_markdown(tables["ledger"]),
    ]
    return _tell(study, "ledger.md", lines)


def _tell(study: Study, name: str, lines: Iterable[str]) -> str:
    text = "\n".join(lines).rstrip() + "\n"
    files.write_atomic(study.figures / name, lambda file: file.write(text.encode()))
    return text
