"""The Python API on a model in memory gives what a recipe's run gives, and leaves everything else as it was."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from facts import capital_rows
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

import unlearn
from unlearn.errors import RecipeError, UnlearnError
from unlearn.model.load import Loaded
from unlearn.score.tasks import random_state_kept
from unlearn.vector.task_vector import TaskVector

FORGET = [{"question": row["question"], "answer": row["answer"]} for row in capital_rows(8)]
RETAIN = [{"question": row["question"], "answer": row["answer"]} for row in capital_rows()[8:16]]
QUICK: dict[str, Any] = {"lora": {"rank": 2, "alpha": 4}, "steps": 3, "learning_rate": 5e-3, "batch_size": 4}
README = Path(__file__).resolve().parent.parent / "README.md"


def mean_loss(tokenizer: Any, rows: list[dict[str, Any]]) -> Callable[[Any], float]:
    """A metric: nats per token of the answers."""

    @torch.no_grad()
    def metric(model: Any) -> float:
        losses = []
        for row in rows:
            prompt = f"Question: {row['question']}\nAnswer:"
            ids = tokenizer(f"{prompt} {row['answer']}", return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt).input_ids)] = -100
            losses.append(float(model(input_ids=ids, labels=labels).loss))
        return float(np.mean(losses))

    return metric


@pytest.fixture
def tau(phi: Loaded) -> TaskVector:
    return unlearn.fit(phi.model, phi.tokenizer, FORGET, RETAIN, **QUICK)


# -- the same as a recipe


def test_fit_and_shape_give_what_a_recipes_run_gives(phi: Loaded, pico_phi: Path, tmp_path: Path) -> None:
    places = {"forget": FORGET, "retain": RETAIN}
    for name, rows in places.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = {"train": "all", "validation": 0.5, "test": 0.5}
    sets = {name: {"kind": "qa", "path": str(tmp_path / f"{name}.jsonl"), "shares": shares} for name in places}
    training = {key: value for key, value in QUICK.items() if key != "lora"}
    recipe = {
        "name": "twin",
        "model": {"path": str(pico_phi), "device": "cpu", "dtype": "float32"},
        "forget": sets["forget"],
        "retain": [sets["retain"]],
        "vector": {
            "method": ["shrink", "rescale"],
            **{"lora": QUICK["lora"], "forget": training, "correlation": None},
            "retain_kl": {"sides": "two", "coefficients": [0.5, 2.0]},
        },
        "sweep": {"coefficients": [1.0]},
    }
    unlearn.run(unlearn.Recipe.model_validate_json(json.dumps(recipe)), out=tmp_path / "run")
    given = (phi.model, phi.tokenizer, FORGET, RETAIN)
    fitted = unlearn.fit(*given, **QUICK, retain_kl={"sides": "two", "coefficients": [0.5, 2.0]})
    shaped = unlearn.shape(fitted, ["shrink", "rescale"], model=phi.model, tokenizer=phi.tokenizer, retain=RETAIN)
    there = {name: TaskVector.load(tmp_path / f"run/vectors/{name}/vector.safetensors") for name in ("forget", "edit")}
    assert fitted.digest() == there["forget"].digest()
    assert (shaped - there["edit"]).norm() < 1e-6 * shaped.norm()
    assert shaped.norm() == pytest.approx(fitted.norm())
    assert fitted.cosine(shaped) < 0.999


def test_the_readme_s_lines_run_as_written(phi: Loaded, pico_phi: Path, tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8").partition("## From Python")[2]
    snippet = text.partition("```python\n")[2].partition("```")[0]
    task = capitals_task(tmp_path)
    for written, here in (('["tofu_forget10", "mmlu"]', repr([task])), ('"out"', repr(str(tmp_path / "out")))):
        assert written in snippet
        snippet = snippet.replace(written, here)
    metric = mean_loss(phi.tokenizer, FORGET)
    names: dict[str, Any] = {
        **{"model": phi.model, "tokenizer": phi.tokenizer, "forget": FORGET, "retain": RETAIN, "name": str(pico_phi)},
        **{"my_metric": metric, "f": lambda model: -metric(model), "g": lambda model: 1.0},
    }
    exec(compile(snippet, "README.md", "exec"), names)
    assert PeftModel.from_pretrained(phi.model, tmp_path / "out")


def test_retain_rows_are_held_at_both_signs_unless_said_otherwise(phi: Loaded, tau: TaskVector) -> None:
    alone = unlearn.fit(phi.model, phi.tokenizer, FORGET, **QUICK)
    unheld = unlearn.fit(phi.model, phi.tokenizer, FORGET, RETAIN, retain_kl="none", **QUICK)
    assert alone.digest() == unheld.digest() != tau.digest()
    baseline = unlearn.fit(phi.model, phi.tokenizer, FORGET, RETAIN, method="gradient_difference", **QUICK)
    assert baseline.digest() not in (alone.digest(), tau.digest())
    theirs = unlearn.fit(phi.model, phi.tokenizer, FORGET, RETAIN, method="GradDiff", **QUICK)
    assert theirs.digest() == baseline.digest()


CHOICES = [{"question": r["question"], "choices": r["choices"], "answer": r["correct"]} for r in capital_rows(6)]
TEXTS = [f"{row['capital']} is the capital of {row['country']}, and has been for long." for row in capital_rows(4)]


@pytest.mark.parametrize(
    ("listed", "held"),
    [
        *((CHOICES, hold) for hold in (Dataset.from_list, pandas.DataFrame, tuple, iter)),
        (TEXTS, lambda texts: [{"text": text} for text in texts]),
    ],
)
def test_rows_may_be_held_by_anything(phi: Loaded, listed: list[Any], held: Callable[[Any], Any]) -> None:
    cut = {"prefix": 4, "length": 32} if listed is TEXTS else {}
    one, other = (unlearn.fit(phi.model, phi.tokenizer, rows, **cut, **QUICK) for rows in (listed, held(listed)))
    assert one.digest() == other.digest()


# -- nothing else changes


def test_conversations_stand_in_the_chat_template(
    pico_llama: Path, loaded: Callable[..., Loaded], tmp_path: Path
) -> None:
    """Rows as messages are those with question and answer, in the template and outside it, and these two differ."""
    one = loaded(chats.build(pico_llama, tmp_path / "chatty", "llama"))
    talks = [
        {
            "messages": [
                {"role": role, "content": row[key]} for role, key in (("user", "question"), ("assistant", "answer"))
            ]
        }
        for row in FORGET
    ]
    digests = {
        (form, template): unlearn.fit(one.model, one.tokenizer, rows, chat_template=template, **QUICK).digest()
        for form, rows in (("pairs", FORGET), ("talks", talks))
        for template in ("auto", "none")
    }
    assert digests["pairs", "auto"] == digests["talks", "auto"] != digests["pairs", "none"] == digests["talks", "none"]


@pytest.mark.parametrize("verbose", [False, True])
def test_everything_else_is_as_it_was(
    phi: Loaded, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, verbose: bool
) -> None:
    phi.model.train()
    phi.model.lm_head.requires_grad_(False)
    weights = {name: value.clone() for name, value in phi.model.state_dict().items()}
    flags = [p.requires_grad for p in phi.model.parameters()]
    phi.tokenizer.pad_token = None
    level = logging.getLogger("unlearn").level
    drawn = (random.random(), np.random.random(), torch.rand(1))
    with random_state_kept():
        drawn = (random.random(), np.random.random(), torch.rand(1))
    vector = unlearn.fit(phi.model, phi.tokenizer, FORGET, RETAIN, verbose=verbose, **QUICK)
    unlearn.shape(vector, "rescale", verbose=verbose)
    unlearn.sweep(phi.model, vector, [1.0], {"one": lambda model: 1.0 + model.training}, verbose=verbose)
    assert (random.random(), np.random.random()) == drawn[:2]
    assert torch.equal(torch.rand(1), drawn[2])
    assert all(torch.equal(weights[name], value) for name, value in phi.model.state_dict().items())
    assert phi.model.training
    assert flags == [p.requires_grad for p in phi.model.parameters()]
    assert phi.tokenizer.pad_token is None
    assert not hasattr(phi.model, "peft_config")
    assert logging.getLogger("unlearn").level == level
    out, err = capfd.readouterr()
    assert not out
    assert bool(err) == verbose
    assert not recwarn.list


def test_a_misspelt_argument_is_told_the_right_one(phi: Loaded) -> None:
    for wrong, right in (("retian", "retain"), ("learning_rat", "learning_rate"), ("chat_tmplate", "chat_template")):
        with pytest.raises(RecipeError, match=f"{wrong}: there is no such argument; did you mean '{right}'"):
            unlearn.fit(phi.model, phi.tokenizer, FORGET, **{wrong: RETAIN, **QUICK})
    with pytest.raises(RecipeError, match=r"adam_beta2: unknown key here; .*trainer"):
        unlearn.fit(phi.model, phi.tokenizer, FORGET, adam_beta2=0.9, **QUICK)


# -- coefficients


@pytest.mark.parametrize(
    ("how", "best"),
    [
        ({"minimise": "acc", "keep": {"kept": 0.95}}, 1.0),
        ({"minimise": "acc", "keep": {"kept": 0.5}}, 2.0),
        ({"minimise": "acc", "keep": {"loss": 1.05}}, 0.5),
        ({"minimise": "acc"}, 2.0),  # as low at 3
        ({"maximise": "loss"}, 3.0),
        ({"minimise": "acc", "keep": {"negloss": 1.25}}, 1.0),  # at most: it may rise by as much
        ({"minimise": "acc", "keep": {"logprob": 0.8}}, 1.0),  # a negative score keeps its share by not growing
    ],
)
def test_choose_goes_as_far_as_what_is_kept_allows(how: dict[str, Any], best: float) -> None:
    values = {
        "acc": (0.9, 0.7, 0.5, 0.2, 0.2),
        "kept": (0.8, 0.8, 0.78, 0.6, 0.1),
        "loss": (2.0, 2.05, 2.2, 3.0, 9.0),
        "logprob": (-1.0, -1.1, -1.2, -2.0, -5.0),
        "negloss": (-5.0, -4.5, -4.1, -3.0, -1.0),
    }
    found = unlearn.Sweep((0.0, 0.5, 1.0, 2.0, 3.0), values)
    assert found.choose(**how) == best


def test_a_sweep_scores_what_subtracted_leaves(phi: Loaded, tau: TaskVector) -> None:
    metric = mean_loss(phi.tokenizer, FORGET)
    found = unlearn.sweep(phi.model, tau, (2, 0.5), {"forget": metric})
    assert found.coefficients == (0.0, 0.5, 2.0)
    for c in found.coefficients:
        with unlearn.subtracted(phi.model, tau, c):
            assert found.at(c) == {"forget": metric(phi.model)}
    assert len(set(found.values["forget"])) == 3
    table = found.to_pandas()
    assert list(table.index) == [0.0, 0.5, 2.0]
    assert list(table["forget"]) == list(found.values["forget"])
    (axes,) = found.plot().axes
    shares = [100 * y / found.values["forget"][0] for y in found.values["forget"]]
    assert any(np.allclose(line.get_ydata(), shares) for line in axes.lines if len(line.get_ydata()) == 3)
    assert "<table" in found._repr_html_()


def capitals_task(folder: Path) -> str:
    """A task file of lm-eval's with four choices."""
    rows = [{"q": r["question"], "choices": r["choices"], "a": r["correct"]} for r in capital_rows(12)]
    (folder / "rows.json").write_text(json.dumps(rows))
    task = {
        **{"task": "capitals", "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "rows.json")}},
        **{"test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices"},
        **{"doc_to_target": "a", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    }
    (folder / "capitals.yaml").write_text(json.dumps(task))
    return str(folder / "capitals.yaml")


def test_evaluate_gives_lm_evals_own_scores(phi: Loaded, tau: TaskVector, tmp_path: Path) -> None:
    task = capitals_task(tmp_path)
    ours = unlearn.evaluate(phi.model, tau, 3.0, [task], tokenizer=phi.tokenizer, log_samples=True)
    with random_state_kept(), unlearn.subtracted(phi.model, tau, 3.0):
        lm = HFLM(pretrained=phi.model, tokenizer=phi.tokenizer)
        index = TaskManager(include_path=str(tmp_path), include_defaults=False)
        theirs = simple_evaluate(model=lm, tasks=["capitals"], task_manager=index)
    for key in ("acc,none", "acc_norm,none"):
        assert ours["results"]["capitals"][key] == theirs["results"]["capitals"][key]
    for one, two in zip(ours["samples"]["capitals"], theirs["samples"]["capitals"], strict=True):
        assert_close(one["filtered_resps"], two["filtered_resps"], atol=1e-4, rtol=0)


# -- vectors from elsewhere, and to PEFT


def test_a_saved_adapter_is_what_subtracted_leaves(
    phi: Loaded, tau: TaskVector, pico_phi: Path, tmp_path: Path
) -> None:
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), unlearn.subtracted(phi.model, tau, 1.5):
        wanted = phi.model(ids).logits
    folder = unlearn.save_adapter(tau, 1.5, str(tmp_path / "out"), base=str(pico_phi))
    with torch.no_grad():
        assert_close(PeftModel.from_pretrained(phi.model, folder)(ids).logits, wanted)
    assert (unlearn.TaskVector.from_peft(str(folder)) + 1.5 * tau).norm() < 1e-6 * tau.norm()


def test_a_vector_of_a_peft_model_in_memory(phi: Loaded) -> None:
    ids = torch.arange(5, 25)[None]
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 3}, init_lora_weights=False
    )
    peft_model = get_peft_model(phi.model, config, adapter_name="mine")
    with torch.no_grad():
        wanted = peft_model(ids).logits
    vector = unlearn.TaskVector.from_peft_model(peft_model)
    assert {m.rank for m in vector.modules.values()} == {2, 3}
    base = peft_model.unload()
    with torch.no_grad(), unlearn.subtracted(base, vector, -1.0):
        assert_close(base(ids).logits, wanted)


