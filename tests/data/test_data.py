"""Rows to items to splits: exact passages, splits disjoint by content, and every mistake with its set and row."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import processors

from unlearn.data.items import SHORTEST_TARGET, Item, answer_index, normalise
from unlearn.data.sets import LoadedSet, asked_back, counterparts, load_sets
from unlearn.errors import DataError, EvaluationError
from unlearn.model import pico
from unlearn.recipe.data import SPLITS
from unlearn.recipe.schema import Recipe

STORY = (
    "The keeper lit the lamp at dusk, as every night; nobody had come up the stairs since March. "
    "Café tables stood in the rain — 日本語の本 lay open 🕯️ on one of them.\n\n"
)


def save(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return name


def save_csv(folder: Path, name: str, *rows: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    (folder / name).write_text(out.getvalue())
    return name


def qa_rows(count: int, tag: str = "") -> list[dict[str, Any]]:
    return [{"question": f"What is {tag}{i}?", "answer": f"It is {tag}{i}."} for i in range(count)]


def recipe(forget: Mapping[str, Any] | None = None, seed: int = 0, **more: Any) -> Recipe:
    plain = {"name": "r", "seed": seed, "model": {"path": "pico:phi"}, "forget": forget, **more}
    return Recipe.model_validate_json(json.dumps(plain))


def load(folder: Path, forget: Mapping[str, Any], seed: int = 0, **more: Any) -> LoadedSet:
    return load_sets(recipe(forget, seed, **more), folder)[0]


def fails(folder: Path, forget: Mapping[str, Any] | None = None, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_sets(recipe(forget, **more), folder)
    return str(caught.value)


def qa(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "kind": "qa", **more}


def mcq(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "kind": "mcq", **more}


def text(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "kind": "text", "length": 32, "prefix": 8, **more}


def shares(train: float | str, validation: float, test: float) -> dict[str, Any]:
    return {"train": train, "validation": validation, "test": test}


ALL = shares("all", 0.5, 0.5)


def facts(items: Sequence[Item]) -> set[str]:
    return {item.id for item in items}


def sizes(loaded: LoadedSet) -> list[int]:
    return [len(loaded.items(split)) for split in SPLITS]


# --- items -----------------------------------------------------------------------------------------------------------


def test_qa_with_the_default_prompt(tmp_path: Path) -> None:
    save(tmp_path, "a.jsonl", [{"question": f" Who {i}? ", "answer": f" Ann {i} "} for i in range(4)])
    loaded = load(tmp_path, qa("a.jsonl"))
    items = (*loaded.train, *loaded.validation, *loaded.test)
    assert sorted(i.prompt for i in items) == [f"Question: Who {i}?\nAnswer:" for i in range(4)]
    assert sorted(i.target for i in items) == [f"Ann {i}" for i in range(4)]
    assert all(i.choices == () and i.answer == -1 and len(i.id) == 16 for i in items)
    assert (loaded.role, loaded.name, loaded.counts["rows"], loaded.counts["unused"]) == ("forget", "a", 4, 0)


def test_mcq_with_mapped_columns_and_a_phrasing_per_split(tmp_path: Path) -> None:
    rows = [{"land": f"L{i}", "choices": ["x", f"c{i}", "y"], "answer": 1, "part": "North"} for i in range(10)]
    save(tmp_path, "a.jsonl", rows)
    prompt = {
        "train": ["{land}, in the {part}, is ruled from ", "Q: {question}? A:"],
        "validation": "{land}:",
        "test": "Of {land} with\n{choices}\n",
    }
    loaded = load(tmp_path, mcq("a.jsonl", columns={"question": "land"}, prompt=prompt))
    assert sizes(loaded) == [10, 2, 3]
    first, second = loaded.train[:2]
    land = first.prompt.split(",")[0]
    assert first.prompt == f"{land}, in the North, is ruled from"
    assert second.prompt == f"Q: {land}? A:"
    assert first.id == second.id
    assert (first.target, first.choices, first.answer) == (f"c{land[1:]}", ("x", f"c{land[1:]}", "y"), 1)
    assert loaded.validation[0].prompt.endswith(":")
    assert loaded.test[0].prompt.endswith(f"with\nA. x\nB. {loaded.test[0].target}\nC. y\n")


def test_mcq_from_csv(tmp_path: Path) -> None:
    rows = [[f"q{i}", "no", f"yes, {i}", "never", "B"] for i in range(5)]
    columns = {"question": "q", "choices": ["a", "b", "c"], "answer": "key"}
    loaded = load(tmp_path, mcq(save_csv(tmp_path, "a.csv", ["q", "a", "b", "c", "key"], *rows), columns=columns))
    assert {i.target for split in SPLITS for i in loaded.items(split)} == {f"yes, {n}" for n in range(5)}
    assert all(i.answer == 1 and len(i.choices) == 3 for i in loaded.train)
    in_a_cell = [[f"q{i}", '["a", "b"]', "b"] for i in range(4)]
    loaded = load(tmp_path, mcq(save_csv(tmp_path, "b.csv", ["question", "choices", "answer"], *in_a_cell)))
    assert {i.answer for i in loaded.train} == {1}


@pytest.mark.parametrize(
    ("value", "choices", "index"),
    [
        (0, ["a", "b"], 0),
        (1.0, ["a", "b"], 1),
        ("B", ["x", "y"], 1),
        ("b", ["x", "y"], 1),
        ("1", ["x", "y"], 1),
        (" y ", ["x", "y"], 1),
        ("A", ["A", "B"], 0),
        ("19", ["7", "19"], 1),
        (19, [7, 19], 1),
    ],
)
def test_answers_as_index_letter_or_text(value: object, choices: list[object], index: int) -> None:
    assert answer_index(value, choices) == index


@pytest.mark.parametrize(
    ("value", "choices", "message"),
    [
        (2, ["a", "b"], "the answer 2 is none of the 2 choices a, b: give its text, its index from 0 or its letter"),
        (-1, ["a", "b"], "none of the"),
        ("4", ["a", "b", "c", "d"], "none of the"),
        ("E", ["w", "x", "y", "z"], "none of the"),
        ("paris", ["Paris", "Rome"], "the answer 'paris' is none of the 2 choices Paris, Rome"),
        (True, ["a", "b"], "none of the"),
        (None, ["a", "b"], "none of the"),
        (0.5, ["a", "b"], "none of the"),
        (float("inf"), ["a", "b"], "none of the"),
        ("A", ["B", "A"], "may mean the choice 'B' or 'A'"),
        ("1", ["1", "2"], "may mean the choice '1' or '2'"),
        (1, [1, 2], "may mean the choice '1' or '2'"),
    ],
)
def test_answers_that_are_refused(value: object, choices: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^the answer") as caught:
        answer_index(value, choices)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 5}, "line 2: the answer 5 is none of the 2 choices"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "line 2: 1 choices; at least 2 are needed"),
        ({"question": "q", "choices": ["a", "b", " a"], "answer": 1}, "line 2: a choice is given twice: a, b, a"),
        ({"question": "q", "choices": "a or b", "answer": 1}, "line 2: the choices are 'a or b', not a list"),
        ({"question": "q", "choices": "[a", "answer": 1}, "line 2: the choices are '[a', not a list"),
        ({"question": "q", "choices": ["a", None], "answer": 0}, "line 2: the choice B is empty"),
        ({"question": " ", "choices": ["a", "b"], "answer": 0}, "line 2: the question is empty"),
        ({"question": "q", "choices": ["a", "b"], "answer": ""}, "line 2: the answer '' is none of"),
        ({"question": ["q"], "choices": ["a", "b"], "answer": 0}, "line 2: the question is ['q'], not text"),
        ({"question": "\ud800", "choices": ["a", "b"], "answer": 0}, "line 2: the question holds half a character"),
    ],
)
def test_unusable_mcq_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    save(tmp_path, "a.jsonl", [{"question": "fine", "choices": ["a", "b"], "answer": 0}, row])
    told = fails(tmp_path, mcq("a.jsonl", name="lands"))
    assert message in told
    assert told.startswith(f"forget set 'lands': {tmp_path / 'a.jsonl'}: 1 of 2 rows cannot be used")


def test_all_bad_rows_are_counted_and_five_shown(tmp_path: Path) -> None:
    save(tmp_path, "a.jsonl", [*qa_rows(3), *[{"question": "q", "answer": None}] * 7])
    told = fails(tmp_path, qa("a.jsonl"))
    assert "7 of 10 rows cannot be used" in told
    assert [f"line {n}: the answer is empty" in told for n in range(4, 11)] == [True] * 5 + [False] * 2
    assert told.endswith("and 2 more")


def test_prompts_that_do_not_fit_the_columns(tmp_path: Path) -> None:
    save(tmp_path, "a.jsonl", [{**row, "hint": None} for row in qa_rows(3)])
    assert "no column 'land'" in fails(tmp_path, qa("a.jsonl", prompt="{land}: {question}"))
    with pytest.raises(ValueError, match=r"there is a single '\{'"):
        recipe(qa("a.jsonl", prompt="{question"))
    assert "line 1: the prompt uses {hint}" in fails(tmp_path, qa("a.jsonl", prompt="{hint}: {question}"))
    assert "line 1: the prompt '  ' is empty" in fails(tmp_path, qa("a.jsonl", prompt="  "))


def test_columns_that_the_kind_does_not_have(tmp_path: Path) -> None:
    save(tmp_path, "a.jsonl", qa_rows(3))
    told = fails(tmp_path, qa("a.jsonl", columns={"query": "question"}))
    assert "'query' is no field of kind qa; its fields are question, answer" in told
    assert "only choices may be a list" in fails(tmp_path, qa("a.jsonl", columns={"answer": ["a", "b"]}))
    assert "no column 'reply'; the columns are question, answer" in fails(
        tmp_path, qa("a.jsonl", columns={"answer": "reply"})
    )


def test_exact_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = qa_rows(6)
    save(tmp_path, "a.jsonl", rows)
    save(tmp_path, "b.jsonl", [*rows, *rows[:2], rows[0]])
    once, twice = load(tmp_path, qa("a.jsonl")), load(tmp_path, qa("b.jsonl"))
    assert (once.train, once.validation, once.test) == (twice.train, twice.validation, twice.test)
    assert (once.digest, once.counts["duplicates"]) == (twice.digest, 0)
    assert (twice.counts["rows"], twice.counts["duplicates"]) == (9, 3)
    assert (once.left_out(), twice.left_out()) == ([], ["3 doubled"])


def test_the_same_question_about_another_context_is_no_duplicate(tmp_path: Path) -> None:
    rows = [{**row, "context": c} for row in qa_rows(6) for c in ("x", "y")]
    save(tmp_path, "a.jsonl", rows)
    loaded = load(tmp_path, qa("a.jsonl", prompt="{context}: {question}"))
    assert loaded.counts["duplicates"] == 0
    assert len({i.id for split in SPLITS for i in loaded.items(split)}) == 12
    # the same knowledge: never in two splits
    answers = [{i.target for i in loaded.items(split)} for split in SPLITS]
    assert sum(map(len, answers)) == len(set.union(*answers)) == 6


# --- passages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["whole offsets", "trimmed offsets"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Trained on the spot: several tokens to one character of the Japanese and the emoji."""
    made: Any = pico.tokenizer([STORY], 330)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=request.param)
    return made


