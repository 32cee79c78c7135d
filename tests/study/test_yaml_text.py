"""The text of a study file: scalars of YAML 1.2, no tags, one short error for what is no study."""

import copy
import json
import math
import time

import pytest
import yaml
from a_study import STUDY, validated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlib.study.base import StudyError
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml


@pytest.mark.parametrize(
    "text", ["seeds: [0, 1]\nseeds: [2, 3]", "data: {source: digits, source: mnist}"]
)
def test_a_key_given_twice_is_refused(write, text):
    with pytest.raises(StudyError, match=r"line \d, column \d+: key '\w+' is given twice"):
        load_study(write(text))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{marker}]",
        "!!python/object/new:pathlib.PosixPath [{marker}]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!include {marker}",
    ],
)
def test_tags_are_refused_and_execute_nothing(write, tmp_path, tag):
    marker = tmp_path / "executed"
    path = write("data: " + tag.format(marker=marker))
    with pytest.raises(StudyError, match="could not determine a constructor for the tag"):
        load_study(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: !!timestamp 2025-02-30", "a: !!int x",
     "? [1]\n: 2", "a: &x {b: *y}", "a: " + "[" * 3000, "\0"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_text_that_is_not_yaml_is_a_study_error(write, text):
    with pytest.raises(StudyError, match=r"case\.yaml is not a readable YAML file"):
        load_study(write(text))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data:\n  source: digits\n n_train: 3\n", "line 3, column 2: "),
        ("data: {source: digits\n", "line 2, column 1: expected ',' or '}'"),
        ("data: a: b\n", "line 1, column 8: mapping values are not allowed here"),
        ("data: &x 1\nother: *y\n", "line 2, column 8: found undefined alias 'y'"),
        ("data:\n\tsource: digits\n", "line 2, column 1: found character"),
        ("data: 1\ndata: 2\n", "line 2, column 1: key 'data' is given twice"),
    ],
)
def test_a_fault_of_yaml_has_its_line_in_one_sentence(write, text, fault):
    with pytest.raises(StudyError) as refused:
        load_study(write(text))
    assert f"case.yaml is not a readable YAML file: {fault}" in str(refused.value)
    assert str(refused.value).endswith("; expected lines `key: value`, indented by spaces")
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_are_a_study_error(write):
    path = write("")
    path.write_bytes(b"data: \xff")
    with pytest.raises(StudyError, match="not a readable YAML file"):
        load_study(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("1e-06", 1e-6), ("1.5e+300", 1.5e300), (".5", 0.5),
        ("5.", 5.0), ("-0.5", -0.5), ("+1", 1), ("-1", -1), ("0", 0), ("010", 10), ("-08", -8),
        ("0o10", 8), ("0x1F", 31), (".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf),
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False),
        ("FALSE", False), ("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None),
        *((text, text) for text in (
            "1:30", "1_000", "0b10", "-0x1F", "0o8", "1e", ".", "e3", "1.5.2", "+.nan", "yes", "no",
            "on", "off", "Yes", "NO", "y", "n", "tRue", "nULL", "2025-01-31", "=", "<<",
        )),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema_of_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}\n{text or 'none'}: b\n")
    assert list(found) == ["a", value if text else "none"]
    assert (type(found["a"]), found["a"]) == (type(value), value)
    if text:
        assert parse_yaml(f"['{text}']") == [text]


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number_is_a_float(text):
    assert math.isnan(parse_yaml(text))


def test_a_study_takes_numbers_as_they_are_written(write):
    text = yaml.safe_dump(STUDY).replace("lr_peak: 0.05", "lr_peak: 5e-2")
    assert "lr_peak: 5e-2" in text
    assert load_study(write(text)) == validated(STUDY)


@pytest.mark.parametrize("text", ["😀", "\ud83d", "ü", "\x7f"])
def test_text_written_as_json_is_read_as_it_was(text):
    written = json.dumps({text: [text, "a" + text]})
    if text == "\ud83d":  # half a character, which no file name has
        with pytest.raises(UnicodeDecodeError):
            parse_yaml(written)
    else:
        assert parse_yaml(written) == json.loads(written)


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", "word"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    with pytest.raises(StudyError, match="expected a mapping with data, teacher, students"):
        load_study(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {k: 1}\nb: {<<: [*a, *a]}", "unknown key"),
        ("\n".join(f"key{i}: {i}" for i in range(10_000)), "unknown key"),
        ("# " + "x" * 2**21, "2,097,154 bytes; a study has at most 262,144"),
        ("? [a, b]\n: 1\n", "a key is a list"),
        ("data: &d {source: *d}", "case.yaml is not a"),
        (f"base: {'x' * 5000}", "no file"),
        ('base: "x\\0y"', "no file"),
        ("base: /dev/zero", "no file"),
        (f"{'x' * 1000}: 1", "unknown key"),
    ],
    ids=["merged", "keys", "large", "list", "itself", "long", "NUL", "device", "name"],
)
def test_a_hostile_study_is_one_short_error_at_once(write, text, message):
    started = time.process_time()
    with pytest.raises(StudyError, match=message) as caught:
        load_study(write(text))
    assert time.process_time() - started < 10  # counting each of the keys took minutes
    assert len(str(caught.value)) < 2500


def paths(content: dict, prefix: tuple = ()) -> list[tuple]:
    found = []
    for key, value in content.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


WORDS = st.sampled_from(["data", "full", "kd", "steps", "timm/resnet18", "x", ""]) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8
)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.dates()
    | st.binary(max_size=4)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_mutated_study_loads_or_is_a_study_error(write, data):
    content = copy.deepcopy(STUDY)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths(content)))
        section = content
        for key in parents:
            section = section[key]
        kind = data.draw(st.sampled_from(["delete", "rename", "replace", "add"]))
        if kind in ("delete", "rename"):
            value = section.pop(last)
        if kind == "rename":
            section[data.draw(WORDS | st.integers() | st.booleans())] = value
        elif kind != "delete":
            section[last if kind == "replace" else data.draw(WORDS)] = data.draw(VALUES)
        if not content:
            break
    path = write(content)
    try:
        study = load_study(path)
    except StudyError:
        return
    for cell in study.cells():
        assert study.cell(**dict(cell.items())) == cell
    assert set(study.probed_cells()) <= set(study.cells())
    study.step_settings("compare")
