"""Questions in a chat template: token by token what transformers and lm-eval make of them, whatever the template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import chats
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from unlearn.data.encoding import IGNORE, encode, encode_item, scored_rows
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet, load_sets, plainly, write_items
from unlearn.errors import UnlearnError
from unlearn.recipe.schema import Recipe

SHAPES = [(name, adds) for name in chats.TEMPLATES for adds in (False, True)]
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "question": lambda n: {"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."},
    "messages": lambda n: {"messages": spoken(n)},
    "halves": lambda n: {"prompt": f"What is {n} + {n}?", "completion": f" It is {2 * n}."},
    "conversational": lambda n: {"prompt": spoken(n)[:1], "completion": spoken(n)[1:]},
}


def spoken(n: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {n} + {n}?"},
        {"role": "assistant", "content": f"It is {2 * n}."},
    ]


def recipe(folder: Path, rows: list[dict[str, Any]], model: Mapping[str, Any], **forget: Any) -> Recipe:
    (folder / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = {"kind": "qa", "path": "f.jsonl", "shares": {"train": "all", "validation": 0.5, "test": 0.5}, **forget}
    whole = {"name": "r", "model": {"path": "pico:llama", "chat_template": "auto", **model}, "forget": data}
    return Recipe.model_validate_json(json.dumps(whole))


def forget(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], model: Mapping[str, Any] = {}, **more: Any) -> Any:
    return load_sets(recipe(folder, rows, model, **more), folder, tokenizer)[0]


def refused(
    folder: Path, tokenizer: Any, rows: list[dict[str, Any]], model: Mapping[str, Any] = {}, **more: Any
) -> str:
    with pytest.raises(UnlearnError) as caught:
        forget(folder, tokenizer, rows, model, **more)
    assert "\n    " not in str(caught.value), "one message, no traceback"
    return str(caught.value)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}{'+bos' if shape[1] else ''}")
def shaped(request: pytest.FixtureRequest, pico_llama: Path) -> tuple[str, bool, PreTrainedTokenizerFast]:
    name, adds = request.param
    return name, adds, chats.tokenizer(pico_llama, name, adds)


def test_tokens_and_labels_are_the_template_s(shaped: tuple[str, bool, Any], tmp_path: Path) -> None:
    """The whole row is ``apply_chat_template``'s, with one beginning token; learned is the answer and what ends it."""
    name, adds, tokenizer = shaped
    loaded = forget(tmp_path, tokenizer, [ROWS["messages"](n) for n in range(1, 7)])
    for item, row in zip(loaded.train, encode(loaded.train, "qa", tokenizer, 512), strict=True):
        conversation = [{"role": "user", "content": item.asked}, {"role": "assistant", "content": item.target}]
        dated = tokenizer.chat_template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
        how = {"tokenize": True, "return_dict": False, "date_string": "26 Jul 2024", "chat_template": dated}
        whole = tokenizer.apply_chat_template(conversation, **how)
        asked = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, **how)
        if adds and name not in chats.WRITES_BOS:  # as lm-eval has it: transformers would add none to a template
            whole, asked = ([tokenizer.bos_token_id, *ids] for ids in (whole, asked))
        blank = tokenizer.encode("\n", add_special_tokens=False)
        trained = whole[: -len(blank)] if whole[-len(blank) :] == blank else whole
        assert list(row.input_ids) == trained
        assert row.input_ids.count(tokenizer.bos_token_id) == (adds or name in chats.WRITES_BOS)
        labels = [label for label in row.labels if label != IGNORE]
        assert row.labels[len(row.labels) - len(labels) :] == tuple(labels), "the labelled tokens are the last"
        ends = {"chatml": "<|im_end|>", "llama": "<|eot|>", "gemma": "<end>", "mistral": "</s>"}
        said = tokenizer.decode(labels)
        assert said == (" " if name == "mistral" else "") + item.target + ends.get(name, "<|im_end|>")
        assert row.input_ids[: len(asked)] == tuple(asked), "the conversation up to the answer, as it is asked"
        if name != "thinking":
            assert row.labels[: len(asked)] == (IGNORE,) * len(asked)
            assert len(asked) + len(labels) == len(row.input_ids), "nothing is between"
    (scored,) = scored_rows(loaded.train[:1], "qa", tokenizer, 512)
    (learned,) = encode(loaded.train[:1], "qa", tokenizer, 512)
    assert learned.input_ids[: len(scored.input_ids)] == scored.input_ids
    assert learned.labels[: len(scored.labels)] == scored.labels