def passages(loaded: LoadedSet) -> list[str]:
    return [item.prompt + item.target for item in loaded.train]


def load_text(folder: Path, document: str, tokenizer: Any, **more: Any) -> LoadedSet:
    (folder / "book.txt").write_text(document, encoding="utf-8")
    return load_sets(recipe(text("book.txt", shares=ALL, **more)), folder, tokenizer)[0]


def shuffled_story(count: int) -> str:
    """The story's words in no order, so that no passage comes twice."""
    rng = random.Random(5)
    return "".join(rng.choice(STORY.split()) + rng.choice([" ", " ", "\n\n"]) for _ in range(count))


def test_passages_are_exact_substrings_that_cover_the_text(tmp_path: Path, tokenizer: Any) -> None:
    document = shuffled_story(500)
    loaded = load_text(tmp_path, document, tokenizer)
    found = passages(loaded)
    assert len(found) > 10
    at = sorted((document.index(passage), passage) for passage in found)
    end = 0
    for start, passage in at:
        assert passage == passage.strip()
        assert not document[end:start].strip()  # nothing but white space between one passage and the next
        end = start + len(passage)
    tail = len(tokenizer(document[end:].strip())["input_ids"])
    assert tail < 8 + SHORTEST_TARGET
    assert loaded.counts["short"] == (1 if tail else 0)


