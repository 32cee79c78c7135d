"""Write the generated parts of README.md and docs/ again.

    python tests/pages.py

A generated part stands between `<!-- name -->` and `<!-- /name -->`; `tests/test_pages.py` compares
each with what `PARTS` makes of the committed tables and figures.
"""

import re
from collections.abc import Callable
from pathlib import Path

from kdlib.compare.findings import HEADLINE, KEY_FINDINGS, budgets, findings, in_words

ROOT = Path(__file__).resolve().parents[1]


def tables(path: str, heading: str | None = None) -> str:
    """The Markdown tables of a file: those under one heading, or those before the second one."""
    text = (ROOT / "figures" / path).read_text()
    sections = re.split(r"^## (.*)\n", f"## \n{text}", flags=re.MULTILINE)[1:]
    [section] = [
        body
        for title, body in zip(sections[::2], sections[1::2], strict=True)
        if title == (heading or "")
    ]
    blocks = section.split("\n\n")
    return "\n\n".join(block.strip() for block in blocks if block.strip().startswith("|"))


PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "headline"): lambda: f"**{in_words(HEADLINE)}**",
    ("README.md", "key findings"): lambda: "\n".join(
        f"- {in_words(sentence)}" for sentence in KEY_FINDINGS
    ),
    ("docs/findings.md", "findings"): lambda: "\n".join(findings("../")),
    ("docs/findings.md", "budgets"): lambda: budgets(
        ["subsets", "thirds_cifar10"], "resnet8", "kd"
    ),
    ("docs/scores.md", "cifar10_scores"): lambda: tables("thirds_cifar10/scores.md"),
    ("docs/scores.md", "cifar10n"): lambda: tables("cifar10n/noise.md"),
    ("docs/objectives.md", "objectives"): lambda: tables("objectives/objectives.md"),
}


def between(text: str, name: str) -> re.Match[str]:
    """The part of a page between its two markers."""
    match = re.search(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- /{name} -->)", text, re.DOTALL)
    if match is None:
        raise ValueError(f"no part <!-- {name} --> ... <!-- /{name} -->")
    return match


def main() -> None:
    for (page, name), make in PARTS.items():
        text = (ROOT / page).read_text()
        part = between(text, name)
        (ROOT / page).write_text(f"{text[: part.start()]}{make()}\n{text[part.end() :]}")


if __name__ == "__main__":
    main()
