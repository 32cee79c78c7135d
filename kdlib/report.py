"""Every table and figure of a study, from its run records alone.

What the notebooks show and what `make figures` redraws is the same call. A row that fails a
tripwire stays in the table as refused, with the reason. Leaves to others: drawing (`plots`),
statistics (`compare`).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib import cartography, checks, compare, files, maps, plots, probing, runs, steps
from kdlib.dynamics import DynamicsLog
from kdlib.objectives import KINDS
from kdlib.params import Study
from kdlib.sampling import Plan, fixed_shards
from kdlib.seeds import generator

# Settings in which compared runs may differ: the axes, and what follows from them.
FACTORS = (
    "own.seed", "own.subset.", "own.objective.", "own.student.", "inputs.subset",
    "inputs.teacher_outputs",
)  # fmt: skip

LARGEST = 10  # sentences of a summary: two of counts, then the largest differences


def results(study: Study) -> pd.DataFrame:
    """One row per declared run of the study, accepted or refused.

    Returns: Columns `student strategy fraction objective seed test_accuracy test_accuracy_best
        best_step steps samples unique_examples budget refused reason run weights_sha256`;
        accuracies in [0, 1], NaN where there is no evidence, and at the best epoch also where the
        teacher has learnt from the images it was chosen on.
    """
    rows, evidences = [], {}
    reference: dict[str, Any] | None = None
    for cell in study.cells():
        for seed in study.seeds:
            folder = steps.student_folder(study, cell, seed)
            row = dict(cell.items()) | {"seed": seed, "run": str(folder.relative_to(study.runs))}
            try:
                evidence = steps.open_student(study, cell, seed)
                settings = files.read_json(folder / "settings.json")
                reference = reference or settings
                row |= _measured(evidence)
                reasons = _reasons(folder, evidence, settings, reference)
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
    table = pd.DataFrame(rows)
    return table.assign(refused=table["reason"] != "")


def _measured(evidence: dict[str, Any]) -> dict[str, Any]:
    last, best = evidence["checkpoints"]["last"], evidence["checkpoints"]["best"]
    heard = evidence["selection"]["teacher_overlap"] > 0
    return {
        "test_accuracy": last["test_accuracy"],
        # an epoch chosen on images of which the student has heard is not reported
        "test_accuracy_best": float("nan") if heard else best["test_accuracy"],
        "best_step": best["step"],
        **evidence["budget"]["recorded"],
        "budget": evidence["budget"]["comparison"],
        "weights_sha256": last["weights_sha256"],
        "code_sha256": evidence["made"]["code_sha256"],
    }


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


def compile_tables(study: Study) -> dict[str, pd.DataFrame]:
    """All tables of a study, written to `runs/<study>/compare/` as parquet.

    Returns: `results`, `curves`, `probes`, `strategies` (each strategy minus the baseline) and
        `objectives` (each objective minus the plain one, when the study has one).
    Raises: checks.TripwireError when no row is left to compare.
    """
    table = results(study)
    if table["refused"].all():
        raise checks.TripwireError(f"every row is refused; the first: {table['reason'].iloc[0]}")
    settings = study.compare
    level, margin = settings.confidence_level, settings.margin
    tables = {
        "results": table,
        "curves": curves(study, table),
        "probes": probes(study),
        "strategies": compare.paired_differences(table, settings.baseline, margin, level),
    }
    plain = [n for n in study.axes.objective if study.objectives[n].kind == "cross_entropy"]
    if plain and len(study.axes.objective) > 1:
        tables["objectives"] = compare.objective_differences(table, plain[0], margin, level)
    folder = study.runs / "compare"
    for name, content in tables.items():
        files.write_atomic(folder / f"{name}.parquet", lambda f, c=content: c.to_parquet(f))
    return tables


def summary(study: Study, tables: dict[str, pd.DataFrame]) -> str:
    """What was found, in plain sentences, as Markdown; also written to the figures folder."""
    table = tables["results"]
    refused = table[table["refused"]]
    versions = table["code_sha256"].nunique()
    inflation = (table["test_accuracy_best"] - table["test_accuracy"])[~table["refused"]].mean()
    best = (
        f"the best validation epoch would change them by {100 * inflation:+.2f} points on average"
    )
    if pd.isna(inflation):
        best = "the best epoch is not reported: the teacher has learnt from the validation images"
    lines = [
        f"# {study.name}: what was found",
        "",
        f"{len(table) - len(refused)} of {len(table)} runs accepted, {len(study.seeds)} paired "
        f"seeds, {study.training.comparison.replace('_', ' ')}. Accuracies are those of the last "
        f"step on the test split; {best}.",
        "",
    ]
    if versions > 1:
        lines += [f"The runs were made by {versions} versions of the code.", ""]
    for row in refused.to_dict("records"):
        lines.append(f"- refused: {row['run']}: {row['reason']}")
    for name, title in (
        ("strategies", f"Every strategy against {study.compare.baseline}"),
        ("objectives", "With the teacher against without"),
    ):
        if name in tables:
            lines += [f"## {title}", ""]
            told = compare.summary_lines(tables[name])
            lines += [f"- {line}" for line in told[:LARGEST]]
            if len(told) > LARGEST:
                lines.append(f"- The other {len(told) - LARGEST} comparisons are in the table.")
            lines += ["", compare.to_markdown(tables[name]), ""]
    text = "\n".join(lines).rstrip() + "\n"
    files.write_atomic(study.figures / "summary.md", lambda file: file.write(text.encode()))
    return text


def objective_table(study: Study, tables: dict[str, pd.DataFrame]) -> str:
    """Every objective of the axis with its formula, paper, test and accuracies, as Markdown; also
    written to the figures folder.

    Accuracies are means and standard deviations over seeds (ddof=1), in %, of the accepted runs of
    the study's first student.
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
        numbers = settings.model_dump(exclude={"kind"}, exclude_none=True)
        told = ", ".join(f"{key} {value}" for key, value in numbers.items())
        cells = []
        for strategy, fraction in subsets:
            point = {"strategy": strategy, "fraction": fraction, "objective": name}
            rows = accepted[np.all([accepted[axis] == v for axis, v in point.items()], axis=0)]
            found = 100 * rows["test_accuracy"]
            cells.append(f"{found.mean():.2f} ± {found.std(ddof=1):.2f}" if len(found) else "-")
        loss = kind.formula.replace("|", "\\|") + (f" ({told})" if told else "")
        test = f"`{kind.test.removeprefix('tests/')}`"
        lines.append(f"| {name} | {loss} | {kind.paper} | {test} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    files.write_atomic(study.figures / "objectives.md", lambda file: file.write(text.encode()))
    return text


def finish(study: Study, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
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
    n_shards, size, drawn, n_passes, n_batches, batch = 122, 2048, 25, 200, 500, 64
    ids, n_steps = np.arange(n_shards * size), n_passes * n_batches
    chosen = fixed_shards(ids, size, drawn, seed=0)
    fixed = np.zeros(n_shards)
    fixed[np.unique(chosen // size)] = Plan(
        chosen, batch, n_steps, 0, shard_size=size
    ).shard_visits()
    visits = {"all": Plan(ids, batch, n_steps, 0, shard_size=size).shard_visits(), "fixed": fixed}
    visits[f"random, {drawn} a pass"] = Plan(
        ids, batch, n_steps, 0, shard_size=size, shards_per_pass=drawn
    ).shard_visits()
    # how much of each of its sorted shards a pass that is cut short gets through
    share = np.clip(n_batches * batch / size - np.arange(drawn), 0, 1)
    first, random = np.zeros(n_shards), np.zeros(n_shards)
    first[:drawn] = n_passes * share
    for number in range(n_passes):
        rng = generator(0, "shards", number)
        random[np.sort(rng.choice(n_shards, drawn, replace=False))] += share
    visits["earlier scheme (sorted, cut short), fixed"] = first
    visits["earlier scheme (sorted, cut short), random"] = random
    with plots.style():
        fig = Figure(figsize=(plots.WIDE, 5.6))
        title = f"{n_steps:,} batches of {batch} from {n_shards} shards of {size:,} images"
        plots.shard_visits(fig, visits, title)
    return _save(study, {"shard_visits": fig})


def draw_comparison(study: Study, tables: dict[str, pd.DataFrame]) -> dict[str, Path]:
    """Draw `accuracy`, `differences`, `curves` and `probes`.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    accepted = tables["results"][~tables["results"]["refused"]]
    figures = {}
    with plots.style():
        figures["accuracy"] = Figure(figsize=(plots.WIDE, 4.4))
        names, differences = study.axes.objective, tables["strategies"]
        if len(names) <= len(plots.OBJECTIVES):
            plots.accuracy_by_strategy(figures["accuracy"], accepted, tables["strategies"])
        else:
            of_first = accepted[accepted["student"] == study.axes.student[0]]
            plots.accuracy_by_objective(figures["accuracy"], of_first, names)
            differences = tables.get("objectives", differences)
        figures["differences"] = Figure(figsize=(plots.WIDE, 5.0))
        axis = figures["differences"].subplots()
        plots.paired_differences(axis, differences, margin=study.compare.margin)
        figures["curves"] = Figure(figsize=(plots.WIDE, 3.4))
        rows = tables["curves"]
        shown = [s for s in study.probe.strategy if s != "full"]
        full = rows["strategy"] == "full"
        if shown:
            of_subsets = rows["strategy"].isin(shown) & (rows["fraction"] == study.probe.fraction)
            of_objective = rows["objective"] == study.probe.objective[0]
            plots.learning_curves(
                figures["curves"].subplots(), rows[of_objective & (full | of_subsets)]
            )
        else:  # nothing but the full set is probed: with the teacher against without
            plots.learning_curves(figures["curves"].subplots(), rows[full], by="objective")
        figures["probes"] = Figure(figsize=(plots.WIDE, 3.4))
        for axis, kind in zip(figures["probes"].subplots(1, 2), ("linear", "knn"), strict=True):
            plots.probe_curves(axis, tables["probes"], probe=kind)
    return _save(study, figures)


def draw_diagnostics(study: Study, rows: pd.DataFrame) -> dict[str, Path]:
    """Draw `diagnostics`: the shape of the features over training, from the table `probes`.

    Returns: Figure name -> its PNG; a PDF lies beside it.
    """
    with plots.style():
        figure = plots.diagnostics(Figure(figsize=(plots.WIDE, 4.2)), rows)
    return _save(study, {"diagnostics": figure})


def _save(study: Study, figures: dict[str, Figure]) -> dict[str, Path]:
    return {n: plots.save_figure(figure, study.figures, n)[1] for n, figure in figures.items()}