def test_a_vector_of_two_checkpoints(phi: Loaded, tau: TaskVector, pico_phi: Path, tmp_path: Path) -> None:
    with torch.no_grad(), unlearn.subtracted(phi.model, tau, -1.0):
        phi.model.save_pretrained(tmp_path / "tuned")
    vector = unlearn.TaskVector.from_checkpoints(str(pico_phi), str(tmp_path / "tuned"), rank=2)
    assert vector.rank() == 2
    assert (vector - tau).norm() < 1e-3 * tau.norm()


def test_vectors_and_reports_show_themselves(tau: TaskVector, tmp_path: Path) -> None:
    assert repr(tau) == f"TaskVector(modules={len(tau.modules)}, rank=2, norm={tau.norm():.4g})"
    assert tau._repr_html_().count("<tr>") == 1 + len({re.sub(r"\.\d+\.", "*", name) for name in tau.modules})
    tau.save(str(tmp_path / "v.safetensors"))
    assert unlearn.TaskVector.load(str(tmp_path / "v.safetensors")).digest() == tau.digest()


# -- mistakes


def _fit(phi: Loaded, forget: Any = FORGET, retain: Any = None, **more: Any) -> TaskVector:
    return unlearn.fit(phi.model, phi.tokenizer, forget, retain, **{**QUICK, **more})


