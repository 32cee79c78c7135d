"""The texts of a study's comparison: summary, tables for a paper, objectives, costs."""

import numpy as np
import pandas as pd

from kdlib.compare.classes import class_sentences, class_table
from kdlib.compare.comparisons import Tables, by_place, names_shards
from kdlib.compare.costs import ledger_table, steps_table
from kdlib.compare.text import (
    Section,
    Table,
    comparison_latex,
    comparison_markdown,
    count,
    measured_on,
    numbers_of,
    place_in_words,
    summary_lines,
    write_text,
)
from kdlib.study.cells import share_in_words
from kdlib.study.evaluation import AXES
from kdlib.study.study import Study

LARGEST = 10  # sentences of a summary: two of counts, then the largest differences


def titled(study: Study, tables: Tables) -> list[tuple[str, str, pd.DataFrame]]:
    """Label, title and rows of each comparison that there is, and of each data set apart."""
    known = {
        "strategies": f"Every strategy against {study.compare.baseline}",
        "objectives": "With the teacher against without",
        "controls": f"Every objective against {study.compare.objective}",
    }
    found = []
    for name in filter(tables.__contains__, known):
        for on, rows in by_place(tables[name]):
            label, place = (f"{name}-{on}", f", on {place_in_words(on)}") if on else (name, "")
            found.append((label, known[name] + place, rows))
    return found


@names_shards
def summary(study: Study, tables: Tables) -> str:
    """The results in plain sentences, as Markdown; also written to the figures folder."""
    results, lines = tables["results"], [f"# {study.name}: results", ""]
    for note in notes(study, tables):
        lines += [note, ""]
    if scarce := class_sentences(results):
        lines += [*[f"- {line}" for line in scarce], ""]
    if refused := refusals(study, tables):
        lines += [*[f"- refused: {line}" for line in refused], ""]
    for _, title, rows in titled(study, tables):
        sentences = summary_lines(rows)
        lines += [f"## {title}", "", *[f"- {line}" for line in sentences[:LARGEST]]]
        if len(sentences) > LARGEST:
            lines.append(f"- The other {len(sentences) - LARGEST} comparisons are in the table.")
        lines += ["", comparison_markdown(rows), ""]
    for section in (*further_sections(tables), class_section(tables), again(study, tables)):
        lines += section.markdown() if section else []
    return write_text(study, "summary.md", lines)


@names_shards
def notes(study: Study, tables: Tables) -> list[str]:
    """What a reader of the numbers has to know, a paragraph each: how many runs were accepted, what
    the accuracies are, and what is unusual about data, runs and code."""
    results, measured = tables["results"], list(study.compare.columns.values())
    n_accepted = int((~results["refused"]).sum())
    found = [
        f"{n_accepted} of {len(results)} runs accepted, {len(study.seeds)} paired "
        f"seeds, {study.training.comparison.replace('_', ' ')}. Accuracies are those of the "
        f"{measured_on(measured)}. {_best_epoch(study, tables)}"
    ]
    if "duplicates" in results:  # since 2026-11
        found.append(f"Duplicates: {results['duplicates'].iloc[0]}.")
    if "reader" in results:  # of images in files of which some were converted or cut
        found.append(f"Images as they were read: {results['reader'].iloc[0]}.")
    if study.dynamics.per_seed:
        found.append(
            "Every seed had a recording of its own, by whose scores its subsets were chosen "
            f"(`{next(iter(study.upstream.recordings.models))}`): an interval over seeds is one "
            "over recordings."
        )
    if "origin" in results:  # not random throughout
        begun = results.drop_duplicates(["student", "origin"]).dropna(subset="origin")
        each = "; ".join(f"{row.student}: {row.origin}" for row in begun.itertuples())
        found.append(f"First weights of the students: {each}.")
    return found


def refusals(study: Study, tables: Tables) -> list[str]:
    """Each refused run with its accuracy and the reasons."""
    results, column = tables["results"], next(iter(study.compare.columns.values()))
    lines = []
    for row in results[results["refused"]].to_dict("records"):
        number = f" ({100 * row[column]:.1f} %, which enters no mean)"
        number = "" if pd.isna(row[column]) else number
        lines.append(f"{row['run']}{number}: {row['reason']}")
    return lines


