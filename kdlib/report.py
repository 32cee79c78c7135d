"""Every table and figure of a study, from its run records, or from the tables of them that are
committed.

What the notebooks show and what `make figures` redraws is the same call. A row that fails a
tripwire stays in the table as refused, with the reason. Leaves to others: drawing (`plots`),
statistics (`compare`, `ledger`), wording (`telling`), what is committed (`published`).
"""

import functools
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib import (
    cartography,
    checks,
    compare,
    files,
    ledger,
    maps,
    plots,
    probing,
    published,
    runs,
    steps,
    telling,
)
from kdlib.dynamics import DynamicsLog
from kdlib.objectives import KINDS, needs_teacher
from kdlib.params import EXHIBITS, MEASURES, PICKED, SHARD_POLICIES, Cell, Study
from kdlib.sampling import (
    EARLIER_BATCH,
    EARLIER_BATCHES,
    EARLIER_DRAWN,
    EARLIER_SHARDS,
    EARLIER_SIZE,
    earlier_plan,
    fixed_shards,
)

# Settings in which compared runs may differ: the axes, and what follows from them.
FACTORS = (
    "own.seed", "own.subset.", "own.objective.", "own.student.", "own.teacher", "inputs.subset",
    "inputs.teacher_outputs",
)  # fmt: skip

LARGEST = 10  # sentences of a summary: two of counts, then the largest differences
MOST_LINES = 20  # strategies that can be told apart over the fractions
PROBED = {measure: column for measure, column in MEASURES.items() if measure != "accuracy"}
CIRCUMSTANCES = ("device", "threads", "git_commit", "code_sha256")

Tables = dict[str, pd.DataFrame]


def results(study: Study) -> pd.DataFrame:
    """One row per declared run of the study, accepted or refused.

    Returns: The four axes, `seed`, `test_accuracy` of the last step, `test_accuracy_best` and
        `best_step` of the best epoch, `linear_accuracy` and `knn_accuracy` of the last step's
        probes; the budget, recorded (`steps samples unique_examples`), `declared_...`, and its kind
        (`budget`); `refused`, `reason`; `run`, its folder, and `command`, which makes it again;
        hashes of what it was made from and of what it left; device and versions. Accuracies are in
        [0, 1], NaN where there is no evidence, and at the best epoch also where the teacher has
        learnt from the images it was chosen on.
    """
    rows, evidences, made_from = [], {}, _MadeFrom(study)
    reference: dict[str, Any] | None = None
    probed = {cell: _last_probes(study, cell) for cell in study.probed_cells()}
    for cell in study.cells():
        for seed in study.seeds:
            folder = steps.student_folder(study, cell, seed)
            row = dict(cell.items()) | {"seed": seed, "run": str(folder.relative_to(study.runs))}
            row["command"] = command(study, cell)
            try:
                evidence = steps.open_student(study, cell, seed)
                settings = files.read_json(folder / "settings.json")
                reference = reference or settings
                row |= _measured(evidence)
                reasons = _reasons(folder, evidence, settings, reference)
                reasons += made_from.otherwise(cell, evidence)
                found = probed.get(cell, f"{cell.path} is not probed")
                reasons += _add_probes(row, found, study.compare.measure)
                evidences[cell, seed] = (len(rows), evidence)
            except (FileNotFoundError, KeyError, ValueError) as error:
                reasons = [str(error)]
            rows.append(row | {"reason": "; ".join(reasons)})
    by_cell = defaultdict(list)
    for (cell, _), found in evidences.items():
        by_cell[cell].append(found)
    for found in by_cell.values():
        verdicts = checks.distinct_seeds([evidence for _, evidence in found])
        for (index, _), check in zip(found, verdicts, strict=True):
            if not check.passed:
                rows[index]["reason"] = "; ".join(
                    filter(None, [rows[index]["reason"], check.sentence])
                )
    here = f"{files.workspace()}/"  # a table says the same wherever the study lies
    table = pd.DataFrame([row | {"reason": row["reason"].replace(here, "")} for row in rows])
    for column in ("test_accuracy", "test_accuracy_best", *PROBED.values()):
        if column not in table:  # no run has it
            table[column] = np.nan
    return table.assign(refused=table["reason"] != "")


