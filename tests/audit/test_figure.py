"""The figure of the audit shows both numbers of every defect, legibly."""

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from audit.report import draw_defects
from kdlib.plots import theme


def exhibit_table():
    budget, saved = "kdlib.repro.checks.budget", "kdlib.cartography.subset.Subset.save"
    return pd.DataFrame(
        {
            "study": ["A", "A", "B"],
            "name": ["a random third that was the full set", "seed + epoch", "a third defect"],
            "measure": ["test accuracy of a random third", "draws that are shared", "tensors"],
            "defect": [0.94, 1.0, 0.0],
            "honest": [0.85, 0.0, 1.0],
            "check": [f"{budget}, {budget}", "other test labels", saved],
            "caught": [True, True, False],
        }
    )


def test_defects_stand_beside_honest_numbers_with_their_checks():
    table = exhibit_table()
    ax = draw_defects(Figure().subplots(), table, "title")
    marks = {
        marker: [(x, y) for line in ax.lines if line.get_marker() == marker
                 for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        for marker in ("X", "o")
    }  # fmt: skip
    assert marks["X"] == [(94.0, 0), (100.0, 1), (0.0, 2)]
    assert marks["o"] == [(85.0, 0), (0.0, 1), (100.0, 2)]
    texts = [text.get_text() for text in ax.texts]
    for row in table.itertuples():
        assert f"{row.study}  {row.name}" in texts
        assert row.measure in texts
        assert f"{100 * row.defect:.1f}" in texts
    assert "checks.budget\nchecks.budget" in texts
    assert "other test labels" in texts
    assert "not caught by\nsubset.Subset.save" in texts
    assert sum("not caught" in text for text in texts) == 1
    assert ax.get_xlabel() == "what each row measures (%)"
    with pytest.raises(ValueError, match=r"expected \[0, 100\]"):
        draw_defects(Figure().subplots(), table.assign(defect=-0.1))
    with pytest.raises(ValueError, match="lacks the columns"):
        draw_defects(Figure().subplots(), table.drop(columns="honest"))


def test_all_text_is_legible_and_inside_the_figure():
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 3.4))
        draw_defects(fig.subplots(), exhibit_table(), "digits: 3 defects in miniature")
        fig.draw_without_rendering()
        extent = fig.get_tightbbox()  # inches, everything that is drawn
    assert min(text.get_fontsize() for text in fig.findobj(Text) if text.get_text().strip()) >= 7
    assert min(extent.x0, extent.y0) >= 0
    assert extent.x1 <= fig.get_figwidth()
