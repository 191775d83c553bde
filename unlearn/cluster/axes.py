"""``--grid key=value,value``: the axes of a grid, read from the command line, and their names in file names."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from unlearn.cluster.grid import Axis
from unlearn.errors import GridError
from unlearn.recipe.yaml import YamlSyntaxError, parse_value

_FORM = "write --grid key.path=value,value, for example --grid seed=0,1,2"
_OPEN, _CLOSE = "[{(", "]})"
_BEFORE_QUOTE = "[{,:=("  # a quote opens a text only where a value begins, not in don't
_NAME = 72  # characters of a job's name; file systems take 255 bytes, people take less


def split_values(text: str) -> tuple[str, ...]:
    """Split at the commas that stand outside brackets and quotes: ``[1,2],'a,b'`` has two values.

    Raises:
        ValueError: a bracket or quote is not closed, or a value is empty.
    """
    values, start, depth, quote, before = [], 0, 0, "", ""
    i = 0
    while i < len(text):
        char = text[i]
        if quote:
            if char == "\\" and quote == '"':
                i += 1
            elif char == quote:
                quote = ""
        elif char in "'\"" and (not before or before in _BEFORE_QUOTE):
            quote = char
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth < 0:
                raise ValueError(f"{char} closes a bracket that was not opened")
        elif char == "," and not depth:
            values.append(text[start:i].strip())
            start = i + 1
        if not char.isspace():
            before = char
        i += 1
    if quote or depth:
        raise ValueError("a quote is not closed" if quote else "a bracket is not closed")
    values.append(text[start:].strip())
    if not all(values):
        raise ValueError("there is an empty value; write null or '' where that is meant")
    return tuple(values)


def read_axes(flags: Sequence[str], sets: Sequence[str] = ()) -> tuple[Axis, ...]:
    """The axes of ``--grid key=value,value`` flags.

    Args:
        flags: What was given to ``--grid``, in order.
        sets: What was given to ``--set``; a key cannot be in both.

    Raises:
        GridError: a flag that is none, a value that is no YAML, a value or key that is there twice.
    """
    axes: list[Axis] = []
    fixed = [text.partition("=")[0].strip() for text in sets]
    for flag in flags:
        key, equals, text = (part.strip() for part in flag.partition("="))
        if not equals or not all(key.split(".")):
            raise GridError(f"--grid {flag}: not an axis; {_FORM}")
        if key.split(".")[0] == "cluster":
            raise GridError(f"--grid {key}: all jobs are submitted alike; write --set {key}=VALUE")
        for other in (*(a.key for a in axes), *fixed):
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                how = "is given twice" if key == other else f"and {other} set the same thing"
                raise GridError(f"--grid {key} {how}: leave one out")
        axes.append(Axis(key, _values(key, text)))
    return tuple(axes)


def _values(key: str, text: str) -> tuple[str, ...]:
    try:
        values = split_values(text)
    except ValueError as error:
        raise GridError(f"--grid {key}={text}: {error}") from None
    seen: dict[str, str] = {}
    for value in values:
        try:
            meant = json.dumps(parse_value(value), sort_keys=True)
        except YamlSyntaxError as error:
            raise GridError(f"--grid {key}: the value {value[:60]!r} is {error}") from None
        if meant in seen:
            raise GridError(f"--grid {key}: {seen[meant]} is given twice")
        seen[meant] = value
    return values


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of every key, or as many parts as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        others = [other.split(".") for other in keys if other != key]
        fit = (n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        found[key] = ".".join(parts[-next(fit, len(parts)) :])
    return found


def short_value(value: str) -> str:
    """Of a path its end."""
    plain = value.strip("'\"").rstrip("/")
    return plain.rsplit("/", 1)[-1] if not plain.startswith(tuple(_OPEN)) else plain


def file_name(text: str) -> str:
    """The text as a part of a file's name: without brackets and quotes; other characters of shells are dashes."""
    text = re.sub(r"[\[\](){}'\"\s]", "", text)
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9.,=+_-]", "-", text))[:_NAME].strip("-_.,= ")