class _MadeFrom:
    """What the study's runs must be made from, as it is now."""

    def __init__(self, study: Study) -> None:
        up = study.upstream
        runs.read_evidence(up.runs / "cache", up.step_settings("cache"))  # refuses a changed split
        made = {
            step: runs.read_evidence(up.runs / step, up.step_settings(step))
            for step in ("teacher", "datamap")
        }
        self.study, self.data = study, made["teacher"]["data"]
        self.datamap = made["datamap"]["datamap_sha256"]
        self.card = functools.cache(lambda name: steps.open_teacher(study, name))

    def otherwise(self, cell: Cell, evidence: dict[str, Any]) -> list[str]:
        """Of what else a run was made."""
        found, parent = [], evidence["subset"]["parent_datamap"]
        name = self.study.objectives[cell.objective].teacher
        of_subset = name is not None and self.study.teachers[name].learns_from == "subset"
        if evidence["data"] != self.data:
            found.append("images")
        if evidence["teacher"] and not of_subset and evidence["teacher"] != self.card(name):
            found.append("teacher outputs")
        if not cell.strategy.startswith(PICKED) and parent not in (None, self.datamap):
            found.append("datamap")
        return [f"made of another study's {', '.join(found)}: run notebook 04 again"] * bool(found)


def command(study: Study, cell: Cell) -> str:
    """The one command that makes a cell's runs again, from the repository's folder."""
    axes = dict(cell.items()) | {"fraction": repr(cell.fraction)}
    given = {"study": f"params/{study.name}.yaml"} | axes
    told = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in given.items())
    return f"papermill notebooks/04_distill.ipynb out.ipynb {told}"


def _measured(evidence: dict[str, Any]) -> dict[str, Any]:
    last, best = evidence["checkpoints"]["last"], evidence["checkpoints"]["best"]
    heard = evidence["selection"]["teacher_overlap"] > 0
    budget, made, teacher = evidence["budget"], evidence["made"], evidence["teacher"]
    return {
        "test_accuracy": last["test_accuracy"],
        # an epoch chosen on images of which the student has heard is not reported
        "test_accuracy_best": float("nan") if heard else best["test_accuracy"],
        "best_step": best["step"],
        **budget["recorded"],
        **{f"declared_{key}": value for key, value in budget["declared"].items()},
        "budget": budget["comparison"],
        "weights_sha256": last["weights_sha256"],
        "checkpoint_sha256": last["file_sha256"],
        "subset_sha256": evidence["subset"]["sha256"],
        "teacher_sha256": teacher["weights_sha256"] if teacher else "",
        **{f"data_{part}": value for part, value in evidence["data"].items()},
        "settings_sha256": evidence["settings_sha256"],
        **{key: str(made[key]) for key in CIRCUMSTANCES},
        "versions": ", ".join(f"{name} {found}" for name, found in made["versions"].items()),
    }


def _last_probes(study: Study, cell: Cell) -> pd.DataFrame | str:
    """Probe rows of a cell, or why there are none that count."""
    try:
        evidence = runs.read_evidence(probing.probe_folder(study, cell))
        judged = checks.run_all(checks.PROBE, evidence)
        if failed := [f"{check.name}: {check.sentence}" for check in judged if not check.passed]:
            return "; ".join(failed)
        return probing.open_probes(study, cell)
    except (FileNotFoundError, KeyError, ValueError) as error:
        return str(error)


