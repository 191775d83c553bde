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
from yaml.composer import ComposerError
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

KeyPath = tuple[str | int, ...]
MAX_DEPTH = 40
MAX_NODES = 100_000
_MAX_DIGITS = 40
_TOO_MANY = f"more than {MAX_NODES} values; is it a data file?"
_TAG = "tag:yaml.org,2002:"
_KINDS = frozenset({"null", "bool", "int", "float", "str", "seq", "map"})
_HINTS = (
    (r"'\\t'", "indent with spaces, not tabs"),
    (r"mapping values are not allowed", "a value that contains ': ' needs quotes around it, or the indentation is off"),
    (r"found another document", "keep one recipe per file: remove the '---' between them"),
    (r"expected <block end>", "the indentation does not match the lines above, or a quote is not closed"),
    (r"cannot start any token", "put a value that begins with this character in quotes"),
    (r"found unexpected end of stream", "a quote is not closed"),
    (r"could not find expected ':'", "write 'key: value', with a space after the colon"),
)


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


class CoreLoader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed by PyYAML."""

    yaml_implicit_resolvers = _RESOLVERS
    _depth = _count = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node, refusing nesting that would exhaust Python's stack."""
        self._depth += 1
        self._count += 1
        try:
            if self._depth > MAX_DEPTH or self._count > MAX_NODES:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                much = f"nested deeper than {MAX_DEPTH} levels" if self._depth > MAX_DEPTH else _TOO_MANY
                raise ComposerError(None, None, much, mark)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def scan_flow_scalar_non_spaces(self, double: bool, start_mark: Any) -> Any:
        """Turn PyYAML's bare ``chr()`` failure on escapes such as ``\\UFFFFFFFF`` into a syntax error."""
        try:
            return super().scan_flow_scalar_non_spaces(double, start_mark)
        except (ValueError, OverflowError):
            raise ScannerError(None, None, "an escape in a quoted text is no character", self.get_mark()) from None


class CoreDumper(yaml.SafeDumper):
    """Writes text so that :class:`CoreLoader` reads the same value back (``'1e-4'`` keeps its quotes)."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat equal values instead of writing anchors."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape what PyYAML would take for a line end and fold away."""
        unusual = any(char in text for char in "\r\x85\u2028\u2029")
        return self.represent_scalar(_TAG + "str", text, style='"' if unusual else None)


CoreDumper.add_representer(str, CoreDumper.represent_text)


def dump(data: Any) -> str:
    """Block-style YAML in the given key order, readable by :func:`parse`."""
    return str(yaml.dump(data, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=110))


def parse(text: str) -> Document:
    """Read one YAML document, or raise a YamlSyntaxError, whose message names no file."""
    try:
        root = CoreLoader(text).get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlSyntaxError(line, f"not valid YAML: the character U+{error.character:04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        raise _plain(error) from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise YamlSyntaxError(1, f"not valid YAML: {error}") from None
    if root is None:
        return Document(None, {(): 1})
    builder = _Builder()
    return Document(builder.build(root, ()), {**builder.lines, (): 1})


def parse_value(text: str) -> Any:
    """Read the value of an override, under the same rules."""
    return parse(text).data


def scalar_of(text: str) -> Any:
    """What ``text`` means when it is written without quotes."""
    tags = (tag for tag, pattern in _RESOLVERS.get(text[:1], ()) if pattern.match(text))
    return _scalar(next(tags, _TAG + "str"), text)


def _plain(error: yaml.MarkedYAMLError) -> YamlSyntaxError:
    mark, start = error.problem_mark or error.context_mark, error.context_mark
    problem = error.problem or str(error)
    began = error.context and start and error.context.startswith("while")
    since = f" {error.context} that began on line {start.line + 1}," if began and start else ""
    hint = next((f"; {hint}" for pattern, hint in _HINTS if re.search(pattern, problem)), "")
    return YamlSyntaxError(mark.line + 1 if mark else 1, f"not valid YAML:{since} {problem}{hint}")


def _scalar(tag: str, text: str) -> Any:
    """The value of a scalar; a ValueError if its text does not have the form that its tag asks for."""
    kind = tag.removeprefix(_TAG)
    if kind == "str":
        # JSON writes a character beyond 16 bits as two escapes; half of one alone is a UnicodeDecodeError
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
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
        self._open: set[int] = set()
        self._count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        kind = node.tag.removeprefix(_TAG)
        wanted = {"map": yaml.MappingNode, "seq": yaml.SequenceNode}.get(kind, yaml.ScalarNode)
        if self._count > MAX_NODES:
            raise _refused(node, (), f"aliases (*name) make this file larger than {MAX_NODES} values; write it out")
        if id(node) in self._open:
            raise _refused(node, path, "an alias (*name) stands inside the value it names, which never ends")
        if len(path) > MAX_DEPTH:
            raise _refused(node, path, f"nested deeper than {MAX_DEPTH} levels")
        if kind not in _KINDS:
            tag = f"!!{kind}" if node.tag.startswith(_TAG) else kind
            raise _refused(node, path, f"the tag {tag} is refused: a recipe holds plain values only; remove it")
        if not isinstance(node, wanted):
            raise _refused(node, path, f"the tag !!{kind} does not fit this value; remove it")
        if isinstance(node, yaml.ScalarNode):
            return _value(node, node.tag, path, "text")
        self._open.add(id(node))
        data: Any = self._mapping(node, path) if kind == "map" else self._sequence(node, path)
        self._open.discard(id(node))
        return data

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        self.lines |= {(*path, i): item.start_mark.line + 1 for i, item in enumerate(node.value)}
        return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.removeprefix(_TAG) not in _KINDS:
                raise _refused(key_node, (*path, "?"), "a key must be plain text")
            key = _value(key_node, _TAG + "str", (*path, "?"), "key")  # as written: the column 1 is the column '1'
            here = (*path, key)
            if key in data:
                raise _refused(key_node, here, f"given twice: on line {self.lines[here]} and again here; keep one")
            if key == "<<":
                raise _refused(key_node, here, "merge keys (<<) are not part of YAML 1.2; write the keys out")
            self.lines[here] = key_node.start_mark.line + 1
            data[key] = self.build(value_node, here)
        return data


def _value(node: yaml.ScalarNode, tag: str, path: KeyPath, what: str) -> Any:
    try:
        return _scalar(tag, node.value)
    except UnicodeDecodeError:
        raise _refused(node, path, f"an escape in this {what} is half a character (a lone surrogate)") from None
    except ValueError as error:
        raise _refused(node, path, str(error)) from None


def _refused(node: yaml.Node, path: KeyPath, text: str) -> YamlSyntaxError:
    """A mistake that is none of YAML's grammar, at the place of a node."""
    place = ".".join(str(key) for key in path)
    return YamlSyntaxError(node.start_mark.line + 1, f"{place}: {text}" if place else text)
