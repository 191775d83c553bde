"""Prompt templates: text with ``{column}`` fields, filled from one row of data.

The grammar is a small part of :meth:`str.format`: a plain ``{name}`` field, and ``{{`` / ``}}`` for literal braces.
Attribute and index access (``{a.b}``, ``{a[0]}``), conversions (``{a!r}``) and format specs (``{a:>10}``) are refused:
a recipe is data that people pass around, so a template must not be able to reach into Python objects.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|(?P<brace>[{}])")
_FORMAT_MARKS = {".": "attribute access", "[": "index access", "!": "a conversion", ":": "a format spec"}


def template_fields(template: str) -> tuple[str, ...]:
    """Return the column names that ``template`` uses, each once, in order of first use.

    Raises:
        ValueError: the braces do not balance, or a field is more than a plain name.
    """
    return tuple(dict.fromkeys(text for is_field, text in _parts(template) if is_field))


def render(template: str, row: Mapping[str, object]) -> str:
    """Fill every ``{column}`` of ``template`` with ``str(row[column])``.

    Raises:
        ValueError: the template is malformed, or it names a column that ``row`` lacks or that is empty (``None``).
    """
    return "".join(_value(text, row) if is_field else text for is_field, text in _parts(template))


def stops(template: str) -> list[str]:
    """Where an answer may end, besides the end of text: at a line break, and where the next prompt would begin.

    That is the last line of what the template has before its first field; an answer that holds one of these itself
    goes on to the next.
    """
    head = "".join(text for _, text in itertools.takewhile(lambda part: not part[0], _parts(template)))
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    return ["\n", *(f"\n{line}" for line in lines[-1:])]


def _value(name: str, row: Mapping[str, object]) -> str:
    if name not in row:
        columns = ", ".join(str(column) for column in row) or "none"
        raise ValueError(f"the prompt uses {{{name}}}, but there is no column '{name}' (columns: {columns})")
    value = row[name]
    if value is None:
        raise ValueError(f"the prompt uses {{{name}}}, but the column '{name}' is empty in this row")
    return str(value)


def _parts(template: str) -> Iterator[tuple[bool, str]]:
    """Yield (is a field, its name or the literal text) from left to right."""
    end = 0
    for match in _TOKEN.finditer(template):
        if match.start() > end:
            yield False, template[end : match.start()]
        end = match.end()
        token = match.group()
        if token in ("{{", "}}"):
            yield False, token[0]
        elif match.group("brace"):
            raise ValueError(
                f"there is a single '{token}' without its partner; write '{token}{token}' for a literal one"
            )
        else:
            name = match.group("field")
            _check_name(name)
            yield True, name
    if end < len(template):
        yield False, template[end:]


def _check_name(name: str) -> None:
    if not name.strip():
        raise ValueError("there is an empty field '{}'; name a column, as in {question}")
    if name != name.strip():
        raise ValueError(f"the field '{{{name}}}' has spaces around the name; write {{{name.strip()}}}")
    for mark, what in _FORMAT_MARKS.items():
        if mark in name:
            raise ValueError(f"the field '{{{name}}}' uses {what} ('{mark}'); only plain {{column}} fields are allowed")
