"""Why an image is hard, in words and as a curve: on the map, in the gallery, in its own panel."""

import html
import urllib.parse
from dataclasses import dataclass, field

import numpy as np

from kdlib.explorer.state import REGIONS, Explorer

BLUE, VERMILLION = "#0072B2", "#D55E00"  # right, wrong
CHANGES = 6  # predictions that are named
LIKELY = 0.005  # classes with less of the teacher's probability are not named
N_NEAR = 8
RULES = {
    "region_variability": "ambiguous: the third with the highest variability; of the others those "
    "with confidence from 0.5 are easy-to-learn, those below hard-to-learn",
    "region_corner": "the nearest of three corners of the map (variability, confidence): "
    "easy-to-learn (0, 1), hard-to-learn (0, 0), ambiguous (1, 0.5)",
}
_ABSENT = (ValueError, OSError, LookupError)  # a file or a part of it that the study did not store


@dataclass
class Why:
    """What is known of one image: `prob` and `correct` (E,) of the recorded epochs, empty without a
    record; `lines`, plain sentences, and `missing`, why others are not there."""

    prob: np.ndarray
    correct: np.ndarray
    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def reasons(state: Explorer, ids: np.ndarray) -> list[Why]:
    """What is known of some images, in their order; each file is read once."""
    ids = np.asarray(ids, np.int64)
    found = [Why(np.empty(0), np.empty(0, bool)) for _ in ids]
    for part in (_course, _teacher, _stability):
        try:
            part(state, ids, found)
        except _ABSENT as error:
            for why in found:
                why.missing.append(" ".join(str(error).split()))
    return found


def _course(state: Explorer, ids: np.ndarray, found: list[Why]) -> None:
    course = state.examples.courses(ids)
    for i, why in enumerate(found):
        why.prob, why.correct = course.label_prob[:, i], course.correct[:, i]
    for i, why in enumerate(found):
        changes = [(epoch, state.class_name(c)) for epoch, c in course.changes(i)]
        text = f"Predicted {changes[0][1]}"
        if len(changes) == 1:
            text += " in every epoch"
        for epoch, name in changes[1:CHANGES]:
            text += f", {name} from epoch {epoch}"
        if len(changes) > CHANGES:
            text += f", and {len(changes) - CHANGES} further changes"
        why.lines.append(f"{text}.")


def _teacher(state: Explorer, ids: np.ndarray, found: list[Why]) -> None:
    for why, probs in zip(found, state.examples.teacher_probs(ids), strict=True):
        if len(probs) != len(state.names):
            why.missing.append(f"The teacher has {len(probs)} classes of its own.")
            continue
        top = [c for c in np.argsort(-probs, kind="stable")[:3] if probs[c] >= LIKELY]
        shown = ", ".join(f"{state.class_name(c)} ({100 * probs[c]:.0f} %)" for c in top)
        why.lines.append(f"The teacher: {shown}.")


def _stability(state: Explorer, ids: np.ndarray, found: list[Why]) -> None:
    table = state.examples.regions_by_recording
    if not table.shape[1]:
        raise ValueError(
            "no further training is recorded, and so not whether the region changes with the seed; "
            "the study's key `recordings` asks for some, and notebook 07 makes them"
        )
    here = state.table["region_variability"]
    for why, i in zip(found, ids, strict=True):
        row = table.loc[i].astype(str)
        other = row[row != here.loc[i]].value_counts()
        if other.empty:
            text = f"The same region in all {len(row)} recordings."
        else:
            kinds = ", ".join(f"{region_name(k)} in {n}" for k, n in other.items())
            text = f"Another region in {other.sum()} of {len(row)} recordings: {kinds}."
        why.lines.append(text)


def region_name(region: str) -> str:
    """A region as it is called on the screen: `easy` alone is a rule that selects."""
    return region if region == "ambiguous" else f"{region}-to-learn"


def curve_svg(why: Why, width: int, height: int, axes: bool = False) -> str:
    """p(label) over the recorded epochs as an SVG; a dot is blue where the label was predicted.

    Args:
        axes: Also name both axes, and their ends.
    """
    n = len(why.prob)
    if not n:
        return ""
    left, below, top = (30, 28, 6) if axes else (2, 2, 2)
    x = left + (width - left - 4) * (np.arange(n) / max(n - 1, 1))
    y = top + (height - top - below) * (1 - why.prob)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    radius = 2.2 if axes else 1.3
    parts = [f"<polyline points='{line}' fill='none' stroke='#888888'/>"]
    parts += [
        f"<circle cx='{a:.1f}' cy='{b:.1f}' r='{radius}' fill='{BLUE if right else VERMILLION}'/>"
        for a, b, right in zip(x, y, why.correct, strict=True)
    ]
    if axes:
        low, high = height - below, top
        parts += [
            f"<path d='M{left} {high}V{low}H{width - 4}' fill='none' stroke='#888888'/>",
            f"<text x='{left - 4}' y='{high + 8}' text-anchor='end'>1</text>",
            f"<text x='{left - 4}' y='{low}' text-anchor='end'>0</text>",
            f"<text x='10' y='{(low + high) / 2:.0f}' text-anchor='middle' transform='rotate(-90 10"
            f" {(low + high) / 2:.0f})'>p(label)</text>",
            f"<text x='{left}' y='{low + 12}'>1</text>",
            f"<text x='{width - 4}' y='{low + 12}' text-anchor='end'>{n}</text>",
            f"<text x='{(left + width) / 2:.0f}' y='{height - 3}' text-anchor='middle'>"
            "recorded epoch</text>",
        ]
    # xmlns: a tooltip takes it as an image
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' class='kdlib-curve' width='{width}' "
        f"height='{height}' viewBox='0 0 {width} {height}' font-size='10' fill='currentColor' "
        f"font-family='sans-serif'>{''.join(parts)}</svg>"
    )


