"""What is in a selection: a dozen of its images that stand for the others."""

import html
import itertools

import numpy as np

from kdlib.explorer.example import figure_html
from kdlib.explorer.state import Explorer

N_GROUPS = 12
NAMED = 4  # classes of a group


def representatives_html(state: Explorer) -> str:
    """Groups of the selected images by the teacher's features: of each the image in its middle,
    under the class that most of the group have."""
    ids = state.selected
    if not len(ids):
        return "<div class='kdlib-quiet'>Nothing is selected.</div>"
    groups, n_read = state.examples.representatives(ids, N_GROUPS)
    uris = state.pictures(groups["example_id"])
    parts = []
    for label, rows in itertools.groupby(
        zip(uris, groups.itertuples(), strict=True), lambda pair: pair[1].label
    ):
        figures = []
        for uri, group in rows:
            named = [f"{state.class_name(c)}: {n:,}" for c, n in group.labels.items()]
            more = [f"{len(named) - NAMED} further classes"] if len(named) > NAMED else []
            caption = html.escape(", ".join(named[:NAMED] + more))
            tip = f"example {group.example_id} stands for {group.size:,} images: {', '.join(named)}"
            figures.append(figure_html(state, uri, group.example_id, caption, tip))
        parts.append(
            f"<section><b>{html.escape(state.class_name(label))}</b>"
            f"<div class='kdlib-gallery'>{''.join(figures)}</div></section>"
        )
    counted = np.bincount(state.table["label"].loc[ids], minlength=len(state.names))
    text = f"{len(ids):,} images of {np.count_nonzero(counted)} classes in {len(groups)} groups"
    if n_read < len(ids):
        text += f", which were made of {n_read:,} of them, drawn with a seed"
    return (
        f"<div class='kdlib-representatives'><p>{text}: of each the image in the middle, and how "
        f"many of each class the group has.</p>{''.join(parts)}</div>"
    )
