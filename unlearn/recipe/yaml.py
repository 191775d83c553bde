"""YAML with no surprises: the 1.2 core schema, plain data only, and the line of everything that was read.

PyYAML's own rules are those of YAML 1.1, where ``on`` is a boolean, ``1e-4`` is text, ``010`` is eight and a doubled
key silently wins. Here scalars follow the core schema (YAML 1.2.2, section 10.3.2); doubled keys, foreign tags and
aliases that blow up are mistakes with a line number; and no tag ever builds an object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

KeyPath = tuple[str | int, ...]
MAX_NODES = 100_000
_MAX_DIGITS = 40
_TAG = "tag:yaml.org,2002:"
_HINTS = {
    "mapping values are not allowed": "a value that contains ': ' needs quotes around it, or the indentation is off",
    "expected <block end>": "the indentation does not match the lines above, or a quote is not closed",
    "'\\t'": "indent with spaces, not tabs",
}


class YamlSyntaxError(ValueError):
    """Text that is not YAML. ``line`` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Document(NamedTuple):
    """Plain data (dict, list, str, int, float, bool, None), and the line of every key and list item in it."""

    data: Any
    lines: Mapping[KeyPath, int]


_FORMS: dict[str, re.Pattern[str]] = {
    "null": re.compile(r"(?:~|null|Null|NULL)?\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
_FIRST = {"null": ("", *"~nN"), "bool": tuple("tTfF"), "int": tuple("-+0123456789"), "float": tuple("-+0123456789.")}
# PyYAML's form of the same table: the first character -> (tag, pattern), in order of precedence
_RESOLVERS = {
    char: [(_TAG + name, form) for name, form in _FORMS.items() if char in _FIRST[name]]
    for char in {char for chars in _FIRST.values() for char in chars}
}
_KINDS = {yaml.MappingNode: ("map",), yaml.SequenceNode: ("seq",), yaml.ScalarNode: ("str", *_FORMS)}


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed by PyYAML."""

    yaml_implicit_resolvers = _RESOLVERS


class _Dumper(yaml.SafeDumper):
    """Writes text so that :func:`parse` reads the same value back (``'1e-4'`` keeps its quotes)."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat equal values instead of writing anchors."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape what PyYAML would take for a line end and fold away; quote what would be a merge key."""
        unusual = any(char in text for char in "\r\x85\u2028\u2029")
        return self.represent_scalar(_TAG + "str", text, style='"' if unusual or text == "<<" else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def dump(data: Any) -> str:
    """Block-style YAML in the given key order, readable by :func:`parse`."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def parse(text: str) -> Document:
    """Read one YAML document, or raise a YamlSyntaxError, whose message names no file."""
    line = 1
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            line = loader.line + 1
        builder = _Builder()
        return Document(None if root is None else builder.build(root, ()), {**builder.lines, (): 1})
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or str(error)
        hint = next((f"; {hint}" for part, hint in _HINTS.items() if part in problem), "")
        raise YamlSyntaxError(mark.line + 1 if mark else 1, f"not valid YAML: {problem}{hint}") from None
    except RecursionError:
        raise YamlSyntaxError(
            line, "nested too deeply, or an alias (*name) stands inside the value it names, which never ends"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlSyntaxError(line, f"not valid YAML: the character U+{error.character:04X} is not allowed") from None
    except YamlSyntaxError:
        raise
    except (ValueError, OverflowError, yaml.YAMLError) as error:  # such as an escape that is no character
        raise YamlSyntaxError(line, f"not valid YAML: {error}") from None


def parse_value(text: str) -> Any:
    """Read the value of an override, under the same rules."""
    return parse(text).data


def _scalar(kind: str, text: str) -> Any:
    """The value of a scalar; a ValueError if its text does not have the form that its tag asks for."""
    if kind == "str":
        try:  # JSON writes a character beyond 16 bits as two escapes
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise ValueError("an escape in this text is half a character (a lone surrogate)") from None
    if not (_FORMS[kind].match(text) or (kind == "float" and _FORMS["int"].match(text))):
        raise ValueError(f"{text[:40]!r} is no {kind}")
    if kind in ("null", "bool"):
        return text.lower() == "true" if kind == "bool" else None
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:12]}... has more than {_MAX_DIGITS} digits")
    if kind == "int":
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


class _Builder:
    """Nodes to plain data, with the line of everything gathered on the way."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._count = 0

    def build(self, node: yaml.Node, path: KeyPath, is_key: bool = False) -> Any:
        self._count += 1
        if self._count > MAX_NODES:
            raise _refused(node, (), f"more than {MAX_NODES} values: is it a data file, or do aliases repeat others?")
        kind = node.tag.removeprefix(_TAG)
        if kind not in _KINDS[type(node)]:
            tag = f"!!{kind}" if node.tag.startswith(_TAG) else kind
            raise _refused(node, path, f"the tag {tag} is refused: a recipe holds plain values only; remove it")
        if isinstance(node, yaml.ScalarNode):
            try:  # a key is text as it is written: the column 1 is the column '1'
                return _scalar("str" if is_key else kind, node.value)
            except ValueError as error:
                raise _refused(node, path, str(error)) from None
        if is_key:
            raise _refused(node, path, "a key must be plain text")
        if isinstance(node, yaml.SequenceNode):
            self.lines |= {(*path, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.build(key_node, (*path, "?"), is_key=True)
            here = (*path, key)
            if key in data:
                raise _refused(key_node, here, f"given twice: on line {self.lines[here]} and again here; keep one")
            if key == "<<" and not key_node.style:
                raise _refused(key_node, here, "merge keys (<<) are not part of YAML 1.2; write the keys out")
            self.lines[here] = key_node.start_mark.line + 1
            data[key] = self.build(value_node, here)
        return data


def _refused(node: yaml.Node, path: KeyPath, text: str) -> YamlSyntaxError:
    """A mistake that is none of YAML's grammar, at the place of a node."""
    place = ".".join(str(key) for key in path)
    return YamlSyntaxError(node.start_mark.line + 1, f"{place}: {text}" if place else text)