def test_the_prompt_is_the_first_tokens(tmp_path: Path, tokenizer: Any) -> None:
    loaded = load_text(tmp_path, "The keeper lit the lamp. " * 9 + shuffled_story(300), tokenizer)
    plain = 0
    for item in loaded.train:
        ids = tokenizer(item.prompt + item.target)["input_ids"]
        assert 8 + SHORTEST_TARGET <= len(ids) <= 34
        assert item.target.strip()
        if item.prompt.isascii():
            plain += 1
            assert item.prompt == tokenizer.decode(ids[:8])
    assert plain > 5


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), min_size=120, max_size=400), st.integers(1, 12), st.integers(13, 40))
@example("日" * 150, 5, 17)
@example("a\r\n \t" * 60, 3, 20)
def test_any_text_is_cut_into_exact_passages(
    tmp_path: Path, tokenizer: Any, document: str, prefix: int, length: int
) -> None:
    save(tmp_path, "a.jsonl", [{"text": f"begin {i} of it: {document}"} for i in range(2)])
    spec = text("a.jsonl", prefix=prefix, length=length, shares=ALL)
    try:
        loaded = load_sets(recipe(spec), tmp_path, tokenizer)[0]
    except DataError as error:
        event(str(error).split(": ")[-1][:20])
        if not any(known in str(error) for known in ("no passage", "too few")):  # what white space alone leads to
            raise
        return
    for passage, item in zip(passages(loaded), loaded.train, strict=True):
        assert any(passage in f"begin {i} of it: {document}" for i in range(2))
        assert item.prompt
        assert item.target.strip()


