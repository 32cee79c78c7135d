"""HTML of the gallery, the counts, the results and a failed training."""

import html

from kdlib.cartography.subset import Subset
from kdlib.explorer.background import BackgroundTraining
from kdlib.explorer.selections import selection_path, selection_results
from kdlib.explorer.state import LIMITS, Explorer
from kdlib.study.study import Study

LISTED = 20  # classes of the table of counts
LIT = "#D55E00"  # selected points, and their share of a class
_CELL = "padding:0 .6em;line-height:1.6"


def gallery_html(state: Explorer) -> str:
    """The present page of the gallery."""
    rows = state.page()
    if not len(rows):
        return (
            "<div style='color:#767676;padding:1em'>Draw a lasso around some points: their images "
            "appear here. The buttons beside the map switch between lasso and moving.</div>"
        )
    shown = []
    for uri, (i, row) in zip(state.pictures(rows.index), rows.iterrows(), strict=True):
        name, score = html.escape(state.class_name(row["label"])), f"{row[state.sort]:.3g}"
        about = ", ".join(f"{s} {row[s]:.3g}" for s in LIMITS)
        shown.append(
            f"<figure style='margin:0;text-align:center' title='example {i}: {name}&#10;{about}'>"
            f"<img src='{uri}' alt='{name}' style='width:100%;image-rendering:pixelated'>"
            "<figcaption style='font-size:11px;line-height:1.2;white-space:nowrap;overflow:hidden;"
            f"text-overflow:ellipsis'>{name}<br><span style='color:#767676'>{score}</span>"
            "</figcaption></figure>"
        )
    return (
        "<div class='kdlib-gallery' style='display:grid;gap:6px;align-content:start;"
        f"grid-template-columns:repeat(auto-fill,minmax(56px,1fr))'>{''.join(shown)}</div>"
    )


def counts_html(state: Explorer) -> str:
    """How many of each class are selected, with bars; of many classes those with most."""
    table = state.counts()
    title = "selected, of all"
    if len(table) > LISTED:
        title += f" (the {LISTED} most of {len(table):,} classes)"
        table = table.sort_values("selected", ascending=False, kind="stable").head(LISTED)
    lines = "".join(
        f"<tr><td style='{_CELL}'>{html.escape(row['class'])}</td><td style='width:120px'><div "
        f"style='background:{LIT};height:9px;width:{100 * row.share:.1f}%'></div></td>"
        f"<td style='{_CELL};text-align:right'>{row.selected:,}</td>"
        f"<td style='{_CELL};text-align:right;color:#767676'>of {row.whole:,}</td></tr>"
        for _, row in table.iterrows()
    )
    return f"<b>{title}</b><table class='kdlib-counts' style='font-size:12px'>{lines}</table>"


def results_html(study: Study, name: str) -> str:
    """Students of a selection beside those of a random one, in points of test accuracy."""
    heads = ("objective", name, "random", "difference", "seed by seed")
    size = len(Subset.load(selection_path(study, name)))
    lines = ""
    for objective, rows in selection_results(study, name).groupby("objective", sort=False):
        picked, random, difference = 100 * rows[["picked", "random", "difference"]].mean()
        each = " ".join(f"{100 * d:+.1f}" for d in rows["difference"])
        texts = (objective, f"{picked:.2f} %", f"{random:.2f} %", f"{difference:+.2f}", each)
        cells = (f"<td style='{_CELL}'>{html.escape(text)}</td>" for text in texts)
        lines += f"<tr>{''.join(cells)}"
    head = "".join(f"<th style='{_CELL};text-align:left'>{html.escape(h)}</th>" for h in heads)
    return (
        f"<div style='line-height:1.4'>Test accuracy of students trained on <b>{html.escape(name)}"
        f"</b> and on as many random examples ({size:,}), mean over {len(study.seeds)} seeds:</div>"
        f"<table class='kdlib-results' style='font-size:12px'><tr>{head}</tr>{lines}</table>"
    )


def failure_html(name: str, training: BackgroundTraining) -> str:
    """The error of a training, and the path of its log."""
    return (
        f"<div class='kdlib-failure' style='line-height:1.4;color:{LIT}'><b>The training of "
        f"students on {html.escape(name)} failed:</b> {html.escape(training.error())}<br>"
        f"The whole log: <code>{html.escape(str(training.log))}</code></div>"
    )
