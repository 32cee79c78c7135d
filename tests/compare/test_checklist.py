"""The checklist counts, for each check, the runs that passed and failed it."""

import pandas as pd
from a_study import STUDY, validated

from kdlib.compare.checklist import checklist


def counted(results):
    table = checklist(validated(STUDY), results)
    return {name: tuple(numbers) for name, _, *numbers in table.rows}


def test_a_run_fails_the_checks_it_names_and_without_evidence_no_other():
    rows = counted(
        pd.DataFrame(
            {
                "refused": [False, False, True, True],
                "failed_checks": ["", "", "budget derived_again", "evidence"],
            }
        )
    )
    assert rows["budget"] == rows["derived again"] == (2, 1, 1)
    assert rows["coverage"] == rows["pairing"] == rows["agree"] == (3, 0, 1)
    assert rows["evidence"] == (3, 1, 0)
    assert "probed" not in rows  # this study compares by accuracy


def test_of_refused_rows_whose_checks_were_not_recorded_none_is_counted():
    rows = counted(pd.DataFrame({"refused": [False, True]}))
    assert set(rows.values()) == {(1, 0, 1)}


def test_every_check_says_what_holds():
    table = checklist(validated(STUDY), pd.DataFrame({"refused": [False]}))
    assert all(len(holds) > 20 and holds.endswith(".") for _, holds, *_ in table.rows)
