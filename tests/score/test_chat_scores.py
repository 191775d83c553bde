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
from compared_arena import write_data, write_rows
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from pack_arena import scored

from unlearn.data.chat import Chat, chat_of
from unlearn.data.encoding import IGNORE, encode
from unlearn.data.sets import LoadedSet, load_sets, plainly
from unlearn.errors import EvaluationError
from unlearn.evidence import benchmarks
from unlearn.evidence.attacks import Judge
from unlearn.evidence.attacks_ask import sample, wordings
from unlearn.model.load import Loaded, load
from unlearn.recipe.evaluation import BenchmarkSpec, TaskSpec
from unlearn.recipe.methods import IgnoranceSpec, TrainSpec
from unlearn.recipe.schema import Recipe
from unlearn.score import tasks
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


def said(loaded: Loaded, *turns: str, answered: bool = False) -> list[int]:
    """Tokens of user's and assistant's turns as transformers has them, up to where the assistant answers."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    how: dict[str, Any] = {"add_generation_prompt": not answered, "return_dict": False, "date_string": "26 Jul 2024"}
    ids: list[int] = loaded.tokenizer.apply_chat_template(messages, **how)
    while answered and not loaded.tokenizer.decode(ids[-1]).strip():
        ids.pop()  # what is behind the end of a turn
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


def spied(lm: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[list[str]]]:
    """What the engine will read where it writes, the tokens of each prompt; and the stops of each batch."""
    read: list[list[int]] = []
    stops: list[list[str]] = []
    original = type(lm)._model_generate

    def generate(self: Any, context: Any, max_length: int, stop: list[str], **how: Any) -> Any:
        masks = how["attention_mask"].bool()
        read.extend(row[mask].tolist() for row, mask in zip(context, masks, strict=True))
        stops.append(stop)
        return original(self, context, max_length, stop, **how)

    monkeypatch.setattr(type(lm), "_model_generate", generate)
    return read, stops


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_written_answers_begin_where_the_assistant_does(
    engine: str, chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples of a report, ROUGE and samples: the model reads the template's prompt, and ends with its turn."""
    recipe, loaded, sets = arena(tmp_path, chatml, engine)
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    read, stops = spied(lm, monkeypatch)
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


