"""The map one can send: a study's datamap as one HTML file that needs no kernel and no network."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.cartography.datamap import REGIONS, compute_datamap
from kdlib.explorer.document import as_json, asset, document, packed, write
from kdlib.explorer.page_content import IN_WORDS, REGION, Content, collect
from kdlib.explorer.sent import SELECTION_FORMAT
from kdlib.explorer.state import LIMITS
from kdlib.explorer.thumbnails import Atlas, atlas
from kdlib.steps.cache import open_images
from kdlib.steps.display import meanings
from kdlib.steps.recordings import open_log
from kdlib.study.load import load_study
from kdlib.study.study import Study

THUMBNAILS = 3.0  # megabytes of the pictures of all images, at most
LISTED_THUMBNAILS = 0.6  # of those of the hard images, which are shown larger
SCORES = 4_000_000  # numbers of all scores together: of large maps the first scores alone
ABSENT = 65_535  # of a quantised score: no number


def write_page(
    study: Study,
    against: Study | pd.DataFrame | None = None,
    against_name: str = "",
    pictures: bool = True,
    thumbnails: float = THUMBNAILS,
) -> Path:
    """Write `datamap.html` of a study whose steps 01 to 03 are done, with a second map
    `datamap_against_<name>.html`, into its figures folder.

    Args:
        against: Another study, or another datamap of the same images with its `against_name`.
        pictures: Whether the page holds small images.
        thumbnails: Megabytes of the small images of all points, at most.

    Raises: As `explore`; an error of the image cache where pictures are wanted.
    """
    content = collect(study, against, against_name, pictures=pictures)
    return write(page_path(study, content.other_name if against is not None else ""),
                 page(content, thumbnails))  # fmt: skip


def page_path(study: Study, against_name: str = "") -> Path:
    """Where a study's page lies."""
    ending = "_against_" + re.sub(r"[^A-Za-z0-9_-]+", "_", against_name) if against_name else ""
    return study.figures / f"datamap{ending}.html"


def named_map(study: Study, name: str) -> tuple[Study | pd.DataFrame, str]:
    """The map that `--against` names: a study file, or `MODEL/PART` of the study's recordings.

    Returns: The study or the datamap, and its name.
    """
    if name.endswith((".yaml", ".yml")):
        other = load_study(name)
        return other, other.name
    model, slash, part = name.partition("/")
    if not slash or study.recordings is None:
        raise ValueError(
            f"{name!r} is no second map; expected a study file such as params/mnist.yaml, or a "
            "recording of this study, such as resnet8/seed=0"
        )
    log, asked = open_log(study, open_images(study), model, part), study.dynamics
    return compute_datamap(log, el2n_epoch=asked.el2n_epoch, window=asked.window), name


def page(content: Content, thumbnails: float = THUMBNAILS) -> str:
    """The HTML of a page."""
    header, arrays = header_of(content), arrays_of(content)
    data = {f"a-{name}": packed(array) for name, array in arrays.items()}
    header["arrays"] = {name: array.dtype.name for name, array in arrays.items()}
    small, listed = pictures_of(content, thumbnails)
    for name, made in (("thumbnails", small), ("listed", listed)):
        if made is not None:
            data[name] = made.uri
            header[name] = {"side": made.side, "columns": made.columns}
    if content.read is None:
        header["remarks"].append("This page was made without the images.")
    elif small is None:
        header["remarks"].append(
            f"Small images of all {len(content.table):,} points do not fit into "
            f"{thumbnails:g} MB: those of the list of hard images alone are here."
        )
    else:
        header["remarks"].append(
            f"Small images are {small.side} pixels wide and take {small.n_bytes / 1e6:.2g} MB."
        )
    data["header"] = as_json(header)
    libraries = [
        asset("vendor/regl-2.1.1.js"),
        _as_global(asset("vendor/pub-sub-es-3.0.0.js")),
        asset("vendor/regl-scatterplot-1.16.0.js"),
    ]
    own = "".join(asset(f"page/{name}.js") for name in ("data", "map", "charts", "main"))
    body = asset("page/body.html").replace("LICENCES", asset("vendor/LICENSES.txt"))
    scripts = ["\n".join([*libraries, f'(function () {{\n"use strict";\n{own}}})();'])]
    title = f"{content.name}: datamap"
    return document(title, body, [asset("page/style.css")], scripts, data, compiles=True)