def test_without_a_tokenizer_four_characters_are_a_token(tmp_path: Path) -> None:
    document = "".join(f"{i:07d} " for i in range(100))  # 200 tokens, 6 passages of 32 and 8 more tokens
    loaded = load_text(tmp_path, document, None)
    assert (len(loaded.train), loaded.counts["short"]) == (6, 1)
    assert all(len(item.prompt) == 32 and len(item.target) == 95 for item in loaded.train)
    assert len(loaded.validation) == len(loaded.test) == 3


def test_texts_may_take_a_template(tmp_path: Path) -> None:
    save(tmp_path, "a.jsonl", [{"body": f"words {i} " * 20, "title": f"T{i}"} for i in range(6)])
    loaded = load(tmp_path, text("a.jsonl", columns={"text": "body"}, prompt="# {title}\n{text}"))
    assert any(item.prompt.startswith("# T") for item in loaded.train)
    told = fails(tmp_path, text("a.jsonl", columns={"text": "body"}, prompt=["{text}", "> {text}"]))
    assert "a text set takes one template" in told


def test_texts_too_short_for_one_passage(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no passage is as long as prefix \+ 8 = 16 tokens"):
        load_text(tmp_path, "Too short.", tokenizer)


def test_without_a_tokenizer_other_scripts_count_by_the_character(tmp_path: Path) -> None:
    """A plan must not find a text too short that the run will find long enough."""
    for two in ("\u732b\u72ac", "abcdefgh"):  # tokens, of which 96 are three passages
        document = "".join(random.Random(1).choices([two, two[::-1]], k=48))
        assert len(load_text(tmp_path, document, None).train) == 3


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with files of ten questions each, ``a.jsonl`` and so on."""
    for name in "abcdfghkltuv":
        save(tmp_path, f"{name}.jsonl", qa_rows(10, name))
    return tmp_path


V, T = {"path": "v.jsonl"}, {"path": "t.jsonl"}
UNTRAINED, UNTESTED = shares(0.0, 0.5, 0.5), shares(0.5, 0.5, 0.0)
ABC = {name: qa(f"{name}.jsonl") for name in "abc"}


@pytest.mark.parametrize(
    ("spec", "found", "unused"),
    [
        (qa("a.jsonl"), [5, 2, 3], 0),
        (qa("a.jsonl", shares=shares("all", 0.4, 0.6)), [10, 4, 6], 0),
        (qa("a.jsonl", limit=3), [1, 1, 1], 7),
        (qa("a.jsonl", shares=shares(0.5, 0.2, 0.1)), [5, 2, 1], 2),
        (qa("a.jsonl", validation=V, test=T | {"limit": 3}), [10, 10, 3], 7),
        (qa("a.jsonl", test=T), [5, 2, 10], 3),
        (qa("a.jsonl", shares={"train": "all"}, validation={"path": "a.jsonl", "limit": 4}, test=V), [10, 4, 10], 0),
    ],
)
def test_how_files_are_divided(here: Path, spec: dict[str, Any], found: list[int], unused: int) -> None:
    loaded = load(here, spec)
    assert sizes(loaded) == found
    assert loaded.counts["unused"] == unused
    assert not facts(loaded.validation) & facts(loaded.test)
    for split, own in (("validation", "v"), ("test", "t")):
        if spec.get(split, {}).get("path") == f"{own}.jsonl":
            assert all(item.target.startswith(f"It is {own}") for item in getattr(loaded, split))


def test_the_seed_moves_limit_split_and_digest(here: Path) -> None:
    picks = [load(here, qa("a.jsonl", limit=5), seed) for seed in (1, 1, 2)]
    sets = [frozenset().union(*(facts(pick.items(split)) for split in SPLITS)) for pick in picks]
    assert [len(s) for s in sets] == [5, 5, 5]
    assert sets[0] == sets[1] != sets[2]
    one, other = load(here, qa("a.jsonl"), 1), load(here, qa("a.jsonl"), 2)
    assert facts(one.train) != facts(other.train)
    assert one.digest != other.digest
    assert one.digest != load(here, qa("a.jsonl", prompt="{question}"), 1).digest


def test_files_of_their_own_need_only_their_own_columns(tmp_path: Path) -> None:
    save(tmp_path, "a.jsonl", [{**row, "land": "x"} for row in qa_rows(4)])
    save(tmp_path, "t.jsonl", [{**row, "region": "y"} for row in qa_rows(2, "t")])
    prompt = {"train": "{land} {question}", "validation": "{land} {question}", "test": "{region} {question}"}
    loaded = load(tmp_path, qa("a.jsonl", prompt=prompt, test=T))
    assert all(item.prompt.startswith("y ") for item in loaded.test)


def test_roles(here: Path) -> None:
    kept = qa("k.jsonl", shares=shares(0.0, 0.0, 1.0))
    own = qa("l.jsonl", shares={"train": 0.0}, validation=V, test=T)
    parts = {
        "also_forget": [qa("a.jsonl")],
        "retain": [kept, own],
        "utility": [qa("u.jsonl")],
        "holdout": qa("h.jsonl"),
    }
    sets = load_sets(recipe(qa("f.jsonl"), **parts), here)
    assert [(s.role, s.name, sizes(s)) for s in sets] == [
        ("forget", "f", [5, 2, 3]),
        ("forget", "a", [5, 2, 3]),
        ("retain", "k", [0, 0, 10]),
        ("retain", "l", [0, 10, 10]),
        ("utility", "u", [0, 4, 6]),
        ("holdout", "h", [0, 0, 10]),
    ]
    save(here, "a.jsonl", qa_rows(10, "f"))  # an item may be in two requests
    assert sizes(load_sets(recipe(qa("f.jsonl"), also_forget=[qa("a.jsonl")]), here)[1]) == [5, 2, 3]
    # terms are only trained on, and what they teach is only scored
    sets = load_sets(recipe(analogy=ABC, learn=[qa("d.jsonl")]), here)
    assert [(s.role, s.name, sizes(s)) for s in sets] == [
        ("learn", "d", [0, 2, 3]),
        *(("term", name, [5, 0, 0]) for name in "abc"),
    ]
    assert [s.counts["unused"] for s in sets] == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"learn": [qa("d.jsonl", shares=UNTRAINED)]},
            "learn set 'd': shares.train is 0, but a learn set needs train, validation and test items",
        ),
        (
            {"analogy": ABC | {"a": qa("a.jsonl", shares=UNTRAINED)}, "learn": [qa("d.jsonl")]},
            "term set 'a': shares.train is 0, but a term of an analogy needs train items",
        ),
        (
            {"analogy": ABC, "learn": [qa("d.jsonl", shares=UNTESTED)]},
            "learn set 'd': shares.test is 0, but the set that an analogy should teach needs validation and test items",
        ),
        (
            {"forget": ABC["a"], "holdout": qa("d.jsonl", shares=UNTESTED)},
            "holdout set 'd': shares.test is 0, but a hold-out set needs test items",
        ),
        (
            {"forget": qa("a.jsonl", shares=UNTRAINED)},
            "forget set 'a': shares.train is 0, but a forget set needs train, validation and test items",
        ),
        ({"forget": qa("a.jsonl", rows=[0, 2])}, "2 different rows are too few for the validation share of 0.2"),
    ],
)
def test_what_a_role_cannot_do_without(here: Path, parts: dict[str, Any], said: str) -> None:
    assert said in fails(here, **parts)


def test_the_same_item_in_two_files(here: Path) -> None:
    save(here, "t.jsonl", [*qa_rows(2, "t"), {"question": "what  IS v1?", "answer": "it is V1."}])
    told = fails(here, qa("a.jsonl", shares={"train": "all"}, validation=V, test=T))
    assert "the same item is in validation and in test" in told
    for part in ("what IS v1?", f"{here / 'v.jsonl'}, line 2", f"{here / 't.jsonl'}, line 3"):
        assert part in told
    told = fails(here, qa("a.jsonl", validation={"path": "a.jsonl"}, test=V))
    for part in ("the same item is in train and in validation", "and 9 more like it", "shares.train to all"):
        assert part in told


SAME = {"question": "WHAT is\n f4?", "choices": ["no", "It is f4."], "answer": 1}
OTHERS = [{"question": f"k{i}", "choices": ["a", "b"], "answer": 0} for i in range(9)]
BOOKS = [{"text": f"{i} the forgotten words " * 30} for i in range(10)]
CUT = [
    {"text": "9 held " * 60},
    *[{"text": f"more {i} " * 60} for i in range(8)],
    {"text": "4 The forgotten  words " * 30},
]
# set k holds at its end what another set has too: the other set's rows and k's, the recipe, and the message
ANEW = [*qa_rows(9, "k"), qa_rows(5, "f")[4]]  # nine of k's own, and one that f has
OVERLAPS: dict[str, tuple[list[Any], list[Any], dict[str, Any], str, str]] = {
    **{
        f"kept, {role}": (
            *(qa_rows(10, "f"), [*OTHERS, SAME]),
            {"forget": qa("f.jsonl"), role: [mcq("k.jsonl", prompt="{question} >")]},
            f"{role} set 'k': the same item is to be forgotten and kept:\n  WHAT is f4? > It is f4.\n",
            "forget set 'f'",
        )
        for role in ("retain", "utility")
    },
    **{
        f"another request, {role}": (
            *(qa_rows(10, "f"), ANEW, {"forget": qa("a.jsonl"), "also_forget": [qa("f.jsonl")], role: [qa("k.jsonl")]}),
            *(f"{role} set 'k': the same item is to be forgotten and {fate}:\n", "forget set 'f'"),
        )
        for role, fate in (("learn", "learned"), ("retain", "kept"))
    },
    "reached by analogy": (
        *(qa_rows(10, "f"), ANEW, {"analogy": ABC | {"c": qa("k.jsonl")}, "learn": [qa("f.jsonl")]}),
        *("term set 'k': the same item is to be reached by analogy and trained on:\n", "learn set 'f'"),
    ),
    **{
        f"held out, {role}": (
            *(qa_rows(10, "f"), ANEW, {"forget": qa("a.jsonl"), "holdout": qa("k.jsonl"), role: [qa("f.jsonl")]}),
            *("holdout set 'k': the same item is held out and in a set that a model has seen:\n", f"{role} set 'f'"),
        )
        for role in ("retain", "learn")
    },
    "a document, whatever the cut": (
        *(BOOKS, CUT, {"forget": text("f.jsonl"), "holdout": text("k.jsonl", length=24)}),
        *("holdout set 'k': the same item is to be forgotten and held out:\n", "forget set 'f'"),
    ),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_one_item_cannot_have_two_fates(here: Path, name: str) -> None:
    others, own, parts, said, other = OVERLAPS[name]
    save(here, "f.jsonl", others)
    save(here, "k.jsonl", own)
    told = fails(here, **parts)
    assert told.startswith(said)
    assert f"{other}: {here / 'f.jsonl'}, line 5" in told
    assert f"{here / 'k.jsonl'}, line 10" in told
    save(here, "k.jsonl", own[:9])
    load_sets(recipe(**parts), here)


def test_what_may_be_in_two_sets(here: Path) -> None:
    save(here, "b.jsonl", qa_rows(8, "a"))  # terms: a and b differ in form only
    assert len(load_sets(recipe(analogy=ABC, learn=[qa("d.jsonl")]), here)) == 4
    save(here, "h.jsonl", qa_rows(10, "u"))  # what is only scored has taught nobody
    assert len(load_sets(recipe(qa("f.jsonl"), utility=[qa("u.jsonl")], holdout=qa("h.jsonl")), here)) == 3


contents = st.lists(st.sampled_from([f"{c}{c}" for c in "abcdefghijklmnop"]), min_size=4, max_size=40)
parts_of_all = st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10), st.integers(0, 10))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents, parts_of_all, st.integers(0, 2**31 - 1), st.booleans(), st.randoms(use_true_random=False))
def test_splits_are_disjoint_stable_and_blind_to_order(
    tmp_path: Path, words: list[str], parts: tuple[int, ...], seed: int, everything: bool, rng: random.Random
) -> None:
    # Rows that differ in case or spacing only are the same content, and rows with other distractors too.
    rows = [
        {"question": w.upper() if i % 2 else f" {w}", "choices": [w, f"not {i % 3}", f"nor {i % 5}!"], "answer": 0}
        for i, w in enumerate(words)
    ]
    total = sum(parts)
    train, validation, test = (part / total for part in parts[:3])
    spec = mcq("a.jsonl", shares={"train": "all" if everything else train, "validation": validation, "test": test})
    save(tmp_path, "a.jsonl", rows)
    distinct = len({normalise(str(row["question"])) for row in rows})
    if distinct < (2 if everything else 3):
        assert "too few" in fails(tmp_path, spec, seed=seed)
        return
    loaded = load(tmp_path, spec, seed)
    targets = {split: {item.target for item in loaded.items(split)} for split in SPLITS}
    assert not targets["validation"] & targets["test"]
    assert all(targets.values())
    if everything:
        assert targets["train"] == set(words)
    else:
        assert not targets["train"] & (targets["validation"] | targets["test"])
        for split, share in zip(SPLITS, (train, validation, test), strict=True):
            assert abs(len(targets[split]) - share * distinct) < 2
    rng.shuffle(rows)
    save(tmp_path, "a.jsonl", rows)
    again = load(tmp_path, spec, seed)
    assert [again.items(split) for split in SPLITS] == [loaded.items(split) for split in SPLITS]
    assert (again.digest, dict(again.counts)) == (loaded.digest, dict(loaded.counts))


def test_a_question_asked_back_among_other_questions(tmp_path: Path) -> None:
    rows = [{"country": c, "choices": ["Rome", "Oslo"], "answer": a} for c, a in (("Italy", 0), ("Norway", 1))]
    rows += [{"country": "Latium", "choices": ["Rome", "Oslo"], "answer": 0}]  # an answer that two questions have
    save(tmp_path, "c.jsonl", rows)
    mapped = {"path": "c.jsonl", "kind": "mcq", "columns": {"question": "country"}}
    plain = {**mapped, "shares": {"train": "all", "validation": 0, "test": 1}}
    spec = {**plain, "reverse": "{answer} lies in"}
    role = {"retain": [spec], "forget": qa(save(tmp_path, "f.jsonl", qa_rows(9)))}
    (loaded,) = load_sets(recipe(role["forget"], retain=role["retain"]), tmp_path)[1:]
    back = {item.prompt: item for item in asked_back([loaded])[1].test if item.target != "Latium"}
    assert {p: i.target for p, i in back.items()} == {"Rome lies in": "Italy", "Oslo lies in": "Norway"}
    assert back["Rome lies in"].choices[back["Rome lies in"].answer] == "Italy"
    assert set(back["Rome lies in"].choices) == {"Italy", "Norway"}, "the other right answer is no choice"
    assert set(back["Oslo lies in"].choices) == {"Italy", "Norway", "Latium"}
    (without,) = load_sets(recipe(role["forget"], retain=[plain]), tmp_path)[1:]
    assert without.digest != loaded.digest
    assert asked_back([without]) == (without,)
    save(tmp_path, "c.jsonl", rows[::2])
    with pytest.raises(EvaluationError, match="reverse: retain set 'c' has no two test items with another question"):
        asked_back(load_sets(recipe(role["forget"], retain=[spec]), tmp_path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"kind": "text"}, "is for questions"), ({"reverse": "Which country?"}, "names no column: {answer}, say")],
)
def test_what_cannot_be_asked_back(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe({"path": "c.jsonl", "kind": "qa", "reverse": "{answer} is of", **changed})


def test_counterparts_ask_about_others_in_the_same_wording() -> None:
    items = [Item(f"{n:016}", f"The capital of {n} is", f"city {n % 3}") for n in range(9)]
    found = counterparts(items, "The capital of {country} is")
    answers = {item.prompt: item.target for item in items}
    for item in items:
        assert len(set(found[item.id])) == 4
        assert item.target not in {answers[prompt] for prompt in found[item.id]}
    assert counterparts(items[::-1], "The capital of {country} is") == found, "whatever the order of the items"
    # a prompt that is the question alone is no wording, and nobody else's answer is another one's
    assert set(map(tuple, counterparts(items, "{question}").values())) == {("",)}
    assert set(map(tuple, counterparts(items[::3], "The capital of {country} is").values())) == {("",)}
