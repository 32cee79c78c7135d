"""The base class of all sections of a study, and the types of their values."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from kdlib.repro.files import nearest


class StudyError(ValueError):
    """A study file or an axis value that is not valid."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows below a cell: the sentence, which says what to do."""
        return [f"{type(self).__name__}: {self}"]


class Settings(BaseModel):
    """Base of every section: frozen and exactly typed. An unknown key is refused with the nearest
    known one; a key that is null counts as not given."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _given(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        given = {key: value for key, value in content.items() if value is not None}
        for key in content:
            if key not in cls.model_fields and not (content[key] is None and cls._elsewhere(key)):
                raise ValueError(f"unknown key {key!r}; {nearest(key, cls.model_fields)}")
        # lists become tuples, so that settings are frozen all the way down
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

    @classmethod
    def _elsewhere(cls, key: str) -> bool:
        """Whether settings of another kind or origin in the place of these have the key."""
        above = [k for k in cls.__mro__[1:] if issubclass(k, Settings) and k is not Settings]
        return any(key in k.model_fields for base in above for k in base.__subclasses__())


def known(value: str, names: Iterable[str], what: str) -> str:
    """The value, where it is one of the names.

    Raises: ValueError with the nearest name.
    """
    names = tuple(names)
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}; {nearest(value, names)}")
    return value


def matching(pattern: str, expected: str) -> Any:
    """The type of texts that match a pattern of ASCII letters.

    Args:
        pattern: A regular expression for the whole text.
        expected: What the message says was expected.
    """
    compiled = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"{text!r} is not allowed here; expected {expected}")
        return text

    schema = {"type": "string", "pattern": f"^({pattern})$"}
    return Annotated[str, AfterValidator(check), WithJsonSchema(schema)]


def suggested(names: Iterable[str]) -> WithJsonSchema:
    """The JSON schema of a text for which an editor suggests names, others being allowed."""
    return WithJsonSchema({"anyOf": [{"enum": list(names)}, {"type": "string"}]})


def _distinct(values: tuple) -> tuple:
    if len(set(values)) != len(values):
        raise ValueError(f"{list(values)} names a value twice; expected distinct values")
    return values


Distinct = AfterValidator(_distinct)


def one_or_more(kind: Any) -> Any:
    """The type of one value, or of a list of distinct ones; `listed` makes a tuple of either."""
    several = Annotated[tuple[kind, ...], Field(min_length=1), Distinct]
    which = Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "one")
    return Annotated[Annotated[kind, Tag("one")] | Annotated[several, Tag("list")], which]


def listed(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


NAME = r"\w[\w.-]*"  # of folders, and of rows in tables
Name = matching(NAME, "letters, digits, '_', '-' or '.', since it names a folder")

Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
ImageSize = Annotated[int, Field(ge=4)]