def _as_global(module: str) -> str:
    """pub-sub-es as a script that sets the name by which regl-scatterplot finds it."""
    code = re.sub(r"^export .*$", "", module, flags=re.MULTILINE)
    return f"(function () {{\n{code}\nglobalThis.createPubSub = createPubSub;\n}})();"


def header_of(content: Content) -> dict[str, Any]:
    """Everything of a page that is no array and no picture."""
    table, known = content.table, meanings(content.table)
    scores = shown_scores(content)
    limits = {name: _limits(table[name], name) for name in scores}
    remarks = list(content.remarks)
    if left_out := len(content.scores) - len(scores):
        remarks.append(f"{left_out} further scores are left out, to keep the page small.")
    if not content.epochs:
        remarks.append("Curves of single images are left out, to keep the page small.")
    elif content.predicted is None:
        remarks.append("No predicted classes were recorded (dynamics.logits).")
    header = {
        "name": content.name,
        "n": len(table),
        "classes": content.classes,
        "regions": [IN_WORDS[region] for region in REGIONS],
        "scores": [
            {"name": name, "meaning": known.get(name, ""), "low": low, "high": high}
            for name, (low, high) in limits.items()
        ],
        "sentences": content.sentences(),
        "epochs": content.epochs,
        "hard": [[label, rows.tolist()] for label, rows in content.hard().items()],
        "results": content.results,
        "remarks": remarks,
        "selection": {
            "kdlib": "selection",
            "format": SELECTION_FORMAT,
            "study": content.name,
            "data_fingerprint": content.data,
            "datamap_sha256": content.parent,
        },
    }
    if content.other is not None:
        header["other"] = {"name": content.other_name, "n": len(content.other)}
    return header


def shown_scores(content: Content) -> list[str]:
    """The scores a page holds: the map's own first, then as many as fit."""
    order = [*LIMITS, *(name for name in content.scores if name not in LIMITS)]
    return order[: max(len(LIMITS), SCORES // max(len(content.table), 1))]


def arrays_of(content: Content) -> dict[str, np.ndarray]:
    """The arrays of a page, by name: `ids` as differences, `labels`, `region` (0 to 2), a score as
    16 bits between its ends, `gold` as 8 bits, `predicted`; of a second map its scores and `rows`,
    the positions of its images in the first."""
    table = content.table
    few = np.uint8 if len(content.classes) <= 256 else np.uint16
    arrays = {
        "ids": np.diff(table.index.to_numpy(), prepend=0).astype(np.uint32),
        "labels": table["label"].to_numpy().astype(few),
        "region": table[REGION].cat.codes.to_numpy().astype(np.uint8),
    }
    for name in shown_scores(content):
        arrays[f"s-{name}"] = quantised(
            table[name].to_numpy(np.float64), *_limits(table[name], name)
        )
    if content.gold is not None:
        arrays["gold"] = np.round(np.clip(content.gold, 0, 1) * 255).astype(np.uint8)
    if content.predicted is not None:
        arrays["predicted"] = np.asarray(content.predicted).astype(few)
    if content.other is not None:
        arrays["o-rows"] = table.index.get_indexer(content.other.index).astype(np.uint32)
        for name, ends in LIMITS.items():
            arrays[f"o-{name}"] = quantised(content.other[name].to_numpy(np.float64), *ends)
    return arrays


def _limits(values: pd.Series, name: str) -> tuple[float, float]:
    """Ends of a score: the possible ones where they are known, else those of the values."""
    finite = values[np.isfinite(values)]
    return LIMITS.get(name, (float(finite.min()), float(finite.max())))


def quantised(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as 16 bits between two ends; ABSENT for what is no number."""
    share = (values - low) / ((high - low) or 1.0)
    known = np.isfinite(share)
    codes = np.full(len(values), ABSENT, np.uint16)
    codes[known] = np.round(np.clip(share[known], 0, 1) * (ABSENT - 1))
    return codes


def pictures_of(content: Content, thumbnails: float) -> tuple[Atlas | None, Atlas | None]:
    """Small images of all points, and larger ones of the hard images that are listed, in the order
    of the list; None where they do not fit, or are no larger than the small ones."""
    if content.read is None:
        return None, None
    small = atlas(content.read, content.table.index.to_numpy(), int(1e6 * thumbnails))
    rows = [row for rows in content.hard().values() for row in rows]
    listed = atlas(content.read, content.table.index.to_numpy()[rows], int(1e6 * LISTED_THUMBNAILS))
    if listed is not None and small is not None and listed.side <= small.side:
        listed = None
    return small, listed