def _add_probes(row: dict[str, Any], found: pd.DataFrame | str, measure: str) -> list[str]:
    """Add the probes of a run's last step to its row; why the row lacks the compared one."""
    lacking = {measure: found} if isinstance(found, str) else {}
    for probe, column in PROBED.items() if not lacking else ():
        last = found[
            (found["strategy"] == row["strategy"])
            & (found["seed"] == row["seed"])
            & (found["step"] == row["steps"])
            & (found["probe"] == probe)
            & (found["on"] == "own")
            & (found["layer"] == "features")
        ]
        if len(last) != 1:
            lacking[probe] = f"{len(last)} {probe} probes of its last step; expected one"
        elif last["weights_sha256"].iloc[0] != row["weights_sha256"]:
            lacking[probe] = f"its {probe} probe is of other weights: run notebook 05 again"
        else:
            row[column] = float(last["accuracy"].iloc[0])
    return [lacking[measure]] if measure in PROBED and measure in lacking else []


def _reasons(folder: Path, evidence: dict, settings: dict, reference: dict) -> list[str]:
    """Why this row must not be believed; empty when it may."""
    judged = checks.run_all(checks.STUDENT, evidence)
    judged.append(checks.checkpoint_hashes(folder, evidence))
    reasons = [f"{check.name}: {check.sentence}" for check in judged if not check.passed]
    if lines := checks.differing(settings, reference, FACTORS):
        reasons.append(f"differs from the other runs in {', '.join(lines)}")
    return reasons