def tooltip_picture(state: Explorer, example_id: int) -> str:
    """The image, its curve and what is known of it, as a data URI of one SVG."""
    [uri], [why] = state.pictures([example_id]), reasons(state, [example_id])
    lines = [part for text in why.lines for part in _wrapped(text, 42)]
    height = 84 + 12 * len(lines)
    texts = "".join(
        f"<text x='0' y='{94 + 12 * i}'>{html.escape(line)}</text>" for i, line in enumerate(lines)
    )
    curve = curve_svg(why, 130, 76).replace("<svg ", "<svg x='90' y='2' ", 1)
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 222 {height}' width='222' "
        f"height='{height}' font-size='10' font-family='sans-serif' fill='#333333'>"
        f"<rect width='222' height='{height}' fill='white'/>"
        f"<image href='{uri}' width='80' height='80' style='image-rendering:pixelated'/>"
        f"{curve}{texts}</svg>"
    )
    return "data:image/svg+xml," + urllib.parse.quote(svg, safe=":/;,+=")


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def figure_html(state: Explorer, uri: str, example_id: int, caption: str, tip: str) -> str:
    """One image that can be clicked: a person's click or Enter on it opens its panel.

    Args:
        caption: HTML below it; tip, plain text of its tooltip.
    """
    name = state.class_of(example_id)
    return (
        f"<figure data-example='{example_id}' tabindex='0' role='button' "
        f"title='{html.escape(tip)}'><img src='{uri}' alt='{html.escape(name)}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def detail_html(state: Explorer, example_id: int | None) -> str:
    """One image: enlarged, its curve, why it is hard, its scores, the images most like it."""
    if example_id is None:
        return "<div class='kdlib-quiet'>Click an image or a point to see it here.</div>"
    row, [why] = state.table.loc[example_id], reasons(state, [example_id])
    [uri] = state.pictures([example_id], 3 * 64)
    name = html.escape(state.class_name(row["label"]))
    items = "".join(f"<li>{html.escape(line)}</li>" for line in why.lines)
    items += "".join(f"<li class='kdlib-quiet'>{html.escape(m)}</li>" for m in why.missing)
    regions = "".join(
        f"<li title='{html.escape(RULES[rule])}'><b>{region_name(row[rule])}</b> by "
        f"{rule} <span class='kdlib-quiet'>({html.escape(RULES[rule])})</span></li>"
        for rule in REGIONS
    )
    flags = [c for c in state.table.select_dtypes(bool)]
    scores = "".join(
        f"<div><span class='kdlib-quiet'>{html.escape(score)}</span> "
        f"{('yes' if row[score] else 'no') if score in flags else format(row[score], '.4g')}</div>"
        for score in [*state.scores, *flags]
    )
    return (
        f"<div class='kdlib-detail'><div class='kdlib-detail-top'><img src='{uri}' alt='{name}'>"
        f"<div><b>example {example_id}: {name}</b><br>{curve_svg(why, 260, 120, axes=True)}"
        f"</div></div><ul>{items}{regions}</ul><div class='kdlib-scores'>{scores}</div>"
        f"{_near_html(state, example_id)}</div>"
    )


def _near_html(state: Explorer, example_id: int) -> str:
    """The images most like one to the teacher, or why they are not known."""
    try:
        near = state.examples.neighbours(example_id, N_NEAR)
    except _ABSENT as error:
        text = html.escape(" ".join(str(error).split()))
        return f"<p class='kdlib-quiet'>Its nearest neighbours are not known: {text}</p>"
    figures = []
    for uri, pair in zip(state.pictures(near["example_id"]), near.itertuples(), strict=True):
        name = state.class_of(pair.example_id)
        caption = f"{html.escape(name)}<br><span class='kdlib-quiet'>{pair.similarity:.3f}</span>"
        tip = f"example {pair.example_id}: {name}; cosine {pair.similarity:.3f}"
        figures.append(figure_html(state, uri, pair.example_id, caption, tip))
    return (
        "<p>The most similar images to the teacher (cosine of its features):</p>"
        f"<div class='kdlib-gallery'>{''.join(figures)}</div>"
    )
