"""Pydantic's errors about a recipe, in plain words: what was expected, what was found, the nearest right key.

A union makes pydantic report one error per alternative and put the alternative's name into the error's place; here
each key gets one message, about the alternative that the given value resembles.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import ValidationError

from unlearn.recipe import Recipe
from unlearn.recipe_schema import Alternative, alternatives_at, below, fields, homes, is_model, words
from unlearn.redact import is_secret
from unlearn.template import template_fields
from unlearn.yaml_core import KeyPath, scalar_of

_SECRET = (
    "this is, or holds, a secret (a token, or an address with a password); a recipe is written into the run's folder "
    "and its report, so take it out: tokens belong in the environment"
)
_TRUE, _FALSE = ("on", "yes", "y"), ("off", "no", "n")
_PLACES: tuple[KeyPath, ...] = (
    *(("forget",), ("also_forget",), ("learn",)),
    *(("analogy", "a"), ("analogy", "b"), ("analogy", "c")),
    *(("retain",), ("utility",)),
)


class Mistake(NamedTuple):
    """What is wrong at one key, as a sentence without place. ``whole``: several keys below it disagree."""

    path: KeyPath
    text: str
    whole: bool = False


class _Found(NamedTuple):
    """A pydantic error at a place freed of the names of union alternatives."""

    path: KeyPath
    kinds: tuple[Alternative, ...]
    error: Mapping[str, Any]
    unfit: bool  # it speaks of an alternative that the given value does not resemble


def mistakes(error: ValidationError, data: Any) -> list[Mistake]:
    """Every mistake that ``error`` reports about ``data``, one message per key."""
    found = [_place(e, data) for e in error.errors()]
    groups: dict[KeyPath, list[_Found]] = {}
    for item in found:
        groups.setdefault(item.path, []).append(item)
    result = []
    for path, group in groups.items():
        fit = [item for item in group if not item.unfit]
        deeper = any(p[: len(path)] == path for p in groups if len(p) > len(path))
        if deeper and (not fit or fit[0].error["type"] == "too_short"):
            continue
        item = fit[0] if fit else group[0]
        result.append(Mistake(path, _sentence(item, data), whole=item.error["type"] == "value_error"))
    return _without_echoes(result, found)


def semantic_mistakes(data: Any) -> list[Mistake]:
    """Mistakes that no type shows: malformed prompt templates, empty lists where one item is needed, secrets."""
    result: list[Mistake] = []
    for path, entry in data_sets(data):
        for place, template in _leaves(entry.get("prompt"), (*path, "prompt")):
            if template == []:
                result.append(Mistake(place, "the list is empty; give at least one template"))
            elif isinstance(template, str):
                try:
                    template_fields(template)
                except ValueError as problem:
                    result.append(Mistake(place, str(problem)))
    texts = [(place, value) for place, value in _leaves(data, ()) if isinstance(value, str)]
    result += [Mistake(place, _SECRET) for place, value in texts if is_secret(value)]
    targets: tuple[KeyPath, ...] = (("vector", "lora", "targets"), ("teach", "lora", "targets"))
    empty = "the list is empty; name at least one module, or write all-linear"
    return [*result, *(Mistake(path, empty) for path in targets if value_at(data, path) == [])]


def data_sets(data: Any) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Place and entry of every data set in unchecked recipe data that has the form of a mapping."""
    for place in _PLACES:
        entry = value_at(data, place)
        many = isinstance(entry, list) and len(place) == 1
        for path, one in [((*place, i), e) for i, e in enumerate(entry)] if many else [(place, entry)]:
            if isinstance(one, dict):
                yield path, one


def value_at(data: Any, path: Sequence[str | int]) -> Any:
    """The value at ``path`` in plain data, None where there is none."""
    for key in path:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        if not inside:
            return None
        data = data[key]
    return data


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    if word in known:
        return word
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    pairs: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and value:
        pairs = list(enumerate(value))
    else:
        yield path, value
    for key, item in pairs:
        yield from _leaves(item, (*path, key))


def _place(error: Mapping[str, Any], data: Any) -> _Found:
    kinds: tuple[Alternative, ...] = (Alternative(Recipe),)
    path: KeyPath = ()
    loc = error["loc"]
    for i, key in enumerate(loc):
        if i == len(loc) - 1 and error["type"] == "extra_forbidden":
            return _Found((*path, key), kinds, error, False)
        inner = below(kinds, key)
        if inner is not None:
            path, kinds, data = (*path, key), inner, value_at(data, (key,))
        elif not _resembles(str(key), data, kinds):
            return _Found(path, kinds, error, True)
    return _Found(path, kinds, error, False)