def curves(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Metrics of all accepted runs: the axes and seed, then the columns of `metrics.parquet`."""
    axes = ["student", "strategy", "fraction", "objective", "seed"]
    parts = []
    for row in table[~table["refused"]].to_dict("records"):
        metrics = runs.read_metrics(study.runs / row["run"])
        parts.append(metrics.assign(**{a: row[a] for a in axes}))
    return pd.concat(parts, ignore_index=True)


def probes(study: Study) -> pd.DataFrame:
    """Probe rows of all probed cells, with reference rows `untrained` and `teacher`."""
    parts = [probing.open_probes(study, cell) for cell in study.probed_cells()]
    return with_untrained(pd.concat(parts, ignore_index=True))


def with_untrained(table: pd.DataFrame) -> pd.DataFrame:
    """Probe rows with the rows of step 0 once more under the strategy `untrained`.

    The untrained network of a seed is the same in every cell, and so is the teacher: each of these
    reference rows is kept once.
    """
    untrained = table[table["step"] == 0].assign(strategy="untrained")
    whole = pd.concat([table, untrained], ignore_index=True)
    is_reference = whole["strategy"].isin(["untrained", "teacher"])
    keys = ["student", "strategy", "objective", "seed", "on", "layer", "probe"]
    return whole[~(is_reference & whole.duplicated(keys))].reset_index(drop=True)


def costs(study: Study) -> pd.DataFrame:
    """What took how long: one row for each finished run of a student, and one each for `cache`,
    `teacher` (its training, if any, and its stored outputs), `dynamics` (where it is a training of
    its own), `datamap` and each further teacher, or all those of it that learn from a subset alone.

    Returns: `what`, the axes and `seed` ("", 0 and -1 where there are none), `wall_s` of the
        process that finished it, `steps` of optimisation, and the circumstances.
    """
    made, nowhere = study.upstream.runs, {"student": "", "strategy": "", "fraction": 0.0}
    nowhere |= {"objective": "", "seed": -1}
    folders = {what: [made / what] for what in ("cache", "teacher")}
    if study.dynamics.model is not None:
        folders["dynamics"] = [study.recorded_run]
    folders["datamap"] = [made / "datamap"]
    for name in study.teachers:
        found = sorted(steps.teacher_folder(study, name).glob("**/evidence.json"))
        folders[f"teacher {name}"] = [path.parent for path in found]
    rows = []
    for what, places in folders.items():
        spent = [_cost(e) for e in map(_finished, places) if e is not None]
        if spent:
            total = {key: sum(one[key] for one in spent) for key in ("wall_s", "steps")}
            rows.append({"what": what} | nowhere | spent[0] | total)
    for cell in study.cells():
        for seed in study.seeds:
            evidence = _finished(steps.student_folder(study, cell, seed))
            if evidence is not None:
                row = {"what": "student"} | dict(cell.items()) | {"seed": seed}
                rows.append(row | _cost(evidence))
    return pd.DataFrame(rows)


def _finished(folder: Path) -> dict[str, Any] | None:
    try:
        return runs.read_evidence(folder)
    except (FileNotFoundError, ValueError):  # not made, or refused with its row
        return None


def _cost(evidence: dict[str, Any]) -> dict[str, Any]:
    made, recorded = evidence["made"], evidence.get("budget", {}).get("recorded", {})
    told = {key: str(made[key]) for key in CIRCUMSTANCES}
    return {"wall_s": made["wall_s"], "steps": recorded.get("steps", 0)} | told


def selection_s(study: Study, spent: pd.DataFrame, strategy: str, objective: str) -> float:
    """Seconds before the first subset of a strategy was there, that a student on the full set would
    not have needed.

    A strategy that reads the datamap needs it and the training recorded for it; where the teacher's
    own training was recorded, a student with that teacher would have needed it anyway. Further
    teachers are needed for the full set as well, and a subset's own one is charged to nobody.

    Args:
        spent: From `costs`.
    """
    if strategy in ("full", *SHARD_POLICIES, *EXHIBITS):
        return 0.0
    if not strategy.startswith(PICKED) and study.selection(strategy).kind == "random":
        return 0.0
    needed = {"datamap"}
    if study.dynamics.model is not None:
        needed.add("dynamics")
    elif not needs_teacher(heard := study.objectives[objective]) or heard.teacher is not None:
        needed.add("teacher")
    return float(spent[spent["what"].isin(needed)]["wall_s"].sum())


def compile_tables(study: Study) -> Tables:
    """All tables of a study from its runs, written to `runs/<study>/compare/` as parquet; those
    from which all others follow are written to `figures/<study>/tables/` too, to be committed.

    Returns: `results`, `curves`, `probes` and `costs`, and what `comparisons` makes of them.
    Raises: checks.TripwireError when no row is left to compare.
    """
    table = results(study)
    if table["refused"].all():
        raise checks.TripwireError(f"every row is refused; the first: {table['reason'].iloc[0]}")
    found = probes(study)
    hashes = [name for name in found if name.endswith(("_weights", "weights_sha256"))]
    records = {
        "results": table,
        "curves": curves(study, table).drop(columns=["epoch", "learning_rate"]),
        "probes": found.drop(columns=hashes),  # `results` has those of the last step
        "costs": costs(study),
    }
    tables = comparisons(study, published.write(study, records))
    folder = study.runs / "compare"
    for name, content in tables.items():
        files.write_atomic(folder / f"{name}.parquet", lambda f, c=content: c.to_parquet(f))
    return tables


def open_tables(study: Study) -> tuple[Tables, str]:
    """All tables of a study, compiled from its runs where they are compared, else the committed
    ones; and which of them.

    Raises: FileNotFoundError where there are neither; ValueError for committed tables that were
        changed or belong to other settings.
    """
    compared = (study.runs / "compare" / "evidence.json").is_file()
    if compared or not published.there(study):
        if not (study.runs / "distill").is_dir():
            raise FileNotFoundError(
                f"{study.name} has neither runs ({study.runs}) nor committed tables "
                f"({published.folder(study)}); run python -m kdlib study params/{study.name}.yaml"
            )
        return compile_tables(study), "its runs"
    return comparisons(study, published.read(study)), "its committed tables"


def comparisons(study: Study, tables: Tables) -> Tables:
    """The tables, and what follows from them: `strategies` (each strategy minus the baseline),
    `objectives` (each objective minus the one without a teacher, when the study has one),
    `controls` (each minus `compare.objective`, when the study names one), `ledger`."""
    settings, table, names = study.compare, tables["results"], study.axes.objective
    how = (settings.margin, settings.confidence_level, MEASURES[settings.measure])
    made = {"strategies": compare.paired_differences(table, settings.baseline, *how)}
    plain = [n for n in names if study.objectives[n].kind == "cross_entropy"][:1]
    against = {"objectives": plain[0] if plain else None, "controls": settings.objective}
    if against["controls"] == against["objectives"]:
        del against["controls"]
    for name, reference in against.items():
        if reference is not None and len(names) > 1:
            made[name] = compare.objective_differences(table, reference, *how)
    commands = table.drop_duplicates(compare.AXES).set_index(compare.AXES)["command"]
    for name, content in made.items():
        cells = zip(*(content[axis] for axis in compare.AXES), strict=True)
        made[name] = content.assign(command=[commands[cell] for cell in cells])
    spent = tables["costs"]
    made["ledger"] = ledger.ledger(
        table,
        tables["curves"],
        spent[spent["what"] == "student"],
        settings.margin,
        lambda strategy, objective: selection_s(study, spent, strategy, objective),
    )
    return tables | made


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
        f"{telling.MEASURED[MEASURES[study.compare.measure]]}. {_best_epoch(study, tables)}",
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
        told = telling.summary_lines(tables[name])
        lines += [f"- {line}" for line in told[:LARGEST]]
        if len(told) > LARGEST:
            lines.append(f"- The other {len(told) - LARGEST} comparisons are in the table.")
        lines += ["", telling.to_markdown(tables[name]), ""]
    lines += [telling.bootstrap_line(tables["strategies"]), ""]
    lines += ["## Any cell again", "", telling.cell_table(_commands(table))]
    return _tell(study, "summary.md", lines)


def _best_epoch(study: Study, tables: Tables) -> str:
    if study.compare.measure != "accuracy":
        return "Only the last step is probed for the comparison."
    accepted = tables["results"].query("not refused")
    if accepted["test_accuracy_best"].isna().all():
        return "The best epoch is not reported: the teacher has learnt from the validation images."
    gains = (accepted["test_accuracy_best"] - accepted["test_accuracy"]).dropna()
    return telling.inflation_line(gains.mean(), gains.max(), len(gains))


def _commands(table: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    for row in table.drop_duplicates(compare.AXES).to_dict("records"):
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
        kind = KINDS[settings.kind]
        numbers = settings.model_dump(exclude={"kind", "trust_code"}, exclude_none=True)
        numbers |= numbers.pop("options", {})
        told = ", ".join(f"{key} {value}" for key, value in numbers.items())
        cells = []
        for strategy, fraction in subsets:
            point = {"strategy": strategy, "fraction": fraction, "objective": name}
            rows = accepted[np.all([accepted[axis] == v for axis, v in point.items()], axis=0)]
            found = 100 * rows[MEASURES[study.compare.measure]]
            cells.append(f"{found.mean():.2f} ± {found.std(ddof=1):.2f}" if len(found) else "-")
        loss = kind.formula.replace("|", "\\|") + (f" ({told})" if told else "")
        test = f"`{kind.test.removeprefix('tests/')}`"
        lines.append(f"| {name} | {loss} | {kind.paper} | {test} | {' | '.join(cells)} |")
    return _tell(study, "objectives.md", lines)


def comparison_texts(study: Study, tables: Tables) -> list[Path]:
    """Write the tables of the comparison alone: `comparison.md` and, for a paper, `comparison.tex`.

    Returns: Their paths.
    """
    markdown, latex = [], [r"% \usepackage{booktabs,longtable}; from the run records"]
    for name, title in titles(study, tables).items():
        markdown += [f"**{title}**", "", telling.to_markdown(tables[name]), ""]
        told = telling.MEASURED[MEASURES[study.compare.measure]]
        caption = f"{study.name}: {title[0].lower()}{title[1:]}; {told}, in %."
        latex += ["", telling.to_latex(tables[name], caption, f"{study.name}-{name}")]
    _tell(study, "comparison.md", markdown)
    _tell(study, "comparison.tex", latex)
    return [study.figures / f"comparison.{kind}" for kind in ("md", "tex")]


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
        f"within {telling.count(100 * study.compare.margin, 'point')} of where the full set's "
        "students end, on either side, at the median time of a step; at equal steps a subset by "
        "itself saves nothing. A selection is charged the datamap and the training recorded for "
        "it, unless a teacher was needed anyway. Times are those of the process that finished a "
        "run, on machines that may have done other things.",
        "",
        ledger.to_markdown(tables["ledger"]),
    ]
    return _tell(study, "ledger.md", lines)


def _tell(study: Study, name: str, lines: Iterable[str]) -> str:
    text = "\n".join(lines).rstrip() + "\n"
    files.write_atomic(study.figures / name, lambda file: file.write(text.encode()))
    return text


def finish(study: Study, tables: Tables) -> dict[str, Any]:
    """Mark the comparison made: what it was compiled from and how many rows it holds."""
    folder = study.runs / "compare"
    table = tables["results"]
    settings = {"own": study.step_settings("compare"), "inputs": {}}
    for name in tables:
        settings["inputs"][name] = files.sha256_file(folder / f"{name}.parquet")
    files.write_json(folder / "settings.json", settings)
    return runs.Run(folder, settings).finish(
        {
            "step": "compare",
            "study": study.name,
            "n_runs": len(table),
            "n_accepted": int((~table["refused"]).sum()),
        }
    )


def draw_datamap(study: Study) -> dict[str, Path]:
    """Draw `datamap`, `forming` (the map after fewer epochs) and `regions` (the images deepest
    inside each region).

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    images = steps.open_images(study)
    table = steps.open_datamap(study, images)
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)
    with plots.style():
        fig_map = Figure(figsize=(plots.WIDE, 4.6))
        title = f"{study.name}, N = {len(table):,}, E = {log.n_epochs}"
        maps.datamap(fig_map, table, title, class_names=images.train.header["class_names"])
        snapshots = _snapshots(log)
        fig_forming = Figure(figsize=(plots.WIDE, 2.5 if len(snapshots) <= 3 else 4.5))
        maps.forming(fig_forming, snapshots, f"{study.name}, N = {len(table):,}")
        fig_grid = Figure(figsize=(plots.WIDE, 3.2))
        plots.region_grid(fig_grid, *_typical_images(images, table))
    return _save(study, {"datamap": fig_map, "forming": fig_forming, "regions": fig_grid})


