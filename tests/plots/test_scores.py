"""Figures of scores show the correlations, ranges and curves of their tables."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from plots.example_tables import check_legible, check_same_files, words

from kdlib.plots import theme
from kdlib.plots.scores import detectors, rank_correlations, stability

SCORES = ("confidence", "variability", "aum", "el2n", "grand_last")
DETECTORS = ("aum", "loss", "cleanlab_self_confidence")
FIGURES = ("rank_correlations", "stability", "detectors")


def correlations(n=5):
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.normal(size=(50, 2)) @ rng.normal(size=(2, n)))
    table.columns = SCORES if n == len(SCORES) else [f"score_{i}" for i in range(n)]
    return table.corr(method="spearman")


def stability_table():
    rows = [
        (score, n, 1 - level / n, 1 - 1.2 * level / n, 1 - 0.8 * level / n)
        for score, level in zip(SCORES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)
        for n in (1, 2, 3)
    ]
    return pd.DataFrame(rows, columns=["score", "n_runs", "correlation", "low", "high"])


def detector_tables(names=DETECTORS):
    rate = np.linspace(0, 1, 21)
    curves = pd.concat(
        pd.DataFrame(
            {
                "detector": name,
                "false_positive_rate": rate,
                "true_positive_rate": rate ** (0.2 + 0.1 * i),
                "recall": rate ** (0.2 + 0.1 * i),
                "precision": 1 - (0.7 + 0.01 * i) * rate,
            }
        )
        for i, name in enumerate(names)
    )
    summary = pd.DataFrame(
        {"detector": names, "auroc": 0.9, "average_precision": np.linspace(0.8, 0.6, len(names))}
    )
    epochs = pd.DataFrame(
        [(n, e, 0.5 + 0.04 * e) for n in names[:2] for e in range(1, 11)],
        columns=["detector", "epoch", "auroc"],
    )
    return curves, summary, epochs


def draw(name):
    """Each figure at its print size."""
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 3.4))
        if name == "rank_correlations":
            groups = {"all epochs": SCORES[:3], "early": SCORES[3:]}
            rank_correlations(fig.subplots(), correlations(), groups)
        elif name == "stability":
            stability(fig.subplots(), stability_table())
        else:
            detectors(fig, *detector_tables(), noise_rate=0.2)
    return fig


@pytest.mark.parametrize("name", FIGURES)
def test_all_text_is_legible_and_inside_the_figure(name):
    check_legible(draw(name))


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_tables_give_the_same_bytes(name, tmp_path):
    check_same_files(draw(name), draw(name), tmp_path)


def test_rank_correlations_are_written_below_the_diagonal():
    matrix = correlations()
    matrix.iloc[3, 1] = np.nan
    ax = rank_correlations(Figure().subplots(), matrix)
    values = matrix.to_numpy()
    written = [t.get_text() for t in ax.texts]
    expected = [f"{values[i, j]:.2f}" for i in range(5) for j in range(i)]
    expected[1 + 2 + 1] = "none"
    assert written == expected
    drawn = np.ma.filled(ax.images[0].get_array().astype(float), np.nan)
    np.testing.assert_allclose(drawn, np.where(np.tri(5, k=-1) > 0, values, np.nan))
    assert ax.images[0].get_clim() == (-1, 1)
    names = [theme.in_words(score) for score in SCORES]
    assert [label.get_text() for label in ax.get_xticklabels()] == names[:-1]
    assert [label.get_text() for label in ax.get_yticklabels()] == names[1:]
    assert "Spearman correlation ρ" in words(ax)


def test_groups_order_the_scores_and_are_named():
    matrix = correlations()
    groups = {"early": ["el2n", "grand_last"], "whole": ["aum", "confidence", "variability"]}
    ax = rank_correlations(Figure().subplots(), matrix, groups)
    assert {"early", "whole"} <= set(words(ax))
    drawn = ax.images[0].get_array()
    assert drawn[1, 0] == matrix.loc["grand_last", "el2n"]
    assert drawn[4, 2] == matrix.loc["variability", "aum"]
    assert len(ax.lines) == 2


def test_many_scores_have_no_numbers_but_the_sign_of_negative_ones():
    matrix = correlations(21)
    ax = rank_correlations(Figure().subplots(), matrix)
    below = matrix.to_numpy()[np.tril_indices(21, -1)]
    assert [t.get_text() for t in ax.texts] == ["–"] * int((below < -0.05).sum())


def test_stability_has_a_row_for_each_score_and_a_mark_for_each_number_of_runs():
    table = stability_table()
    ax = stability(Figure().subplots(), table.sample(frac=1, random_state=0))
    # Scores are in the order in which single runs agree.
    assert [t.get_text() for t in ax.get_yticklabels()] == [theme.in_words(s) for s in SCORES]
    marks = [line for line in ax.lines if len(line.get_xdata()) == 1]
    for row, (score, rows) in enumerate(table.groupby("score", sort=False)):
        of_row = sorted(
            (x for x in marks if round(x.get_ydata()[0]) == row), key=lambda x: x.get_ydata()[0]
        )
        found = [x.get_xdata()[0] for x in of_row]
        np.testing.assert_allclose(found, rows["correlation"])
        assert {x.get_color() for x in of_row} == {theme.SCORES[score][0]}
        assert of_row[0].get_markerfacecolor() == "white"
        sizes = [x.get_markersize() for x in of_row]
        assert sizes == sorted(set(sizes))
    ranges = {tuple(x.get_xdata()) for x in ax.lines if len(x.get_xdata()) == 2}
    assert ranges == set(table[["low", "high"]].itertuples(index=False, name=None))
    assert ax.get_xlim() == (0.4, 1.005)
    shown = words(ax.get_legend())
    assert shown == [f"{n} run{'s' * (n > 1)} in each average" for n in (1, 2, 3)]


def test_stability_of_two_runs_has_one_mark_a_row_and_no_axis_of_runs():
    table = stability_table().query("n_runs == 1")
    ax = stability(Figure().subplots(), table)
    assert words(ax.get_legend()) == ["1 run in each average"]
    assert "runs" not in ax.get_ylabel() + ax.get_xlabel().replace("different runs", "")


def test_detectors_look_the_same_in_all_panels_and_the_reference_is_black_and_dashed():
    curves, summary, epochs = detector_tables()
    fig = detectors(Figure(), curves, summary, epochs, noise_rate=0.2)
    roc, precision, time = fig.axes
    for i, name in enumerate(DETECTORS):
        same = [(ax.lines[i].get_color(), str(ax.lines[i].get_linestyle())) for ax in fig.axes]
        assert len(set(same)) == 1
        rows = curves[curves["detector"] == name]
        np.testing.assert_allclose(
            roc.lines[i].get_xydata(), rows[["false_positive_rate", "true_positive_rate"]]
        )
        np.testing.assert_allclose(
            precision.lines[i].get_xydata(), rows.loc[rows["recall"] > 0, ["recall", "precision"]]
        )
    assert len({line.get_color() for line in roc.lines[:3]}) == 3
    assert len({str(line.get_marker()) for line in time.lines[:2]}) == 2
    assert roc.lines[2].get_color() == theme.BLACK
    assert roc.lines[2].is_dashed()
    assert list(time.lines[2].get_ydata()) == [0.9, 0.9]  # without epochs: a level
    assert list(precision.lines[3].get_ydata()) == [0.2, 0.2]
    assert "base rate 20 %" in words(precision)
    (legend,) = fig.legends
    assert "AUM (0.900, 0.800)" in words(legend)
    assert "cleanlab self confidence (0.900, 0.600)" in words(legend)
    labels = [(ax.get_xlabel(), ax.get_ylabel()) for ax in fig.axes]
    assert labels == [
        ("false positive rate", "true positive rate"), ("recall", "precision"),
        ("epochs recorded", "AUROC"),
    ]  # fmt: skip


def test_eight_detectors_have_eight_looks_and_nine_are_refused():
    names = [f"score_{i}" for i in range(9)]
    fig = detectors(Figure(), *detector_tables(names[:8]), noise_rate=0.05)
    looks = theme.line_looks(names[:8], "score")
    assert len({look[:2] for look in looks.values()}) == 8
    drawn = [line.get_color() for line in fig.axes[0].lines[:8]]
    assert drawn == [looks[name][0] for name in names[:8]]
    with pytest.raises(ValueError, match=r"9 rows .*at most 8 detectors"):
        detectors(Figure(), *detector_tables(names), noise_rate=0.05)


def test_el2n_is_named_with_its_epoch_and_the_panel_over_epochs_says_which_it_draws():
    fig = detectors(Figure(), *detector_tables(("el2n", "aum")), noise_rate=0.2, el2n_epoch=5)
    (legend,) = fig.legends
    assert "EL2N of epoch 5 (0.900, 0.800)" in words(legend)
    assert fig.axes[2].get_xlabel() == "epochs recorded\n(EL2N: of that epoch alone)"
    assert fig.axes[0].lines[0].get_color() == theme.SCORES["el2n"][0]


def test_detectors_refuse_a_table_without_a_column():
    curves, summary, epochs = detector_tables()
    with pytest.raises(ValueError, match=r"`over_epochs` lacks the columns \['auroc'\]"):
        detectors(Figure(), curves, summary, epochs.drop(columns="auroc"), noise_rate=0.2)
