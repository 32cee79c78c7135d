"""Names of classes and studies are shown as they are: no formula, no markup, no end of a row."""

import contextlib
import io
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from plots.test_datamaps import map_table

from kdlib.compare.text import escaped, table
from kdlib.plots import theme
from kdlib.plots.datamaps import datamap
from kdlib.plots.images import region_grid

NAMES = [
    "$", "$x$", "$\\frac{$", "5$ to 6$", "a_b", "x^2", "100 %", "#1", "<b>x", "a|b", "`c`", "*d*",
    "~", "{}", "\\", "&",
]  # fmt: skip


def _drawn(fig: Figure) -> list[str]:
    """All texts of a figure, once it was drawn; none of them is read as a formula."""
    fig.savefig(io.BytesIO(), format="png")
    fig.savefig(io.BytesIO(), format="pdf")
    texts = [text for text in fig.findobj(Text) if text.get_text()]
    names = [text for text in texts if any(sign in text.get_text() for sign in "$\\")]
    assert not any(text._preprocess_math(text.get_text())[1] for text in names)
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("styled", [True, False])
def test_a_figure_shows_every_name_of_a_class(styled):
    with theme.style() if styled else contextlib.nullcontext():
        data = map_table().assign(label=np.arange(300) % len(NAMES))
        title = "$5_a$" if styled else "study"
        fig = datamap(Figure(figsize=(theme.WIDE, 6)), data, title, class_names=NAMES)
        images = np.zeros((len(NAMES), 1, 8, 8), np.uint8)
        grid = region_grid(Figure(figsize=(9, 2)), {"$r$": images}, {"$r$": NAMES})
    shown = _drawn(fig)
    assert title in shown
    assert all(any(text.startswith(f"{name} (") for text in shown) for name in NAMES)
    captions = _drawn(grid)
    assert {"$x$", "x^2", "$", "\\"} <= set(captions)


def test_a_table_of_markdown_keeps_its_columns():
    rows = table(["class", "n"], [[name, 1] for name in NAMES] + [["a\nb", 2]]).splitlines()
    assert len(rows) == len(NAMES) + 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert "| &lt;b>x | 1 |" in rows
    assert "| < 0.001 |" in table(["p"], [["< 0.001"]])


def test_latex_has_no_sign_that_begins_anything():
    for name in NAMES:
        bare = re.sub(r"\\(text\w+\{\}|[&%$#_{}])", "", escaped(name))
        assert not set(bare) & set("\\&%$#_{}~^"), name
