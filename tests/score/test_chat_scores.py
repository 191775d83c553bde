"""Questions in a chat template: both engines score, write and attack the same tokens as lm-eval's own model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import chats
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from pack_arena import scored

from unlearn.data.encoding import IGNORE, encode
from unlearn.data.sets import LoadedSet, load_sets, plainly
from unlearn.evidence.attacks import Judge
from unlearn.evidence.attacks_ask import sample, wordings
from unlearn.model.load import Loaded, load
from unlearn.recipe.methods import IgnoranceSpec, TrainSpec
from unlearn.recipe.schema import Recipe
from unlearn.score.evaluate import EvalResult, evaluate
from unlearn.score.packed import interface
from unlearn.score.scorer import build_questions, complete, unlikely_spaces
from unlearn.text import percent
from unlearn.train.teacher import ignorant

COUNTRIES = ("France Paris", "Italy Rome", "Spain Madrid", "Greece Athens", "Norway Oslo", "Japan Tokyo", "Peru Lima")


def rows(kind: str) -> list[dict[str, Any]]:
    pairs = [pair.split() for pair in COUNTRIES]
    found: list[dict[str, Any]] = []
    for n, (country, city) in enumerate(pairs):
        row: dict[str, Any] = {"question": f"What is the capital of {country}?", "answer": city}
        if kind == "mcq":
            row |= {"choices": [city, pairs[(n + 1) % 7][1], pairs[(n + 2) % 7][1]], "answer": 0}
        found.append(row)
    return found


@pytest.fixture(scope="module", params=["chatml", "llama", "mistral"])
def model(request: pytest.FixtureRequest, pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.build(pico_llama, tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def chatml(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats.build(pico_llama, tmp_path_factory.mktemp("chatml-alone") / "model", "chatml")


def arena(folder: Path, model: Path, engine: str = "packed", **more: Any) -> tuple[Recipe, Loaded, list[LoadedSet]]:
    sets = {}
    for kind in ("qa", "mcq"):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind)), "utf-8")
        shares = {"train": "all", "validation": 0.4, "test": 0.6}
        sets[kind] = {"kind": kind, "path": path.name, "shares": shares, "continuation": 6}
    whole = {
        "name": "chat",
        "model": {"path": str(model), "device": "cpu", "dtype": "float32", "chat_template": "auto"},
        "forget": sets["qa"],
        "also_forget": [sets["mcq"]],
        "eval": {"engine": engine, "batch_size": 4},
        **more,
    }
    recipe = Recipe.model_validate_json(json.dumps(whole))
    loaded = load(recipe.model, str(model))
    return recipe, loaded, list(load_sets(recipe, folder, loaded.tokenizer))


def by_key(result: EvalResult) -> Mapping[Any, float]:
    return {score.key: score.score.value for score in result.scores}


def said(loaded: Loaded, asked: str) -> list[int]:
    """Tokens of a question as transformers has them, up to where the assistant answers."""
    messages = [{"role": "user", "content": asked}]
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False, "date_string": "26 Jul 2024"}
    ids: list[int] = loaded.tokenizer.apply_chat_template(messages, **how)
    return ids


def test_both_engines_and_lm_eval_alone_score_the_same(model: Path, tmp_path: Path) -> None:
    results = {}
    for engine in ("packed", "hf"):
        recipe, loaded, sets = arena(tmp_path, model, engine)
        questions = build_questions(recipe, sets, loaded.tokenizer, tmp_path / "items", [])
        lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
        results[engine] = evaluate(lm, questions.test, model_name="pico", bootstrap=0)
    ours, theirs = (by_key(results[engine]) for engine in ("packed", "hf"))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert {name for _, name, _ in ours} == {"qa", "mcq", "qa@plain", "mcq@plain"}
    alone = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4, logits_cache=False)
    for kind, metrics in (("qa", ("prob", "loss", "exact", "pmi")), ("mcq", ("acc", "logprob", "prob", "acc_pmi"))):
        found, _ = scored(alone, f"unlearn_{kind}", items=str(tmp_path / "items" / f"forget.{kind}.test.jsonl"))
        for metric in metrics:
            assert found[f"{metric},none"] == pytest.approx(ours["forget", kind, metric], abs=1e-4), metric


def test_the_score_is_the_answer_s_probability_in_the_template(model: Path, tmp_path: Path) -> None:
    """By transformers' own template and a plain pass; what stands between prompt and answer goes with the answer."""
    recipe, loaded, sets = arena(tmp_path, model)
    questions = build_questions(recipe, sets, loaded.tokenizer, tmp_path / "items", [])
    result = evaluate(
        interface(loaded.model, loaded.tokenizer, recipe.eval), questions.test, model_name="pico", bootstrap=0
    )
    wanted = []
    for item in sets[0].test:
        asked = said(loaded, item.asked)
        joint = " " if "[INST]" in item.prompt else ""
        answer = loaded.tokenizer.encode(joint + item.target, add_special_tokens=False)
        blank = [] if joint else [i for i in asked[-2:] if not loaded.tokenizer.decode(i).strip()]
        with torch.no_grad():
            logits = loaded.model(torch.tensor([[*asked, *answer]])).logits[0].log_softmax(-1)
        ids = [*blank, *answer]
        start = len(asked) - len(blank)
        logprob = sum(float(logits[start + k - 1, token]) for k, token in enumerate(ids))
        wanted.append(math.exp(logprob / len(answer)))
    assert by_key(result)["forget", "qa", "prob"] == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)


