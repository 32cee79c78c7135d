"""Which settings of a study differ from the defaults of the schema."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from kdlib.repro.files import nearest
from kdlib.study.base import Settings
from kdlib.study.study import Study

_ABSENT = object()
_LONG = 12  # values of a list that is counted


def changed(study: Study, *sections: str) -> list[tuple[str, str, str]]:
    """The settings that a study changes, that have no default, or that name a kind.

    Args:
        sections: Keys of the study, or keys in them such as `data.relabel`; none: all.

    Returns: Of each setting, in the order of the schema, its dotted key, its value and its default,
        "" where it has none.
    Raises: KeyError with the nearest key for a section that studies do not have.
    """
    for section in sections:
        if (key := section.partition(".")[0]) not in Study.model_fields:
            raise KeyError(f"no section {key!r}; {nearest(key, Study.model_fields)}")
    return [
        (name, _text(value), "" if default is _ABSENT else _text(default))
        for name, value, default in _changed(study)
        if name != "name"
        and (not sections or any(f"{name}.".startswith(f"{section}.") for section in sections))
    ]


def _changed(settings: Settings, usual: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """The same of one section, whose defaults are those of `usual` if that is of its class."""
    for key, field in type(settings).model_fields.items():
        here, default = getattr(settings, key), _ABSENT
        if type(usual) is type(settings):
            default = getattr(usual, key)
        elif not field.is_required() and not _names_the_class(field.annotation):
            default = field.get_default(call_default_factory=True)
        if here == default:
            continue
        parts = {"": here} if isinstance(here, Settings) else here
        if isinstance(parts, dict) and any(isinstance(p, Settings) for p in parts.values()):
            for part, inner in parts.items():
                if inner is None:
                    yield f"{key}.{part}", None, _ABSENT
                    continue
                for name, *values in _changed(inner, default):
                    yield ".".join(filter(None, (key, part, name))), *values
        else:
            yield key, here, default


def _names_the_class(annotation: Any) -> bool:
    """Whether a key has one value in this class of settings, such as the `kind` of an objective."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def _text(value: Any) -> str:
    """A value as a study file has it."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, tuple | list):
        some = len(value) <= _LONG
        return f"[{', '.join(map(_text, value))}]" if some else f"{len(value)} values"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, Settings):
        return _text(value.model_dump(mode="json", exclude_none=True))
    return json.dumps(value)
