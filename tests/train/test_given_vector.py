"""A vector that the recipe brings: nothing is fitted for it, and all that follows is as if it had been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_arena import read, rows, run, stages, write_rows
from lm_eval.models.huggingface import HFLM
from pack_arena import scored
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.cli import main
from unlearn.results import RunReport
from unlearn.vector.interop import to_adapter
from unlearn.vector.task_vector import TaskVector

SHARES = {"train": "all", "validation": 0.5, "test": 0.5}
ONLY_SCORED = {"train": 0.0, "validation": 0.5, "test": 0.5}
RECIPE: dict[str, Any] = {
    "name": "own",
    "model": {"path": "model"},
    "forget": {"kind": "qa", "path": "f.jsonl", "shares": SHARES},
    "retain": [{"kind": "qa", "path": "r.jsonl", "shares": SHARES}],
    "vector": {"forget": {"steps": 6, "learning_rate": 0.005}, "lora": {"rank": 4}, "correlation": None},
    "sweep": {"coefficients": [0.5, 1.0]},
    "choose": {"keep": 0.0, "collapse": 100.0},
    "eval": {"generate": "none", "examples": 0, "bootstrap": 100},
}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def recipe(folder: Path, name: str = "recipe.yaml", **changed: Any) -> Path:
    """The recipe with keys replaced, beside the model and the data."""
    path = folder / name
    path.write_text(json.dumps({**RECIPE, **changed}), encoding="utf-8")
    return path


def train_lora(folder: Path, model: Path) -> None:
    """What a user brings: an adapter that PEFT trained and saved, and the model with it merged."""
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lora = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    optimizer = torch.optim.AdamW(tuned.parameters(), 5e-3)
    for row in rows(0, 12) * 2:
        text = f"Question: {row['question']}\nAnswer: {row['answer']}"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(folder / "lora")
    tuned.merge_and_unload().save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pico_llama: Path) -> Path:
    """A model, data, a run that fitted its own vector, that vector as an adapter, and a LoRA of PEFT's. Read only."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(pico_llama, folder / "model")
    for name, start in (("f", 0), ("r", 100), ("u", 200)):
        write_rows(folder / f"{name}.jsonl", rows(start, 12))
    assert run(recipe(folder), folder / "fitted") == 0
    to_adapter(vector(folder / "fitted", "forget"), folder / "adapter", "someone/else")
    to_adapter(-vector(folder / "fitted", "forget"), folder / "forgets", "someone/else")
    train_lora(folder, folder / "model")
    return folder


def vector(folder: Path, name: str) -> TaskVector:
    return TaskVector.load(folder / "vectors" / name / "vector.safetensors")


def given(home: Path, out: Path, brought: Any, **changed: Any) -> RunReport:
    """The report of a run that brings its vector, its forget set without training rows."""
    forget = {**RECIPE["forget"], "shares": ONLY_SCORED}
    changed = {"vector": {"from": brought, "correlation": None}, "forget": forget} | changed
    assert run(recipe(home, f"{out.name}.yaml", **changed), out) == 0
    return read(out)


def figures(report: RunReport) -> dict[tuple[float, str, str], float]:
    """Every validation score of a sweep, by coefficient, set and metric."""
    return {(p.coefficient, s.name, s.metric): s.score.value for p in report.sweep for s in p.scores}


FORMS = {
    "file": "fitted/vectors/forget/vector.safetensors",
    "stage": {"path": "fitted/vectors/forget"},
    "adapter": "adapter",
    "negated": {"path": "forgets", "negate": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_it_scores_as_if_it_had_been_fitted(home: Path, tmp_path: Path, form: str) -> None:
    fitted, report = read(home / "fitted"), given(home, tmp_path / form, FORMS[form])
    assert figures(report) == figures(fitted)
    assert (report.chosen, report.scores) == (fitted.chosen, fitted.scores)
    assert vector(tmp_path / form, "edit").digest() == vector(home / "fitted", "edit").digest()
    assert report.training == ()
    assert stages(tmp_path / form) & {"vectors/forget", "vectors/given"} == {"vectors/given"}
    assert report.provenance["vector"] == report.vector["digest"]
    assert "export/adapter" in stages(tmp_path / form)


def test_a_lora_that_peft_trained_is_subtracted_as_peft_would(home: Path, tmp_path: Path) -> None:
    report = given(home, tmp_path / "run", "lora")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    for coefficient in (0.5, 1.0):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "model"), home / "lora")
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= -coefficient
        lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4)
        for role, name in (("forget", "f"), ("retain", "r")):
            items = tmp_path / "run" / "items" / f"{role}.{name}.validation.jsonl"
            found, _ = scored(lm, "unlearn_qa", items=str(items))
            ours = figures(report)[coefficient, name, "loss"]
            assert ours == pytest.approx(found["loss,none"], abs=1e-4)
            assert abs(ours - figures(report)[0.0, name, "loss"]) > 0.01


def test_checkpoints_are_subtracted_weight_by_weight(home: Path, tmp_path: Path) -> None:
    export = {"adapter": False, "merged": True}
    report = given(home, tmp_path / "run", {"finetuned": "tuned"}, export=export)
    before, after = (AutoModelForCausalLM.from_pretrained(home / name).state_dict() for name in ("model", "tuned"))
    for name, change in vector(tmp_path / "run", "given").modules.items():
        weight = f"{name}.weight"
        torch.testing.assert_close(change.delta(), after[weight] - before[weight], rtol=0, atol=0)
    assert len(vector(tmp_path / "run", "given").modules) == 2 * len(TARGETS)
    lora = given(home, tmp_path / "lora", "lora")
    assert figures(report) == pytest.approx(figures(lora), abs=1e-5)
    # λ = -1 would be the fine-tuned model; the other way round it is what is subtracted of it
    back = {"finetuned": "model", "base": "tuned", "negate": True}
    low = {"from": back, "method": "low_rank", "low_rank": {"rank": 4}, "correlation": None}
    report = given(home, tmp_path / "low", back, vector=low)
    assert figures(report) == pytest.approx(figures(lora), abs=1e-4)
    assert report.exports["adapter"]["rank"] == 4


