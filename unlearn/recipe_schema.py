"""What a recipe may hold, read off its types: the fields at a place, and what a field takes in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from unlearn.recipe import Recipe
from unlearn.yaml_core import KeyPath

PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "text of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    r"^(auto|cpu|mps|cuda(:\d+)?)$": "one of auto, cpu, mps, cuda, or cuda:NUMBER",
    r"^\d+(\.\d+)?[KMGT]B$": "a size such as 500MB or 5GB",
    r"^(\d+-)?\d{1,3}:\d{2}(:\d{2})?$": "a time such as 4:00:00 (hours) or 1-12:00:00 (days and hours)",
    r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$": "a name on the hub, OWNER/NAME",
}


class Alternative(NamedTuple):
    """One alternative of a field: its type and its constraints."""

    type: Any
    limits: tuple[Any, ...] = ()


def alternatives(annotation: Any, limits: tuple[Any, ...] = ()) -> tuple[Alternative, ...]:
    """Take unions and ``Annotated`` apart."""
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            limits += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in alternatives(member, limits))
    return (Alternative(annotation, limits),)


def is_model(kind: Any) -> bool:
    """Whether a type is one of the recipe's sections."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def fields(kinds: Sequence[Alternative]) -> dict[str, FieldInfo]:
    """The keys that a mapping of one of these alternatives may have."""
    return {name: info for kind in kinds if is_model(kind.type) for name, info in kind.type.model_fields.items()}


def below(kinds: Sequence[Alternative], key: str | int) -> tuple[Alternative, ...] | None:
    """The alternatives of what lies at ``key``; None where no alternative has such a key."""
    known = fields(kinds)
    if key in known:
        info = known[str(key)]
        return alternatives(info.annotation, tuple(info.metadata))
    for kind in kinds:
        origin = get_origin(kind.type)
        if origin is dict and isinstance(key, str):
            return alternatives(get_args(kind.type)[1])
        if origin is tuple and isinstance(key, int):
            return alternatives(get_args(kind.type)[0])
    return None


def alternatives_at(path: KeyPath) -> tuple[Alternative, ...]:
    """What a recipe may hold at ``path``; empty where it may hold nothing."""
    kinds: tuple[Alternative, ...] = (Alternative(Recipe),)
    for key in path:
        kinds = below(kinds, key) or ()
    return kinds


def homes(key: str, model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place in the schema where ``key`` is a field."""
    for name, info in model.model_fields.items():
        if name == key:
            yield (*path, name)
        for kind in alternatives(info.annotation):
            many = get_origin(kind.type) is tuple
            inner = get_args(kind.type)[0] if many else kind.type
            if is_model(inner):
                yield from homes(key, inner, (*path, name, "0") if many else (*path, name))


def words(kinds: Sequence[Alternative]) -> str:
    """What a field takes, as the object of "expected"."""
    parts = list(dict.fromkeys(_describe(kind) for kind in kinds if kind.type is not type(None)))
    if len(kinds) > len(parts) and any(kind.type is type(None) for kind in kinds):
        parts.append("null")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _describe(kind: Alternative) -> str:
    origin = get_origin(kind.type)
    if origin is Literal:
        values = [str(value) for value in get_args(kind.type)]
        return f"'{values[0]}'" if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is tuple:
        least = next((m.min_length for m in kind.limits if getattr(m, "min_length", None)), 0)
        inner = get_args(kind.type)[0]
        item = "a mapping" if is_model(inner) else words(alternatives(inner))
        return f"a list{f' with at least {least} item' if least else ''} (each: {item})"
    if origin is dict:
        return "a mapping (key: value)"
    if is_model(kind.type):
        return f"a mapping (keys: {', '.join(kind.type.model_fields)})"
    pattern = next((m.pattern for m in kind.limits if getattr(m, "pattern", None)), None)
    if pattern:
        return PATTERNS.get(pattern, f"text that matches {pattern}")
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind.type]
    if kind.type is str and any(getattr(m, "min_length", None) for m in kind.limits):
        return "text that is not empty"
    return plain + _bounds(kind.limits)


def _bounds(limits: Sequence[Any]) -> str:
    found = {name: getattr(m, name) for m in limits for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
    if {"ge", "le"} <= set(found):
        return f" from {found['ge']} to {found['le']}"
    said = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return "".join(f" {'and ' if i else ''}{said[name]} {value}" for i, (name, value) in enumerate(found.items()))
