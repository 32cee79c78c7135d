"""`kdlib.study.schema`: what is generated from the settings says what they say."""

import json

import pytest
from jsonschema import Draft7Validator
from tiny import ROOT

from kdlib.study import schema
from kdlib.study.load import study_from
from kdlib.study.yaml_text import parse_yaml

STUDIES = sorted((ROOT / "params").glob("*.yaml"))


def test_the_written_schema_and_page_are_those_of_the_settings():
    written = json.loads((ROOT / "params" / "study.schema.json").read_text())
    assert written == schema.file_schema(), "run python -m kdlib schema"
    page = (ROOT / "docs" / "studies.md").read_text()
    assert f"{schema.START}\n{schema.keys_text()}\n{schema.END}" in page, (
        "run python -m kdlib schema"
    )


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_names_the_schema_and_fits_it(path):
    text = path.read_text()
    assert "# yaml-language-server: $schema=study.schema.json\n" in text
    assert text.startswith("# ")
    assert not text.startswith("# yaml")  # the first line is the question
    Draft7Validator(schema.file_schema()).validate(parse_yaml(text))


@pytest.mark.parametrize(
    "content",
    [
        {"techer": {}},
        {"data": {"source": "digts"}},
        {"training": {"steps": "many"}},
        {"objectives": {"kd": {"kind": "kd", "smoothing": 0.1}}},
        {"selections": {"mine": {"kind": "esy"}}},
        {"teacher": {"weights": "a.pt", "mean": [0.5], "training": {"steps": 1}}},
        {"students": {"a": {"model": {"name": "tiny_cnn"}, "freeze": "head"}}},
    ],
)
def test_an_editor_marks_what_a_study_refuses(content):
    assert not Draft7Validator(schema.file_schema()).is_valid(content)
    with pytest.raises(ValueError, match="is not a valid study"):
        study_from({"name": "case"} | content)


def test_write_keeps_the_text_around_the_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    (tmp_path / "docs").mkdir()
    (tmp_path / "params").mkdir()
    page = tmp_path / "docs" / "studies.md"
    page.write_text(f"# Keys\n\n{schema.START}\nold\n{schema.END}\n\nmore\n")
    for _ in range(2):
        schema.write()
        text = page.read_text()
        assert text.startswith("# Keys\n\n<!-- keys -->\n| key |")
        assert text.endswith("<!-- /keys -->\n\nmore\n")
