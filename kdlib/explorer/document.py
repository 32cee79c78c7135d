"""One HTML file that loads nothing: style, scripts and data inside, and a policy that forbids the
rest."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdlib.repro.files import write_atomic

ASSETS = Path(__file__).parent / "assets"


def asset(name: str) -> str:
    """The text of a file that comes with the package."""
    return (ASSETS / name).read_text(encoding="utf-8")


def document(
    title: str,
    body: str,
    styles: Sequence[str],
    scripts: Sequence[str] = (),
    data: Mapping[str, str] | None = None,
    compiles: bool = False,
) -> str:
    """A whole page. Its Content-Security-Policy lets the given styles and scripts work, by their
    sha256, and pictures inside the page be shown; nothing else runs, and nothing is loaded or sent.

    Args:
        title: Plain text, escaped here.
        body: HTML; what comes from data is escaped by who writes it.
        styles, scripts: CSS and JavaScript without a closing tag.
        data: Blocks of text by the id under which a script finds them; none of them runs.
        compiles: A script makes functions of text (regl makes its drawing commands so).
    """
    for text in (*styles, *scripts):
        if any(end in text.lower() for end in ("</script", "</style", "<!--")):
            raise ValueError("a script or style holds a tag that would end it")
    run = " ".join(map(_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {run}{' ' + repr('unsafe-eval') if compiles else ''}; "
        f"style-src {' '.join(map(_hash, styles))}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    blocks = [
        f'<script type="text/plain" id="{html.escape(name)}">{_inert(text)}</script>'
        for name, text in (data or {}).items()
    ]
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{html.escape(title)}</title>",
        *(f"<style>{text}</style>" for text in styles),
        "</head>",
        "<body>",
        body,
        *blocks,
        *(f"<script>{text}</script>" for text in scripts),
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _inert(text: str) -> str:
    """Text in which no tag begins. JSON reads the escape; base64 and data URIs hold no such sign.

    Raises: ValueError for other text with a `<`.
    """
    if "<" not in text:
        return text
    json.loads(text)
    return text.replace("<", "\\u003c")


def packed(array: np.ndarray) -> str:
    """An array as text: base64 of gzip of its bytes, little-endian, row by row."""
    array = np.ascontiguousarray(array)
    raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    # pyarrow brings its own zlib: the same bytes on every machine that has this version
    return base64.b64encode(pa.compress(raw, codec="gzip", asbytes=True)).decode()


def as_json(content: Any) -> str:
    """JSON without spaces; NaN, which JSON does not have, is refused."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write(path: Path, text: str) -> Path:
    """Write a page, whole or not at all."""
    return write_atomic(path, lambda file: file.write(text.encode()))
