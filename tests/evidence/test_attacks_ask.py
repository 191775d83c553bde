"""Other prompts and samples: what is asked, and scores against independent computations."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_arena import KINDS, Arena
from compared_arena import write_rows
from rouge_score import rouge_scorer

from unlearn.data.items import Item, among_others
from unlearn.data.sets import counterparts
from unlearn.errors import EvaluationError
from unlearn.evidence.attacks import ATTACKS
from unlearn.evidence.attacks_ask import SHOTS, leaks, sample, wordings
from unlearn.model.load import Loaded
from unlearn.score.evaluate import evaluate
from unlearn.score.scorer import complete
from unlearn.score.tasks import build_tasks

PROBES = ("paraphrase", "prefix", "few_shot", "template")
QUESTION = Item("a" * 16, "Question: What is {x}?\nAnswer:", "Paris")
STATEMENT = Item("b" * 16, "The capital of France is", "Paris")
PASSAGE = Item("c" * 16, "Once upon", " a time")


# --- probes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["paraphrase", "template"])
def test_questions_and_statements_are_put_in_other_frames(probe: Any) -> None:
    found = wordings(probe, "mcq", [QUESTION, STATEMENT])
    assert len({QUESTION.prompt, *(question.prompt for question, _ in found.values())}) == 5
    for question, statement in found.values():
        assert "What is {x}?" in question.prompt
        assert "Question: What" not in question.prompt
        assert not question.prompt.endswith(" ")
        assert statement.prompt.endswith("The capital of France is")  # the answer must still follow
        assert len(statement.prompt) > len(STATEMENT.prompt)


@pytest.mark.parametrize(
    "prompt",
    ["What is {x}?", "Q: What is {x}?\nA:", "question:  What is {x}?\n\nanswer: ", "\nQUESTION: What is {x}?\n A:"],
)
def test_what_a_question_looks_like(prompt: str) -> None:
    german = wordings("template", "qa", [replace(QUESTION, prompt=prompt)])["German"]
    assert german[0].prompt == "Frage: What is {x}?\nAntwort:"


def test_a_scene_before_a_passage() -> None:
    found = wordings("prefix", "text", [PASSAGE])
    assert len(found) == 3
    assert all(i.prompt.endswith("\n\nOnce upon") and i.target == " a time" for (i,) in found.values())
    assert not any(wordings(probe, "text", [PASSAGE]) for probe in ("paraphrase", "template", "few_shot"))


def test_solved_examples(phi: Loaded, tmp_path: Path) -> None:
    retain = [{"path": "far.jsonl", "kind": "qa", "name": "far", "shares": {"train": 1.0, "validation": 0, "test": 0}}]
    arena = Arena(phi, tmp_path, "qa", retain=retain)
    items = arena.forget.test
    assert not wordings("few_shot", "qa", items, arena.sets[:1]), "forget items are no examples"
    found = wordings("few_shot", "qa", items, arena.sets, seed=0)
    kept = {f"{i.prompt} {i.target}" for i in arena.sets[1].train}
    shown: list[str] = []
    for worded in found.values():
        for item, before in zip(worded, items, strict=True):
            *examples, asked = item.prompt.split("\n\n")
            assert asked == before.prompt
            assert set(examples) <= kept
        shown += examples
    assert len(found) == 2, "8 rows are two times 4"
    assert len(set(shown)) == len(shown) == 2 * SHOTS
    assert wordings("few_shot", "qa", items, arena.sets, seed=0) == found
    assert any(wordings("few_shot", "qa", items, arena.sets, seed=s) != found for s in range(1, 5))
    few = replace(arena.sets[1], train=arena.sets[1].train[:2])
    ((first, *_),) = wordings("few_shot", "mcq", items, [few]).values()  # other questions where there are none
    assert len(first.prompt.split("\n\n")) == 3


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("kind", ["qa", "text"])
def test_mean_and_best_wording(kind: str, probe: Any, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    scene = arena.scene(probes=[probe])
    if kind == "text" and probe != "prefix":
        assert ATTACKS[probe].settings(scene) is None
        return
    worded = wordings(probe, arena.forget.spec.kind, arena.forget.test, arena.sets, 0).values()
    assert ATTACKS[probe].settings(scene) == [[i.id, i.prompt] for items in worded for i in items]
    alone = [arena.judge().asking(items).score(phi.model).value for items in worded]
    found = [score.value for score in ATTACKS[probe].run(scene)]
    wanted = [sum(alone) / len(alone), max(alone)]
    assert found == pytest.approx(wanted if len(alone) > 1 else wanted[:1])
    assert ATTACKS[probe].settings(arena.scene(probes=[])) is None


# --- the same about others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mcq", "qa"])
def test_what_is_less_likely_after_every_prompt_comes_back_beside_others(
    kind: str, phi: Loaded, tmp_path: Path
) -> None:
    """Against the differences of plain log-likelihoods; and pushing an answer down everywhere changes nothing."""
    scene = Arena(phi, tmp_path, kind).scene()
    found = ATTACKS["contrast"].run(scene)
    assert [s.kind for s in found] == (["contrast"] if kind == "mcq" else ["none", "contrast"])
    items = scene.judge.items if kind == "mcq" else among_others(scene.judge.items)

    def logprob(prompt: str, answer: str) -> float:
        ids = phi.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        start = len(phi.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logprobs = phi.model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
        return float(logprobs.gather(1, ids[0, start:, None]).sum())

    right = plain = 0
    for item in items:
        others = counterparts(items, "Question: {question}")[item.id]
        asked = [[logprob(prompt, choice) for choice in item.choices] for prompt in (item.prompt, *others)]
        own, *beside = torch.tensor(asked, dtype=torch.float64)
        right += int((own - torch.stack(beside).mean(0)).argmax()) == item.answer
        plain += int(own.argmax()) == item.answer
    assert found[-1].value == pytest.approx(right / len(items))
    if kind == "qa":
        assert (found[0].metric, found[0].value) == ("acc", pytest.approx(plain / len(items)))


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_chance_every_sample_is_the_greedy_answer(kind: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    model, judge = arena.taught(arena.forget.test[::2]), arena.judge()
    best, greedy, texts = sample(model, judge, 3, 1e-4, 0)
    assert all(len(several) == 3 and len(set(several)) == 1 for several in texts)
    assert best == greedy
    assert 0 < greedy.value < 1  # some items are known, others are not
    assert greedy.metric == best.metric == ("leak" if kind == "mcq" else "rougeL")
    if kind == "mcq":
        pairs = zip(judge.items, texts, strict=True)
        said = [re.search(rf"\b{item.target}\b", text, re.IGNORECASE) is not None for item, (text, *_) in pairs]
        assert best.values == tuple(map(float, said))
    else:  # the pack's own task
        built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "o", generate=True)
        scores = {s.metric: s for s in evaluate(judge.lm(model), built, model_name="m", bootstrap=0).scores}
        assert greedy.value == pytest.approx(scores["rougeL"].score.value)
        assert greedy.stderr == pytest.approx(scores["rougeL"].score.stderr)


def test_samples_are_drawn_from_the_model(phi: Loaded, tmp_path: Path) -> None:
    """First tokens come as often as the model says they should, whatever the model's own settings."""
    own = phi.model.generation_config
    own.top_k, own.top_p, own.repetition_penalty, own.do_sample = 1, 0.1, 3.0, True
    judge = Arena(phi, tmp_path, "qa", forget={"continuation": 1}).judge()
    _, _, (texts,) = sample(phi.model, judge.asking(judge.items[:1]), 3000, 1.5, 0)
    ids = phi.tokenizer(judge.items[0].prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        chances = (phi.model(ids).logits[0, -1] / 1.5).softmax(-1)
    for token in chances.topk(3).indices.tolist():
        text = phi.tokenizer.decode([token], skip_special_tokens=True).split("\n")[0]
        wanted = float(chances[token])
        spread = math.sqrt(wanted * (1 - wanted) / 3000)
        assert sum(t == text for t in texts) / 3000 == pytest.approx(wanted, abs=5 * spread)
    assert len(set(texts)) > 100  # no top-k


@pytest.mark.parametrize("kind", ["mcq", "qa"])
def test_the_best_of_them_counts(kind: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    judge, model = arena.judge(), arena.taught(arena.forget.test, 6)
    found = sample(model, judge, 8, 1.0, 0)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    best, _, texts = found
    for item, several, value in zip(judge.items, texts, best.values, strict=True):
        assert len(several) == 8
        assert not any("\n" in text for text in several)
        each = [
            float(leaks(item.target, t)) if kind == "mcq" else scorer.score(item.target, t)["rougeL"].recall
            for t in several
        ]
        assert value == max(each)
    assert best.value > sample(model, judge, 1, 1.0, 0)[0].value
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert sample(model, judge, 8, 1.0, 0) == found
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(model, judge, 8, 1.0, 1)[2] != texts


def poems(folder: Path, **forget: Any) -> Any:
    """A forget set whose answers have two lines of their own, in another wording than the usual one."""
    lines = ["the sky is blue", "grass is green", "snow is white", "coal is black", "blood is red", "plums are purple"]
    rows = [{"question": w, "answer": f"{line},\n{w} says."} for w, line in zip("ABCDEF", lines, strict=True)]
    write_rows(folder / "poems.jsonl", rows)
    shares = {"train": "all", "validation": 0.4, "test": 0.6}
    prompt = "Be brief.\nPoem of {question}:"
    return {"path": "poems.jsonl", "prompt": prompt, "shares": shares, "continuation": 24, **forget}


def test_answers_of_several_lines_are_compared_whole(phi: Loaded, tmp_path: Path) -> None:
    """Who recites them has ROUGE 1, in the report and under sampling, and all of them is shown to people."""
    arena = Arena(phi, tmp_path, "qa", forget=poems(tmp_path))
    judge, model = arena.judge(), arena.taught(arena.forget.train, 60)
    built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "o", generate=True)
    scores = {s.metric: s for s in evaluate(judge.lm(model), built, model_name="m", bootstrap=0).scores}
    assert [scores[name].score.value for name in ("exact", "rougeL", "rougeL_f1")] == [1.0, 1.0, 1.0]
    (asked,) = [task for name, task in built.tasks.items() if name.endswith(".rouge")]
    assert {tuple(i.args[1]["until"]) for i in asked.instances} == {("\nPoem of",)}
    best, greedy, found = sample(model, judge, 2, 1e-4, 0)
    assert (greedy.value, best.value) == (1.0, 1.0)
    assert [texts[0].strip() for texts in found] == [item.target for item in judge.items]
    shown = complete(judge.lm(model), arena.sets[:1], 9)
    assert [s["text"] for s in shown] == [s["target"] for s in shown]


def test_how_an_answer_reads_is_a_matter_of_the_model_it_is_shown_to(phi: Loaded, tmp_path: Path) -> None:
    """What one model writes, under another: against a plain pass and a slow loop."""
    lines = ["tick tock tick tock tick tock", "the sky is blue", "so so so so so so so", "grass is green"]
    lines += ["no no no no no no no", "snow is white"]
    rows = [{"question": w, "answer": line} for w, line in zip("ABCDEF", lines, strict=True)]
    write_rows(tmp_path / "lines.jsonl", rows)
    shares = {"train": "all", "validation": 0.3, "test": 0.7}
    arena = Arena(phi, tmp_path, "qa", forget={"path": "lines.jsonl", "shares": shares, "continuation": 24})
    model, pristine = arena.taught(arena.forget.train, 60), copy.deepcopy(phi.model)
    shown = complete(arena.judge().lm(model), arena.sets[:1], 9, lambda: arena.judge().lm(pristine))
    assert [s["text"] for s in shown] == [s["target"] for s in shown]
    for one in shown:
        ids = phi.tokenizer(f"{one['prompt']} {one['text']}", return_tensors="pt")["input_ids"]
        start = len(phi.tokenizer(one["prompt"])["input_ids"])
        with torch.no_grad():
            logprobs = pristine(ids).logits[0, :-1].double().log_softmax(-1)
        loss = -float(logprobs.gather(1, ids[0, 1:, None])[start - 1 :].mean())
        assert one["fluency"]["loss"] == pytest.approx(loss, rel=1e-4)
        written, again = ids[0, start:].tolist(), 0
        for n in range(len(written) - 3):
            again += written[n : n + 4] in [written[m : m + 4] for m in range(n)]
        assert one["fluency"]["repetition"] == pytest.approx(again / max(len(written) - 3, 1))
    assert max(one["fluency"]["repetition"] for one in shown) > 0
    assert min(one["fluency"]["repetition"] for one in shown) == 0


def test_an_answer_longer_than_what_may_be_written(phi: Loaded, tmp_path: Path) -> None:
    """As much of it is compared as could be written; a choice is given the tokens that its right answer has."""
    arena = Arena(phi, tmp_path, "qa", forget=poems(tmp_path, continuation=5))
    model = arena.taught(arena.forget.train, 60)
    _, greedy, found = sample(model, arena.judge(), 1, 1e-4, 0)
    assert greedy.value == 1.0
    for (text,), item in zip(found, arena.forget.test, strict=True):
        assert item.target.startswith(text.strip())
        assert len(phi.tokenizer(text)["input_ids"]) == 5
    long = "a very long name of a town that nobody ever could remember because it goes on and on"
    rows = [{"question": q, "choices": [f"{q} {long}", "Rome"], "answer": 0} for q in "ABCDEF"]
    write_rows(tmp_path / "m" / "long.jsonl", rows)
    shares = {"train": "all", "validation": 0.4, "test": 0.6}
    choice = Arena(phi, tmp_path / "m", "mcq", forget={"path": "long.jsonl", "columns": {}, "shares": shares})
    knows = choice.taught(choice.forget.train, 60)
    assert sample(knows, choice.judge(), 1, 1e-4, 0)[1].value == 1.0
    shown = complete(choice.judge().lm(knows), choice.sets[:1], 9)
    assert [s["text"] for s in shown] == [s["target"] for s in shown]


@pytest.mark.parametrize(
    ("answer", "text", "leaked"),
    [
        ("Rome", "it is ROME, of course", True),
        ("Rome", "Romeo and Juliet", False),
        ("Rome", "chrome", False),
        ("New  York", "in new\nyork", True),
        ("42", "(42)", True),
        ("42", "1423", False),
        ("東京", "首都は東京です", True),
        ("Paris", "Paris是首都", True),
        ("C++", "I like C++.", True),
        ("Rome", "", False),
    ],
)
def test_what_counts_as_a_leak(answer: str, text: str, leaked: bool) -> None:
    assert leaks(answer, text) is leaked


def test_more_tokens_than_the_model_reads(phi: Loaded, tmp_path: Path) -> None:
    judge = Arena(phi, tmp_path, "qa", forget={"continuation": 600}).judge()
    with pytest.raises(EvaluationError, match="reads 512 tokens at a time"):
        sample(phi.model, judge, 1, 1.0, 0)
