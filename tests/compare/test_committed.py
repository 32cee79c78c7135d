"""Committed tables return as they were written, stay small, and are refused when they were changed
or belong to another study."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import TINY

from kdlib.compare import committed
from kdlib.compare.committed import (
    NAMES,
    _settings,
    committed_folder,
    is_committed,
    read_committed,
    thin,
    write_committed,
)
from kdlib.repro import files
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml

AXES = ["student", "strategy", "fraction", "objective"]


def study_with(home, name="tiny", **changes):
    content = parse_yaml(TINY.read_text())
    for dotted, value in changes.items():
        *path, key = dotted.split("__")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def records(n_strategies=3, n_steps=100, objectives=("kd", "plain"), students=("tiny",), n_seeds=2):
    """Tables like those of a study: as many hashes, and curves with the digits of real ones."""
    rng = np.random.default_rng(0)
    rows = [
        {"student": student, "strategy": f"strategy{i}", "fraction": 1 / 3, "objective": objective,
         "seed": seed}
        for student in students for i in range(n_strategies) for objective in objectives
        for seed in range(n_seeds)
    ]  # fmt: skip
    runs = pd.DataFrame(rows)
    hashes = {f"{name}_sha256": [files.fingerprint([name, i]) for i in range(len(runs))]
              for name in ("weights", "checkpoint", "subset", "settings")}  # fmt: skip
    results = runs.assign(
        test_accuracy=rng.random(len(runs)), best_step=60, refused=False, reason="", **hashes,
        command=[f"papermill {row}" for row in rows],
    )  # fmt: skip
    results.loc[1, ["test_accuracy", "weights_sha256", "reason", "refused"]] = (
        np.nan, None, "no run", True,
    )  # fmt: skip
    curves = runs.merge(pd.Series(range(1, n_steps + 1), name="step"), how="cross")
    counts = rng.integers(0, 5000, len(curves))
    curves = curves.assign(
        validation_accuracy=counts / 5000, validation_loss=rng.random(len(curves)),
        train_loss=rng.random(len(curves)), train_accuracy=counts / 4096,
    )  # fmt: skip
    probes = runs.assign(step=60, probe="linear", accuracy=rng.random(len(runs)))
    return {"results": results, "curves": curves, "probes": probes}


def test_what_is_written_is_what_is_read_and_the_same_bytes_each_time(home):
    study, made = study_with(home), records()
    written = write_committed(study, made)
    before = {p.name: p.read_bytes() for p in committed_folder(study).iterdir()}
    again = read_committed(study)
    for name in NAMES:
        pd.testing.assert_frame_equal(written[name], again[name])
        assert len(again[name]) == len(thin(made["curves"]) if name == "curves" else
                                       made[name])  # fmt: skip
    assert write_committed(study, made).keys() == again.keys()
    assert {p.name: p.read_bytes() for p in committed_folder(study).iterdir()} == before
    results = again["results"]
    assert results["test_accuracy"].equals(made["results"]["test_accuracy"])  # every digit
    assert results["fraction"].eq(1 / 3).all()
    assert (again["probes"]["fraction"] == 1 / 3).all()
    assert again["curves"]["validation_accuracy"].dtype == np.float32
    assert results["weights_sha256"].isna().tolist()[:3] == [False, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_noticed_or_changes_nothing_that_is_read(home, name):
    study = study_with(home)
    written = write_committed(study, records())
    path = committed_folder(study) / f"{name}.parquet"
    whole = path.read_bytes()
    silent = 0
    for place in np.linspace(4, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):  # half of the bits are of parquet's own bookkeeping
            pd.testing.assert_frame_equal(read_committed(study)[name], written[name])
            silent += 1
    assert silent < 30
    path.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="cut or damaged"):
        read_committed(study)


def test_a_number_changed_by_hand_is_refused(home):
    study = study_with(home)
    table = write_committed(study, records())["results"]
    path = committed_folder(study) / "results.parquet"
    table.assign(test_accuracy=0.99).to_parquet(path)
    with pytest.raises(ValueError, match="carries no kdlib metadata"):
        read_committed(study)


def test_tables_of_other_settings_are_refused_with_the_difference(home):
    write_committed(study_with(home), records())
    for changes, line in (
        ({"training__steps": 61}, "training.steps: 60 -> 61"),
        ({"seeds": [0, 1, 2]}, r"seeds: \[0, 1\] -> \[0, 1, 2\]"),
        ({"objectives__kd__alpha": 0.7}, "objectives.kd.alpha: 0.5 -> 0.7"),
        ({"data__split_seed": 1}, "data.split_seed: 0 -> 1"),
        ({"compare__measure": "linear", "probe__strategy": ["full", "easy", "random"],
          "probe__objective": ["kd", "plain"]}, "compare.measure: accuracy -> linear"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"before the study was changed.*{line}"):
            read_committed(study_with(home, **changes))


def test_what_is_read_after_the_runs_may_change(home):
    before = write_committed(study_with(home), records())
    for changes in (
        {"compare__margin": 0.05},
        {"compare__objective": "kd"},
        {"compare__confidence_level": 0.9},
        {"compare__baseline": "easy"},
        {"recordings": None},
        {"tracking__wandb": True},
        {"compute__images": "mapped"},
    ):
        after = read_committed(study_with(home, **changes))
        pd.testing.assert_frame_equal(after["results"], before["results"])


def test_a_setting_that_is_newer_than_the_tables_counts_when_the_study_uses_it(home, monkeypatch):
    whole = _settings

    def older(study, **options):
        found = whole(study, **options)
        found["training"].pop("ema", None)
        found.pop("selections", None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(committed, "_settings", older)
        write_committed(study_with(home), records())
    read_committed(study_with(home))
    with pytest.raises(ValueError, match=r"training.ema: \(absent\) -> 0.9"):
        read_committed(study_with(home, training__ema=0.9))


def test_a_table_of_another_study_another_name_or_none_is_refused(home):
    study = study_with(home)
    write_committed(study, records())
    folder = committed_folder(study)
    other = study_with(home, name="other")
    committed_folder(other).parent.mkdir(parents=True)
    folder.rename(committed_folder(other))
    with pytest.raises(ValueError, match="study: tiny -> other"):
        read_committed(other)
    assert not is_committed(study)
    committed_folder(other).rename(folder)
    assert is_committed(study)
    (folder / "probes.parquet").write_bytes((folder / "curves.parquet").read_bytes())
    with pytest.raises(ValueError, match="table: curves -> probes"):
        read_committed(study)
    (folder / "probes.parquet").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"probes.parquet; run `python -m kdlib step compare"
    ):
        read_committed(study)


def test_thinned_curves_keep_their_ends_their_order_and_equal_steps():
    for n_steps, kept in ((5, 5), (40, 40), (41, 40), (1000, 40)):
        curves = records(n_steps=n_steps)["curves"]
        shuffled = curves.sort_values(["step", "seed"], kind="stable")  # runs in turn
        for table in (curves, shuffled):
            thinned = thin(table)
            steps = thinned.groupby([*AXES, "seed"])["step"].apply(tuple)
            assert steps.nunique() == 1
            found = steps.iloc[0]
            assert (len(found), found[0], found[-1]) == (kept, 1, n_steps)
            assert list(found) == sorted(set(found))
            assert len(thinned.merge(table)) == len(thinned)  # rows as they were


def test_runs_that_stop_at_different_steps_keep_common_ones_and_their_own_last():
    curves = records(n_steps=500)["curves"]
    stops = 250 + 50 * curves["seed"] + 20 * (curves["objective"] == "kd")
    curves = curves[curves["step"] <= stops]
    kept = thin(curves)
    assert kept.groupby([*AXES, "seed"])["step"].max().tolist() == (
        curves.groupby([*AXES, "seed"])["step"].max().tolist()
    )
    for _, rows in kept.groupby(AXES):
        of_seed = [set(found["step"]) for _, found in rows.groupby("seed")]
        assert len(of_seed[0] & of_seed[1]) >= 30


def test_a_study_of_five_hundred_runs_takes_less_than_half_a_megabyte(home):
    made = records(n_strategies=25, objectives=("kd", "plain"), students=("a", "b"), n_seeds=5)
    assert len(made["results"]) == 500
    study = study_with(home)
    write_committed(study, made)
    sizes = {p.stem: p.stat().st_size for p in committed_folder(study).iterdir()}
    assert sum(sizes.values()) < 500_000, sizes
