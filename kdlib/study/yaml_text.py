"""Study files as text: the scalars of YAML 1.2, and nothing that constructs objects."""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

# Types of plain scalars in the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2), and
# the characters they begin with ("": the empty scalar). PyYAML follows 1.1, which reads 1e-06 as
# text, 010 as 8, 1:30 as 90 and `no` as false.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),  # before float, which has it
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _SafeLoader(yaml.SafeLoader):
    """YAML with the scalars of 1.2, without tags that construct objects, and without keys given
    twice."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # filled below; none of YAML 1.1

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        # JSON writes a character past U+FFFF as two surrogates, which PyYAML leaves two
        text = super().construct_scalar(node)
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _type, _form, _first in _CORE_SCHEMA:
    _SafeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(rf"(?:{_form})\Z"), list(_first)
    )
_SafeLoader.add_constructor("tag:yaml.org,2002:int", _SafeLoader.construct_core_int)


def parse_yaml(text: str) -> Any:
    """The content of a study file's text: mappings, lists, and scalars of the YAML 1.2 core schema.

    Raises: yaml.YAMLError, ValueError or RecursionError for text that is not YAML.

    >>> parse_yaml("{a: 1e-3, b: 010, c: 0o10, d: 1:30, e: no, f: true, g: ~}")
    {'a': 0.001, 'b': 10, 'c': 8, 'd': '1:30', 'e': 'no', 'f': True, 'g': None}
    """
    return yaml.load(text, Loader=_SafeLoader)