def further_sections(tables: Tables) -> list[Section | None]:
    """What there is to say beside the comparisons, a table each."""
    return [_distinct(tables), _by_class(tables), _networks(tables)]


def again(study: Study, tables: Tables) -> Section:
    """The command of each cell."""
    cells = tables["results"].drop_duplicates(list(AXES))
    rows = [
        (r.student, r.strategy, share_in_words(r.fraction), r.objective, f"`{r.command}`")
        for r in cells.itertuples()
    ]
    text = _where_again(study)
    return Section("The command that makes a cell again", text, Table([*AXES, "command"], rows))


def class_section(tables: Tables) -> Section | None:
    """How many examples of each class a subset has; nothing where it was not recorded."""
    found = class_table(tables["results"])
    text = (
        "Examples of each class in a subset, by the labels of the training; of seeds that differ, "
        "the fewest."
    )
    return found and Section("Classes of each subset", text, found)


def _best_epoch(study: Study, tables: Tables) -> str:
    """By how much accuracy at the best validation epoch lies above that at the last one."""
    if study.compare.measure != "accuracy":
        return "Only the last step is probed for the comparison."
    accepted = tables["results"].query("not refused")
    if accepted["test_accuracy_best"].isna().all():
        if study.data.n_validation == 0:
            return "No image was held out, so that there is no best epoch beside the last."
        return "The best epoch is not reported: the teacher was trained on the validation images."
    gains = 100 * (accepted["test_accuracy_best"] - accepted["test_accuracy"]).dropna()
    return (
        f"The best validation epoch would change them by {gains.mean():+.2f} points on average and "
        f"{gains.max():+.2f} at most ({count(len(gains), 'run')}): it is shown beside the last "
        "step, and verdicts rest on the last step."
    )


def _distinct(tables: Tables) -> Section | None:
    """Accuracy on the test images whose pixels occur only once, beside that on all of them; nothing
    where the two are the same or the tables are from before it was measured."""
    accepted = tables["results"].query("not refused")
    both = ["test_accuracy", "test_accuracy_distinct"]
    if both[1] not in accepted or not (accepted[both[0]] - accepted[both[1]]).abs().gt(1e-9).any():
        return None
    rows, cells = [], []
    for axes, runs in accepted.groupby(list(AXES), sort=False):
        whole, distinct = (100 * runs[column].mean() for column in both)
        student, strategy, fraction, objective = axes
        numbers = (f"{whole:.2f}", f"{distinct:.2f}", f"{distinct - whole:+.2f}")
        rows.append((student, objective, share_in_words(fraction), strategy, *numbers))
        cells.append(axes)
    head = ("student", "objective", "fraction", "strategy", "all (%)", "distinct (%)", "points")
    text = (
        "A test image whose pixels occur again, in either split, can be classified by memory. Mean "
        "accuracy of the last step over seeds, on all test images and without those; verdicts rest "
        "on all."
    )
    return Section(
        "On test images that occur once",
        text,
        Table(head, rows, "llrlrrr", numbers_of(cells, range(4, 7))),
    )


def _by_class(tables: Tables) -> Section | None:
    """Precision, recall and F1, each averaged over classes, beside accuracy; nothing where the runs
    are from before they were measured."""
    accepted = tables["results"].query("not refused")
    columns = ["test_accuracy", "test_precision", "test_recall", "test_f1"]
    if columns[-1] not in accepted or accepted[columns[-1]].isna().all():
        return None
    means = 100 * accepted.groupby(list(AXES), sort=False)[columns].mean()
    rows = [
        (student, objective, share_in_words(fraction), strategy, *(f"{v:.2f}" for v in values))
        for (student, strategy, fraction, objective), *values in means.itertuples()
    ]
    head = ("student", "objective", "fraction", "strategy", "accuracy", "precision", "recall", "F1")
    text = (
        "Accuracy, precision, recall and F1 (%) of the last step on the test split, means over "
        "seeds; the last three are those of each class, averaged over classes, where the precision "
        "of a class that is never predicted counts 0."
    )
    table = Table(head, rows, "llrlrrrr", numbers_of(means.index, range(4, 8)))
    return Section("Averages over classes", text, table)


