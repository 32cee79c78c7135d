"""What later steps find of a student, for the summary of its run at Weights & Biases."""

import pandas as pd

from kdlib.compare.comparisons import Tables
from kdlib.steps.folders import student_folder
from kdlib.steps.probe_network import LAST
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES, OWN
from kdlib.study.study import Study
from kdlib.trainer.tracking import summarise

COLUMNS = ("verdict", "difference", "low", "high")


def show_probes(study: Study, cell: Cell, table: pd.DataFrame) -> None:
    """The probes of step 05 of the last layer at the last step: `linear_accuracy`, and with another
    data set `linear_accuracy/NAME`."""
    for seed in study.seeds if study.tracking.wandb else ():
        rows = table[(table["seed"] == seed) & (table["layer"] == LAST)]
        results = {
            f"{row.probe}_accuracy" + ("" if row.on == OWN else f"/{row.on}"): row.accuracy
            for row in rows[rows["step"] == rows["step"].max()].itertuples()
        }
        summarise(study.tracking, student_folder(study, cell, seed), results)


def show_verdicts(study: Study, tables: Tables) -> None:
    """What step 06 says of each run, and of its cell: `strategies/verdict`, by probes of another
    data set `strategies on NAME/verdict`, against another fraction `strategies 0.33/verdict`."""
    for row in tables["results"].to_dict("records") if study.tracking.wandb else ():
        results = {"refused": row["refused"], "reason": row["reason"]}
        for name in ("strategies", "objectives", "controls"):
            for found in tables[name].to_dict("records") if name in tables else ():
                if all(found[axis] == row[axis] for axis in AXES):
                    against, on = found["against_fraction"], found.get("on", OWN)
                    key = name if on == OWN else f"{name} on {on}"
                    key += "" if against == row["fraction"] else f" {against:g}"
                    results |= {f"{key}/{column}": found[column] for column in COLUMNS}
        if (study.runs / row["run"] / "evidence.json").is_file():
            summarise(study.tracking, study.runs / row["run"], results)
