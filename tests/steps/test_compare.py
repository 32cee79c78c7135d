"""Tables from evidence: which rows are accepted, which refused, and what they say."""

import itertools
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from tiny import files_below, first_run, forge, tiny_study

from kdlib.compare.report import objective_table, summary
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import open_images
from kdlib.steps.compare import compile_tables, curves
from kdlib.steps.comparison_figures import _accepted_probes, draw_comparison
from kdlib.steps.display import TEXTS
from kdlib.steps.distill import make_subset, train_student
from kdlib.steps.done import unfinished
from kdlib.steps.figures import redraw_comparison
from kdlib.steps.folders import probe_folder, student_folder
from kdlib.steps.probe import open_probes, probe_cell
from kdlib.steps.results import results


def test_every_row_of_an_honest_study_is_accepted(lab):
    table = results(tiny_study(lab))
    assert len(table) == 12  # (full, random 33 %, easy 33 %) x (kd, plain) x 2 seeds
    assert not table["refused"].any()
    assert (table["steps"] == 60).all()
    assert (table["samples"] == 60 * 64).all()
    assert set(table["unique_examples"]) == {363, 1100}


def test_a_row_with_another_budget_is_refused_and_shown(lab):
    study = tiny_study(lab)
    forge(first_run(study), lambda e: e["budget"]["recorded"].update(steps=156))
    tables = compile_tables(study)
    refused = tables["results"][tables["results"]["refused"]]
    assert refused["run"].tolist() == [str(first_run(study).relative_to(study.runs))]
    assert "steps: 60 -> 156" in refused["reason"].iloc[0]
    full = tables["strategies"].query("strategy == 'full' and objective == 'kd'").iloc[0]
    assert (full["n_seeds"], full["n_refused"]) == (1, 1)
    message = (
        f"{refused['run'].item()} ({100 * refused['test_accuracy'].item():.1f} %, which enters no"
    )
    assert f"- refused: {message} mean): budget: " in summary(study, tables)


def test_a_number_without_its_checkpoint_is_refused(lab):
    study = tiny_study(lab)
    evidence = read_evidence(first_run(study))
    path = first_run(study) / evidence["checkpoints"]["last"]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    table = results(study)
    assert table["refused"].sum() == 1
    assert "checkpoints missing or changed: last" in table["reason"].iloc[0]


def test_times_devices_and_commits_stand_beside_the_runs_and_in_no_committed_file(lab):
    study = tiny_study(lab)
    for cell, seed in itertools.product(study.cells(), study.seeds):
        forge(student_folder(study, cell, seed), lambda e: e["made"].update(git_clean=True))

    def committed():
        tables = compile_tables(study)
        for describe in TEXTS["compare"].values():
            describe(study, tables)
        return files_below(study.figures), (study.runs / "compare" / "costs.md").read_text()

    before, costs = committed()
    assert "uncommitted" not in costs
    other = {"device": "a toaster", "threads": 9, "git_commit": "f" * 40, "code_sha256": "e" * 64,
             "git_clean": False, "wall_s": 987_000.0, "versions": {"torch": "9.9"}}  # fmt: skip
    forge(first_run(study), lambda e: e["made"].update(other))
    again, costs = committed()
    assert again == before
    assert "These runs were made on a toaster, cpu (" in costs
    assert "They were made by 2 versions of the code. 1 run of code with uncommitted" in costs
    (made,) = compile_tables(study)["made"].query("device == 'a toaster'").to_dict("records")
    assert (made["versions"], made["git_commit"]) == ("torch 9.9", "f" * 40)


def test_weights_that_are_cut_refuse_their_row_alone(lab):
    study = tiny_study(lab)
    evidence = read_evidence(first_run(study))
    path = first_run(study) / evidence["checkpoints"]["last"]["file"]
    path.write_bytes(path.read_bytes()[:-40])
    table = results(study)
    assert table["refused"].sum() == 1
    assert "checkpoints missing or changed: last" in table["reason"].iloc[0]


def test_metrics_that_were_changed_are_not_drawn(lab):
    study = tiny_study(lab)
    path = first_run(study) / "metrics.parquet"
    table = pd.read_parquet(path, partitioning=None)
    table.assign(validation_accuracy=1.0).to_parquet(path)
    with pytest.raises(ValueError, match=r"metrics\.parquet is missing or was changed"):
        curves(study, results(study))


def test_a_run_that_differs_in_more_than_the_factor_is_refused(lab):
    study = tiny_study(lab)
    folder = student_folder(study, study.cell(strategy="easy"), 0)
    settings = json.loads((folder / "settings.json").read_text())
    settings["inputs"]["split"] = "of another seed"
    files.write_json(folder / "settings.json", settings)
    forge(folder, lambda e: e.update(settings_sha256=files.fingerprint(settings)))
    table = results(study)
    assert table["refused"].sum() == 1
    reason = table[table["refused"]]["reason"].iloc[0]
    assert "differs from the other runs in inputs.split" in reason
    assert reason.endswith("-> of another seed")