def _networks(tables: Tables) -> Section | None:
    """Size and cost of each student; nothing where the runs are from before they were measured."""
    results, columns = tables["results"], ["parameters", "megabytes", "multiply_adds"]
    if columns[0] not in results:
        return None
    of = results.dropna(subset=columns).drop_duplicates("student")
    sizes, cells = of[["student", *columns]], of[list(AXES)].itertuples(index=False, name=None)
    rows = [
        (student, f"{n:,.0f}", f"{size:.3g}", f"{products / 1e6:,.4g}")
        for student, n, size, products in sizes.itertuples(index=False)
    ]
    head = ("student", "parameters", "size (MB)", "multiply-adds of an image (millions)")
    return Section("The networks", "", Table(head, rows, "lrrr", numbers_of(cells, range(1, 4))))


def _where_again(study: Study) -> str:
    """Where the same command gives the same bytes."""
    same = "A GPU may sum in another order each time: expect the same numbers, not bytes."
    if study.compute.portable:
        same = "Held to AVX2 (`portable`), it gives the same bytes on every x86-64 processor."
    elif study.compute.device == "cpu":
        same = (
            "The same kind of processor gives the same bytes; another kind may round differently."
        )
    return same


def objective_table(study: Study, tables: Tables) -> str:
    """What `objectives` returns, as Markdown; also written to the figures folder."""
    return write_text(study, "objectives.md", [objectives(study, tables).markdown()])


@names_shards
def objectives(study: Study, tables: Tables) -> Table:
    """Every objective of the axis with its formula, paper, test and accuracies.

    Accuracies, by the measure of the study, are means and standard deviations over seeds (ddof=1),
    in %, of the accepted runs of its first student.
    """
    accepted = tables["results"].query("not refused")
    student, places = study.axes.student[0], study.compare.columns.values()
    accepted = accepted[accepted["student"] == student]
    subsets = accepted[["strategy", "fraction"]].drop_duplicates().to_records(index=False)
    heads = [s if s == "full" else f"{s} {share_in_words(f)}" for s, f in subsets]
    if study.compare.on is not None:
        heads = [f"{head}, on {place_in_words(on)}" for head in heads for on in study.compare.on]
    rows, cells = [], []
    for name in study.axes.objective:
        settings = study.objectives[name]
        formula, paper, test = settings.described()
        if not study.data.labelled:
            labels_alone = "; labels train the last layer alone"
            formula = formula.removeprefix("CE + ").removesuffix(labels_alone)
        numbers = settings.model_dump(
            exclude={"kind", "trust_code", "teacher"}, exclude_none=True, exclude_defaults=True
        )
        numbers |= numbers.pop("options", {})
        numbers |= {"teacher": settings.teacher} if settings.teacher else {}
        given = ", ".join(f"{key} {value}" for key, value in numbers.items())
        numbers, of = [], []
        for strategy, fraction in subsets:
            point = {"strategy": strategy, "fraction": fraction, "objective": name}
            of_cell = np.all([accepted[axis] == v for axis, v in point.items()], axis=0)
            for column in places:
                accuracy = 100 * accepted[of_cell][column]
                mean_sd = f"{accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f}"
                numbers.append(mean_sd if len(accuracy) else "-")
                of.append((student, strategy, fraction, name))
        loss = formula + (f" ({given})" if given else "")
        test = f"`{test.removeprefix('tests/')}`"
        rows.append([name, loss, paper, test, *numbers])
        cells.append(dict(enumerate(of, start=4)))
    head = ["objective", "loss", "paper", "test", *heads]
    return Table(head, rows, "llll" + "r" * len(heads), cells)