def test_a_run_depends_on_the_content_and_not_on_the_name(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "adapter", home / "swapped")
    first = given(home, tmp_path / "run", "swapped")
    shutil.rmtree(home / "swapped")
    shutil.copytree(home / "lora", home / "swapped")
    second = given(home, tmp_path / "run", "swapped")
    assert first.provenance["vector"] != second.provenance["vector"]
    assert figures(first) != figures(second)
    shutil.rmtree(home / "swapped")
    third = given(home, tmp_path / "other", "lora", reuse=(str(tmp_path / "run"),))
    keys = [json.loads((tmp_path / name / "provenance.json").read_text())["stages"] for name in ("run", "other")]
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"export/adapter"}  # its card has the name
    assert figures(third) == figures(second)


def test_shapers_fit_the_retain_vector_alone(home: Path, tmp_path: Path) -> None:
    how = {"from": "adapter", "method": "contrast", "lora": {"rank": 4}, "retain": {"steps": 3}, "correlation": None}
    report = given(home, tmp_path / "run", "adapter", vector=how)
    assert [line["stage"] for line in report.training] == ["retain"]
    forget, retain, edit = (vector(tmp_path / "run", name) for name in ("given", "retain", "edit"))
    for name, change in edit.modules.items():
        wanted = forget.modules[name].delta() - retain.modules[name].delta()
        torch.testing.assert_close(change.delta(), wanted, atol=1e-6, rtol=1e-5)


def test_a_set_to_learn_is_added(home: Path, tmp_path: Path) -> None:
    learn = [{**RECIPE["forget"], "shares": ONLY_SCORED}]
    report = given(home, tmp_path / "run", "adapter", forget=None, learn=learn)
    loss = {c: figures(report)[c, "f", "loss"] for c in (0.0, 0.5, 1.0)}
    assert loss[1.0] < loss[0.5] < loss[0.0]


def test_a_vector_of_another_model_is_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = given(home, tmp_path / "run", "adapter")
    said = "vector.from: it was made for someone/else, and is put on model"
    assert said in report.warnings
    assert said in capsys.readouterr().err
    assert not any("was made for" in line for line in given(home, tmp_path / "same", FORMS["file"]).warnings)


def test_the_plan_says_where_it_is_from(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget = {**RECIPE["forget"], "shares": ONLY_SCORED}
    path = recipe(home, "plan.yaml", forget=forget, vector={"from": {"path": "forgets", "negate": True}})
    assert main(["plan", str(path)]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "take the vector of the forget set from forgets, negated; nothing is trained for it" in plan
    assert "fine-tune on the forget set" not in plan


REFUSED = {
    "nothing there": ({"from": "no/such/adapter.safetensors"}, "vector.from: there is no no/such/adapter.safetensors"),
    "no vector": ({"from": "f.jsonl"}, "f.jsonl is no task vector"),
    "an adapter's file": ({"from": "lora/adapter_model.safetensors"}, "of an adapter give its folder"),
    "a model": ({"from": "tuned"}, "a checkpoint is given as finetuned"),
    "no checkpoint": (
        {"from": {"finetuned": "lora"}, "method": "low_rank", "low_rank": {"rank": 2}},
        "lora is an adapter, not a model",
    ),
    "neither": ({"from": {"negate": True}}, "give either path (a vector or an adapter) or finetuned"),
    "dense": ({"from": {"finetuned": "tuned"}}, "a dense change does not fit into an adapter: add low_rank"),
    "a source": ({"from": "lora", "method": "npo"}, "vector.method npo makes a vector of its own"),
    "a penalty": ({"from": "lora", "retain_kl": "two_sided"}, "vector.retain_kl belongs to a fitting"),
    "inside": ({"from": "lora", "inside": 1000}, "vector.inside belongs to a fitting"),
    "a fitting": ({"from": "lora", "forget": {"steps": 3}}, "vector.forget says how the forget vector is fitted"),
    "a shape": ({"from": "lora", "lora": {"rank": 2}}, "vector.lora is the shape of a vector that is fitted"),
    "rows needed": ({"from": "lora", "method": "perta"}, "a forget set needs train, validation and test items"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_mistakes_are_said_before_the_model_is_loaded(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    brought, said = REFUSED[what]
    forget = {**RECIPE["forget"], "shares": ONLY_SCORED}
    path = recipe(home, f"{tmp_path.name}.yaml", forget=forget, vector=brought)
    for command in (["plan", str(path)], ["run", str(path), "--out", str(tmp_path / "run")]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert said in " ".join(error.split())
        assert error.count("error:") == 1
        assert "] finetune:" not in error


def test_several_goals_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(home, "goals.yaml", also_forget=[{"kind": "qa", "path": "u.jsonl"}], vector={"from": "lora"})
    assert main(["plan", str(path)]) == 2
    assert "vector.from brings one vector, for one set to forget" in capsys.readouterr().err


def test_a_vector_that_does_not_fit_names_the_modules(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(home, "misfit.yaml", model={"path": "pico:phi"}, vector={"from": "lora"})
    assert run(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert ": vector.from: the vector does not fit this model" in error
    assert "model.layers.1.mlp.up_proj: the model has no such module" in error
    assert "] finetune:" not in error
