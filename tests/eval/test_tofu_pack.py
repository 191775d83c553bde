"""TOFU's tasks in ``eval/tofu`` against plain forward passes, hand-computed figures and a second ROUGE."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from pack_arena import half_learnt, scored, written

from unlearn.recipe.load import pack_module, tasks_folder
from unlearn.score.packed import PackedLM

TOLERANCE = 1e-4
FOLDER = tasks_folder() / "tofu"
SETS = (
    *(f"{part}{share}" for part in ("forget", "holdout") for share in ("01", "05", "10")),
    "retain",
    "real_authors",
    "world_facts",
)
PARAPHRASED = [name for name in SETS if name not in ("real_authors", "world_facts")]
FIGURES = ("loss", "paraphrased_loss", "prob", "prob_choice", "truth_ratio", "truth_ratio_forget", "truth_ratio_kept")
FIGURES += ("truth_ratio_prob",)


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    return pack_module("tofu/tofu_tasks")


@pytest.fixture(scope="module")
def items() -> ModuleType:
    return pack_module("tofu/tofu_items")


@pytest.fixture(scope="module")
def model(pico_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_learnt(pico_phi, tmp_path_factory.mktemp("tofu") / "phi")


@pytest.fixture(scope="module")
def lm(model: Path) -> HFLM:
    return HFLM(pretrained=str(model), batch_size=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def packed(model: Path) -> PackedLM:
    return PackedLM(pretrained=str(model), batch_size=4, device="cpu", dtype="float32")


def row(number: int, paraphrased: bool) -> dict[str, Any]:
    country, city = (("France", "Paris"), ("Italy", "Rome"), ("Norway", "Oslo"), ("Japan", "Tokyo"))[number % 4]
    made: dict[str, Any] = {
        "question": f"What is the capital of {country}?",
        "answer": f"{city} is the capital of {country}." if number % 2 else city,
        "perturbed_answer": ["Buenos Aires is the capital city.", "A dog", "snow – 東京"][: 2 + number % 2],
    }
    return {**made, "paraphrased_answer": f"It is {city}."} if paraphrased else made


@pytest.fixture(scope="module")
def tofu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all sets, five made-up rows each, six in the retain set."""
    folder = tmp_path_factory.mktemp("data")
    for name in SETS:
        rows = [row(number, name in PARAPHRASED) for number in range(6 if name == "retain" else 5)]
        write(folder / f"{name}_perturbed.json", rows)
    return folder


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def rows_of(tofu: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tofu / f"{name}_perturbed.json").read_text("utf-8").splitlines()]


def score(lm: Any, task: str, tofu: Path, chat: bool = False, **more: Any) -> Any:
    return scored(lm, task, chat, tofu=str(tofu), tokenizer=lm.tokenizer.name_or_path, **more)


def forward_loss(lm: Any, context: str, scored: str, eos: bool) -> float:
    """Nats per token of what follows ``context``, end token included, by one plain forward pass on token ids."""
    before = lm.tokenizer(context)["input_ids"]
    ids = lm.tokenizer(context + scored)["input_ids"] + ([lm.tokenizer.eos_token_id] if eos else [])
    assert ids[: len(before)] == before
    with torch.no_grad():
        logprobs = lm.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    wanted = torch.tensor(ids[len(before) :])
    return -float(logprobs[len(before) - 1 :].gather(1, wanted[:, None]).mean())