def _snapshots(log: DynamicsLog) -> dict[int, pd.DataFrame]:
    """The map's coordinates after each of up to six numbers of epochs."""
    found = {}
    for epoch in np.unique(np.geomspace(min(2, log.n_epochs), log.n_epochs, 6).round()).astype(int):
        gold_prob, correct = log["gold_prob"][:epoch], log["correct"][:epoch]
        found[int(epoch)] = pd.DataFrame(
            {
                "confidence": cartography.confidence(gold_prob),
                "variability": cartography.variability(gold_prob),
                "correctness": cartography.correctness(correct),
            }
        )
    return found


def _typical_images(images: steps.Images, table: pd.DataFrame, n: int = 12) -> tuple[dict, dict]:
    """The images deepest inside each region: region -> uint8 (n, C, H, W), region -> captions."""
    names = images.train.header["class_names"]
    deepest = {
        "easy": np.hypot(table["variability"], 1 - table["confidence"]),
        "ambiguous": -table["variability"],
        "hard": np.hypot(table["variability"], table["confidence"]),
    }
    pixels, captions = {}, {}
    for region, distance in deepest.items():
        ids = distance.sort_values(kind="stable").index[:n].to_numpy()
        pixels[region] = images.train.read("images", ids)
        captions[region] = [str(names[label]) for label in table.loc[ids, "label"]]
    return pixels, captions