MISTAKES: dict[str, tuple[Callable[[Loaded, TaskVector], object], str]] = {
    "no rows": (lambda phi, tau: _fit(phi, []), "forget: there are no rows"),
    "one text": (lambda phi, tau: _fit(phi, "all of it"), "give a list of rows"),
    "no row": (lambda phi, tau: _fit(phi, [3]), "forget, row 1: int is neither a mapping"),
    "unknown columns": (lambda phi, tau: _fit(phi, [{"q": "x", "a": "y"}]), "columns q and a are neither"),
    "an empty answer": (lambda phi, tau: _fit(phi, [{"question": "x", "answer": ""}]), "row 1: the answer is empty"),
    "both at once": (lambda phi, tau: _fit(phi, FORGET, FORGET[:1]), "the same item is to be forgotten and kept"),
    "a misspelt setting": (lambda phi, tau: _fit(phi, learning_rat=1), "learning_rate"),
    "no retain rows": (lambda phi, tau: _fit(phi, retain_kl="two_sided"), "retain_kl needs a retain set"),
    "a source to shape with": (lambda phi, tau: unlearn.shape(tau, "npo"), "give it to fit"),
    "a source by its other name": (lambda phi, tau: unlearn.shape(tau, ["IdkDPO"]), "give it to fit"),
    "no name of a shaper": (lambda phi, tau: unlearn.shape(tau, [3]), "vector.method"),  # type: ignore[list-item]
    "no name of a method": (lambda phi, tau: _fit(phi, retain=RETAIN, method=3), "vector.method"),
    "an option of ours": (lambda phi, tau: unlearn.evaluate(phi.model, tau, 1, ["x"], task_manager=3), "has no option"),
    "an unknown shaper": (lambda phi, tau: unlearn.shape(tau, "shrnk"), "shrink"),
    "a shaper without rows": (lambda phi, tau: unlearn.shape(tau, "shrink"), "give model and retain as well"),
    "a shaper without a vector": (lambda phi, tau: unlearn.shape(tau, "project"), "give retain_vector as well"),
    "no metrics": (lambda phi, tau: unlearn.sweep(phi.model, tau, [1], {}), "metrics is empty"),
    "one metric": (lambda phi, tau: unlearn.sweep(phi.model, tau, [1], len), "no mapping"),  # type: ignore[arg-type]
    "scores in a mapping": (
        lambda phi, tau: unlearn.sweep(phi.model, tau, [1], {"a": lambda m: {"f": 1}}),  # type: ignore[dict-item,return-value]
        "a gave a dict, and no number",
    ),
    "no coefficient": (lambda phi, tau: unlearn.sweep(phi.model, tau, [0], {"a": len}), "at least one number"),
    "a score that is none": (
        lambda phi, tau: unlearn.sweep(phi.model, tau, [1], {"a": lambda m: float("nan")}),
        "a of the model as it is is nan",
    ),
    "a score that is a list": (
        lambda phi, tau: unlearn.sweep(phi.model, tau, [1], {"a": lambda m: [1.0]}),
        "a gave a list, and no number",
    ),
    "one coefficient": (lambda phi, tau: unlearn.sweep(phi.model, tau, 1.0, {"a": len}), "give a list of numbers"),
    "an untried coefficient": (
        lambda phi, tau: unlearn.Sweep((0.0, 1.0), {"a": (1, 1)}).at(2),
        "2 was not tried; 0.0 and 1.0 were",
    ),
    "a shaper without forget rows": (
        lambda phi, tau: unlearn.shape(
            tau, "shrink", model=phi.model, tokenizer=phi.tokenizer, retain=RETAIN, shrink={"forget": 1.0}
        ),
        "give forget as well",
    ),
    "another model to shape by": (
        lambda phi, tau: unlearn.shape(tau, "shrink", model=torch.nn.Linear(2, 2), retain=RETAIN),  # type: ignore[arg-type]
        "does not fit this model",
    ),
    "what the Trainer refuses": (
        lambda phi, tau: _fit(phi, trainer={"optim": "nope"}),
        "trainer: transformers refuses",
    ),
    "a file in the way": (lambda phi, tau: unlearn.save_adapter(tau, 1.0, README, "base"), "cannot be written"),
    "an unknown metric": (
        lambda phi, tau: unlearn.Sweep((0.0, 1.0), {"kept": (1, 1)}).choose(minimise="kep"),
        "did you mean 'kept'",
    ),
    "nothing forgotten": (
        lambda phi, tau: unlearn.Sweep((0.0, 1.0), {"a": (1, 1)}).choose(minimise="a"),
        "none lowers a",
    ),
    "no goal": (lambda phi, tau: unlearn.Sweep((0.0, 1.0), {"a": (1, 1)}).choose(), "minimise= or maximise="),
    "a bound of 0": (
        lambda phi, tau: unlearn.Sweep((0.0, 1.0), {"a": (1, 0)}).choose(minimise="a", keep={"a": 0}),
        "give a share above 0",
    ),
    "an unknown task": (
        lambda phi, tau: unlearn.evaluate(phi.model, tau, 1, ["unlearn_mqc"]),
        "did you mean 'unlearn_mcq'",
    ),
    "no task": (lambda phi, tau: unlearn.evaluate(phi.model, tau, 1, []), "tasks is empty"),
    "an unknown option": (
        lambda phi, tau: unlearn.evaluate(phi.model, tau, 1, ["unlearn_mcq"], limt=3),
        "did you mean 'limit'",
    ),
    "a task without its items": (
        lambda phi, tau: unlearn.evaluate(
            phi.model, tau, 1, ["unlearn_qa"], tokenizer=phi.tokenizer, metadata={"items": "nowhere.jsonl"}
        ),
        "nowhere.jsonl",
    ),
    "an endless coefficient": (
        lambda phi, tau: unlearn.evaluate(phi.model, tau, math.nan, ["unlearn_qa"]),
        "give a finite number",
    ),
    "coefficient 0": (lambda phi, tau: unlearn.save_adapter(tau, 0.0, "x", "base"), "no other model"),
    "no adapter": (lambda phi, tau: unlearn.TaskVector.from_peft("nobody here"), "there is no nobody here"),
    "no PeftModel": (lambda phi, tau: unlearn.TaskVector.from_peft_model(phi.model), "is no PeftModel"),
    "a path to fit": (
        lambda phi, tau: unlearn.fit("me/llama", None, FORGET),
        "'me/llama' is a str, and no model in memory",
    ),
    "a path to sweep": (lambda phi, tau: unlearn.sweep("llama", tau, [1], {"a": len}), "no model in memory"),
    "a path to evaluate": (lambda phi, tau: unlearn.evaluate("llama", tau, 1, ["unlearn_mcq"]), "no model in memory"),
    "a path to edit": (lambda phi, tau: unlearn.subtracted("llama", tau, 1).__enter__(), "no model in memory"),
    "another model's vector": (
        lambda phi, tau: unlearn.sweep(torch.nn.Linear(2, 2), tau, [1], {"a": len}),
        "does not fit this model",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(phi: Loaded, tau: TaskVector, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(UnlearnError, match=re.escape(message)):
        make(phi, tau)


def test_a_model_with_an_adapter_on_it_is_refused(phi: Loaded) -> None:
    peft_model = get_peft_model(phi.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnlearnError, match="has an adapter on it"):
        unlearn.fit(peft_model, phi.tokenizer, FORGET, **QUICK)
    with pytest.raises(UnlearnError, match="was not trained"):
        unlearn.TaskVector.from_peft_model(peft_model)
    dora = get_peft_model(peft_model.unload(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UnlearnError, match=r"^adapter 'default': cannot become a task vector: it is a DoRA"):
        unlearn.TaskVector.from_peft_model(dora)
