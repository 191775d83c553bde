"""HTML and SVG from nested calls. Text is escaped unless it came from here, so forgetting to escape is not possible."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from unlearn.text import clean

VOID = frozenset({"br", "col", "hr", "link", "meta"})


class Raw(str):
    """Markup that is already safe. Only :func:`el` and :func:`join` make it out of other people's text."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]


def text(value: object) -> Raw:
    """Any value as escaped text."""
    return value if isinstance(value, Raw) else Raw(escape(clean(str(value)), quote=True))


def join(*children: Child) -> Raw:
    """Children side by side: :class:`Raw` as it is, other text escaped, None left out, sequences flattened."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        parts.append(text(child) if isinstance(child, (str, int)) else join(*child))
    return Raw("".join(parts))


def el(name: str, /, *children: Child, **attributes: str | float | None) -> Raw:
    """One element.

    Attribute names: a trailing underscore is dropped (``class_``) and inner ones become hyphens
    (``stroke_width``). Numbers get at most two decimals, which is finer than a pixel; None leaves the attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Raw(f"<{name}{given}>")
    return Raw(f"<{name}{given}>{join(*children)}</{name}>")


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