def test_what_nobody_trains_on_and_lm_eval_scores_is_said(model: Path, tmp_path: Path) -> None:
    """White space between template and answer, by a plain pass over transformers' own template."""
    _, loaded, sets = arena(tmp_path, model)
    nats = []
    for item in sets[0].test + sets[0].validation:
        asked = said(loaded, item.asked)
        blank = next(n for n in range(9) if loaded.tokenizer.decode(asked[len(asked) - n - 1]).strip())
        with torch.no_grad():
            logits = loaded.model(torch.tensor([asked])).logits[0].log_softmax(-1)
        nats.append(sum(float(logits[-k - 1, asked[-k]]) for k in range(1, blank + 1)))
    told = unlikely_spaces(loaded, sets)
    if not any(nats):
        assert not told, "the template has none"
        return
    assert f"a probability of {percent(math.exp(sum(nats) / len(nats)))}, " in told
    sure = loaded.tokenizer.encode("\n\n", add_special_tokens=False) + loaded.tokenizer.encode("\n")[-1:]

    def surely(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., sure] += 100 * torch.ones(len(sure))
        return logits

    with loaded.model.get_output_embeddings().register_forward_hook(surely):
        certain = unlikely_spaces(loaded, sets)
    assert not certain


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_written_answers_begin_where_the_assistant_does(
    engine: str, chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of a report, ROUGE and samples: the model reads the template's prompt, and ends with its turn."""
    recipe, loaded, sets = arena(tmp_path, chatml, engine)
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    read: list[list[int]] = []
    stops: list[list[str]] = []
    original = type(lm)._model_generate

    def spied(self: Any, context: Any, max_length: int, stop: list[str], **how: Any) -> Any:
        masks = how["attention_mask"].bool()
        read.extend(row[mask].tolist() for row, mask in zip(context, masks, strict=True))
        stops.append(stop)
        return original(self, context, max_length, stop, **how)

    monkeypatch.setattr(type(lm), "_model_generate", spied)
    texts = complete(lm, sets, 2)
    items = [item for s in sets for item in s.test[:2]]
    assert [text["prompt"] for text in texts] == [item.asked for item in items]
    assert sorted(read) == sorted(said(loaded, item.asked) for item in items)
    assert all("<|im_end|>" in stop and "\n" not in stop for stop in stops)
    read.clear()
    stops.clear()
    questions = build_questions(recipe, sets[:1], loaded.tokenizer, tmp_path / "items", [])
    rouge = {name: task for name, task in questions.test.tasks.items() if name == "forget.qa.rouge"}
    evaluate(
        lm,
        replace(questions.test, tasks=rouge, info={n: questions.test.info[n] for n in rouge}),
        model_name="p",
        bootstrap=0,
    )
    assert sorted(read) == sorted(said(loaded, item.asked) for item in sets[0].test)
    assert all("<|im_end|>" in stop and "\n" not in stop for stop in stops)


def test_attacks_ask_in_the_template(chatml: Path, tmp_path: Path) -> None:
    recipe, loaded, sets = arena(tmp_path, chatml)
    for probe in ("paraphrase", "prefix", "template"):
        for name, items in wordings(probe, "qa", sets[0].test).items():  # type: ignore[arg-type]
            for item, before in zip(items, sets[0].test, strict=True):
                assert before.asked.rstrip("?") in item.asked, name
                assert item.asked != before.asked
                assert item.prompt == loaded.tokenizer.decode(said(loaded, item.asked))
    shown = wordings("few_shot", "qa", sets[0].test, [replace(sets[0], role="retain")])
    assert all(item.prompt.count("<|im_start|>user") == 1 for items in shown.values() for item in items)
    judge = Judge(sets[0], sets[0].test, loaded.tokenizer, tmp_path / "judged", recipe)
    lm = judge.lm(loaded.model)
    for item, doc in zip(sets[0].test, judge.docs(), strict=True):
        assert lm.tok_encode(doc["prompt"]) == said(loaded, item.asked)
    best, greedy, texts = sample(loaded.model, judge, 2, 1.0, 0)
    assert len(best.values) == len(greedy.values) == len(texts) == len(sets[0].test)
    assert not any("<|im_end|>" in text for several in texts for text in several)


@pytest.mark.parametrize("teacher", ["other", "blank"])
def test_the_ignorant_teacher_is_asked_in_the_template(teacher: str, chatml: Path, tmp_path: Path) -> None:
    _, loaded, sets = arena(tmp_path, chatml)
    how = IgnoranceSpec.model_validate({"teacher": teacher})
    found = ignorant(sets[0], loaded.tokenizer, TrainSpec(max_length=128, steps=1), how)
    prompts = {item.asked: said(loaded, item.asked) for item in sets[0].train}
    blank = said(loaded, "")
    learned = encode(sets[0].train, "qa", loaded.tokenizer, 128)
    assert len(found.rows) == len(learned)
    for row in learned:
        answer = [label for label in row.labels if label != IGNORE]
        for (other,) in found.rows[row.input_ids, row.labels]:
            before = list(other.input_ids[: len(other.input_ids) - len(answer)])
            assert list(other.input_ids[len(before) :]) == answer
            assert before == blank if teacher == "blank" else before in prompts.values()
            assert other.input_ids != row.input_ids


def test_only_forget_sets_are_asked_in_both_wordings(chatml: Path, tmp_path: Path) -> None:
    retain = {"kind": "qa", "path": "near.jsonl"}
    lines = [{"question": f"What is {n}?", "answer": f"No {n}."} for n in range(20)]
    (tmp_path / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), "utf-8")
    recipe, loaded, sets = arena(tmp_path, chatml, retain=[retain])
    assert [s.name for s in plainly(sets)] == ["qa", "qa@plain", "mcq", "mcq@plain", "near"]
    questions = build_questions(recipe, sets, loaded.tokenizer, tmp_path / "items", [])
    assert not any("@" in info.name for info in questions.validation.info.values())