def _resembles(alternative: str, value: Any, kinds: Sequence[Alternative]) -> bool:
    """Whether the union alternative that pydantic names is of the shape (mapping, list, scalar) of the value."""
    if any(is_model(kind.type) and kind.type.__name__ == alternative for kind in kinds):
        return isinstance(value, dict)
    return not isinstance(value, dict) and isinstance(value, list) == alternative.startswith("tuple[")


def _without_echoes(result: list[Mistake], found: Sequence[_Found]) -> list[Mistake]:
    """Drop "required key" where an unknown key beside it is that key misspelt."""
    meant = set()
    for item in found:
        if item.error["type"] == "extra_forbidden":
            guess = nearest(str(item.path[-1]), tuple(fields(item.kinds)))
            meant.add((*item.path[:-1], guess))
    missing = {item.path for item in found if item.error["type"] == "missing"}
    return [mistake for mistake in result if not (mistake.path in missing and mistake.path in meant)]


def _sentence(item: _Found, data: Any) -> str:
    kind = item.error["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(item.path[-1]), item.kinds)
    if kind == "value_error":
        return str(item.error["ctx"]["error"])
    if kind == "missing":
        info = fields(alternatives_at(item.path[:-1])).get(str(item.path[-1]))
        return "this key is required: " + (info.description if info and info.description else words(item.kinds))
    value = value_at(data, item.path)
    return f"expected {words(item.kinds)}, got {show(value)}{_hint(value, item.kinds)}"


def _unknown_key(key: str, kinds: Sequence[Alternative]) -> str:
    known = tuple(fields(kinds))
    guess = nearest(key, known)
    allowed = f"allowed here: {', '.join(known)}"
    if guess:
        return f"unknown key; did you mean '{guess}'? ({allowed})"
    places = [".".join(path) for path in homes(key, Recipe)]
    if places:
        return f"unknown key here; it belongs at {' or '.join(places[:3])} ({allowed})"
    return f"unknown key; {allowed}"


def show(value: Any) -> str:
    """A value as it is quoted in a message."""
    if value is None:
        return "nothing (the key has no value)"
    if isinstance(value, dict | list):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "an infinite number"
    return json.dumps(value)


def _hint(value: Any, kinds: Sequence[Alternative]) -> str:
    types = {kind.type for kind in kinds}
    lists = any(get_origin(t) is tuple for t in types)
    if isinstance(value, str):
        return _hint_for_text(value, kinds, types) or (f"; write it as a list: [{value}]" if lists else "")
    free_text = any(kind.type is str and not any(getattr(m, "pattern", None) for m in kind.limits) for kind in kinds)
    if isinstance(value, bool | int | float) and free_text and not types & {bool, int, float}:
        return f"; put it in quotes: '{json.dumps(value)}'"
    if isinstance(value, float) and value.is_integer() and int in types:
        return f"; write {int(value)}"
    if isinstance(value, dict) and any(is_model(get_args(t)[0]) for t in types if get_origin(t) is tuple):
        return "; put '- ' before its first key, so that it is an item of a list"
    return f"; write it as a list: [{json.dumps(value)}]" if lists and isinstance(value, bool | int | float) else ""


def _hint_for_text(value: str, kinds: Sequence[Alternative], types: set[Any]) -> str:
    if types & {int, float}:
        if _is_number(value.strip()):
            return "; this is text: remove the quotes to make it a number"
        bare = value.replace("_", "").replace(",", "")
        return f"; write {bare}" if _is_number(bare) else ""
    if bool in types:
        if isinstance(scalar_of(value), bool):
            return "; this is text: remove the quotes"
        return "; write true" if value.lower() in _TRUE else "; write false" if value.lower() in _FALSE else ""
    options = [str(option) for kind in kinds if get_origin(kind.type) is Literal for option in get_args(kind.type)]
    guess = nearest(value, options)
    return f"; did you mean '{guess}'?" if guess else ""


def _is_number(text: str) -> bool:
    try:
        return isinstance(scalar_of(text), int | float) and not isinstance(scalar_of(text), bool)
    except ValueError:
        return False
