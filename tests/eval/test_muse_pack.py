"""MUSE's tasks in ``eval/muse`` against plain forward passes, hand-computed figures and a second ROUGE."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from pack_arena import half_learnt, scored, written
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from unlearn.recipe.load import pack_module, tasks_folder
from unlearn.score.packed import PackedLM

TOLERANCE = 1e-4
FOLDER = tasks_folder() / "muse"
TASKS = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout", "privleak_retain")
PASSAGES = (
    "The capital of France is Paris.  A dog barks at night.\n\nSnow is white, the naïve cat – 東京 – purrs.\n",
    "A dog barks.",
    "\n  Which animal barks? The dog, and after one comes two",
)


@pytest.fixture(scope="module")
def muse() -> ModuleType:
    return pack_module("muse/muse_tasks")


@pytest.fixture(scope="module")
def items() -> ModuleType:
    return pack_module("muse/muse_items")


@pytest.fixture(scope="module")
def model(pico_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_learnt(pico_phi, tmp_path_factory.mktemp("muse") / "phi")


@pytest.fixture(scope="module")
def begun(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer that begins every text with a token of its own, as Llama's does."""
    folder = tmp_path_factory.mktemp("begun") / "phi"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == tokenizer.bos_token_id
    return folder


def engine(name: str, folder: Path) -> Any:
    kind = {"hf": HFLM, "packed": PackedLM}[name]
    return kind(pretrained=str(folder), batch_size=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out like the authors' data, with a few made-up rows."""
    folder = tmp_path_factory.mktemp("data")
    for corpus_name in ("news", "books"):
        for split in ("forget", "retain"):
            qa = [{"question": f"What is the capital of {c}?", "answer": a} for c, a in CAPITALS[split]]
            write(folder / corpus_name / "knowmem" / f"{split}_qa.json", qa)
            write(folder / corpus_name / "knowmem" / f"{split}_qa_icl.json", EXAMPLES[split])
        for split in ("forget", "retain", "holdout"):
            write(folder / corpus_name / "privleak" / f"{split}.json", list(PASSAGES))
        write(folder / corpus_name / "verbmem" / "forget.json", RECITED)
    return folder


CAPITALS = {
    "forget": [("France", "Paris"), ("Norway", "Oslo"), ("Japan", "The city of Tokyo, and Rome lies in Italy")],
    "retain": [("Egypt", "Cairo"), ("Peru", "Lima")],
}
EXAMPLES = {
    "forget": [{"question": "What colour is snow?", "answer": "white"}, {"question": "Who barks?", "answer": "A dog"}],
    "retain": [{"question": "What colour is coal?", "answer": "black"}],
}
RECITED = [
    {"prompt": "The capital of France is", "gt": " Paris. Paris is the capital city of France, in which dogs bark."},
    {"prompt": "A dog", "gt": " barks at night. The capital of Italy is Rome."},
]


def write(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def f1(target: str, text: str) -> float:
    from rouge_score import rouge_scorer

    value: float = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(target, text)["rougeL"].fmeasure
    return value


@pytest.mark.parametrize(("name", "tokens"), [("hf", 5), ("packed", 12)])
def test_verbatim_memorisation(model: Path, data: Path, name: str, tokens: int) -> None:
    lm = engine(name, model)
    result, samples = scored(
        lm, "muse_news_verbmem", muse=str(data), tokenizer=lm.tokenizer.name_or_path, max_tokens=tokens
    )
    wanted = []
    for sample, row in zip(samples, RECITED, strict=True):
        short = lm.tokenizer.decode(lm.tokenizer(row["gt"])["input_ids"][:tokens])
        assert sample["arguments"][0][0] == row["prompt"]
        assert sample["target"] == short != row["gt"]
        wanted.append(f1(short, written(lm, row["prompt"], tokens)))
    assert [s["rougeL_f1"] for s in samples] == pytest.approx(wanted)
    assert result["rougeL_f1,none"] == pytest.approx(sum(wanted) / len(wanted))
    assert len(set(wanted)) > 1


@pytest.mark.parametrize(
    ("name", "split", "chat"), [("packed", "forget", False), ("hf", "retain", False), ("packed", "forget", True)]
)
def test_knowledge(model: Path, data: Path, name: str, split: str, chat: bool) -> None:
    lm = engine(name, model)
    result, samples = scored(
        lm, f"muse_books_knowmem_{split}", chat, muse=str(data), tokenizer=lm.tokenizer.name_or_path
    )
    shots = {
        "forget": "Question: What colour is snow?\nAnswer: white\n\nQuestion: Who barks?\nAnswer: A dog\n\n",
        "retain": "Question: What colour is coal?\nAnswer: black\n\n",
    }[split]
    wanted = []
    for sample, (country, city) in zip(samples, CAPITALS[split], strict=True):
        prompt = f"{shots}Question: What is the capital of {country}?\nAnswer: "
        prompt = f"<|user|>\n{prompt}\n<|assistant|>\n" if chat else prompt
        assert sample["arguments"][0][0] == prompt
        text = written(lm, prompt, 32)
        for stop in ("\n\n", "\nQuestion", "Question:"):
            text = text.split(stop)[0]
        wanted.append(f1(city, text))
    assert [s["rougeL_f1"] for s in samples] == pytest.approx(wanted)
    assert result["rougeL_f1,none"] == pytest.approx(sum(wanted) / len(wanted))


def token_logprobs(lm: Any, text: str, begun: bool) -> list[float]:
    """Log-probability of every token but the first, or of all where a beginning token stands before it."""
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    assert begun is (int(ids[0, 0]) == lm.tokenizer.bos_token_id)
    with torch.no_grad():
        logprobs = lm.model(ids).logits[0, :-1].double().log_softmax(-1)
    found: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize(
    ("name", "with_beginning", "chat"), [("hf", False, False), ("packed", False, True), ("packed", True, False)]
)
def test_passages_agree_with_plain_forward_passes(
    request: pytest.FixtureRequest, data: Path, name: str, with_beginning: bool, chat: bool
) -> None:
    lm = engine(name, request.getfixturevalue("begun" if with_beginning else "model"))
    result, samples = scored(
        lm, "muse_news_privleak_holdout", chat, muse=str(data), tokenizer=lm.tokenizer.name_or_path
    )
    losses = []
    for sample, text in zip(samples, PASSAGES, strict=True):
        doc, tokens = sample["doc"], token_logprobs(lm, text, with_beginning)
        assert doc["prompt"] + "".join(doc["pieces"]) == doc["target"] == text
        assert (doc["prompt"] == "") is with_beginning
        own = [value for value, _ in sample["filtered_resps"]]
        at = len(tokens) - sum(doc["piece_tokens"])  # tokens that cannot be cut from the first one
        assert at == 0 or not with_beginning
        even: list[float] = []
        for value, count in zip(own, doc["piece_tokens"], strict=True):
            assert value == pytest.approx(sum(tokens[at : at + count]), abs=TOLERANCE)
            even += [sum(tokens[at : at + count]) / count] * count
            at += count
        lowest = np.sort(even)[: int(len(even) * 0.4)]  # Min-40 % as the authors compute it, but for the sign
        assert sample["min_40"] == pytest.approx(float(np.mean(lowest)), abs=TOLERANCE)
        assert sample["loss"] == pytest.approx(-sum(even) / len(even), abs=TOLERANCE)
        size = len(zlib.compress(text.encode()))
        assert sample["zlib"] == pytest.approx(-sum(even) / len(even) / size, abs=TOLERANCE)
        losses.append(sample["loss"])
    assert result["loss,none"] == pytest.approx(sum(losses) / 3, abs=TOLERANCE)


def test_pieces_are_single_tokens_where_they_can_be(items: ModuleType, model: Path, begun: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = "Snow is white and grass is green"
    whole = items.passage(tokenizer, plain, "here")
    ids = tokenizer(plain)["input_ids"]
    assert [whole["prompt"], *whole["pieces"]] == [tokenizer.decode(i) for i in ids]
    assert whole["piece_tokens"] == [1] * (len(ids) - 1)
    started = items.passage(AutoTokenizer.from_pretrained(begun), plain, "here")
    assert (started["prompt"], started["pieces"]) == ("", [whole["prompt"], *whole["pieces"]])
    rare = items.passage(tokenizer, "Snow 東京", "here")
    assert rare["pieces"][-1].endswith("東京"[-1])
    assert max(rare["piece_tokens"]) > 1, "a character of several bytes is several tokens"
    for text in PASSAGES:
        row = items.passage(tokenizer, text, "here")
        context = row["prompt"]
        for piece, count in zip(row["pieces"], row["piece_tokens"], strict=True):
            before, after = tokenizer(context)["input_ids"], tokenizer(context + piece)["input_ids"]
            assert after[: len(before)] == before
            assert len(after) - len(before) == count
            assert not context[-1].isspace(), "lm-eval would score that white space again"
            context += piece


def test_only_the_beginning_of_passages(items: ModuleType, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Snow is white and grass is green"
    row = items.passage(tokenizer, text, "here", limit=4)
    assert row["target"] == tokenizer.decode(tokenizer(text)["input_ids"][:4])
    assert sum(row["piece_tokens"]) == 3
    assert row["zlib_bytes"] == len(zlib.compress(row["target"].encode()))
    assert items.passage(tokenizer, text, "here", limit=999) == items.passage(tokenizer, text, "here")


def test_figures_by_hand(muse: ModuleType) -> None:
    doc = {"piece_tokens": [1, 2, 1, 1], "zlib_bytes": 4}
    scores = muse.score_passage(doc, [(-1.0, True), (-8.0, False), (-3.0, True), (-2.0, True)])
    assert scores == pytest.approx({"min_40": -4.0, "loss": 14 / 5, "zlib": 14 / 5 / 4})
    one = muse.score_passage({"piece_tokens": [1], "zlib_bytes": 2}, [(-3.0, False)])
    assert one == {"min_40": -3.0, "loss": 3.0, "zlib": 1.5}, "at least one token counts"
    sure = muse.score_passage(doc, [(0.0, True)] * 4)
    assert sure == {"min_40": 0.0, "loss": 0.0, "zlib": 0.0}
    broken = muse.score_passage(doc, [(math.nan, True), (-8.0, False), (-3.0, True), (-2.0, True)])
    assert all(math.isnan(value) for value in broken.values())
    assert muse.score_generation({"target": "The cities, two"}, ["the city two"])["rougeL_f1"] == pytest.approx(
        2 / 3
    ), "city and cities are different words to MUSE"
    assert muse.score_generation({"target": "two"}, [""]) == {"rougeL_f1": 0}


@pytest.mark.parametrize("corpus_name", ["news", "books"])
def test_a_group_has_all_tasks(model: Path, data: Path, corpus_name: str) -> None:
    metadata = {"muse": str(data), "pretrained": str(model), "items": 1, "passage_tokens": 6}
    manager = TaskManager(include_defaults=False, include_path=str(tasks_folder()), metadata=metadata)
    found = manager.load(f"muse_{corpus_name}")["tasks"]
    assert set(found) == {f"muse_{corpus_name}_{name}" for name in TASKS}
    assert {len(task.eval_docs) for task in found.values()} == {1}
    tokens = {n: t.config.generation_kwargs["max_gen_toks"] for n, t in found.items() if "mem" in n}
    assert sorted(tokens.values()) == [32, 32, 128]
    assert tokens[f"muse_{corpus_name}_verbmem"] == 128
    for name in TASKS:
        config = load_yaml(FOLDER / f"muse_{corpus_name}_{name}.yaml")
        kind, _, split = name.partition("_")
        assert config["dataset_kwargs"] == {"corpus": corpus_name, "kind": kind, "split": split or "forget"}


def loaded(pack: ModuleType, model: Path, folder: Path, kind: str, **more: Any) -> Any:
    metadata = {"tokenizer": str(model), "max_tokens": 8, **more}
    return pack.load_items("news", kind, "forget", muse=str(folder), **metadata)["test"]


def test_numbers_of_items(items: ModuleType, model: Path, data: Path, tmp_path: Path) -> None:
    write(tmp_path / "news" / "privleak" / "forget.json", [{"text": text} for text in PASSAGES])  # or plain texts
    assert loaded(items, model, tmp_path, "privleak")["target"] == list(PASSAGES)
    assert loaded(items, model, data, "knowmem", items=2)["id"] == ["0", "1"]
    assert loaded(items, model, data, "knowmem", items={"knowmem_forget": 1})["id"] == ["0"]
    assert len(loaded(items, model, data, "knowmem", items={"verbmem_forget": 1})) == 3


@pytest.mark.parametrize(
    ("kind", "rows", "more", "message"),
    [
        ("verbmem", [], {}, "verbmem/forget.json has no rows"),
        ("verbmem", {"prompt": "p"}, {}, "has no rows"),
        ("verbmem", [{"prompt": "p", "gt": "g"}, {"prompt": "p"}], {}, "row 2: 'gt' is missing or empty"),
        ("verbmem", ["text"], {}, "row 1: 'prompt' is missing or empty"),
        ("verbmem", [{"prompt": "p", "gt": "g"}], {"max_tokens": 0}, "max_tokens is 0; it must be a whole number"),
        ("verbmem", [{"prompt": "p", "gt": "g"}], {"items": 2}, "has 1 rows, fewer than the 2 of metadata items"),
        ("verbmem", [{"prompt": "p", "gt": "g"}], {"items": "2"}, "items is '2'; it must be a whole number"),
        ("verbmem", [{"prompt": "p", "gt": "g"}], {"items": {"verbmem": 2}}, "items names 'verbmem'; MUSE's parts are"),
        ("verbmem", [{"prompt": "p", "gt": "g"}], {"tokenizer": None}, "no tokenizer to cut texts into tokens"),
        ("privleak", ["a dog barks", " "], {}, "row 2: 'text' is missing or empty"),
        ("privleak", ["a dog barks", "a"], {}, "row 2: this passage has no token to score after its first one"),
        ("privleak", ["a dog barks"], {"passage_tokens": 0}, "passage_tokens is 0; it must be"),
        ("privleak", ["a dog barks"], {"passage_tokens": 1}, "row 1: this passage has no token to score"),
    ],
)
def test_bad_data(
    items: ModuleType, model: Path, tmp_path: Path, kind: str, rows: Any, more: dict[str, Any], message: str
) -> None:
    write(tmp_path / "news" / kind / "forget.json", rows)
    with pytest.raises(ValueError, match=message):
        loaded(items, model, tmp_path, kind, **more)


def test_missing_data(items: ModuleType, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"verbmem/forget\.json: no such file"):
        loaded(items, model, tmp_path, "verbmem")
    write(tmp_path / "news" / "knowmem" / "forget_qa.json", [{"question": "Who?", "answer": "Nobody"}])
    with pytest.raises(ValueError, match=r"knowmem/forget_qa_icl\.json: no such file"):
        loaded(items, model, tmp_path, "knowmem")
    write(tmp_path / "news" / "knowmem" / "forget_qa_icl.json", [])
    with pytest.raises(ValueError, match=r"forget_qa_icl\.json has no rows"):
        loaded(items, model, tmp_path, "knowmem")
    (tmp_path / "news" / "knowmem" / "forget_qa.json").write_text("[")
    with pytest.raises(ValueError, match=r"forget_qa\.json: not JSON"):
        loaded(items, model, tmp_path, "knowmem")
    with pytest.raises(ValueError, match="muse-bench/MUSE-Books, knowmem, retain_qa, cannot be had from the hub"):
        items.load_items("books", "knowmem", "retain")
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        items.passage(object(), "a dog barks", "here")
