"""A recipe from a stranger: YAML that builds objects or blows up, and names that lead elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from unlearn.errors import RecipeError
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.load import load_recipe
from unlearn.recipe.yaml import YamlSyntaxError

BASE = "name: x\nmodel: {path: pico:phi}\nforget: {kind: qa, path: data.jsonl}\n"


def refused(folder: Path, text: str | bytes) -> str:
    """The message about a recipe, which must be refused."""
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        *("!!python/object/apply:pathlib.Path.touch [{place}]", "!!python/object/new:pathlib.PosixPath [{place}]"),
        *("!!python/name:os.system ''", "!!python/module:os ''", "!!python/object/apply:os.system ['touch {place}']"),
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {place}']",
        *("!function os.system", "!!binary aGVsbG8=", "!!set {{a}}", "!!timestamp 2001-01-01"),
    ],
)
@pytest.mark.parametrize("where", ["description: {}", "forget: {}", "model: {{path: {}}}", "? {}\n: 1"])
def test_no_tag_builds_anything(tmp_path: Path, tag: str, where: str) -> None:
    canary = tmp_path / "canary"
    said = refused(tmp_path, BASE + "extra: 1\n" + where.format(tag.format(place=canary)) + "\n")
    assert not canary.exists()
    assert "recipe.yaml" in said


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs(12), "aliases"),
        ("a: &a {<<: *a}\n", ""),
        ("a: &a [*a]\n", "never ends"),
        ("base: &b {name: y}\n<<: *b\n" + BASE, "merge keys"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("- " * 5000 + "a", "nested too deeply"),
        ("? " * 3000 + "a", "nested too deeply"),
        (BASE + f"seed: {'9' * 100_000}\n", "digits"),
        (BASE + f"seed: 0x{'f' * 100_000}\n", "digits"),
        (BASE + "seed: 1e999999999\n", ""),
        (BASE + "name: twice\n", "given twice"),
        ("\x00" + BASE, "not allowed"),
        (BASE + "description: a\x00b\n", "not allowed"),
        (BASE + 'description: "\\ud800"\n', "half a character"),
        (BASE + 'description: "\\UFFFFFFFF"\n', "not valid YAML"),
        (BASE + "---\n" + BASE, "document"),
        ("%YAML 9.9\n---\n" + BASE, ""),
        ("x\n" * 20_000, ""),
        (BASE + "# " + "x" * 1_100_000, "too large"),
        (b"\xff\xfe" + BASE.encode("utf-16-le"), "UTF-8"),
        (b"name: \xff\xfe\xfa\n", "UTF-8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_would_blow_up_is_refused_soon(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in refused(tmp_path, text)  # one that is not would take hours here, or all the memory


def test_a_very_long_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + f"description: {'word ' * 150_000}\n")
    assert len(load_recipe(str(path)).recipe.description) > 700_000
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())  # one byte-order mark is what editors write
    assert load_recipe(str(path)).recipe.name == "x"


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "..", ".hidden", "a\nb", "a\x1b[2J", "-rf", "", "a\\b", "a\n"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    plain, forget = {"name": "x", "model": {"path": "pico:phi"}}, {"kind": "qa", "path": "d.jsonl"}
    assert "name" in refused(tmp_path, yaml_core.dump(plain | {"name": name, "forget": forget}))
    assert "forget.name" in refused(tmp_path, yaml_core.dump(plain | {"forget": forget | {"name": name}}))


@pytest.mark.parametrize("path", ["..", "../..", ".jsonl", "/", "hub:..", "a/../../b.jsonl", "x\n/../y.csv", "~"])
def test_labels_made_from_paths_stay_names(tmp_path: Path, path: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml_core.dump({"name": "x", "model": {"path": "pico:phi"}, "forget": {"kind": "qa", "path": path}}), "utf-8"
    )
    label = load_recipe(str(file)).recipe.sets()[0][1].label()
    assert Path(label).name == label
    assert label.strip(".")
    assert label.isprintable()


@pytest.mark.parametrize(
    "given",
    [f"retain.{'9' * 5000}.path=x", "retain.²=1", "a=[1", "a=!!python/name:os.system ''", "=1", "a..b=1", "a=&a [*a]"],
)
def test_overrides_that_make_no_sense(tmp_path: Path, given: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + "retain: [{kind: qa, path: r.jsonl}]\n")
    with pytest.raises(RecipeError):
        load_recipe(str(path), [given])


def test_an_override_cannot_grow_the_recipe_for_ever() -> None:
    with pytest.raises(YamlSyntaxError, match="aliases"):
        yaml_core.parse_value("{" + ", ".join(laughs(12).splitlines()) + "}")


def test_a_tag_directive_is_no_way_around(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"%TAG !! tag:yaml.org,2002:python/object/apply:\n---\n{BASE}description: !!os.system ['touch {canary}']\n"
    refused(tmp_path, text)
    assert not canary.exists()
