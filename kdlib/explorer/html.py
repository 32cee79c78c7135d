"""HTML of the gallery."""

import html

from kdlib.explorer.crossfilter import LIMITS
from kdlib.explorer.example import curve_svg, figure_html, reasons
from kdlib.explorer.state import Explorer


def gallery_html(state: Explorer) -> str:
    """The present page of the gallery."""
    rows = state.page()
    if not len(rows):
        return (
            "<div class='kdlib-quiet' style='padding:1em'>Draw a lasso around some points: their "
            "images appear here. The buttons beside the map switch between lasso and moving.</div>"
        )
    shown = []
    pictures, known = state.pictures(rows.index), reasons(state, rows.index)
    for uri, why, (i, row) in zip(pictures, known, rows.iterrows(), strict=True):
        name = state.class_name(row["label"])
        about = ", ".join(f"{s} {row[s]:.3g}" for s in LIMITS)
        caption = (
            f"{html.escape(name)}<br><span class='kdlib-quiet'>{row[state.sort]:.3g}</span>"
            f"{curve_svg(why, 56, 20)}"
        )
        tip = "\n".join([f"example {i}: {name}", about, *why.lines])
        shown.append(figure_html(state, uri, i, caption, tip))
    return f"<div class='kdlib-gallery'>{''.join(shown)}</div>"