def draw_shard_visits(study: Study) -> dict[str, Path]:
    """Draw `shard_visits`: how often the shard policies read each shard, and how often the scheme
    did that sorts the drawn shards and cuts every pass short.

    The numbers are those of an earlier study: 122 shards of 2,048 images, 25 of them per pass, 200
    passes of 500 batches of 64 (800 would be needed to read 25 shards).

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    n_passes, size, ids = 200, EARLIER_SIZE, np.arange(EARLIER_SHARDS * EARLIER_SIZE)

    def visits(shards: np.ndarray | None = None, **how: bool) -> np.ndarray:
        """Of each shard; of none but `shards`, whose examples every pass has."""
        if shards is None:
            return earlier_plan(n_passes, **how).shard_visits()
        found, own = np.zeros(EARLIER_SHARDS), ids[np.isin(ids // size, shards)]
        found[shards] = earlier_plan(n_passes, drawn=False, example_ids=own, **how).shard_visits()
        return found

    chosen = np.unique(fixed_shards(ids, size, EARLIER_DRAWN, seed=0) // size)
    told = {
        "all": visits(drawn=False),
        "fixed": visits(chosen),
        f"random, {EARLIER_DRAWN} a pass": visits(),
        "earlier scheme (sorted, cut short), fixed": visits(np.arange(EARLIER_DRAWN), biased=True),
        "earlier scheme (sorted, cut short), random": visits(biased=True),
    }
    with plots.style():
        fig = Figure(figsize=(plots.WIDE, 5.6))
        n_batches = n_passes * EARLIER_BATCHES
        title = f"{n_batches:,} batches of {EARLIER_BATCH} from {EARLIER_SHARDS} shards of {size:,}"
        plots.shard_visits(fig, told, f"{title} images")
    return _save(study, {"shard_visits": fig})


def draw_comparison(study: Study, tables: Tables) -> dict[str, Path]:
    """Draw `accuracy`, `differences` (of strategies, or of objectives where there are many),
    `objective_differences` and `control_differences` where there are such, `fractions` where there
    are three or more, `curves`, `probes`, of the first student `diagnostics`, and `places` where
    probes are of several layers or data sets.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    accepted = tables["results"][~tables["results"]["refused"]]
    figures, names = {}, study.axes.objective
    measure, margin = MEASURES[study.compare.measure], study.compare.margin
    kinds = {"differences": "strategies", "objective_differences": "objectives",
             "control_differences": "controls"}  # fmt: skip
    with plots.style():
        figures["accuracy"] = Figure(figsize=(plots.WIDE, 4.4))
        if len(names) <= len(plots.OBJECTIVES) and set(accepted["strategy"]) != {"full"}:
            plots.accuracy_by_strategy(figures["accuracy"], accepted, tables["strategies"], measure)
        else:
            plots.accuracy_by_objective(figures["accuracy"], accepted, names, measure)
            if "objectives" in tables:
                kinds = {"differences": "objectives", "control_differences": "controls"}
        for name, kind in kinds.items():
            if len(tables.get(kind, ())):
                figures[name] = Figure(figsize=(plots.WIDE, 5.0))
                plots.differences(figures[name], _in_order(study, tables[kind]), margin)
        subsets = accepted[accepted["strategy"] != "full"]
        if subsets["fraction"].nunique() >= 3 and subsets["strategy"].nunique() <= MOST_LINES:
            figures["fractions"] = Figure(figsize=(plots.WIDE, 3.2))
            plots.accuracy_by_fraction(figures["fractions"], accepted, measure)
        figures["curves"] = Figure(figsize=(plots.WIDE, 3.4))
        rows, by = _shown_curves(study, _common(study, tables["curves"], ["objective"]))
        plots.learning_curves_by_student(figures["curves"], rows, by)
        probed = _judged(tables["probes"], tables["results"])
        probed = _common(study, probed, ["objective", "probe"])
        # lines are strategies, or, where nothing but the full set is probed, objectives
        several = probed[~probed["strategy"].isin(plots.REFERENCES)]["strategy"].nunique() > 1
        panels = list(probed.groupby(["student", "objective"][: 1 + several], sort=False))
        figures["probes"] = Figure(figsize=(plots.WIDE, 0.6 + 2.8 * len(panels)))
        axs = figures["probes"].subplots(len(panels), 2, squeeze=False)
        for (i, j), ax in np.ndenumerate(axs):
            (student, *_), rows = panels[i]
            plots.probe_curves(ax, rows, probe=("linear", "knn")[j])
            if probed["student"].nunique() > 1:
                title = f"{plots.in_words(student)}\n{ax.get_title(loc='left')}"
                ax.set_title(title, fontsize=plots.TEXT_PT)
        figures["diagnostics"] = Figure(figsize=(plots.WIDE, 4.2))
        first = probed["student"] == probed["student"].iloc[0]
        plots.diagnostics(figures["diagnostics"], probed[first])
        if len(probed[["on", "layer"]].drop_duplicates()) > 1:
            figures["places"] = Figure(figsize=(plots.WIDE, 3.0))
            plots.probe_places(figures["places"], probed)
    return _save(study, figures)


