"""`kdlib.study.cells`: the points of a study's axes."""

import math

import numpy as np
import pytest
from a_study import STUDY, changed, validated

from kdlib.cartography.subset import Subset
from kdlib.study.base import StudyError
from kdlib.study.cells import Cell
from kdlib.study.study import Study


def test_cells_are_every_point_of_the_axes_with_the_full_set_once_per_student_and_objective():
    cells = validated(STUDY).cells()
    # 2 students * (1 full + 2 strategies * 2 fractions) * 2 objectives
    assert len(cells) == len(set(cells)) == 20
    assert cells[:2] == [Cell("tiny", "full", 1.0, "kd"), Cell("tiny", "full", 1.0, "plain")]
    assert [c for c in cells if c.strategy == "easy" and c.student == "wide"] == [
        Cell("wide", "easy", f, o) for f in (0.33, 0.1) for o in ("kd", "plain")
    ]
    assert {c.fraction for c in cells if c.strategy == "full"} == {1.0}


def test_probed_cells_are_the_named_ones_at_the_named_fraction():
    # 2 students * (full at 1.0, easy at 0.1) * 1 objective
    assert validated(STUDY).probed_cells() == [
        Cell(student, strategy, fraction, "kd")
        for student in ("tiny", "wide")
        for strategy, fraction in (("full", 1.0), ("easy", 0.1))
    ]


def test_every_cell_has_a_folder_of_its_own():
    cells = validated(STUDY).cells()
    assert len({cell.path for cell in cells}) == len(cells)
    assert cells[2].path.as_posix() == "student=tiny/strategy=random/fraction=0.33/objective=kd"