@names_shards
def comparison_texts(study: Study, tables: Tables) -> str:
    """The tables of the comparison as Markdown; also written to the figures folder, there with
    `comparison.tex` for a paper."""
    columns, markdown = study.compare.columns.values(), []
    latex = [r"% \usepackage{booktabs,longtable}; from the run records"]
    for name, title, rows in titled(study, tables):
        markdown += [f"**{title}**", "", comparison_markdown(rows), ""]
        measured = measured_on(rows["measure"].unique() if len(rows) else columns)
        caption = f"{study.name}: {title[0].lower()}{title[1:]}; {measured}, in %."
        latex += ["", comparison_latex(rows, caption, f"{study.name}-{name}")]
    write_text(study, "comparison.tex", latex)
    return write_text(study, "comparison.md", markdown)


@names_shards
def ledger_text(study: Study, tables: Tables) -> str:
    """How many steps a subset saves, as Markdown; also written to the figures folder. Seconds stand
    in `costs_text`."""
    steps, *_ = ledger_sections(study, tables)
    lines = [f"# {study.name}: how many steps a subset saves", "", steps.text]
    lines += ["", steps.table.markdown()] if steps.table.rows else []
    return write_text(study, "ledger.md", lines)


@names_shards
def costs_text(study: Study, tables: Tables) -> str:
    """Where and by which code the runs were made, what each selection costs, and after how many
    students it has paid, as Markdown; also written to `runs/<study>/compare/costs.md`, as it
    differs from machine to machine. Without the runs it says where it is written."""
    title = f"# {study.name}: what a selection costs, and when it has paid"
    _, *sections = ledger_sections(study, tables)
    if not sections:
        where = f"runs/{study.name}/compare/costs.md"
        return f"{title}\n\nThe runs are not here; step 06 writes this text to `{where}`.\n"
    lines = [title]
    for section in sections:
        lines += ["", section.text] if section.text else []
        lines += ["", section.table.markdown()] if section.table.rows else []
    return write_text(study, "costs.md", lines, study.runs / "compare")


def ledger_sections(study: Study, tables: Tables) -> list[Section]:
    """How many steps a subset saves; where the runs are here, also what each step took, and after
    how many students a selection has paid."""
    target = (
        "the mean validation curve of a cell is first within "
        f"{count(100 * study.compare.margin, 'point')} of where the full set's students end"
    )
    without = (
        "Without labels no accuracy is followed during a training, and nothing says how many of "
        "its steps a subset saves."
    )
    followed = "validation_accuracy" in tables["curves"]
    text = (
        f"The step at which {target}, on either side; at equal steps a subset by itself saves "
        "nothing."
    )
    title = "How many steps a subset saves"
    sections = [Section(title, text if followed else without, steps_table(tables["ledger"]))]
    if "costs" not in tables:
        return sections
    costs, made = tables["costs"], tables["made"]
    students = costs[costs["what"] == "student"]
    rows = [
        (row["what"], f"{row['wall_s']:.3g}", row["steps"], row["device"])
        for row in costs[costs["what"] != "student"].to_dict("records")
    ]
    rows.append(
        (
            f"a student (median of {len(students)})", f"{students['wall_s'].median():.3g}",
            f"{students['steps'].median():.0f}", students["device"].iloc[0],
        )
    )  # fmt: skip
    versions, dirty = made["code_sha256"].nunique(), made["git_clean"].eq("False").sum()
    facts = [f"These runs were made on {', '.join(sorted(made['device'].dropna().unique()))}."]
    facts += [f"They were made by {versions} versions of the code."] * (versions > 1)
    facts += [f"{count(dirty, 'run')} of code with uncommitted changes."] * bool(dirty)
    took = Table(("what", "wall time (s)", "steps", "device"), rows, "lrrl")
    sections.append(Section("What each step took", " ".join(facts), took))
    text = (
        f"A student is charged the steps after which {target}, on either side, at the median time "
        "of a step; at equal steps a subset by itself saves nothing. A selection is charged the "
        "datamap and the training recorded for it, unless a teacher was needed anyway. Times are "
        "those of the process that finished a run, on machines that may have done other things."
    )
    paid = ledger_table(tables["ledger"])
    return [*sections, Section("When a selection has paid", text if followed else without, paid)]
