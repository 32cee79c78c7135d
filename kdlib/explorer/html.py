"""HTML of the gallery, the results and a failed training."""

import html

from kdlib.cartography.subset import Subset
from kdlib.explorer.background import BackgroundTraining
from kdlib.explorer.selections import selection_path, selection_results
from kdlib.explorer.state import LIMITS, Explorer
from kdlib.study.study import Study


def gallery_html(state: Explorer) -> str:
    """The present page of the gallery."""
    rows = state.page()
    if not len(rows):
        return (
            "<div class='kdlib-quiet' style='padding:1em'>Draw a lasso around some points: their "
            "images appear here. The buttons beside the map switch between lasso and moving.</div>"
        )
    shown = []
    for uri, (i, row) in zip(state.pictures(rows.index), rows.iterrows(), strict=True):
        name, score = html.escape(state.class_name(row["label"])), f"{row[state.sort]:.3g}"
        about = ", ".join(f"{s} {row[s]:.3g}" for s in LIMITS)
        shown.append(
            f"<figure title='example {i}: {name}&#10;{about}'>"
            f"<img src='{uri}' alt='{name}'><figcaption>{name}<br>"
            f"<span class='kdlib-quiet'>{score}</span></figcaption></figure>"
        )
    return f"<div class='kdlib-gallery'>{''.join(shown)}</div>"


def results_html(study: Study, name: str) -> str:
    """Students of a selection beside those of a random one, in points of test accuracy."""
    heads = ("objective", name, "random", "difference", "seed by seed")
    size = len(Subset.load(selection_path(study, name)))
    lines = ""
    for objective, rows in selection_results(study, name).groupby("objective", sort=False):
        picked, random, difference = 100 * rows[["picked", "random", "difference"]].mean()
        each = " ".join(f"{100 * d:+.1f}" for d in rows["difference"])
        texts = (objective, f"{picked:.2f} %", f"{random:.2f} %", f"{difference:+.2f}", each)
        cells = (f"<td>{html.escape(text)}</td>" for text in texts)
        lines += f"<tr>{''.join(cells)}"
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return (
        f"<div style='line-height:1.4'>Test accuracy of students trained on <b>{html.escape(name)}"
        f"</b> and on as many random examples ({size:,}), mean over {len(study.seeds)} seeds:</div>"
        f"<table class='kdlib-results' style='font-size:12px'><tr>{head}</tr>{lines}</table>"
    )


def failure_html(name: str, training: BackgroundTraining) -> str:
    """The error of a training, and the path of its log."""
    return (
        f"<div class='kdlib-failure kdlib-wrong'><b>The training of "
        f"students on {html.escape(name)} failed:</b> {html.escape(training.error())}<br>"
        f"The whole log: <code>{html.escape(str(training.log))}</code></div>"
    )