def test_rows_made_before_the_study_was_changed_are_refused(lab):
    table = results(tiny_study(lab, objectives__kd__alpha=0.9))
    assert table.groupby("objective")["refused"].mean().to_dict() == {"kd": 1.0, "plain": 0.0}
    assert "objective.alpha: 0.5 -> 0.9" in table[table["refused"]]["reason"].iloc[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["data"].update(split="of another seed"), "images"),
        (lambda e: e["teacher"].update(weights_sha256="0" * 64), "teacher outputs"),
        (lambda e: e["subset"].update(parent_datamap="0" * 64), "datamap"),
    ],
)
def test_rows_of_another_study_s_making_are_refused(lab, change, message):
    study = tiny_study(lab)
    folder = student_folder(study, study.cell(strategy="easy", objective="kd"), 0)
    forge(folder, change)
    table = results(study)
    reason = table[table["refused"]]["reason"].item()
    assert (
        f"made from another study's {message}: delete {folder.relative_to(lab)}, then run" in reason
    )


def test_a_missing_run_is_refused_and_named(lab):
    study = tiny_study(lab)
    shutil.rmtree(first_run(study))
    assert "holds no finished run" in results(study)["reason"].iloc[0]


def test_run_tables_say_what_each_number_was_made_from(lab):
    study = tiny_study(lab)
    tables = compile_tables(study)
    table = tables["results"]
    for row in table.to_dict("records"):
        evidence = read_evidence(study.runs / row["run"])
        assert row["checkpoint_sha256"] == evidence["checkpoints"]["last"]["file_sha256"]
        assert row["subset_sha256"] == evidence["subset"]["sha256"]
        teacher = evidence["teacher"]
        assert row["teacher_sha256"] == (teacher["weights_sha256"] if teacher else "")
        assert (row["data_train"], row["data_split"]) == (
            evidence["data"]["train"], evidence["data"]["split"],
        )  # fmt: skip
        assert row["declared_steps"] == row["steps"] == 60
        assert row["settings_sha256"] == evidence["settings_sha256"]
        made = tables["made"].set_index("run").loc[row["run"]]
        assert f"torch {evidence['made']['versions']['torch']}" in made["versions"]
    assert not table.isna().drop(columns=["linear_accuracy", "knn_accuracy"]).any(axis=None)
    assert str(lab) not in table.to_csv()
    shutil.rmtree(first_run(study))
    refused = compile_tables(study)["results"].iloc[0]
    assert refused["refused"]
    assert refused["reason"].startswith("runs/tiny/distill/student=tiny")
    assert str(lab) not in summary(study, compile_tables(study))


def test_a_study_of_features_compares_the_probe_of_the_last_step(lab, unwritten):
    study = tiny_study(
        lab, compare={"baseline": "random", "margin": 0.02, "measure": "linear",
                      "on": ["own", "large"]},
        probe={"strategy": ["full", "random", "easy"], "fraction": [0.33], "k": [5, 3],
               "objective": ["kd", "plain"], "c_grid": [0.1, 10.0],
               "others": {"large": {"source": "digits", "n_validation": 997, "image_size": 16}}},
    )  # fmt: skip
    table = results(study)
    lacking = ~(table["strategy"].isin(["full", "easy"]) & (table["objective"] == "kd"))
    assert table["refused"].all()  # those that are probed are so on the study's data alone
    assert "holds no finished run" in table[lacking]["reason"].iloc[0]
    assert "was made before the study was changed" in table[~lacking]["reason"].iloc[0]
    images = open_images(study)
    for cell in study.cells():
        probe_cell(study, images, cell)
    tables = compile_tables(study)
    assert not tables["results"]["refused"].any()
    by_hand = open_probes(study, study.cell(strategy="easy"))
    last = by_hand.query("on == 'own' and step == 60 and probe == 'linear' and seed == 1")[
        "accuracy"
    ].item()
    row = tables["results"].query("strategy == 'easy' and objective == 'kd' and seed == 1")
    assert row["linear_accuracy"].item() == last
    assert row["test_accuracy"].item() != last
    elsewhere = by_hand.query("on == 'large' and step == 60 and probe == 'linear' and seed == 1")
    assert row["linear_accuracy_on_large"].item() == elsewhere["accuracy"].item()
    assert tables["results"].eval("linear_accuracy_on_large != linear_accuracy").any()
    assert by_hand.groupby("probe")["k"].unique().map(list).to_dict() == {
        "knn": [5], "knn_3": [3], "linear": [0],
    }  # fmt: skip
    pair = tables["results"].query("objective == 'kd'").groupby("strategy")
    for place, column in (("own", "linear_accuracy"), ("large", "linear_accuracy_on_large")):
        compared = tables["strategies"].query(
            f"strategy == 'easy' and objective == 'kd' and on == '{place}'"
        )
        wanted = pair[column].mean()["easy"] - pair[column].mean()["random"]
        assert compared["difference"].item() == pytest.approx(wanted)
        assert compared["measure"].item() == column
    assert tables["strategies"].groupby("on")["p_holm"].count().nunique() == 1
    text = summary(study, tables)
    assert "last step's features, on the test split of the study's data and of large." in text
    assert "## Every strategy against random, on the study's data" in text
    assert "## Every strategy against random, on large" in text
    drawn = set(redraw_comparison(study)[0])
    assert "tiny-strategies-large}" in (study.figures / "comparison.tex").read_text()
    for name in ("accuracy", "differences", "objective_differences", "probes"):
        assert {name, f"{name}_on_large"} <= drawn
    assert drawn >= {"places", "curves"}
    path = probe_folder(study, study.cell(strategy="easy"))
    forge(path, lambda e: e["floor"].update(untrained=0.999))
    found = results(study)
    assert found[found["refused"]]["reason"].str.contains("probe_floor").tolist() == [True] * 2