def _in_order(study: Study, comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison with the students in the order of the study."""
    place = comparison["student"].map(study.axes.student.index)
    return comparison.iloc[np.argsort(place.to_numpy(), kind="stable")]


def _judged(probes: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """Probe rows of accepted runs; a cell of which every run is refused stays, and is called so."""
    cell = ["student", "strategy", "fraction", "objective"]
    marked = results.assign(lost=results.groupby(cell)["refused"].transform("all"))
    known = marked[[*cell, "seed", "refused", "lost"]]
    rows = probes.merge(known, on=[*cell, "seed"], how="left")  # references are no runs
    refused, lost = (rows[name].eq(True) for name in ("refused", "lost"))
    names = rows["strategy"].where(~lost, rows["strategy"] + "_(refused)")
    kept = rows.assign(strategy=names)[~refused | lost]
    return kept.drop(columns=["refused", "lost"])


def _common(study: Study, rows: pd.DataFrame, more: list[str]) -> pd.DataFrame:
    """Of a study whose runs may stop early, the steps that every seed of a cell has reached."""
    if study.training.early_stopping is None:
        return rows
    cell = ["student", "strategy", "fraction", *more]
    of_step = rows.groupby([*cell, "step"])["seed"].transform("nunique")
    return rows[of_step == rows.groupby(cell)["seed"].transform("nunique")]


def _shown_curves(study: Study, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The curves of the probed cells of one objective; of all objectives on the full set, where
    nothing else is probed. And what tells them apart."""
    full = rows["strategy"] == "full"
    shown = [s for s in study.probe.strategy if s != "full"]
    if not shown:
        return rows[full], "objective"
    of_subsets = rows["strategy"].isin(shown) & (rows["fraction"] == study.probe.fraction)
    of_objective = rows["objective"] == study.probe.objective[0]
    return rows[of_objective & (full | of_subsets)], "strategy"


def redraw(study: Study) -> tuple[dict[str, Path], str]:
    """Every figure and text of the comparison, from the study's runs, or from its committed tables
    where the runs are elsewhere.

    Returns: Figure name -> its PNG, and what they were drawn from.
    Raises: As `open_tables`.
    """
    tables, origin = open_tables(study)
    drawn = draw_comparison(study, tables)
    summary(study, tables)
    objective_table(study, tables)
    comparison_texts(study, tables)
    ledger_text(study, tables)
    return drawn, origin


def _save(study: Study, figures: dict[str, Figure]) -> dict[str, Path]:
    return {n: plots.save_figure(figure, study.figures, n)[1] for n, figure in figures.items()}