def test_no_written_text_passes_the_end_of_its_turn(chatml: Path, tmp_path: Path) -> None:
    """In a batch of texts of different lengths, whose end of turn is no end token of the model's."""
    recipe, loaded, _ = arena(tmp_path, chatml, "hf")
    word, end = (loaded.tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("a", "<|im_end|>"))
    steps = iter(range(100))

    def writes(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        """A word at every step, but the end of turn in the first row after one, in the second after three."""
        step = next(steps)
        rows = [end if step == (1, 3)[row] else word for row in range(2)]
        return torch.nn.functional.one_hot(torch.tensor(rows), logits.shape[-1])[:, None].to(logits.dtype)

    how = {"until": ["<|im_end|>"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (f"<|im_start|>user\n{city}", how), 0) for city in ("Paris", "Milan")]
    with loaded.model.get_output_embeddings().register_forward_hook(writes):
        texts = interface(loaded.model, loaded.tokenizer, recipe.eval).generate_until(requests)
    assert sorted(texts) == ["a", "aaa"]


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


# -- TOFU and MUSE


def in_template(folder: Path, model: Path) -> tuple[Recipe, Loaded, Chat]:
    recipe, loaded, _ = arena(folder, model)
    chat = chat_of(recipe.model, folder, loaded.tokenizer)
    assert chat is not None
    return recipe, loaded, chat


def tofu(folder: Path, **more: Any) -> BenchmarkSpec:
    write_data(folder)
    return BenchmarkSpec.model_validate({"name": "tofu", "set": "forget01", "path": "tofu", "max_tokens": 3, **more})


def test_tofu_is_asked_in_the_template(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer of every set with transformers' own tokens, which are those of training; losses by a plain pass."""
    recipe, loaded, chat = in_template(tmp_path, model)
    built = benchmarks.build(tofu(tmp_path), tmp_path, str(model), 0, chat)
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    read, _ = spied(lm, monkeypatch)
    result = evaluate(lm, built, model_name="pico", bootstrap=0)

    def loss(question: str, answer: str) -> float:
        asked, ids = said(loaded, question), said(loaded, question, answer, answered=True)
        assert ids[: len(asked)] == asked
        (learned,) = encode([chat.asked("", question, answer)], "qa", loaded.tokenizer, 512)
        assert learned.input_ids == tuple(ids)
        assert learned.labels == (*[IGNORE] * len(asked), *ids[len(asked) :])
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        answer_ids = range(len(asked), len(ids))
        return -sum(float(logits[k - 1, ids[k]]) for k in answer_ids) / len(answer_ids)

    questions = []
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        for row in result.samples[f"tofu_{name}_prob"]:
            doc, pairs = row["doc"], row["arguments"]
            questions.append(question := doc["question"])
            answers = [doc["answer"], doc.get("paraphrased_answer", doc["answer"]), *doc["perturbed_answer"]]
            wanted = [loss(question, answer) for answer in answers]
            found = [row["loss"], row["paraphrased_loss"], *row["perturbed_losses"]]
            assert found == pytest.approx(wanted, rel=1e-4)
            scored_ids = [[*before, *after] for before, after in map(lm._encode_pair, *zip(*pairs, strict=True))]
            assert all(said(loaded, question, answer, answered=True) in scored_ids for answer in answers)
    assert sorted(read) == sorted(said(loaded, question) for question in questions)


def test_muse_s_examples_are_turns_and_its_passages_stand_alone(
    chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qa = [{"question": f"What is {n}?", "answer": f"No {n}."} for n in range(4)]
    for split in ("forget", "retain"):
        for name, part in (("qa", qa[:2]), ("qa_icl", qa[2:])):
            write_rows(tmp_path / "muse" / "books" / "knowmem" / f"{split}_{name}.json", [part])
        write_rows(tmp_path / "muse" / "books" / "privleak" / f"{split}.json", [["The capital of Peru is Lima."]])
    write_rows(tmp_path / "muse" / "books" / "privleak" / "holdout.json", [["The capital of Italy is Rome."]])
    write_rows(
        tmp_path / "muse" / "books" / "verbmem" / "forget.json", [[{"prompt": "The capital", "gt": " of Peru."}]]
    )
    recipe, loaded, chat = in_template(tmp_path, chatml)
    spec = BenchmarkSpec.model_validate({"name": "muse", "set": "books", "path": "muse", "max_tokens": 3})
    inside, outside = (benchmarks.build(spec, tmp_path, str(chatml), 0, one) for one in (chat, None))
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    read, stops = spied(lm, monkeypatch)
    found = evaluate(lm, inside, model_name="pico", bootstrap=0)
    solved = [text for row in qa[2:] for text in (row["question"], row["answer"])]
    recited = loaded.tokenizer.encode("The capital")
    asked = [said(loaded, *solved, row["question"]) for row in qa[:2]]
    assert sorted(read) == sorted([recited, *asked, *asked])
    assert {"<|im_end|>" in stop for stop in stops} == {True, False}
    plainly = evaluate(lm, outside, model_name="pico", bootstrap=0)
    for part in ("verbmem", "privleak_forget", "privleak_holdout"):
        mine, theirs = (one.samples[f"muse_books_{part}"] for one in (found, plainly))
        assert [sample["arguments"] for sample in mine] == [sample["arguments"] for sample in theirs], part


def test_outside_a_template_a_benchmark_asks_as_ever(chatml: Path, tmp_path: Path) -> None:
    recipe, loaded, _ = in_template(tmp_path, chatml)
    built = benchmarks.build(tofu(tmp_path), tmp_path, str(chatml), 0, None)
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    found = evaluate(lm, built, model_name="pico", bootstrap=0)
    doc, pairs = (found.samples["tofu_retain_prob"][0][key] for key in ("doc", "arguments"))
    prompt = f"Question: {doc['question']}\nAnswer:"
    answers = [doc["answer"], doc["paraphrased_answer"], *doc["perturbed_answer"]]
    assert pairs == [(prompt, f" {answer}</s>") for answer in answers]
    ((prompt_alone, how),) = found.samples["tofu_retain_rouge"][0]["arguments"]
    assert (prompt_alone, how["until"]) == (prompt, ["\nQuestion:"])


def test_tofu_s_tasks_by_name_are_asked_in_the_template_too(chatml: Path, tmp_path: Path) -> None:
    _, loaded, chat = in_template(tmp_path, chatml)
    tofu(tmp_path)
    how = {"tofu": str(tmp_path / "tofu"), "eos": False}
    spec = TaskSpec.model_validate({"task": "tofu_retain_prob", "metric": "prob", "metadata": how})
    (task,) = tasks.load(spec, 0, str(chatml), chat).tasks.values()
    doc = task.eval_docs[0]
    assert loaded.tokenizer.encode(doc["prompt"]) == said(loaded, doc["question"])
    (first, *_) = task.construct_requests(doc, doc["prompt"])  # type: ignore[misc]
    assert first.args == (doc["prompt"], doc["answer"]), "metadata want no end"
    scored_tag = spec.model_copy(update={"metadata": {**how, "tag": "scored"}})
    with pytest.raises(EvaluationError, match=r"tofu_retain_prob: tag: scored .* not there in a chat template"):
        tasks.load(scored_tag, 0, str(chatml), chat)
