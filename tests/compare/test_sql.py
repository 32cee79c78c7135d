"""SQL sees every finished run and every committed table, whatever the folders are called."""

import pandas as pd
import pytest

from kdlib.compare.sql import query

duckdb = pytest.importorskip("duckdb")

AXES = ("student=8", "strategy=easy", "fraction=0.33", "objective=kd")


def run(home, study, seed, accuracy, *axes, finished=True):
    folder = home.joinpath("runs", study, "distill", *(axes or AXES), f"seed={seed}")
    folder.mkdir(parents=True)
    rows = pd.DataFrame({"step": [10, 20], "validation_accuracy": [0.1, accuracy]})
    rows.to_parquet(folder / "metrics.parquet")
    if finished:
        (folder / "evidence.json").write_text("{}")


@pytest.fixture(params=["plain", "it's [a] b*d=1 place?", "seed=9"])
def odd(request, tmp_path, monkeypatch):
    """A workspace whose own path could be taken for a pattern, a string's end or an axis."""
    home = tmp_path / request.param
    home.mkdir()
    (tmp_path / "it's a bd=1 place1").mkdir()  # what the pattern would match
    monkeypatch.setenv("KDLIB_HOME", str(home))
    return home


def test_finished_runs_are_seen_with_the_axes_of_their_folders(odd):
    run(odd, "st.u-dy", 0, 0.5)
    run(odd, "st.u-dy", 1, 0.7, "student=8", "strategy=full", "fraction=1", "objective=kd")
    run(odd, "other", 0, 0.9)
    run(odd, "other", 1, 0.1, finished=False)
    run(odd / "runs" / "other" / "archive" / "abc", "other", 2, 0.1)
    table = query("SELECT * FROM metrics WHERE step = 20 ORDER BY study, seed")
    assert table["study"].tolist() == ["other", "st.u-dy", "st.u-dy"]
    assert table["validation_accuracy"].tolist() == [0.9, 0.5, 0.7]
    assert table["fraction"].tolist() == [0.33, 0.33, 1.0]
    assert table["student"].tolist() == ["8"] * 3  # a name, not a number
    assert table["seed"].tolist() == [0, 0, 1]
    assert list(table) == [
        "study", "student", "strategy", "fraction", "objective", "seed", "step",
        "validation_accuracy",
    ]  # fmt: skip


def test_values_are_parameters_and_end_no_string(odd):
    run(odd, "study", 0, 0.5)
    text = "SELECT count(*) AS n FROM metrics WHERE study = ?"
    assert query(text, ["study"])["n"].item() == 2
    assert query(text, ["x' OR 'a' = 'a"])["n"].item() == 0


def test_committed_tables_of_all_studies_are_one_view(odd):
    for study, columns in (("a", {"x": [1]}), ("b", {"x": [2], "y": [3]})):
        folder = odd / "figures" / study / "tables"
        folder.mkdir(parents=True)
        pd.DataFrame(columns).to_parquet(folder / "results.parquet")
    table = query("SELECT study, x, y FROM results ORDER BY study")
    assert table["study"].tolist() == ["a", "b"]
    assert table["y"].isna().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"metrics .*; the views here are results \(2 files\):"):
        query("SELECT * FROM metrics")


@pytest.mark.parametrize(
    "text", ["SELEC 1", "SELECT nothing FROM metrics", "SELECT ? + 1", "SELECT 'x'::INTEGER"]
)
def test_a_query_that_cannot_be_answered_is_a_sentence(odd, text):
    run(odd, "study", 0, 0.5)
    with pytest.raises(ValueError, match=r"DuckDB cannot answer this query: .*metrics \(1 files"):
        query(text)