def test_probes_of_refused_runs_are_left_out_or_called_so(lab, unwritten):
    study = tiny_study(lab)
    cell = study.cell(strategy="easy")
    forge(student_folder(study, cell, 0), lambda e: e["budget"]["recorded"].update(steps=9))
    tables = compile_tables(study)
    shown = _accepted_probes(tables["probes"], tables["results"]).query("strategy == 'easy'")
    assert set(shown["seed"]) == {1}
    forge(student_folder(study, cell, 1), lambda e: e["budget"]["recorded"].update(steps=9))
    tables = compile_tables(study)
    shown = _accepted_probes(tables["probes"], tables["results"])
    assert set(shown["strategy"]) == {"full", "easy_(refused)", "untrained", "teacher"}
    assert len(shown) == len(tables["probes"])
    assert "probes" in draw_comparison(study, tables)


def test_a_probe_of_other_weights_is_no_measure(lab):
    study = tiny_study(
        lab, compare={"baseline": "random", "margin": 0.02, "measure": "knn"},
        probe={"strategy": ["full", "random", "easy"], "fraction": 0.33, "k": 5,
               "objective": ["kd", "plain"], "c_grid": [0.1, 10.0]},
    )  # fmt: skip
    folder = student_folder(study, study.cell(strategy="easy"), 0)
    forge(folder, lambda e: e["checkpoints"]["last"].update(weights_sha256="0" * 64))
    row = results(study).query("strategy == 'easy' and objective == 'kd' and seed == 0")
    assert "its knn probe is of other weights" in row["reason"].item()