def test_a_cell_takes_the_first_value_of_an_axis_that_is_not_given():
    study = validated(STUDY)
    assert study.cell() == Cell("tiny", "random", 0.33, "kd")
    assert study.cell(student="wide", fraction=0.1) == Cell("wide", "random", 0.1, "kd")
    assert study.cell(strategy=None).strategy == "random"
    assert study.cell(strategy="full", fraction=0.1).fraction == 1.0
    assert study.cell(objective="smooth", strategy="aum_top", fraction=0.5) == Cell(
        "tiny", "aum_top", 0.5, "smooth"
    )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"strategi": "easy"}, "unknown axis 'strategi'; did you mean 'strategy'"),
        ({"student": "tinny"}, "unknown student 'tinny'; did you mean 'tiny'"),
        ({"strategy": "eazy"}, "unknown strategy 'eazy'; did you mean 'easy'"),
        ({"objective": "kdd"}, "unknown objective 'kdd'; did you mean 'kd'"),
        ({"fraction": 0.0}, r"fraction is 0\.0; expected a number in \(0, 1\]"),
        ({"fraction": 0}, r"fraction is 0; expected a number in \(0, 1\]"),
        ({"fraction": 0, "strategy": "full"}, "fraction is 0; expected"),
        ({"fraction": True}, "fraction is True; expected"),
        ({"fraction": False}, "fraction is False; expected"),
        ({"fraction": ""}, "fraction is ''; expected"),
        ({"student": ""}, "unknown student ''; known: "),
        ({"strategy": ""}, "unknown strategy ''; known: "),
        ({"objective": ""}, "unknown objective ''; known: "),
        *(
            ({axis: value}, f"unknown {axis} '?{value}'?; (known|did)")
            for axis in ("student", "strategy", "objective")
            for value in (0, 0.0, False, True)
        ),
        ({"fraction": 1.1}, "fraction is 1.1; expected"),
        ({"fraction": math.nan}, "fraction is nan; expected"),
        ({"fraction": "a third"}, "fraction is 'a third'; expected"),
        ({"fraction": [0.1]}, r"fraction is \[0.1\]; expected"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(axes, message):
    with pytest.raises(StudyError, match=message):
        validated(STUDY).cell(**axes)


def saved_selection(study: Study, name: str, n: int, fraction: float) -> None:
    ids = np.arange(n)
    subset = Subset(ids, f"picked_{name}", fraction, 0, None, "images")
    subset.save(study.runs / "selections" / f"{name}.parquet")


def test_a_picked_selection_has_the_fraction_it_was_saved_with(home):
    study = validated(
        changed("axes.strategy", ["random", "picked_mine"], changed("probe.strategy", ["full"]))
    )
    with pytest.raises(FileNotFoundError, match="save a selection named mine in the map"):
        study.cell(strategy="picked_mine")
    saved_selection(study, "mine", 30, 0.03)
    assert study.cell(strategy="picked_mine", fraction=0.5).fraction == 0.03
    # beside it a random subset of the same size, to compare it with
    here = {(c.strategy, c.fraction) for c in study.cells()}
    assert here == {("full", 1.0), ("random", 0.33), ("random", 0.1), ("picked_mine", 0.03),
                    ("random", 0.03)}  # fmt: skip
    with pytest.raises(StudyError, match=r"unknown strategy 'picked_\.\./x'"):
        study.cell(strategy="picked_../x")


@pytest.mark.parametrize(("fraction", "text"), [(1.0, "1"), (0.33, "0.33"), (52 / 1100, None)])
def test_a_cell_s_folder_says_its_fraction_exactly(fraction, text):
    *_, found, _ = Cell("tiny", "random", fraction, "kd").path.parts
    assert found == f"fraction={text or repr(fraction)}"
    assert float(found.removeprefix("fraction=")) == fraction


def test_cells_of_so_many_shards_stand_beside_those_of_a_fraction():
    content = changed("axes.strategy", ["random", "fixed_shards", "random_shards"])
    content = changed("compare.baseline", "random_shards", changed("axes.shards", [3, 2], content))
    content["probe"]["strategy"] = ["full", "fixed_shards"]
    study = validated(changed("axes.objective", ["kd"], changed("axes.student", ["tiny"], content)))
    assert [(c.strategy, c.fraction, c.shards) for c in study.cells()] == [
        ("full", 1.0, None), ("random", 0.33, None), ("random", 0.1, None),
        ("fixed_shards", None, 3), ("fixed_shards", None, 2),
        ("random_shards", None, 3), ("random_shards", None, 2),
    ]  # fmt: skip
    cell = study.cell(strategy="fixed_shards")
    assert str(cell.path) == "student=tiny/strategy=fixed_shards/shards=3/objective=kd"
    assert study.step_settings("distill", cell)["subset"] == {
        "strategy": "fixed_shards", "shards": 3,
    }  # fmt: skip
    assert study.cell(**dict(cell.items())) == cell
    assert study.cell(strategy="fixed_shards", fraction=0.5).shards is None
    assert study.cell().path.parts[2] == "fraction=0.33"
    assert [c.shards for c in study.probed_cells()] == [None, 3, 2]
    for axes, message in (
        ({"strategy": "easy", "shards": 3}, "shards are for fixed_shards and random_shards"),
        ({"strategy": "fixed_shards", "shards": 3, "fraction": 0.1}, "in place of a fraction"),
        ({"strategy": "fixed_shards", "shards": 2.5}, "expected an integer >= 1"),
    ):
        with pytest.raises(StudyError, match=message):
            study.cell(**axes)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.n_train", 1000, r"axes\.shards asks for 3 of 2 shards \(1,000 images"),
        ("compare.baseline", "random", r"not compared with random: give compare\.baseline: full, "),
        ("compare.pairs", [{"strategy": "random_shards", "shards": 9,
                            "against_strategy": "fixed_shards", "against_shards": 3}],
         "compare.pairs names random_shards of 9 shards; expected"),
    ],
)  # fmt: skip
def test_shards_that_cannot_be_read_or_compared_are_refused(path, value, message):
    content = changed("axes.strategy", ["random", "fixed_shards", "random_shards"])
    content = changed("compare.baseline", "random_shards", changed("axes.shards", [3, 2], content))
    content["probe"]["strategy"] = ["full"]
    with pytest.raises(StudyError, match=message):
        validated(changed(path, value, content))
