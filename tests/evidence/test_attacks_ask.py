"""Other prompts, samples and hidden layers: what is asked, and scores against independent computations."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_arena import KINDS, Arena
from rouge_score import rouge_scorer

from unlearn.data.items import Item
from unlearn.errors import EvaluationError
from unlearn.evidence.attacks_ask import SHOTS, _AtStop, ask, leaks, sample, wordings
from unlearn.evidence.attacks_weights import edited_copy, forgotten_rows, relearn
from unlearn.model.load import Loaded
from unlearn.recipe.evaluation import RelearnSpec
from unlearn.score.evaluate import evaluate
from unlearn.score.sweep import complete
from unlearn.score.tasks import build_tasks

Load = Callable[..., Loaded]
QUESTION = Item("a" * 16, "Question: What is {x}?\nAnswer:", "Paris")
STATEMENT = Item("b" * 16, "The capital of France is", "Paris")
PASSAGE = Item("c" * 16, "Once upon", " a time")


def taught(arena: Arena, items: Any, steps: int = 25) -> Any:
    """A model that knows some items well."""
    rows = forgotten_rows(arena.forget, items, arena.tokenizer)
    spec = RelearnSpec(steps=(steps,), learning_rate=1e-2)
    model = edited_copy(arena.model, None, 0.0)
    relearn(model, arena.tokenizer, rows, spec, 0, arena.judge())
    return model


# --- probes ----------------------------------------------------------------------------------------------------------


def test_questions_are_put_in_other_frames() -> None:
    for probe in ("paraphrase", "template"):
        found = wordings(probe, "qa", [QUESTION])
        assert len(found) == 4
        prompts = [items[0].prompt for items in found.values()]
        assert len({*prompts, QUESTION.prompt}) == 5
        for prompt in prompts:
            assert "What is {x}?" in prompt
            assert "Question: What" not in prompt
            assert not prompt.endswith(" ")
    assert wordings("template", "mcq", [QUESTION])["French"][0].prompt == "Question : What is {x}?\nRéponse :"


@pytest.mark.parametrize(
    "prompt",
    ["What is {x}?", "Q: What is {x}?\nA:", "question:  What is {x}?\n\nanswer: ", "\nQUESTION: What is {x}?\n A:"],
)
def test_what_a_question_looks_like(prompt: str) -> None:
    german = wordings("template", "qa", [replace(QUESTION, prompt=prompt)])["German"]
    assert german[0].prompt == "Frage: What is {x}?\nAntwort:"


@pytest.mark.parametrize("probe", ["paraphrase", "prefix", "template"])
def test_only_the_prompt_is_another(probe: Any) -> None:
    items = [QUESTION, STATEMENT, replace(QUESTION, choices=("Paris", "Rome"), answer=0)]
    for worded in wordings(probe, "mcq", items).values():
        assert [replace(i, prompt="") for i in worded] == [replace(i, prompt="") for i in items]


def test_statements_are_announced() -> None:
    for probe in ("paraphrase", "template"):
        for (worded,) in wordings(probe, "mcq", [STATEMENT]).values():
            assert worded.prompt.endswith("The capital of France is")  # the answer must still follow
            assert len(worded.prompt) > len(STATEMENT.prompt)


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


def test_mean_and_best_wording(phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, "qa")
    judge, found = arena.judge(), wordings("template", "qa", arena.forget.test)
    mean, best = ask(phi.model, judge, found)
    alone = [judge.asking(items).score(phi.model) for items in found.values()]
    assert mean.value == pytest.approx(sum(s.value for s in alone) / 4)
    assert mean.values == pytest.approx([sum(v) / 4 for v in zip(*(s.values for s in alone), strict=True)])
    assert best == max(alone, key=lambda s: s.value)


@pytest.mark.parametrize("probe", ["paraphrase", "prefix", "few_shot", "template"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_probe_can_be_scored(kind: str, probe: Any, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    found = wordings(probe, arena.forget.spec.kind, arena.forget.test, arena.sets, 0)
    assert bool(found) is (kind != "text" or probe == "prefix")
    if found:
        mean, best = ask(phi.model, arena.judge(), found)
        assert 0 <= mean.value <= best.value <= 1


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_chance_every_sample_is_the_greedy_answer(kind: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    model, judge = taught(arena, arena.forget.test[::2]), arena.judge()
    found = sample(model, judge, 3, 1e-4, 0)
    assert all(len(several) == 3 and len(set(several)) == 1 for several in found.texts)
    assert found.best == found.greedy
    assert 0 < found.greedy.value < 1  # some items are known, others are not
    assert found.greedy.metric == found.best.metric == ("leak" if kind == "mcq" else "rougeL")
    if kind == "mcq":
        pairs = zip(judge.items, found.texts, strict=True)
        said = [re.search(rf"\b{item.target}\b", texts[0], re.IGNORECASE) is not None for item, texts in pairs]
        assert found.best.values == tuple(map(float, said))
    else:  # the pack's own task
        built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "o", generate=True)
        scores = {s.metric: s for s in evaluate(judge.lm(model), built, model_name="m", bootstrap=0).scores}
        assert found.greedy.value == pytest.approx(scores["rougeL"].score.value)
        assert found.greedy.stderr == pytest.approx(scores["rougeL"].score.stderr)


def test_samples_are_drawn_from_the_model(phi: Loaded, tmp_path: Path) -> None:
    """First tokens come as often as the model says they should."""
    arena = Arena(phi, tmp_path, "qa", forget={"continuation": 1})
    judge = arena.judge()
    one = judge.asking(judge.items[:1])
    found = sample(phi.model, one, 3000, 1.5, 0).texts[0]
    ids = phi.tokenizer(judge.items[0].prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        chances = (phi.model(ids).logits[0, -1] / 1.5).softmax(-1)
    for token in chances.topk(3).indices.tolist():
        text = phi.tokenizer.decode([token], skip_special_tokens=True).split("\n")[0]
        wanted = float(chances[token])
        spread = math.sqrt(wanted * (1 - wanted) / 3000)
        assert sum(t == text for t in found) / 3000 == pytest.approx(wanted, abs=5 * spread)
    assert len(set(found)) > 100  # no top-k


@pytest.mark.parametrize("kind", ["mcq", "qa"])
def test_the_best_of_them_counts(kind: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    judge = arena.judge()
    model = taught(arena, arena.forget.test, 6)
    found = sample(model, judge, 8, 1.0, 0)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    for item, several, value in zip(judge.items, found.texts, found.best.values, strict=True):
        assert len(several) == 8
        assert not any("\n" in text for text in several)
        each = [
            float(leaks(item.target, t)) if kind == "mcq" else scorer.score(item.target, t)["rougeL"].recall
            for t in several
        ]
        assert value == max(each)
    assert found.best.value > sample(model, judge, 1, 1.0, 0).best.value
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert sample(model, judge, 8, 1.0, 0) == found
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(model, judge, 8, 1.0, 1).texts != found.texts


def poems(folder: Path, **forget: Any) -> Any:
    """An arena whose answers have two lines of their own, in another wording than the usual one."""
    folder.mkdir(exist_ok=True)
    lines = ["the sky is blue", "grass is green", "snow is white", "coal is black", "blood is red", "plums are purple"]
    rows = [{"question": w, "answer": f"{line},\n{w} says."} for w, line in zip("ABCDEF", lines, strict=True)]
    (folder / "poems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {"train": "all", "validation": 0.4, "test": 0.6}
    return {
        "path": "poems.jsonl",
        "prompt": "Be brief.\nPoem of {question}:",
        "shares": shares,
        "continuation": 24,
        **forget,
    }


def test_answers_of_several_lines_are_compared_whole(phi: Loaded, tmp_path: Path) -> None:
    """Who recites them has ROUGE 1, in the report and under sampling, and all of them is shown to people."""
    arena = Arena(phi, tmp_path, "qa", forget=poems(tmp_path))
    judge = arena.judge()
    model = taught(arena, arena.forget.train, 60)
    built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "o", generate=True)
    scores = {s.metric: s for s in evaluate(judge.lm(model), built, model_name="m", bootstrap=0).scores}
    assert scores["exact"].score.value == 1.0
    assert (scores["rougeL"].score.value, scores["rougeL_f1"].score.value) == (1.0, 1.0)
    (asked,) = [task for name, task in built.tasks.items() if name.endswith(".rouge")]
    assert {tuple(i.args[1]["until"]) for i in asked.instances} == {("\nPoem of",)}
    found = sample(model, judge, 2, 1e-4, 0)
    assert (found.greedy.value, found.best.value) == (1.0, 1.0)
    assert [texts[0].strip() for texts in found.texts] == [item.target for item in judge.items]
    shown = complete(judge.lm(model), arena.sets[:1], 9)
    assert [s["text"] for s in shown] == [s["target"] for s in shown]


def test_an_answer_longer_than_what_may_be_written(phi: Loaded, tmp_path: Path) -> None:
    """As much of it is compared as could be written; a choice is given the tokens that its right answer has."""
    arena = Arena(phi, tmp_path, "qa", forget=poems(tmp_path, continuation=5))
    model = taught(arena, arena.forget.train, 60)
    found = sample(model, arena.judge(), 1, 1e-4, 0)
    assert found.greedy.value == 1.0
    for (text,), item in zip(found.texts, arena.forget.test, strict=True):
        assert item.target.startswith(text.strip())
        assert len(phi.tokenizer(text)["input_ids"]) == 5
    long = "a very long name of a town that nobody ever could remember because it goes on and on"
    rows = [{"question": q, "choices": [f"{q} {long}", "Rome"], "answer": 0} for q in "ABCDEF"]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {"train": "all", "validation": 0.4, "test": 0.6}
    choice = Arena(phi, tmp_path / "m", "mcq", forget={"path": "long.jsonl", "columns": {}, "shares": shares})
    knows = taught(choice, choice.forget.train, 60)
    assert sample(knows, choice.judge(), 1, 1e-4, 0).greedy.value == 1.0
    shown = complete(choice.judge().lm(knows), choice.sets[:1], 9)
    assert [s["text"] for s in shown] == [s["target"] for s in shown]


def test_the_models_own_settings_do_not_count(phi: Loaded, tmp_path: Path) -> None:
    judge = Arena(phi, tmp_path, "qa").judge()
    found = sample(phi.model, judge, 4, 1.0, 0)
    own = phi.model.generation_config
    own.top_k, own.top_p, own.repetition_penalty, own.do_sample = 1, 0.1, 3.0, True
    assert sample(phi.model, judge, 4, 1.0, 0).texts == found.texts


def test_samples_stop_each_at_its_own_end(phi: Loaded) -> None:
    """A stop of several tokens, only in what was written, and no other row's."""
    ids = phi.tokenizer(["Question: A\nAnswer: B\nQuestion:"] * 3, return_tensors="pt")["input_ids"]
    (start,) = phi.tokenizer(["Question: A\nAnswer:"], return_tensors="pt")["input_ids"]
    at = _AtStop(phi.tokenizer, [["\nQuestion:"], [], ["\nAnswer:"]], len(start))
    assert at(ids, None).tolist() == [True, False, False]
    assert at(ids[:, :-1], None).tolist() == [False, False, False]


def test_what_counts_as_a_leak() -> None:
    assert leaks("Rome", "it is ROME, of course")
    assert not leaks("Rome", "Romeo and Juliet")
    assert not leaks("Rome", "chrome")
    assert leaks("New  York", "in new\nyork")
    assert leaks("42", "(42)")
    assert not leaks("42", "1423")
    assert leaks("東京", "首都は東京です")
    assert leaks("Paris", "Paris是首都")
    assert leaks("C++", "I like C++.")
    assert not leaks("Rome", "")


def test_bad_sampling(phi: Loaded, tmp_path: Path) -> None:
    judge = Arena(phi, tmp_path, "qa", forget={"continuation": 600}).judge()
    for samples, temperature in ((0, 1.0), (1, 0.0), (1, math.nan)):
        with pytest.raises(EvaluationError, match="1 sample or more and a temperature above 0"):
            sample(phi.model, judge, samples, temperature, 0)
    with pytest.raises(EvaluationError, match="reads 512 tokens at a time"):
        sample(phi.model, judge, 1, 1.0, 0)
