"""Settings, which are fields of nested dataclasses: their types by dotted key, in words, and how YAML gives them."""

from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

__all__ = ["RepeatedKey", "in_words", "kind_of", "load_yaml", "takes_null", "takes_table"]

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}


class RepeatedKey(yaml.YAMLError):
    """A mapping gives a key twice."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        # Before merge keys (<<) are resolved, whose values a mapping may well give once more.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                where = f"line {line}" if lines[key.value] == line else f"lines {lines[key.value]} and {line}"
                raise RepeatedKey(f"{key.value!r} is given twice, in {where}")
            lines[str(key.value)] = line
        return node


def load_yaml(text: str) -> Any:
    """What YAML says, if no key of it is repeated, of which the last would win without a word.

    Raises:
        RepeatedKey: a key is repeated.
        yaml.YAMLError: the text is no YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def kind_of(cls: type, key: str) -> Any:
    """The type of the setting at a dotted key of ``cls``: a dataclass for a group; None where there is no such key."""
    name, _, rest = key.partition(".")
    kind = {entry.name: entry.type for entry in fields(cls)}.get(name)
    if not rest or kind is None:
        return kind
    if is_dataclass(kind):
        return kind_of(kind, rest)
    # ``--roots.visa FOLDER`` sets one entry of a table.
    tables = _tables(kind)
    return get_args(tables[0])[1] if tables else None


def takes_table(kind: Any) -> bool:
    return is_dataclass(kind) or bool(_tables(kind))


def takes_null(kind: Any) -> bool:
    return kind is Any or NoneType in _alternatives(kind)


def in_words(kind: Any) -> str:
    """How a value of a type is written, in YAML as on the command line."""
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return "{setting: value, ...} or a YAML file"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, parts))
    if origin is dict:
        return f"{{name: {in_words(parts[1])}, ...}}"
    if origin in (list, tuple):
        several = origin is list or parts[-1] is Ellipsis
        return f"[{in_words(parts[0])}, ...]" if several else f"[{', '.join(map(in_words, parts))}]"
    return WORDS.get(kind, "a value")


def _tables(kind: Any) -> list:
    return [part for part in _alternatives(kind) if get_origin(part) is dict]


def _alternatives(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
