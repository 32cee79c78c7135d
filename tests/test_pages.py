"""README.md, CONTRIBUTING.md, docs/: generated parts, links, names, commands, examples."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import yaml
from pages import PARTS, between
from tiny import ROOT

from kdlib import __main__ as command_line
from kdlib.study.load import load_study

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("kdlib", "audit", "tests", "benchmarks", "params", "notebooks", "docs", "profiles")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page: Path, language: str = r"\w*") -> list[str]:
    """The contents of the page's fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What stands between backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize(("page", "name"), PARTS)
def test_a_generated_part_is_what_the_committed_tables_say(page, name):
    shown = between((ROOT / page).read_text(), name)[0]
    assert len(shown) > 100
    assert shown == PARTS[page, name]() + "\n", "run python tests/pages.py"


@each_page
def test_every_relative_link_resolves(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_every_path_and_test_in_backticks_exists(page):
    for span in spans(page):
        path, _, test = span.partition("::")
        if test and not path.startswith("tests/"):
            path = f"tests/{path}"  # as the table of objectives has it
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", path):
            assert (ROOT / path).exists(), span
            assert not test or f"def {test}(" in (ROOT / path).read_text(), span


def resolved(name: str) -> object:
    """The module, class, function or attribute of a dotted name."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@each_page
def test_every_name_of_kdlib_exists(page):
    text = "\n".join([*spans(page), *code_blocks(page)])
    for name in re.findall(r"(?<![\w/.])(?:kdlib|audit)(?:\.\w+)+", text):
        if not name.endswith((".png", ".md", ".yaml")):
            resolved(name)
    for block in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kdlib":
                for alias in node.names:
                    resolved(f"{node.module}.{alias.name}")


@each_page
def test_every_command_and_its_options_exist(page, monkeypatch, capsys):
    text = "\n".join([*spans(page), *code_blocks(page)])
    for line in re.findall(r"python -m kdlib ([^#\n]+)", text):
        for command in line.split(" | "):
            words = command.split()
            names = words[: 2 if words[0] == "cache" else 1]
            monkeypatch.setattr(sys, "argv", ["kdlib", *names, "--help"])
            with pytest.raises(SystemExit, match="0"):  # an unknown command exits with 2
                command_line.main()
            options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            asked = {word.split("=")[0] for word in words if word.startswith("--")}
            assert asked <= options or names == ["study"], command  # study: Snakemake's too


def test_the_study_of_the_readme_is_one(tmp_path):
    whole, own = (yaml.safe_load(block) for block in code_blocks(README, "yaml"))
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(whole))
    study = load_study(tmp_path / "shown.yaml")
    assert len(study.cells()) == 18
    changed = whole | own
    changed["axes"] |= {"student": ["small"], "objective": ["sure"]}
    changed["probe"]["objective"] = ["sure"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(changed))
    assert load_study(tmp_path / "own.yaml").objectives["sure"].options == {
        "alpha": 0.7,
        "temperature": 4.0,
    }


def test_the_readme_lists_every_notebook_with_its_question():
    listed = re.findall(
        r"^\| \[(\w+)\]\(notebooks/\w+\.ipynb\) \| (.*?) \|", README.read_text(), re.M
    )
    titles = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = json.loads(path.read_text())["cells"][0]["source"]
        titles[path.stem] = "".join(first).splitlines()[0].removeprefix("# ")
    assert dict(listed) == titles


def test_the_readme_lists_what_lies_in_the_repository_and_in_kdlib():
    [listing] = [block for block in code_blocks(README) if "kdlib/\n" in block]
    top, _, package = listing.partition("kdlib/\n")
    named = {word.rstrip("/") for word in re.findall(r"(?:^|   )(\w[\w.]*/?)(?= {2,})", top, re.M)}
    assert {*FOLDERS, "figures", "Snakefile"} == named
    assert all((ROOT / name).exists() for name in named)
    named = {line.split()[0].rstrip("/") for line in package.splitlines()}
    package = ROOT / "kdlib"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert named == modules | {path.parent.name for path in package.glob("*/__init__.py")}


def test_the_cell_of_the_readme_runs(lab):
    """On the tiny study, which is finished; the app needs a notebook."""
    [cell] = code_blocks(README, "python")
    assert len(cell.splitlines()) <= 20
    cell = cell.replace("params/digits.yaml", str(lab / "params/tiny.yaml"))
    cell = cell.replace('"ambiguous"', '"easy"').replace("lab.explore()", "")
    names: dict[str, Any] = {}
    exec(cell, names)
    assert list(names["datamap"].columns[:2]) == ["label", "confidence"]
    assert len(names["runs"]) == 4  # two objectives, two seeds
    assert {"results", "strategies", "objectives"} <= set(names["tables"])
    image, label, example_id = next(iter(names["batches"]))
    assert len(image) == len(label) == len(example_id) == 64
    assert set(example_id.tolist()) <= set(names["subset"].example_ids.tolist())
    plt.close("all")


@each_page
def test_what_looks_like_yaml_is_yaml(page):
    blocks = code_blocks(page, "yaml")
    blocks += [f"{{{span}}}" for span in spans(page) if re.match(r"\w+: ", span)]
    for block in blocks:
        filled = re.sub(r"<[^>]*>|\.\.\.", "x", block)  # placeholders
        assert isinstance(yaml.safe_load(filled), dict), block
