"""The checks that every run of a study went through, each with how many runs passed and failed."""

import inspect

import pandas as pd

from kdlib.compare.text import Table
from kdlib.repro import checks
from kdlib.study.study import Study

PROBED, EVIDENCE = "probed", "evidence"  # names among `checks.FURTHER`


def checklist(study: Study, results: pd.DataFrame) -> Table:
    """One row for each check: its name, what holds where it passes, and numbers of runs.

    A row without evidence fails the check `evidence`, and is looked at by no other. Of refused rows
    in tables from before the names of failed checks were recorded, none is counted.
    """
    rules = (*checks.CACHE, *checks.student_rules(study.data.labelled))
    known = {rule.__name__: inspect.getdoc(rule).split("\n\n")[0] for rule in rules}
    known |= checks.FURTHER
    if study.compare.measure == "accuracy":
        del known[PROBED]
    failed = results.get("failed_checks", pd.Series("", results.index)).fillna("").str.split()
    is_known = ~results["refused"] | failed.str.len().gt(0)
    whole = is_known & ~failed.map(lambda names: EVIDENCE in names)
    rows = []
    for name, holds in known.items():
        seen = is_known if name == EVIDENCE else whole
        n_failed = int(failed[seen].map(lambda names, name=name: name in names).sum())
        passed, unseen = int(seen.sum()) - n_failed, len(results) - int(seen.sum())
        rows.append((name.replace("_", " "), " ".join(holds.split()), passed, n_failed, unseen))
    return Table(("check", "what holds", "passed", "failed", "not looked at"), rows, "llrrr")