def test_scored_is_what_lm_eval_sends(shaped: tuple[str, bool, Any], tmp_path: Path) -> None:
    """lm-eval's own encoding of a written item: the tokens trained on; white space before the answer counts there."""
    _, _, tokenizer = shaped
    lm = HFLM.__new__(HFLM)
    lm.tokenizer, lm.backend, lm.add_bos_token = tokenizer, "causal", None
    lm.custom_prefix_token_id, lm.enable_thinking = None, None
    loaded = forget(tmp_path, tokenizer, [ROWS["question"](n) for n in range(1, 7)])
    (path,) = write_items([loaded], tokenizer, tmp_path / "items", ("test",))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(rows) == 3
    for item, row in zip(loaded.test, rows, strict=True):
        context, continuation = lm._encode_pair(row["prompt"], row["joint"] + row["target"])
        ours = encode_item(tokenizer, item, "qa")
        assert [*context, *continuation] == [*ours[0], *ours[1]]
        assert tokenizer.decode(continuation).lstrip() == item.target
        assert row["target_tokens"] == len(ours[1])
        assert continuation[len(continuation) - len(ours[1]) :] == ours[1]
        (learned,) = encode([item], "qa", tokenizer, 512)
        assert list(learned.input_ids[: len(context) + len(continuation)]) == [*context, *continuation]


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("template", ["auto", "none"])
def test_forms_of_rows_are_the_same_items(form: str, template: str, tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    given, plain = (
        forget(tmp_path, tokenizer, [ROWS[rows](n) for n in range(1, 7)], {"chat_template": template})
        for rows in (form, "question")
    )
    assert given.train == plain.train
    assert given.digest == plain.digest


def test_columns_rename_and_cells_of_csv_hold_conversations(tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    named = [{"talk": spoken(n)} for n in range(1, 7)]
    assert len(forget(tmp_path, tokenizer, named, columns={"messages": "talk"}).train) == 6
    text = [{"messages": json.dumps(spoken(n))} for n in range(1, 7)]
    assert (
        forget(tmp_path, tokenizer, text).train
        == forget(tmp_path, tokenizer, [ROWS["messages"](n) for n in range(1, 7)]).train
    )


def test_earlier_messages_are_context(tmp_path: Path, pico_llama: Path) -> None:
    """In the template as turns, plainly before the prompt; items that differ in them alone are different ones."""
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    rows = [
        {"messages": [{"role": "system", "content": f"You are clerk {n}."}, *spoken(8), *spoken(9)]} for n in range(4)
    ]
    loaded = forget(tmp_path, tokenizer, rows, {"system": "Never said."})
    assert len({item.id for item in loaded.train}) == 4
    for item in loaded.train:
        clerk = re.search(r"clerk \d", item.prompt)
        assert clerk is not None
        assert item.prompt == (
            f"<|im_start|>system\nYou are {clerk[0]}.<|im_end|>\n<|im_start|>user\nWhat is 8 + 8?<|im_end|>\n"
            "<|im_start|>assistant\nIt is 16.<|im_end|>\n<|im_start|>user\nWhat is 9 + 9?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert item.plainly().prompt == (
            f"You are {clerk[0]}.\n\nWhat is 8 + 8?\n\nIt is 16.\n\nQuestion: What is 9 + 9?\nAnswer:"
        )
        assert "What is 8 + 8?<|im_end|>" in item.asking("And 1 + 1?").prompt
        assert "user\nAnd 1 + 1?<|im_end|>\n<|im_start|>assistant\n" in item.asking("And 1 + 1?").prompt


def test_system_prompt_and_day(tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "llama", True)
    rows = [ROWS["question"](n) for n in range(1, 5)]
    item = forget(tmp_path, tokenizer, rows, {"system": "Be short.", "date": "2026-02-03"}).train[0]
    assert "Today Date: 03 Feb 2026\n\nBe short.<|eot|>" in item.prompt
    assert "Today Date: 26 Jul 2024" in forget(tmp_path, tokenizer, rows).train[0].prompt
    thinking = chats.tokenizer(pico_llama, "thinking", False)
    prompt = forget(tmp_path, thinking, rows, {"date": "2026-02-03"}).train[0].prompt
    assert "user\n2026-02-03What" in prompt
    thinking.chat_template = "\n  " + chats.THINKING.replace("'%Y-%m-%d'", "'%A, %-d %B %Y'")
    prompt = forget(tmp_path, thinking, rows, {"date": "2026-02-03"}).train[0].prompt
    assert prompt.startswith("\n<|im_start|>user\nTuesday, 3 February 2026What")
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_recipe_s_prompt_is_what_the_user_says(tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    rows = [ROWS["question"](n) | {"who": f"P{n}"} for n in range(1, 5)]
    item = forget(tmp_path, tokenizer, rows, prompt="{who} asks: {question}").train[0]
    assert re.fullmatch(r"P\d asks: What is \d \+ \d\?", item.asked)
    assert f"user\n{item.asked}<|im_end|>" in item.prompt
    assert item.plainly().prompt == item.asked
    assert forget(tmp_path, tokenizer, rows).train[0].plainly().prompt.startswith("Question: What is")


def test_passages_stand_by_themselves(tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    rows = [{"text": " ".join(f"word {n} {k}" for k in range(40))} for n in range(9)]
    how = {"kind": "text", "length": 40, "prefix": 8}
    loaded, plain = (forget(tmp_path, tokenizer, rows, {"chat_template": t}, **how) for t in ("auto", "none"))
    assert loaded.digest == plain.digest
    assert plainly([loaded]) == (loaded,)


def test_choices_and_counterparts_stand_in_the_template(tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "mistral", True)
    rows = [{"question": f"What is {n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(8)]
    loaded = forget(tmp_path, tokenizer, rows, kind="mcq")
    (path,) = write_items([loaded], tokenizer, tmp_path / "items", ("test",))
    prompts = {item.prompt for item in loaded.test}
    for line, item in zip(path.read_text("utf-8").splitlines(), loaded.test, strict=True):
        row = json.loads(line)
        assert row["joint"] == " "
        assert row["ending"] == "</s>"
        assert set(row["others"]) <= prompts - {item.prompt}
        assert row["choice_tokens"] == [
            len(tokenizer.encode(f" {choice}", add_special_tokens=False)) for choice in item.choices
        ]
    (row,) = encode(loaded.test[:1], "mcq", tokenizer, 512)
    assert tokenizer.decode([i for i in row.labels if i != IGNORE]) == f" {loaded.test[0].target}</s>"


def test_the_plain_wording_of_forget_sets_is_scored_too(tmp_path: Path, pico_llama: Path) -> None:
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    rows = [ROWS["question"](n) for n in range(1, 7)]
    loaded: LoadedSet = forget(tmp_path, tokenizer, rows)
    _, outside = plainly([loaded])
    without: LoadedSet = forget(tmp_path, tokenizer, rows, {"chat_template": "none"})
    assert (outside.name, outside.train, outside.validation) == ("f@plain", (), ())
    assert outside.test == without.test
    assert loaded.stops(loaded.test[0]) == ["<|im_end|>"]
    assert outside.stops(outside.test[0]) == ["\n", "\nQuestion:"]
    assert plainly([replace(loaded, role="retain")]) == (replace(loaded, role="retain"),)


BROKEN: dict[str, tuple[str, str]] = {
    "syntax": ("{% if %}", r"the template fails \(user\): TemplateSyntaxError"),
    "unknown": ("{{ messages.x.y }}", "the template fails"),
    "no assistant": ("{% for m in messages %}{{ m.content }}\n{% endfor %}{{ 'A:' if add_generation_prompt else '' }}",
                     "is not how it begins with the answer"),
    "answer left out": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
                        "is not how it begins with the answer"),
    "other words": ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", "is not how|as they are"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_templates_that_cannot_be_used(name: str, tmp_path: Path, pico_llama: Path) -> None:
    text, told = BROKEN[name]
    (tmp_path / "own.jinja").write_text(text)
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    said = refused(tmp_path, tokenizer, [ROWS["question"](1), ROWS["question"](2)], {"chat_template": "own.jinja"})
    assert re.search(rf"model.chat_template: .*({told})", said), said


def test_a_template_of_one_s_own(tmp_path: Path, pico_llama: Path) -> None:
    (tmp_path / "own.jinja").write_text(chats.MISTRAL)
    tokenizer = chats.tokenizer(pico_llama, "chatml", False)
    rows = [ROWS["question"](n) for n in range(1, 5)]
    item: Item = forget(tmp_path, tokenizer, rows, {"chat_template": "own.jinja"}).train[0]
    assert item.prompt == f"<s>[INST] {item.asked} [/INST]"


def messages(*roles: str, content: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role in roles]}


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no template": ({}, {"path": "bare"}, "auto: the tokenizer of bare has no chat template; give a file"),
    "no file": ({}, {"chat_template": "nothing.jinja"}, "there is no file .*nothing.jinja"),
    "no system": ({}, {"system": "Be short."}, "System role not supported; leave model.system out"),
    "last message": (messages("user", "assistant", "user"), {}, "line 1: the last message must be the assistant's"),
    "order": (messages("user", "user", "assistant"), {}, "message 2 is of 'user', where one of 'assistant' is due"),
    "late system": (messages("user", "system", "assistant"), {}, "message 2 is of 'system'"),
    "role": (messages("human", "assistant"), {}, "message 1 is of 'human', where one of 'user' is due"),
    "one message": (messages("assistant"), {}, "message 1 is of 'assistant'"),
    "no messages": ({"messages": []}, {}, "the last message must be the assistant's"),
    "empty": (messages("user", "assistant", content=" "), {}, "the message 1 is empty"),
    "no list": ({"messages": "Hello"}, {}, "the messages are 'Hello', not a list"),
    "no message": ({"messages": ["Hello", "You"]}, {}, "message 1 is 'Hello', not {role"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "the message 1 is .*, not text"),
    "half": ({"prompt": "What?"}, {}, "no column 'completion'; the columns are prompt"),
    "empty half": ({"prompt": "What?", "completion": ""}, {}, "the answer is empty"),
    "nothing fits": ({"q": "What?", "a": "That."}, {}, "qa rows have question and answer, or messages, or prompt and"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message(name: str, tmp_path: Path, pico_llama: Path) -> None:
    row, model, told = MISTAKES[name]
    tokenizer = chats.tokenizer(pico_llama, "gemma", True)
    if name == "no template":
        tokenizer.chat_template = None
    said = refused(tmp_path, tokenizer, [row, row] if row else [ROWS["question"](1), ROWS["question"](2)], model)
    assert re.search(told, said), said


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"system": "Be short."}, "system is a message in a chat template"),
        ({"system": "Be short.", "chat_template": "none"}, "system is a message in a chat template"),
        ({"date": "26 Jul 2024"}, "date"),
        ({"date": "2024-02-31"}, "day is out of range"),
    ],
)
def test_settings_that_do_not_go_together(model: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        recipe(tmp_path, [], {"chat_template": None, **model})