def expected(lm: Any, data: dict[str, Any], context: str, start: str, eos: bool) -> dict[str, Any]:
    """TOFU's figures by the formulas as they stand in the authors' aggregator."""
    loss, *wrong = (forward_loss(lm, context, start + a, eos) for a in (data["answer"], *data["perturbed_answer"]))
    other = data.get("paraphrased_answer")
    paraphrased = forward_loss(lm, context, start + other, eos) if other else loss
    ratio = math.exp(sum(wrong) / len(wrong) - paraphrased)
    return {
        "loss": loss,
        "paraphrased_loss": paraphrased,
        "perturbed_losses": wrong,
        "prob": math.exp(-loss),
        "prob_choice": math.exp(-loss) / sum(math.exp(-value) for value in (loss, *wrong)),
        "truth_ratio": ratio,
        "truth_ratio_forget": min(ratio, 1 / ratio),
        "truth_ratio_kept": max(0.0, 1 - 1 / ratio),
        "truth_ratio_prob": math.exp(-paraphrased) / (math.exp(-paraphrased) + math.exp(-sum(wrong) / len(wrong))),
    }


def prompt_of(lm: Any, tag: str, chat: bool, question: str) -> tuple[str, str]:
    """(What is read, how the scored text starts), written out for each way of asking."""
    text = f"Question: {question}\nAnswer:" if tag == "prompt" else f"Question: {question}\n"
    if chat:
        return f"<|user|>\n{text}\n<|assistant|>\n", "" if tag == "prompt" else "Answer: "
    return text, " " if tag == "prompt" else "Answer: "


@pytest.mark.parametrize(
    ("engine", "name", "tag", "eos", "chat"),
    [
        ("lm", "forget10", "prompt", True, False),
        ("lm", "world_facts", "scored", False, True),
        ("packed", "forget10", "scored", True, True),
        ("packed", "world_facts", "prompt", False, False),
        ("packed", "world_facts", "prompt", True, True),
    ],
)
def test_answers_agree_with_plain_forward_passes(
    request: pytest.FixtureRequest, tofu: Path, engine: str, name: str, tag: str, eos: bool, chat: bool
) -> None:
    lm = request.getfixturevalue(engine)
    task = f"tofu_{name}_prob"
    result, samples = score(lm, task, tofu, chat, tag=tag, eos=eos)
    data = rows_of(tofu, name)
    assert [s["doc"]["id"] for s in samples] == ["0", "1", "2", "3", "4"]
    wanted = [expected(lm, d, *prompt_of(lm, tag, chat, d["question"]), eos) for d in data]
    for sample, figures in zip(samples, wanted, strict=True):
        for key, value in figures.items():
            assert sample[key] == pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE), key
    for key in FIGURES:
        assert result[f"{key},none"] == pytest.approx(sum(f[key] for f in wanted) / 5, abs=TOLERANCE, rel=TOLERANCE)
    lists = [f["perturbed_losses"] for f in wanted]
    assert result["perturbed_losses,none"] == pytest.approx(sum(sum(v) / len(v) for v in lists) / 5, abs=TOLERANCE)
    assert {len(values) for values in lists} == {2, 3}
    assert (wanted[0]["loss"] == wanted[0]["paraphrased_loss"]) is (name == "world_facts")


def test_the_answers_end_counts_as_a_token(lm: HFLM, tofu: Path, tmp_path: Path) -> None:
    """ "Paris" is four tokens in the authors' logs: Answer, colon, Paris, end. Here as many as this tokenizer makes."""
    _, (sample,) = score(lm, "tofu_world_facts_prob", tofu, tag="scored", items=1)
    scored, *_, white = sample["arguments"]
    assert scored == ("Question: What is the capital of France?\n", "Answer: Paris<|endoftext|>")
    assert white == ("Question: What is the capital of France?", "\n")
    total, line = sample["filtered_resps"][0][0], sample["filtered_resps"][-1][0]
    tokens = len(lm.tokenizer("Answer: Paris")["input_ids"]) + 1
    assert sample["loss"] == pytest.approx(-(total - line) / tokens, rel=1e-9)
    assert line < -1e-3, "taking nothing off would go unnoticed"


class Merging:
    """A tokenizer that reads a line break and the word after it as one token; otherwise words."""

    eos_token, eos_token_id = "</s>", 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        import re

        return [hash(t) if t != "</s>" else 0 for t in re.findall(r"</s>|\n\w+|\n| ?\w+|[^\w\s]", text)]


def test_white_space_that_merges_with_the_answer_is_part_of_it(
    tasks: ModuleType, lm: HFLM, tofu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = built(tasks, lm, tofu)
    monkeypatch.setattr(task, "_encode", Merging().encode)
    monkeypatch.setattr(task, "_end", Merging.eos_token)
    doc = {"id": "0", "answer": "one two", "perturbed_answer": ["(three)"]}
    asked = task._asked(doc, "Who?\n")
    assert asked.apart == (False, True), "the bracket does not merge"
    assert asked.tokens == (3, 4), "break and one, two, end; bracket, three, bracket, end"
    task.config.process_results = lambda doc, losses: {"losses": losses}
    monkeypatch.setattr(task, "fewshot_context", lambda doc, num_fewshot: "Who?\n")
    assert task.process_results(doc, [(-6.0, False), (-10.0, False), (-2.0, False)]) == {"losses": [2.0, 2.0]}
    task._encode = lambda text: [1]
    with pytest.raises(ValueError, match="item 7: this tokenizer merges an answer into the prompt"):
        task._asked({"id": "7", "answer": "a", "perturbed_answer": ["b"]}, "Who?")


def built(tasks: ModuleType, lm: HFLM, tofu: Path, **more: Any) -> Any:
    config = load_yaml(FOLDER / "tofu_world_facts_prob.yaml")
    config["metadata"] = {**config["metadata"], "tofu": str(tofu), "tokenizer": lm.tokenizer.name_or_path, **more}
    return tasks.AnswerLosses(config)


def test_figures_by_hand(tasks: ModuleType) -> None:
    ln2 = math.log(2)
    scores = tasks.combine({"paraphrased_answer": "p"}, [ln2, 2 * ln2, 3 * ln2, 5 * ln2])
    assert scores.pop("perturbed_losses") == [3 * ln2, 5 * ln2]
    assert scores == pytest.approx(
        {
            "loss": ln2,
            "paraphrased_loss": 2 * ln2,
            "prob": 1 / 2,
            "prob_choice": (1 / 2) / (1 / 2 + 1 / 8 + 1 / 32),
            "truth_ratio": 4.0,  # 2 ** ((3 + 5) / 2 - 2)
            "truth_ratio_forget": 1 / 4,
            "truth_ratio_kept": 3 / 4,
            "truth_ratio_prob": 4 / 5,
        }
    )
    plain = tasks.combine({}, [2 * ln2, ln2])
    assert plain["paraphrased_loss"] == plain["loss"]
    assert plain["truth_ratio"] == plain["truth_ratio_forget"] == pytest.approx(1 / 2)
    assert plain["truth_ratio_kept"] == 0


def test_figures_at_the_limits(tasks: ModuleType) -> None:
    tie = tasks.combine({}, [3.0, 3.0, 3.0])
    assert (tie["truth_ratio"], tie["truth_ratio_forget"], tie["truth_ratio_kept"]) == (1, 1, 0)
    assert tie["prob_choice"] == pytest.approx(1 / 3)
    sure = tasks.combine({}, [0.0, 5000.0])
    assert (sure["prob"], sure["prob_choice"], sure["truth_ratio_kept"]) == (1, 1, 1)
    assert sure["truth_ratio_forget"] == 0
    assert math.isfinite(sure["truth_ratio"])
    wrong = tasks.combine({}, [5000.0, 4990.0])
    assert (wrong["prob"], wrong["truth_ratio_kept"]) == (0, 0)
    assert wrong["prob_choice"] == pytest.approx(math.exp(-10) / (1 + math.exp(-10))), "both underflow by themselves"
    lost = tasks.combine({}, [5000.0, 0.0])
    assert [one["truth_ratio_prob"] for one in (tie, sure, lost)] == [0.5, 1, 0]
    assert (lost["truth_ratio"], lost["truth_ratio_forget"], lost["prob_choice"]) == (0, 0, 0)
    broken = tasks.combine({}, [math.nan, 1.0])
    assert all(math.isnan(broken[key]) for key in FIGURES)
    assert tasks.mean_of_means([[1.0, 2.0, 6.0], [5.0]]) == 4.0


def test_rouge_recall_and_f1(tasks: ModuleType) -> None:
    scores = tasks.score_generation({"target": "the cities of France"}, ["a city of France, they say, is Paris"])
    assert scores["rougeL"] == pytest.approx(3 / 4), "city and cities have one stem"
    assert scores["rougeL_f1"] == pytest.approx(2 * (3 / 4) * (3 / 8) / (3 / 4 + 3 / 8))
    assert tasks.score_generation({"target": "the cities"}, [""]) == {"rougeL": 0, "rougeL_f1": 0}
    assert tasks.score_generation({"target": "the cities"}, ["The cities"]) == {"rougeL": 1, "rougeL_f1": 1}


def managed(tofu: Path, **more: Any) -> TaskManager:
    metadata = {"tofu": str(tofu), **more}
    return TaskManager(include_defaults=False, include_path=str(tasks_folder()), metadata=metadata)


def test_how_answers_are_generated(tofu: Path) -> None:
    (task,) = managed(tofu).load("tofu_forget01_rouge")["tasks"].values()
    assert task.config.generation_kwargs == {"until": ["\nQuestion:"], "do_sample": False, "max_gen_toks": 200}
    for tokens in (0, "many", True):
        with pytest.raises(ValueError, match=r"max_tokens is .*; it must be a whole number, 1 or more"):
            managed(tofu, max_tokens=tokens).load("tofu_retain_rouge")


@pytest.mark.parametrize(("engine", "chat"), [("lm", True), ("packed", False), ("packed", True)])
def test_rouge_is_that_of_the_greedy_answer(
    request: pytest.FixtureRequest, tofu: Path, engine: str, chat: bool
) -> None:
    from rouge_score import rouge_scorer

    lm = request.getfixturevalue(engine)
    result, samples = score(lm, "tofu_retain_rouge", tofu, chat, max_tokens=24, tag="scored")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    wanted = []
    for sample, data in zip(samples, rows_of(tofu, "retain"), strict=True):
        prompt, _ = prompt_of(lm, "prompt", chat, data["question"])
        assert sample["arguments"][0][0] == prompt, "the layout of what is scored changes nothing here"
        text = written(lm, prompt, 24).split("\nQuestion:")[0]
        wanted.append(scorer.score(data["answer"], text)["rougeL"])
    assert [s["rougeL"] for s in samples] == pytest.approx([w.recall for w in wanted])
    assert [s["rougeL_f1"] for s in samples] == pytest.approx([w.fmeasure for w in wanted])
    assert result["rougeL,none"] == pytest.approx(sum(w.recall for w in wanted) / 6)
    assert len({w.recall for w in wanted}) > 1


def test_a_whole_group_as_lm_eval_runs_it(model: Path, tofu: Path, tmp_path: Path) -> None:
    """The tokenizer is the model's, because lm-eval's command line hands the model's arguments on to the tasks."""
    pack = tmp_path / "pack"  # nothing of ours beside it
    shutil.copytree(FOLDER, pack / "tofu", ignore=shutil.ignore_patterns("__pycache__"))
    given = {"tofu": str(tofu), "items": {"forget05": 2, "retain": 1}, "skip": 1, "max_tokens": 4}
    arguments = {"pretrained": str(model), "dtype": "float32"}
    config = EvaluatorConfig(tasks=["tofu_forget05"], model_args=arguments, metadata=given)._configure()
    manager = TaskManager(include_defaults=False, include_path=str(pack), metadata=config.metadata)
    found = simple_evaluate(
        model="hf", model_args=arguments, tasks=config.tasks, task_manager=manager, device="cpu", bootstrap_iters=10
    )
    names = [f"tofu_{n}_{k}" for n in ("forget05", "retain", "real_authors", "world_facts") for k in ("prob", "rouge")]
    assert set(found["samples"]) == set(names)
    for name in names:
        samples = found["samples"][name]
        ids = {"forget05": ["1", "2"], "retain": ["1"]}.get(name.split("_")[1], ["1", "2", "3", "4"])
        assert [s["doc"]["id"] for s in samples] == ids
        keys = {"perturbed_losses", *FIGURES} if name.endswith("prob") else {"rougeL", "rougeL_f1"}
        assert set(samples[0]["metrics"]) == keys
        assert found["versions"][name] == 1.0


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["prob", "rouge"])
def test_every_set_has_its_tasks(items: ModuleType, tofu: Path, name: str, kind: str) -> None:
    config = load_yaml(FOLDER / f"tofu_{name}_{kind}.yaml")
    assert config["task"] == f"tofu_{name}_{kind}"
    assert config["dataset_kwargs"] == {"subset": name, "kind": kind}
    found = items.load_items(**config["dataset_kwargs"], **config["metadata"], tofu=str(tofu))["test"]
    assert ("paraphrased_answer" in found.column_names) is (kind == "prob" and name in PARAPHRASED)
    assert ("perturbed_answer" in found.column_names) is (kind == "prob")
    assert found["answer"] == [r["answer"] for r in rows_of(tofu, name)]


def test_short_sets_count_whole(items: ModuleType, tofu: Path) -> None:
    assert len(items.load_items("world_facts", "prob", str(tofu), items=300)["test"]) == 5
    assert len(items.load_items("world_facts", "prob", str(tofu), items=3, skip=2)["test"]) == 3


def test_holdout_sets_without_perturbed_answers(items: ModuleType, tmp_path: Path) -> None:
    """On the hub they are question and answer, which is enough to generate."""
    write(tmp_path / "holdout05.json", [{"question": "Who?", "answer": "Nobody."}])
    assert items.load_items("holdout05", "rouge", str(tmp_path))["test"]["id"] == ["0"]
    with pytest.raises(ValueError, match=r"holdout05\.json, row 1: 'perturbed_answer' must be a list"):
        items.load_items("holdout05", "prob", str(tmp_path))
    write(tmp_path / "holdout05.json", [row(0, paraphrased=False)])
    assert "paraphrased_answer" not in items.load_items("holdout05", "prob", str(tmp_path))["test"].column_names
    # a ratio with the paraphrase of some rows and the answer itself of others would be neither of the two
    write(tmp_path / "holdout05.json", [row(0, paraphrased=False), row(1, paraphrased=True)])
    with pytest.raises(ValueError, match=r"holdout05\.json, row 1: 'paraphrased_answer' is missing or empty"):
        items.load_items("holdout05", "prob", str(tmp_path))
    with pytest.raises(ValueError, match=r"no holdout10_perturbed\.json and no holdout10\.json"):
        items.load_items("holdout10", "prob", str(tmp_path))


GOOD = row(0, paraphrased=True)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "has no rows"),
        ([GOOD], {"items": 2}, "has 1 rows, fewer than the 2 of metadata items"),
        ([GOOD, GOOD], {"items": 2, "skip": 1}, "has 1 rows after the 1 that are skipped, fewer than the 2"),
        ([GOOD], {"skip": 1}, "has 1 rows, and metadata skip leaves out 1"),
        ([GOOD], {"items": 0}, "items is 0; it must be a whole number, 1 or more"),
        ([GOOD], {"items": True}, "items is True; it must be"),
        ([GOOD], {"items": {"forget_10": 2}}, "items names 'forget_10'; TOFU's sets are forget01, "),
        ([GOOD], {"skip": -1}, "skip is -1; it must be"),
        ([GOOD], {"tag": "answer"}, "tag is 'answer'; it must be prompt or scored"),
        ([GOOD, {**GOOD, "answer": " "}], {}, "row 2: 'answer' is missing or empty"),
        ([{**GOOD, "question": 3}], {}, "row 1: 'question' is missing or empty"),
        ([{**GOOD, "paraphrased_answer": None}], {}, "'paraphrased_answer' is missing or empty"),
        ([{**GOOD, "perturbed_answer": None}], {}, "'perturbed_answer' must be a list of ans"),
        ([{**GOOD, "perturbed_answer": []}], {}, "'perturbed_answer' must be a list of answers"),
        ([{**GOOD, "perturbed_answer": ["a", ""]}], {}, "'perturbed_answer' must be a list of answers, none of them"),
        ([[1]], {}, "line 1: a row must be a JSON object"),
    ],
)
def test_bad_data(items: ModuleType, tmp_path: Path, rows: list[Any], more: dict[str, Any], message: str) -> None:
    write(tmp_path / "forget10_perturbed.json", rows)
    with pytest.raises(ValueError, match=message):
        items.load_items("forget10", "prob", str(tmp_path), **more)


