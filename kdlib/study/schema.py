"""The schema of a study file: as JSON, so that editors complete and check it, and as tables."""

import json
import re
from pathlib import Path
from typing import Any

from kdlib.repro.files import workspace, write_atomic
from kdlib.study.study import Study

BASE = {
    "type": "string",
    "description": "Another study file beside this one, over which this one is laid key by key; "
    "`null` takes a key away.",
}
START, END = "<!-- keys -->", "<!-- /keys -->"


def file_schema() -> dict[str, Any]:
    """JSON schema of one file. A file that names a `base` may leave out any key, and `null` takes
    one away, so that no key is required and each may be null."""
    schema = json.loads(json.dumps(Study.model_json_schema()), object_hook=_relaxed)
    schema["properties"] = {"base": BASE} | schema["properties"]
    del schema["properties"]["name"]
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | schema


def _relaxed(schema: dict[str, Any]) -> dict[str, Any]:
    """One object of the schema, whose inner objects are relaxed already."""
    kept = {k: v for k, v in schema.items() if k not in ("required", "discriminator")}
    for key in ("properties", "patternProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = {name: _nullable(value) for name, value in kept[key].items()}
    if isinstance(more := kept.get("additionalProperties"), dict):
        kept["additionalProperties"] = _nullable(more)
    elif more is False:  # a key of the base's class, taken away for another class
        kept["additionalProperties"] = {"type": "null"}
    if "oneOf" in kept:  # parts of several classes may fit where keys come from the base
        kept["anyOf"] = kept.pop("oneOf")
    return kept


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    about = {k: schema[k] for k in ("description", "default") if k in schema}
    rest = {k: v for k, v in schema.items() if k not in (*about, "title")}
    choices = rest.pop("anyOf") if set(rest) == {"anyOf"} else [rest]
    null = {"type": "null"}
    return about | {"anyOf": choices if null in choices else [*choices, null]}


def keys_text() -> str:
    """Every key of a study file with type, default and meaning, as Markdown."""
    schema = Study.model_json_schema()
    classes, places = schema.pop("$defs"), {}
    del schema["properties"]["name"]
    schema["properties"] = {"base": BASE} | schema["properties"]
    _collect(schema, "", classes, places)
    parts = [_table(schema)]
    for name, where in places.items():
        about = classes[name].get("description", "").split("\n")
        about = "\n".join(line for line in about if line != "-" and not line.startswith("tests/"))
        at = ", ".join(f"`{place}`" for place in sorted(where, key=len)[:4])
        at += ", ..." if len(where) > 4 else ""
        parts += [f"### {name}", f"At {at}.", about.strip(), _table(classes[name])]
    return "\n\n".join(parts)


def _collect(
    schema: dict[str, Any], path: str, classes: dict[str, Any], places: dict[str, list[str]]
) -> None:
    """The classes of settings in the order in which a study names them, and where."""
    for key, content in schema["properties"].items():
        place = f"{path}.{key}{'' if _named(content) is None else '.<name>'}".lstrip(".")
        references = re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(content))
        for name in dict.fromkeys(references):
            known = places.setdefault(name, [])
            if place not in known:
                known.append(place)
                _collect(classes[name], place, classes, places)


def _named(schema: dict[str, Any]) -> dict[str, Any] | None:
    """The values of a mapping from names; None for anything else."""
    if schema.get("type") != "object":
        return None
    return next(iter(schema.get("patternProperties", {}).values()), None) or schema.get(
        "additionalProperties"
    )


def _table(schema: dict[str, Any]) -> str:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, content in schema["properties"].items():
        required = key in schema.get("required", ()) or "const" in content
        default = "" if required else "-"
        if not required and content.get("default") is not None:
            default = _default(content["default"])
        cells = (f"`{key}`", _type(content), default, content.get("description", ""))
        shown = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return "those of its keys"
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= 60 else f"{len(value)} values"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    choices = [c for c in schema.get("anyOf", schema.get("oneOf", ())) if c != {"type": "null"}]
    if choices:
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        shown = [f"`{value}`" for value in schema["enum"]]
        return ", ".join(shown) if len(shown) <= 8 else f"{', '.join(shown[:6])}, ..."
    if schema.get("type") == "array":
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner)}"
    if schema.get("type") == "object":
        return f"mapping of names to {_type(_named(schema))}"
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="),
              ("exclusiveMaximum", "<"))  # fmt: skip
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds if key in schema]
    return " ".join([schema.get("type", "any"), *([", ".join(limits)] if limits else [])])


def write() -> list[Path]:
    """Write `params/study.schema.json`, and the keys into `docs/studies.md` between its marks."""
    schema, page = workspace() / "params" / "study.schema.json", workspace() / "docs" / "studies.md"
    texts = {schema: json.dumps(file_schema(), indent=1, ensure_ascii=False) + "\n"}
    around = re.split(f"(?s){START}.*{END}", page.read_text(encoding="utf-8"))
    texts[page] = f"{START}\n{keys_text()}\n{END}".join(around)
    for path, text in texts.items():
        write_atomic(path, lambda file, text=text: file.write(text.encode()))
    return list(texts)
