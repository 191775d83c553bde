"""``--set a.b=value``: changes to a recipe's plain data from the command line, before it is checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unlearn.recipe_check import Mistake, data_sets, value_at
from unlearn.yaml_core import KeyPath, YamlSyntaxError, parse_value

FORM = "write --set key.path=value, for example --set vector.forget.steps=50"
_MAX_DIGITS = 9  # of an index; Python refuses to read numbers of thousands of them
_ELSEWHERE = re.compile(r"(hub|wheel|pico):")


class Overrides:
    """Recipe data with overrides applied to a copy of it, and which override set what.

    Attributes:
        data: plain data, the overrides applied in order.
        origin: place in ``data`` -> the flag that put the value there (``--set a.b``).
        mistakes: overrides that could not be applied, each with its flag.
    """

    def __init__(self, data: Any, overrides: Sequence[str], folder: Path) -> None:
        """Apply ``overrides``. Relative paths in them that exist under ``folder`` become absolute: a person who types
        a path means it as seen from where they stand, while paths in a file are as seen from that file."""
        self.data = _copy(data)
        self.origin: dict[KeyPath, str] = {}
        self.mistakes: list[tuple[str, Mistake]] = []
        for override in overrides:
            name, equals, text = override.partition("=")
            keys = tuple(name.strip().split("."))
            flag = f"--set {name.strip() if equals else override}"
            if not equals or not all(keys):
                self.mistakes.append((flag, Mistake((), f"not an override; {FORM}")))
                continue
            try:
                path = self._set(keys, parse_value(text), flag)
            except YamlSyntaxError as error:
                self.mistakes.append((flag, Mistake(keys, f"the value {text[:60]!r} is {_lowered(str(error))}")))
            except _UnreachableError as error:
                self.mistakes.append((flag, Mistake(keys, str(error))))
            else:
                self._anchor(path, folder)

    def _set(self, keys: Sequence[str], value: Any, flag: str) -> KeyPath:
        """Put ``value`` at ``keys``, making mappings on the way, and return the place."""
        path: KeyPath = ()
        node = self.data
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            step = _step(node, key, path)
            path = (*path, step)
            if last:
                self._forget_origins(path)
                node[step] = value
            elif value_at(node, (step,)) is None:
                if keys[i + 1].isdigit():
                    raise _UnreachableError(
                        f"there is no list at {'.'.join(keys[: i + 1])} to change; set it as a whole"
                    )
                self._forget_origins(path)
                node[step] = {}
                self.origin[path] = flag
            node = node[step]
        self.origin[path] = flag
        return path

    def _forget_origins(self, path: KeyPath) -> None:
        """What lay below a replaced value has no origin any more."""
        self.origin = {place: flag for place, flag in self.origin.items() if place[: len(path)] != path}

    def _anchor(self, changed: KeyPath, folder: Path) -> None:
        for place in _file_places(self.data):
            if place[: len(changed)] != changed:
                continue
            value = value_at(self.data, place)
            file, mark, digest = str(value).partition("#")
            if isinstance(value, str) and file and not _ELSEWHERE.match(value) and _exists(folder / file):
                value_at(self.data, place[:-1])[place[-1]] = f"{folder / file}{mark}{digest}"


class _UnreachableError(Exception):
    """An override that points at a place the recipe cannot have."""


def _step(node: Any, key: str, path: KeyPath) -> str | int:
    """``key`` as it is used on ``node``: an index on a list, the key itself on a mapping."""
    if isinstance(node, dict):
        return key
    at = ".".join(str(k) for k in path)
    if isinstance(node, list):
        if key.isdecimal() and len(key) < _MAX_DIGITS and int(key) < len(node):
            return int(key)
        has = f"items 0 to {len(node) - 1}" if node else "no items"
        raise _UnreachableError(f"{at} is a list with {has}, so it has no '{key}'")
    raise _UnreachableError(
        f"{at or 'the recipe'} is a single value, not a mapping, so it has no '{key}'; set it as a whole"
    )


def _file_places(data: Any) -> Iterator[KeyPath]:
    """Places of everything that may name a local file or folder."""
    yield "model", "path"
    for path, entry in data_sets(data):
        yield (*path, "path")
        for split in ("validation", "test"):
            if isinstance(entry.get(split), dict):
                yield (*path, split, "path")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL: no such file
        return False


def _copy(value: Any) -> Any:
    """Copy mappings and lists all the way down, which also parts values that an alias had made one."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _lowered(text: str) -> str:
    return text if text.startswith("not ") else f"refused: {text}"
