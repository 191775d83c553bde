"""Writes docs/recipe.md, the reference of every key, from the recipe's schema: python .ci/recipe_reference.py"""

import json
from pathlib import Path
from typing import Any

from unlearn.recipe.load import json_schema

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
INTRODUCTION = """\
# Recipe reference

Every key of a recipe, written by `.ci/recipe_reference.py` from the schema that checks it (`unlearn schema`). A
recipe is YAML 1.2; `--set a.b.0.c=value` changes one key from the command line. A key without a default is required.
After a key's name stand those that other libraries have for it, which are taken as well.
"""


def kind(node: dict[str, Any]) -> str:
    """What a value may be, with links to the sections that it may be."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(kind(n) for n in node["anyOf"]))
    if "enum" in node:
        return ", ".join(f"`{v}`" for v in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "array":
        inner = node["items"] if "items" in node else node["prefixItems"][0]
        return f"list of {kind(inner)}"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    bounds = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
    limits = [text.format(node[key]) for key, text in bounds.items() if key in node]
    return " ".join([names.get(node.get("type", ""), str(node.get("type", "any"))), *limits])


def row(key: str, node: dict[str, Any], required: bool) -> str:
    default = node.get("default")
    shown = "" if required or "default" not in node else f"`{json.dumps(default, ensure_ascii=False)}`"
    what = kind(node).replace("|", "\\|")
    names = ", ".join(f"`{name}`" for name in (key, *node.get("also", ())))
    return f"| {names} | {what} | {shown} | {node.get('description', '').replace('|', chr(92) + '|')} |"


def section(title: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    about = schema.get("description", "").replace("``", "`")
    lines = [f"## {title}", "", about, "", "| key | value | default | what it is |", "|---|---|---|---|"]
    return "\n".join([*lines, *(row(k, v, k in required) for k, v in schema["properties"].items())]) + "\n"


def reference() -> str:
    """The whole page: the recipe first, then its sections in alphabetical order."""
    schema = json_schema()
    parts = [section("Recipe", schema), *(section(name, one) for name, one in sorted(schema["$defs"].items()))]
    return "\n".join([INTRODUCTION, *parts])


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
