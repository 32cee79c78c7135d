"""A study file becomes settings: safe YAML, laid over its base, validated, its code files hashed.

Unknown keys, unknown names, double keys and impossible values are refused with the nearest known
name.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdlib.repro.files import nearest, one_line, study_files, workspace
from kdlib.study.base import StudyError
from kdlib.study.study import Study
from kdlib.study.user_code import UserCode, pin
from kdlib.study.yaml_text import parse_yaml

_MOST_BYTES = 2**18  # of a study file; the largest here has 3 kB
_MOST_LINES = 20  # of what is wrong with a study
# The last three are what PyYAML lets through, for `!!bool maybe`, say
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, TypeError, AttributeError)


def study_file(path: str | Path) -> Path:
    """The absolute path of a study file: as given when it is absolute, else relative to the current
    folder, else relative to the workspace.

    Raises: FileNotFoundError that lists the studies there are.
    """
    for candidate in (Path(path), workspace() / path):
        if os.path.isfile(candidate):
            return Path(os.path.abspath(candidate))
    known = [str(file.relative_to(workspace() / "params")) for file in study_files()]
    raise FileNotFoundError(
        f"no study file {str(path)!r}; params/ has {', '.join(known) or 'none'}"
    )


def load_study(path: str | Path) -> Study:
    """Read and validate a study file.

    Args:
        path: As in `study_file`.

    Raises: FileNotFoundError that lists the studies there are; StudyError that says which key is
        wrong and how.
    """
    file = study_file(path)
    study = _alone(file)
    if study.shares is None:
        return study
    for folder in (file.parent, workspace() / "params"):
        other = folder / study.shares
        if os.path.isfile(other) and not other.samefile(file):
            return study.sharing(_alone(other))
    raise StudyError(
        f"{file}: `shares` names {_short(study.shares)!r}; expected another study file beside it"
    )


def _alone(path: Path) -> Study:
    """The study of a file without what it shares, with the sha256 of every code file it names."""
    study = study_from({"name": path.stem, **read_content(path, ())}, str(path))
    sections = {
        section: {
            name: pin(rule, f"{section}.{name}") if isinstance(rule, UserCode) else rule
            for name, rule in getattr(study, section).items()
        }
        for section in ("objectives", "selections")
    }
    return study.model_copy(update=sections)


def study_from(content: dict[str, Any], source: str = "this") -> Study:
    """A study from the content of its file and its `name`.

    Args:
        source: What the message calls it.

    Raises: StudyError that says which key is wrong and how.
    """
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        lines = [f"  {_worded(e, content)}" for e in error.errors()]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"  and {len(lines) - _MOST_LINES} more"]
        raise StudyError(f"{source} is not a valid study:\n" + "\n".join(lines)) from None


def _worded(error: dict[str, Any], content: Any) -> str:
    """One fault as `place: what is wrong`, without the tags of unions in its place."""
    parts, last = [], len(error["loc"]) - 1
    for i, part in enumerate(error["loc"]):
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing" or i != last:
                continue  # the tag of a union
        parts.append(str(part))
    message, context = error["msg"].removeprefix("Value error, "), error.get("ctx", {})
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        names = re.findall(r"'([^']*)'", context["expected"])
        message = f"unknown value {error['input']!r}; {nearest(error['input'], names)}"
    elif error["type"] == "union_tag_invalid":
        names = re.findall(r"'([^']*)'", context["expected_tags"])
        message = f"unknown kind {context['tag']!r}; {nearest(context['tag'], names)}"
    elif error["type"] == "union_tag_not_found":
        message = "`kind` is missing"
    elif error["type"] not in ("value_error", "missing", "origin"):
        message += f"; got {_short(repr(error['input']), 100)}"
    return f"{_short('.'.join(parts) or 'study', 200)}: {_short(message)}"


def read_content(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a study file, laid over that of its `base` where it names one.

    A key of the file replaces that of its base, mappings key by key; `null` takes a key away.
    """
    try:
        if (n_bytes := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{n_bytes:,} bytes; a study has at most {_MOST_BYTES:,}")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except _NOT_YAML as error:
        raise StudyError(
            f"{path} is not a readable YAML file: {_short(_fault(error))}; expected lines "
            "`key: value`, indented by spaces"
        ) from None
    if not isinstance(content, dict):
        raise StudyError(
            f"{path} holds {type(content).__name__}; expected a mapping with data, teacher, "
            "students, ..."
        )
    if "name" in content:
        raise StudyError(
            f"{path}: `name` is taken from the file name ({path.stem}); remove the key"
        )
    if (name := content.pop("base", None)) is None:
        return content
    base = path.parent / (name := str(name))
    if not os.path.isfile(base) or base in (path, *above):
        fault = "itself built on this file" if base in (path, *above) else "no file"
        raise StudyError(
            f"{path}: its base {_short(name)} is {fault}; expected another study file beside it"
        )
    return _laid_over(read_content(base, (path, *above)), content)


def _fault(error: Exception) -> str:
    """What is wrong with a YAML text, and where."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return one_line(error)
    problem = getattr(error, "problem", None) or error.context
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _short(text: str, most: int = 500) -> str:
    """A text that can stand in a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = _laid_over(below[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged
