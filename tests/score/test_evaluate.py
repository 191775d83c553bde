"""Items files, tasks built once, and scores: against lm-eval alone, in process and on its command line."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_results_filenames, get_sample_results_filenames
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.data.items import Item
from unlearn.data.sets import MEMORY_TOKENS, LoadedSet, asked_back, at_prefixes, items_path, load_sets, write_items
from unlearn.errors import EvaluationError, RunFolderError
from unlearn.model.pico import corpus
from unlearn.recipe.data import DataSet, Split, SplitShares
from unlearn.recipe.load import tasks_folder
from unlearn.recipe.schema import Recipe
from unlearn.score import tasks as named_tasks
from unlearn.score.evaluate import EvalResult, evaluate, perplexity_stderr
from unlearn.score.tasks import TaskSet, build_tasks, kept_metrics

Sets = tuple[LoadedSet, ...]
ODD = "Naïve cafés – 東京 is 😀  far,\n\n\tand 12345 ... done. "


class Recording(HFLM):  # type: ignore[misc]
    """lm-eval's own model, which remembers the requests it was given."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.given: list[list[Instance]] = [*getattr(self, "given", []), list(requests)]
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: Any, **how: Any) -> list[tuple[float, bool]]:
        self.encoded: list[Any] = [*getattr(self, "encoded", []), requests]
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **how)
        return answers


@pytest.fixture
def lm(pico_phi: Path) -> Recording:
    model = AutoModelForCausalLM.from_pretrained(pico_phi).eval()
    return Recording(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(pico_phi), batch_size=8, device="cpu")


@pytest.fixture
def recipe(capitals: Callable[..., Path], tmp_path: Path) -> Recipe:
    lines = corpus()
    passages = [{"text": " ".join(lines[i : i + 4]) + "\n" + ODD} for i in range(0, 48, 4)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"path": "pico:phi"},
            "forget": {"path": str(capitals("near.jsonl", 0, 10)), "kind": "qa", "continuation": 5},
            "retain": [{"path": str(capitals("far.jsonl", 10, 20)), "kind": "mcq", "columns": {"answer": "correct"}}],
            "utility": [{"path": "passages.jsonl", "kind": "text", "length": 48, "prefix": 8, "continuation": 6}],
        },
        strict=False,
    )


def sets_of(recipe: Recipe, lm: HFLM, tmp_path: Path) -> Sets:
    return load_sets(recipe, tmp_path, lm.tokenizer)


@pytest.fixture
def sets(recipe: Recipe, lm: Recording, tmp_path: Path) -> Sets:
    return sets_of(recipe, lm, tmp_path)


def built(sets: Any, split: Split, recipe: Recipe, lm: HFLM, tmp_path: Path, generate: bool = False) -> TaskSet:
    return build_tasks(sets, split, recipe, lm.tokenizer, tmp_path / "items", generate)


PACK = (
    ("forget", "near", "unlearn_qa", "qa"),
    ("retain", "far", "unlearn_mcq", "mcq"),
    ("utility", "passages", "unlearn_text", "text"),
    ("utility", "passages", "unlearn_text_memory", "text"),
)


def check_against(result: EvalResult, theirs: dict[str, Any], tolerance: float) -> None:
    """Every number of ours is lm-eval's number, and none is missing."""
    seen = set()
    for role, name, task, _ in PACK:
        row = theirs["results"][task]
        for key in (k for k in row if "," in k and "_stderr" not in k):
            metric = key.split(",")[0]
            (ours,) = [s for s in result.scores if s.key == (role, name, metric)]
            assert ours.score.value == pytest.approx(row[key], abs=tolerance)
            assert ours.score.n == theirs["n-samples"][task]["effective"]
            assert ours.higher_is_better is theirs["higher_is_better"][task][metric]
            if metric != "perplexity":
                assert ours.score.stderr == pytest.approx(row[f"{metric}_stderr,none"], abs=tolerance)
            seen.add(ours.key)
    assert seen == {s.key for s in result.scores}


def test_scores_are_those_of_the_command_line(
    recipe: Recipe, sets: Sets, lm: Recording, pico_phi: Path, tmp_path: Path
) -> None:
    result = evaluate(lm, built(sets, "test", recipe, lm, tmp_path), model_name="pico", bootstrap=100)
    saved = json.loads(result.save(tmp_path / "ours").read_text(encoding="utf-8"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tasks_folder(), elsewhere / "eval", ignore=shutil.ignore_patterns("__pycache__"))
    items = {loaded.spec.kind: str(items_path(tmp_path / "items", loaded, "test")) for loaded in sets}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={pico_phi}"]
    command += ["--include_path", "eval", "--tasks", ",".join(task for *_, task, _ in PACK), "--device", "cpu"]
    command += ["--metadata", json.dumps({"items": items}), "--batch_size", "8", "--output_path", "out"]
    command += ["--log_samples"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (elsewhere / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text(encoding="utf-8"))
    check_against(result, theirs, 1e-6)
    assert {s.split for s in result.scores} == {"test"}
    assert all(s.score.n >= 2 and s.score.stderr is not None for s in result.scores)

    # the same layout and schema
    assert set(saved) == set(theirs)
    assert set(theirs["config"]) <= set(saved["config"])
    assert 0 <= theirs["date"] - saved["date"] < 3600
    assert saved["versions"]["forget.near"] == theirs["versions"]["unlearn_qa"] == 1.0
    assert saved["task_hashes"]["forget.near"] == theirs["task_hashes"]["unlearn_qa"], "the same documents and prompts"
    (our_samples,) = (tmp_path / "ours").rglob("samples_forget.near_*.jsonl")
    (their_samples,) = (elsewhere / "out").rglob("samples_unlearn_qa_*.jsonl")
    first, second = (json.loads(p.read_text(encoding="utf-8").splitlines()[0]) for p in (our_samples, their_samples))
    assert set(first) == set(second)
    assert first["doc"] == second["doc"]
    assert first["arguments"] == second["arguments"]


def test_a_folder_that_cannot_be_written_is_an_error(recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path) -> None:
    result = evaluate(lm, built(sets, "test", recipe, lm, tmp_path), model_name="pico")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunFolderError, match=r"could not write results_.*(NotADirectory|FileExists)Error"):
        result.save(tmp_path / "taken")
    (tmp_path / "half" / "pico").mkdir(parents=True)
    broken = EvalResult(result.scores, {"a/b": [*result.samples["forget.near"]]}, *list(vars(result).values())[2:])
    with pytest.raises(
        RunFolderError, match=r"could not write b_.* \(Could not save sample results; FileNotFoundError"
    ):
        broken.save(tmp_path / "half")


def test_requests_are_made_once_and_answers_never_carried_over(
    recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path
) -> None:
    tasks = built(sets, "validation", recipe, lm, tmp_path)
    before = evaluate(lm, tasks, model_name="pico")
    with torch.no_grad():
        saved = lm.model.lm_head.weight.clone()
        lm.model.lm_head.weight.mul_(0.5)
    changed = evaluate(lm, tasks, model_name="pico")
    with torch.no_grad():
        lm.model.lm_head.weight.copy_(saved)
    after = evaluate(lm, tasks, model_name="pico")
    first, second, third = lm.given
    assert all(a is b is c for a, b, c in zip(first, second, third, strict=True))
    assert before.scores == after.scores != changed.scores
    samples = [r.samples["forget.near"][0] for r in (before, changed, after)]
    assert [len(s["resps"][0]) for s in samples] == [1, 1, 1]
    assert samples[0]["resps"] == samples[2]["resps"] != samples[1]["resps"], "an older result keeps its own answers"


def test_values_make_up_the_scores(recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path) -> None:
    result = evaluate(lm, built(sets, "validation", recipe, lm, tmp_path), model_name="pico")
    found = result.values()
    assert found.keys() == {score.key for score in result.scores}
    for score in result.scores:
        numbers, weights = np.array(list(found[score.key].values())).T
        mean = numbers.sum() / weights.sum()
        value = math.exp(-mean) if score.metric == "perplexity" else mean
        assert score.score.value == pytest.approx(value)
        assert list(found[score.key]) == list(range(score.score.n))
    tokens = [count for _, count in found["utility", "passages", "perplexity"].values()]
    assert tokens == [row["doc"]["target_tokens"] for row in result.samples["utility.passages"]]


def test_nothing_is_said_and_no_random_state_is_touched(
    recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def states() -> str:
        return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    before = states()
    capfd.readouterr()
    evaluate(lm, built(sets, "test", recipe, lm, tmp_path, generate=True), model_name="pico")
    assert capfd.readouterr() == ("", "")
    assert states() == before
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # the comparison above can tell
    assert states() != before


def test_items_are_counted_and_cut_as_lm_eval_encodes_them(sets: Sets, lm: Recording, tmp_path: Path) -> None:
    paths = write_items(sets, lm.tokenizer, tmp_path / "items")
    times = [p.stat().st_mtime_ns for p in paths]
    assert write_items(sets, lm.tokenizer, tmp_path / "items") == paths
    assert times == [p.stat().st_mtime_ns for p in paths], "nothing is written twice"
    assert [p.name for p in paths] == [f"{r}.{n}.{s}.jsonl" for r, n, *_ in PACK[:3] for s in ("validation", "test")]
    for path, loaded in zip(paths, [s for s in sets for _ in range(2)], strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == len(loaded.items("test" if ".test." in path.name else "validation"))
        for row in rows:
            spaced = " " if loaded.spec.kind != "text" else ""
            counts = row.get("choice_tokens") or [row["target_tokens"]]
            answers = row.get("choices") or [row["target"]]
            assert counts == [len(lm._encode_pair(row["prompt"], spaced + a)[1]) for a in answers]
            if loaded.spec.kind == "text":
                check_pieces(lm, row, loaded.spec.continuation)


def test_answers_without_a_word_are_refused_where_texts_are_compared(sets: Sets, lm: Recording, tmp_path: Path) -> None:
    wordless = replace(sets[0], test=(Item("1", "Who?", "Paris"), Item("2", "Smile!", "😀 …")))
    assert write_items((wordless,), lm.tokenizer, tmp_path / "a", ("test",), ("validation",))
    assert write_items((replace(wordless, role="holdout"),), lm.tokenizer, tmp_path / "b", ("test",), ("test",))
    with pytest.raises(EvaluationError, match="forget set 'near': 1 of 2 answers have no letter and no digit, such as"):
        write_items((wordless,), lm.tokenizer, tmp_path / "c", ("test",), ("test",))


def check_pieces(lm: HFLM, row: dict[str, Any], generated: int) -> None:
    """Every piece continues the passage's own tokens; they are single tokens where one can cut."""
    whole, context, sizes = lm.tok_encode(row["prompt"] + row["target"]), row["prompt"], []
    for piece in row["pieces"]:
        head, tail = lm._encode_pair(context, piece)
        assert whole[: len(head) + len(tail)] == head + tail
        sizes.append(len(tail))
        context += piece
    assert row["target"].startswith("".join(row["pieces"]))
    assert len(sizes) <= MEMORY_TOKENS
    assert row["target"].startswith(row["continuation"])
    if not row["target"].isascii():  # the tokenizer spells other letters in bytes, and none of those is a place to cut
        return
    assert sizes.count(1) >= 0.7 * len(sizes)
    assert lm.tok_encode(row["prompt"] + row["continuation"]) == whole[: len(lm.tok_encode(row["prompt"])) + generated]


def test_no_cut_where_the_beginning_alone_encodes_otherwise(tmp_path: Path, sets: Sets) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({"[UNK]": 0, "ab": 1, "a": 2, "b": 3, "c": 4}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex("ab(?=c)|a|b|c"), "isolated")  # ab is one token before c only
    words = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    assert [words.tokenize(text) for text in ("cabca", "cab")] == [["c", "ab", "c", "a"], ["c", "a", "b"]]
    utility = replace(sets[2], test=(Item("1", "c", "abcaabc"),))
    (path,) = write_items((utility,), words, tmp_path / "odd", ("test",))
    assert json.loads(path.read_text(encoding="utf-8"))["pieces"] == ["abc", "a", "abc"]


def test_of_long_answers_as_much_is_compared_as_can_be_written(sets: Sets, lm: Recording, tmp_path: Path) -> None:
    short, long = Item("1", "Who?", "Paris"), Item("2", "Who?", "Paris is the capital of France,\n東京 is not.")
    (path,) = write_items((replace(sets[0], test=(short, long)),), lm.tokenizer, tmp_path / "long", ("test",))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    whole = lm.tok_encode(f"Who? {long.target}")
    assert rows[0]["continuation"] == "Paris"
    assert rows[1]["continuation"] == lm.tokenizer.decode(whole[len(lm.tok_encode("Who?")) :][:5]).strip()


def test_generation_is_for_the_final_comparison_only(recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path) -> None:
    assert all(t.OUTPUT_TYPE != "generate_until" for t in built(sets, "test", recipe, lm, tmp_path).tasks.values())
    tasks = built(sets, "test", recipe, lm, tmp_path, generate=True)
    lengths = {n: t.config.generation_kwargs["max_gen_toks"] for n, t in tasks.tasks.items() if n.endswith(".rouge")}
    assert lengths == {"forget.near.rouge": 5, "utility.passages.rouge": 6}
    result = evaluate(lm, tasks, model_name="pico")
    metrics = {s.metric for s in result.scores if s.set == "utility"}
    recited = {"exact_memorisation", "extraction_strength", "pmi"}
    assert metrics == {"loss", "perplexity", "rougeL", "rougeL_f1"} | recited


def test_lm_evals_own_model_recites_in_the_final_comparison_only(
    recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path
) -> None:
    slow = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"engine": "hf"})})
    assert "utility.passages.memory" in built(sets, "validation", recipe, lm, tmp_path).tasks
    assert "utility.passages.memory" not in built(sets, "validation", slow, lm, tmp_path).tasks
    assert "utility.passages.memory" in built(sets, "validation", slow, lm, tmp_path, generate=True).tasks


def test_a_broken_model_is_an_error_that_names_the_task(
    recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path
) -> None:
    tasks = built(sets, "validation", recipe, lm, tmp_path)
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"^forget.near, item 0: log-likelihood nan"):
        evaluate(lm, tasks, model_name="pico")
    with torch.no_grad():
        lm.model.lm_head.weight.normal_(std=1e5)
    only = TaskSet(
        {"utility.passages": tasks.tasks["utility.passages"]},
        {},
        {"utility.passages": tasks.info["utility.passages"]},
        {},
    )
    with pytest.raises(EvaluationError, match=r"^utility.passages: perplexity is inf"):
        evaluate(lm, only, model_name="pico")


def test_sets_without_items(recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path) -> None:
    forget, retain, utility = sets
    with pytest.raises(EvaluationError, match=r"forget set 'near' has no test items: raise shares.test"):
        built((replace(forget, test=()), retain), "test", recipe, lm, tmp_path)
    with pytest.raises(EvaluationError, match="retain set 'far' has no test items"):
        built((forget, replace(retain, test=())), "test", recipe, lm, tmp_path)
    unused = retain.spec.model_copy(update={"shares": retain.spec.shares.model_copy(update={"test": 0.0})})
    tasks = built((forget, replace(retain, test=(), spec=unused)), "test", recipe, lm, tmp_path)
    assert set(tasks.info) == {"forget.near"}
    assert kept_metrics(recipe, tasks) == (), "what is not scored cannot be kept"
    twin = replace(utility, role="forget", name="near")
    with pytest.raises(EvaluationError, match=r"two tasks are called 'forget\.near'"):
        built((forget, twin), "test", recipe, lm, tmp_path)


def test_perplexity_stderr_is_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 200)
    losses = rng.gamma(9, 0.3, 200)
    items = [(-float(loss * t), int(t)) for loss, t in zip(losses, tokens, strict=True)]
    total, count = losses * tokens, tokens
    draws = rng.integers(0, 200, (4000, 200))
    replicates = np.exp(total[draws].sum(1) / count[draws].sum(1))
    assert perplexity_stderr(items) == pytest.approx(float(replicates.std()), rel=0.06)
    same = [(-2.0 * t, int(t)) for t in tokens]
    assert perplexity_stderr(same) == pytest.approx(0, abs=1e-9)


# --- tasks by name ---------------------------------------------------------------------------------------------------

SHIPPED = """
task: {name}
custom_dataset: !function shipped.letters
dataset_kwargs: {{count: {count}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""
CODE = """
import datasets
def letters(count, **_):
    if count < 0:
        raise ConnectionError("no route to the hub")
    return {"test": datasets.Dataset.from_list([{"question": f"Letter {i}?", "answer": i % 2} for i in range(count)])}
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small stand-in for lm-eval's index of 14,000 tasks, in the same format: reading the real one takes seconds."""
    folder = tmp_path / "shelf"  # in it as in lm-eval's own folder, where each family of tasks has one
    folder.mkdir()
    (folder / "shipped.py").write_text(CODE)
    for name, count in (("letters", 11), ("part_one", 30), ("part_two", 1), ("single", 1), ("unreachable", -1)):
        (folder / f"{name}.yaml").write_text(SHIPPED.format(name=name, count=count))
    (folder / "tagged.yaml").write_text(SHIPPED.format(name="tagged", count=4) + "tag: [bundle]\n")
    (folder / "parts.yaml").write_text(
        "group: parts\ntask: [part_one, part_two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    monkeypatch.setattr(named_tasks, "SHIPPED", tmp_path)


def change(recipe: Recipe, **evaluation: Any) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "eval": evaluation}, strict=False)


@pytest.mark.usefixtures("shelf")
def test_a_shipped_task_is_halved_by_the_seed(recipe: Recipe, lm: Recording, tmp_path: Path) -> None:
    def asked(seed: int, split: Split, **spec: Any) -> list[int]:
        chosen = change(recipe, tasks=[{"task": "letters", **spec}]).model_copy(update={"seed": seed})
        return list(built((), split, chosen, lm, tmp_path).samples["letters"])

    validation, test = asked(0, "validation"), asked(0, "test")
    assert sorted(validation + test) == list(range(11))
    assert len(validation) == 5
    assert validation == sorted(validation) == asked(0, "validation") != asked(1, "validation")
    assert len(asked(0, "test", limit=2)) == 2
    assert set(asked(0, "test", limit=2)) <= set(test)

    both = change(recipe, tasks=[{"task": "letters", "set": "retain", "limit": 4}])
    result = evaluate(lm, built((), "test", both, lm, tmp_path), model_name="pico")
    (score,) = result.scores
    assert score.key == ("retain", "letters", "acc")
    assert score.score.n == 4
    numbers = asked(0, "test", limit=4)
    assert [s["doc_id"] for s in result.samples["letters"]] == numbers
    assert [s["doc"]["question"] for s in result.samples["letters"]] == [f"Letter {i}?" for i in numbers]
    assert result.results["versions"]["letters"] == 2.0


@pytest.mark.usefixtures("shelf")
def test_a_shipped_group_is_scored_as_one(recipe: Recipe, lm: Recording, tmp_path: Path) -> None:
    halves = [built((), s, change(recipe, tasks=[{"task": "parts"}]), lm, tmp_path) for s in ("validation", "test")]
    assert sorted(n for t in halves for n in t.samples) == ["part_one", "part_one", "part_two"]
    for tasks in halves:
        result = evaluate(lm, tasks, model_name="pico")
        (score,) = result.scores
        assert score.name == "parts"
        assert score.score.n == sum(map(len, tasks.samples.values()))
        assert score.score.stderr is None or score.score.stderr > 0
        assert result.values() == {}, "a group's items are its tasks'"
        rows = [s for rows in result.samples.values() for s in rows]
        assert score.score.value == pytest.approx(sum(r["acc"] for r in rows) / len(rows))


@pytest.mark.usefixtures("shelf")
def test_chance_is_the_mean_of_one_in_so_many_choices(
    recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path
) -> None:
    """Beside accuracies of choices only: of the pack, of a task that lm-eval ships, and of a group over its tasks."""
    path = tmp_path / "shelf" / "part_two.yaml"
    path.write_text(
        path.read_text().replace('["a", "b"]', '["a", "b", "c", "d", "e"]').replace("count: 1", "count: 30")
    )
    path = tmp_path / "shelf" / "letters.yaml"
    path.write_text(path.read_text().replace("metric: acc,", "metric: acc_mutual_info}, {metric: acc,"))
    asked = change(recipe, tasks=[{"task": "parts"}, {"task": "letters"}])
    mcq = next(s for s in sets if s.spec.kind == "mcq")
    uneven = tuple(replace(i, choices=i.choices[:2], answer=0, target=i.choices[0]) for i in mcq.validation[:1])
    mixed = [replace(s, validation=(*uneven, *s.validation[1:])) if s is mcq else s for s in sets]
    tasks = built(mixed, "validation", asked, lm, tmp_path)
    found = {s.key: s.chance for s in evaluate(lm, tasks, model_name="pico", bootstrap=0).scores}
    items = next(s for s in mixed if s.spec.kind == "mcq").validation
    expected = sum(1 / len(item.choices) for item in items) / len(items)
    assert 1 / 4 < expected < 1 / 2
    for metric in ("acc", "acc_norm", "acc_pmi"):
        assert found["retain", "far", metric] == pytest.approx(expected)
    counts = [len(tasks.samples[name]) for name in ("part_one", "part_two")]
    assert found["utility", "parts", "acc"] == pytest.approx((counts[0] / 2 + counts[1] / 5) / sum(counts))
    assert found["utility", "letters", "acc"] == 0.5, "not one in four requests: half of them are without a question"
    others = {key: chance for key, chance in found.items() if not key[2].startswith("acc")}
    assert {"prob", "logprob", "loss", "exact", "perplexity"} <= {key[2] for key in others}
    assert set(others.values()) == {None}


@pytest.mark.usefixtures("shelf")
def test_standard_errors_without_resampling(recipe: Recipe, lm: Recording, tmp_path: Path) -> None:
    """``acc`` has a formula, ``f1`` is resampled by lm-eval."""
    path = tmp_path / "shelf" / "letters.yaml"
    path.write_text(path.read_text().replace("higher_is_better: true}]", "higher_is_better: true}, {metric: f1}]"))
    both = change(recipe, tasks=[{"task": "letters", "metric": "f1"}])
    tasks = built((), "validation", both, lm, tmp_path)
    tasks = replace(tasks, info={name: replace(info, metrics=("acc", "f1")) for name, info in tasks.info.items()})
    (acc, f1), (quick_acc, quick_f1) = (
        [s.score for s in evaluate(lm, tasks, model_name="pico", bootstrap=n).scores] for n in (100, 0)
    )
    assert quick_acc == acc
    assert acc.stderr is not None
    assert f1.stderr is not None
    assert quick_f1 == replace(f1, stderr=None)
    assert evaluate(lm, tasks, model_name="pico", bootstrap=100).scores[1].score == f1, "nothing is left changed"


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"task": "leters"}, r"lm-eval has no task 'leters'; did you mean 'letters'"),
        ({"task": "unreachable"}, "the data of 'unreachable' are not on this machine"),
        ({"task": "bundle"}, r"'bundle' is a tag for 1 tasks; name them: tagged"),
        ({"task": "single"}, r"single has 1 items: too few"),
        ({"task": "letters", "metric": "acc_norm"}, r"letters has no metric 'acc_norm'; it has acc"),
    ],
)
def test_shipped_tasks_that_cannot_be_scored(
    recipe: Recipe, lm: Recording, tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(lm, built((), "validation", change(recipe, tasks=[spec]), lm, tmp_path), model_name="pico")
    with pytest.raises(EvaluationError, match="two tasks are called 'letters'|there is nothing|" + message):
        built((), "validation", change(recipe, tasks=[{"task": "letters"}] * 2), lm, tmp_path)


def test_passages_are_scored_at_further_prefixes(recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path) -> None:
    plain = sets[2]
    spec = plain.spec.model_copy(update={"prefixes": (4, 20)})
    *_, base, short, long = at_prefixes([*sets[:2], replace(plain, spec=spec)], lm.tokenizer)
    assert base.test == plain.test
    assert [s.name for s in (short, long)] == ["passages@4", "passages@20"]
    for one, prefix in ((short, 4), (long, 20)):
        assert not one.train
        assert not one.validation
        for item, was in zip(one.test, plain.test, strict=True):
            assert item.prompt + item.target == was.prompt + was.target
            # a character of several tokens is not cut
            assert 0 <= len(lm.tokenizer(item.prompt, add_special_tokens=False)["input_ids"]) - prefix <= 3
    whole = [*sets[:2], base]
    assert not [n for n in built(whole, "validation", recipe, lm, tmp_path, generate=True).tasks if "@" in n]
    assert not [n for n in built(whole, "test", recipe, lm, tmp_path).tasks if "@" in n]
    result = evaluate(lm, built(whole, "test", recipe, lm, tmp_path, generate=True), model_name="pico")
    found = {s.key: s.score.value for s in result.scores}
    for name in ("passages", "passages@4", "passages@20"):
        assert {("utility", name, m) for m in ("rougeL", "exact_memorisation", "extraction_strength")} <= set(found)
    alone = evaluate(lm, built([long], "test", recipe, lm, tmp_path, generate=True), model_name="pico")
    (rouge,) = [s.score.value for s in alone.scores if s.metric == "rougeL"]
    assert found["utility", "passages@20", "rougeL"] == rouge


@pytest.mark.parametrize("role", ["forget", "retain"])  # questions, and choices
def test_asked_back_a_set_scores_what_a_set_written_the_other_way_round_does(
    recipe: Recipe, lm: Recording, tmp_path: Path, role: str
) -> None:
    plain = recipe.forget if role == "forget" else recipe.retain[0]
    assert plain is not None
    changed = plain.model_copy(
        update={"reverse": "{answer} is of", "shares": SplitShares(train=0.1, validation=0.1, test=0.8)}
    )
    loaded = load_sets(replaced(recipe, role, changed), tmp_path, lm.tokenizer)[int(role == "retain")]
    back = asked_back([loaded])[1]
    of = {item.id: item for item in loaded.test}
    assert len(back.test) == 8
    assert [(i.prompt, i.target) for i in back.test] == [
        (f"{of[i.id].target} is of", asked(of[i.id])) for i in back.test
    ]
    result = evaluate(lm, built([loaded], "test", recipe, lm, tmp_path), model_name="pico")
    rows = [{"question": i.prompt, "answer": i.target, "choices": list(i.choices)} for i in back.test]
    (tmp_path / "back.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shares = SplitShares(train=0, validation=0, test=1)
    written = {"path": "back.jsonl", "columns": {}, "prompt": "{question}", "shares": shares, "name": "back"}
    other = load_sets(replaced(recipe, "retain", plain.model_copy(update=written)), tmp_path, lm.tokenizer)[1]
    alone = evaluate(lm, built([other], "test", recipe, lm, tmp_path / "alone"), model_name="pico")
    ours = {s.metric: s.score.value for s in result.scores if s.name.endswith("@reverse")}
    theirs = {s.metric: s.score.value for s in alone.scores if not s.metric.endswith("pmi")}  # of others by their ids
    assert {"acc", "prob"} & set(ours) & set(theirs)
    assert {metric: ours[metric] for metric in theirs} == pytest.approx(theirs, abs=1e-5)
    assert not any("@" in name for name in built([loaded], "validation", recipe, lm, tmp_path).tasks)


def asked(item: Item) -> str:
    """The question of the default prompt."""
    return item.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


def replaced(recipe: Recipe, role: str, data: DataSet) -> Recipe:
    return recipe.model_copy(update={"forget": data} if role == "forget" else {"retain": (data,)})


def test_files_are_found_by_lm_evals_own_tools(recipe: Recipe, sets: Sets, lm: Recording, tmp_path: Path) -> None:
    result = evaluate(lm, built(sets, "test", recipe, lm, tmp_path), model_name="some/model 0.5")
    path = result.save(tmp_path / "0.5")
    assert path.parent == tmp_path / "0.5" / "some__model 0.5"
    names = [str(p) for p in (tmp_path / "0.5").rglob("*")]
    assert get_results_filenames(names) == [str(path)]
    assert len(get_sample_results_filenames(names)) == len(result.samples) == 4
    written = json.loads(path.read_text(encoding="utf-8"))
    assert float(written["total_evaluation_time_seconds"]) == pytest.approx(result.seconds, abs=5)
    assert written["model_name"] == "some/model 0.5"
    assert written["config"]["model_num_parameters"] == sum(p.numel() for p in lm.model.parameters())
    ours = {s.key: s.score for s in result.scores}
    row = written["results"]["utility.passages"]
    assert row["perplexity,none"] == ours["utility", "passages", "perplexity"].value
    assert row["perplexity_stderr,none"] == ours["utility", "passages", "perplexity"].stderr
    assert result.save(tmp_path / "0.5").exists(), "saving does not use the result up"