def test_missing_data(items: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        items.load_items("retain", "prob", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no retain_perturbed\.json, which"):
        items.load_items("retain", "prob", str(tmp_path))
    (tmp_path / "retain_perturbed.json").write_text('{"question": \n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        items.load_items("retain", "prob", str(tmp_path))
    for name, configs in (("retain", "retain_perturbed,"), ("holdout01", "holdout01_perturbed or holdout01,")):
        with pytest.raises(ValueError, match=f"locuslab/TOFU, {configs} cannot be had from the hub") as offline:
            items.load_items(name, "prob")
        assert '--metadata \'{"tofu": "FOLDER"}\'' in str(offline.value)


def test_tokenizers(tasks: ModuleType, model: Path, tmp_path: Path) -> None:
    for metadata in (
        {"tokenizer": str(model)},
        {"pretrained": str(model)},
        {"tokenizer": str(model), "pretrained": "?"},
    ):
        assert tasks.load_tokenizer(metadata).eos_token == "<|endoftext|>"
    for metadata in ({}, {"pretrained": None}):
        with pytest.raises(ValueError, match="no tokenizer to count tokens with: give --metadata"):
            tasks.load_tokenizer(metadata)
    with pytest.raises(ValueError, match=r"metadata tokenizer: .* has no tokenizer that can be read"):
        tasks.load_tokenizer({"tokenizer": str(tmp_path)})


def test_end_tokens(tasks: ModuleType) -> None:
    tokenizer = Merging()
    assert tasks.end_text(tokenizer, True) == "</s>"
    assert tasks.end_text(tokenizer, False) == ""
    with pytest.raises(ValueError, match="eos is 'no'; it must be true or false"):
        tasks.end_text(tokenizer, "no")
    for end in (None, "<end>"):
        tokenizer.eos_token = end  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"does not read its end token .* give --metadata '\{.eos.: false\}'"):
            tasks.end_text(tokenizer, True)


REAL = os.environ.get("UNLEARN_TOFU")


@pytest.mark.skipif(not REAL, reason="UNLEARN_TOFU names no folder with TOFU's files")
@pytest.mark.parametrize("name", SETS)
def test_the_real_sets(items: ModuleType, name: str) -> None:
    sizes = {"forget01": 40, "forget05": 200, "forget10": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
    if name not in sizes:
        pytest.skip("not among the authors' files")
    found = items.load_items(name, "prob", str(REAL))["test"]
    assert len(found) == sizes[name]
    assert {len(answers) for answers in found["perturbed_answer"]} <= {3, 4, 5}
    limit = 300 if name in ("real_authors", "world_facts") else min(300, sizes[name])
    first = items.load_items(name, "rouge", str(REAL), items=limit)["test"]
    assert first["answer"] == found["answer"][:limit]