def test_shard_policies_are_strategies_with_budgets_of_their_own(lab):
    study = tiny_study(lab, axes__strategy=["random", "easy", "fixed_shards", "random_shards"])
    images = open_images(study)
    size = images.train.shard_size
    evidence = {
        s: train_student(study, images, study.cell(strategy=s), 0)
        for s in ("fixed_shards", "random_shards")
    }
    assert all(check["passed"] for e in evidence.values() for check in e["checks"])
    fixed, drawn = evidence["fixed_shards"], evidence["random_shards"]
    # five shards of 300, the last one shorter: a third of them is two
    ids = make_subset(study, images, study.cell(strategy="fixed_shards"), 0).example_ids
    assert len(np.unique(ids // size)) == 2
    assert fixed["budget"]["declared"]["unique_examples"] == len(ids)
    assert fixed["coverage"]["most"] - fixed["coverage"]["fewest"] <= 1
    assert drawn["coverage"]["shards_per_pass"] == 2
    assert drawn["coverage"]["most"] - drawn["coverage"]["fewest"] > 1
    assert drawn["subset"]["n_examples"] == len(images.train_ids)


def test_shards_are_counted_and_compared_at_equal_and_at_different_numbers(lab):
    axes = {"student": ["tiny"], "strategy": ["fixed_shards", "random_shards"], "shards": [2, 1],
            "objective": ["kd"]}  # fmt: skip
    pair = {"strategy": "random_shards", "shards": 1}
    pair |= {"against_strategy": "fixed_shards", "against_shards": 2}
    study = tiny_study(
        lab, axes=axes, training={"steps": 12, "batch_size": 64, "lr_peak": 0.1},
        probe={"strategy": ["full", "fixed_shards"], "objective": ["kd"], "k": 5, "c_grid": [1.0]},
        compare={"baseline": "random_shards", "margin": 0.02, "pairs": [pair]},
    )  # fmt: skip
    images = open_images(study)
    for cell in study.cells():
        runs = [train_student(study, images, cell, seed) for seed in study.seeds]
        ids = make_subset(study, images, cell, 0).example_ids
        if cell.strategy == "fixed_shards":
            assert len(np.unique(ids // images.train.shard_size)) == cell.shards
        elif cell.strategy == "random_shards":
            assert runs[0]["coverage"]["shards_per_pass"] == cell.shards
    for cell in study.probed_cells():
        probe_cell(study, images, cell)
    assert [cell.shards for cell in study.probed_cells()] == [None, 2, 1]
    assert not {"distill", "probe"} & {p for f in unfinished(study) for p in f.parts}
    tables = compile_tables(study)
    results = tables["results"]
    assert not results["refused"].any()
    shares = {(r.strategy, r.shards): r.fraction for r in results.itertuples()}
    assert shares == {
        ("full", 0): 1.0, ("fixed_shards", 2): 0.4, ("fixed_shards", 1): 0.2,
        ("random_shards", 2): 0.4, ("random_shards", 1): 0.2,
    }  # fmt: skip
    compared = ["strategy", "fraction", "against_strategy", "against_fraction", "n_seeds"]
    assert tables["strategies"][compared].to_numpy().tolist() == [
        ["fixed_shards", 0.2, "random_shards", 0.2, 2],
        ["fixed_shards", 0.4, "random_shards", 0.4, 2],
        ["full", 1.0, "random_shards", 0.2, 2],
        ["full", 1.0, "random_shards", 0.4, 2],
        ["random_shards", 0.2, "fixed_shards", 0.4, 2],
    ]
    assert set(tables["strategies"]["budget"]) == {"equal_steps"}
    text = summary(study, tables)
    assert "| tiny | kd | 1 shard | random_shards |" in text
    assert "| tiny | kd | 20 % |" not in text  # in no table
    assert "fixed_shards at 2 shards" in text
    assert "-p strategy fixed_shards -p shards 2 -p objective kd`" in text
    redraw_comparison(study)
    too_many = study.cell(strategy="random_shards", shards=6)
    with pytest.raises(ValueError, match="asks for 6 of 5 shards with training images"):
        train_student(study, images, too_many, 0)


def test_a_run_that_stops_early_says_so_and_is_compared_with_its_like(lab, unwritten):
    training = {"steps": 60, "batch_size": 64, "lr_peak": 2.0, "evaluate_every_steps": 2,
                "early_stopping": 1, "checkpoint_fractions": [0, 0.5, 1]}  # fmt: skip
    study = tiny_study(lab, training=training)
    images = open_images(study)
    for cell in study.cells():
        for seed in study.seeds:
            evidence = train_student(study, images, cell, seed)
    assert evidence["budget"]["comparison"] == "early_stopping"
    table = results(study)
    assert not table["refused"].any()
    assert (table["steps"] < 60).any()
    tables = compile_tables(study)
    assert set(tables["strategies"]["budget"]) == {"early_stopping"}
    assert "early stopping" in summary(study, tables)
    assert "differences" in draw_comparison(study, tables)
    assert objective_table(study, tables).count("\n| ") == 3  # kd and plain below the line


def test_a_row_says_how_many_examples_of_each_class_it_learnt_from(lab):
    study = tiny_study(lab)
    tables = compile_tables(study)
    images = open_images(study)
    for row in tables["results"].to_dict("records"):
        cell = study.cell(**{axis: row[axis] for axis in ("strategy", "fraction", "objective")})
        ids = make_subset(study, images, cell, row["seed"]).example_ids
        labels = images.train.read("labels", ids)
        counted = [int((labels == label).sum()) for label in range(10)]
        assert list(map(int, row["class_counts"].split())) == counted
        assert json.loads(row["class_names"]) == [str(label) for label in range(10)]
    assert "## Classes of each subset" in summary(study, tables)


def test_a_refused_row_names_the_checks_that_failed(lab):
    study = tiny_study(lab)
    forge(first_run(study), lambda e: e["budget"]["recorded"].update(steps=156))
    table = results(study)
    assert table["failed_checks"].tolist()[1:] == [""] * 11
    assert table["failed_checks"][0] == "budget derived_again"
    shutil.rmtree(student_folder(study, study.cell(strategy="easy"), 0))
    missing = results(study).query("strategy == 'easy' and objective == 'kd' and seed == 0")
    assert missing["failed_checks"].tolist() == ["evidence"]
