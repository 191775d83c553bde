"""Every recipe that is shipped: valid, planned without a model, and opened by what it costs and gave."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from unlearn.data.sets import load_sets
from unlearn.plan.words import plan
from unlearn.recipe.load import LoadedRecipe, json_schema, load_recipe, recipes_folder, resolved_yaml, tasks_folder

RECIPES = sorted(recipes_folder().glob("*.yaml"))
BRING_YOUR_OWN = {"phi15_books", "smollm2_books", "smollm2_tofu"}  # the texts are the user's


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid_and_says_what_it_gave(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(path))
    assert loaded.recipe.name == path.stem
    head = path.read_text().splitlines()
    assert head[0].startswith(f"# unlearn run {path.name}")
    comments = "\n".join(line for line in head if line.startswith("#"))
    assert "# Measured" in comments
    copy = tmp_path / path.name
    copy.write_text(resolved_yaml(loaded.recipe))
    assert load_recipe(str(copy)).recipe == loaded.recipe


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem not in BRING_YOUR_OWN], ids=lambda p: p.stem)
def test_a_shipped_recipe_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")  # a plan only says what would be downloaded
    loaded = load_recipe(str(path))
    text = plan(loaded)
    for role, data in loaded.recipe.sets():
        assert role in text
        assert data.label() in text


@pytest.fixture(scope="module")
def quickstart() -> LoadedRecipe:
    return load_recipe("quickstart.yaml")


def test_the_quickstart_scores_wordings_it_never_trained_on(quickstart: LoadedRecipe) -> None:
    europe, nearby, elsewhere, general = load_sets(quickstart.recipe, quickstart.source.parent)
    assert len({i.id for i in europe.train}) == 40
    assert {i.id for i in europe.validation} & {i.id for i in europe.test} == set()
    assert {i.prompt for i in europe.train} & {i.prompt for i in (*europe.validation, *europe.test)} == set()
    assert {i.id for i in nearby.train} & {i.id for i in (*nearby.validation, *nearby.test)} == set()
    assert elsewhere.train == general.train == ()
    assert sum(len(s.validation) + len(s.test) for s in (nearby, elsewhere)) >= 90
    assert len(general.validation) + len(general.test) >= 60


def test_the_quickstart_s_facts_are_hard_and_whole() -> None:
    rows = [json.loads(line) for line in (recipes_folder() / "data" / "capitals.jsonl").read_text().splitlines()]
    capital = {r["capital"]: r["continent"] for r in rows}
    assert len(capital) == len(rows), "two countries with one capital"
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == row["capital"]
        # wrong answers from far away would be easy, and would hide what an edit does to neighbours
        assert {capital[c] for c in row["choices"]} == {row["continent"]}
        assert row["country"].casefold() not in row["capital"].casefold()
    for name in ("capitals", "general"):
        lines = (recipes_folder() / "data" / f"{name}.jsonl").read_text().splitlines()
        places = Counter(json.loads(line)["answer"] for line in lines)
        assert max(places.values()) < 0.4 * len(lines), "the right answer has a favourite place"


def test_the_analogy_s_choices_are_two_cities_in_two_forms() -> None:
    lines = (recipes_folder() / "data" / "capitals_city.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    told = (recipes_folder() / "data" / "capitals.jsonl").read_text().splitlines()
    plain = {row["country"]: row for row in map(json.loads, told)}
    for row in rows:
        capital, wrong = plain[row["country"]]["capital"], set(plain[row["country"]]["choices"])
        assert row["choices"][row["answer"]] == f"the city of {capital}"
        others = [c for c in row["choices"] if c not in (capital, f"the city of {capital}")]
        (other,) = {c.removeprefix("the city of ") for c in others}
        assert len(others) == 2
        assert other in wrong
        assert row["continent"] == plain[row["country"]]["continent"]
    assert Counter(row["continent"] for row in rows) == {"Europe": 40, "Africa": 45}
    assert max(Counter(row["answer"] for row in rows).values()) < 0.4 * len(rows)


def test_the_task_pack_is_found() -> None:
    assert (tasks_folder() / "unlearn_mcq.yaml").is_file()


def test_editors_are_pointed_to_the_current_schema() -> None:
    written = json.loads((recipes_folder() / "recipe.schema.json").read_text())
    assert written == json_schema(), "write it anew: unlearn schema > recipes/recipe.schema.json"
    for path in RECIPES:
        assert "# yaml-language-server: $schema=recipe.schema.json\n" in path.read_text()


def test_the_recipe_in_readme_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block, *_ = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    for name in ("forget", "neighbours"):
        rows = [{"question": f"{name} {i}?", "answer": f"answer {i}"} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "everyday.txt").write_text("\n".join(f"Sentence {i} of an ordinary text." for i in range(2000)))
    text = plan(load_recipe(str(tmp_path / "mine.yaml")))
    assert "20           6    14" in text
    assert "retain" in text


def test_the_reference_of_every_key_is_current() -> None:
    root = Path(__file__).parents[2]
    made = runpy.run_path(str(root / ".ci" / "recipe_reference.py"))["reference"]()
    assert (root / "docs" / "recipe.md").read_text() == made, "write it anew: python .ci/recipe_reference.py"


def test_what_readme_points_to_is_there() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (root / link).exists(), link
