"""What is wrong with names, files and folders is said in the plan and at a run's start, before anything is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compared_arena import RECIPE, rows, run, write_data, write_recipe, write_rows

from unlearn.model import pico
from unlearn.recipe import evaluation

BENCHMARK = RECIPE["benchmark"]
HALVES = {"train": "all", "validation": 0.5, "test": 0.5}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data of the small recipe in the current folder; no hub."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def refused(recipe: Path, capfd: pytest.CaptureFixture[str], *extra: str) -> str:
    """The one message of a command that ends with exit code 2, on one line, and what was said before it."""
    capfd.readouterr()
    assert run(recipe, recipe.parent / "out", *extra) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("error:") == 1
    return " ".join(said.split())


def a_log(items: int, question: str = "Where was {name} born?") -> dict[str, Any]:
    """A log as TOFU's authors write them, which says what was asked."""
    files = ("eval_log.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json")
    asked = [row["question"] if "{name}" in question else question for row in rows(0, items)]
    column = {str(n): 1.0 + n / 8 for n in range(items)}
    plain = {
        "avg_gt_loss": column,
        "avg_paraphrased_loss": column,
        "average_perturb_loss": {n: [2.0, 2.5, 3.0] for n in column},
        "rougeL_recall": dict.fromkeys(column, 0.5),
        "generated_text": {n: [f"Question: {q}\n", "", ""] for n, q in zip(column, asked, strict=True)},
    }
    return dict.fromkeys((*files, "eval_log_forget.json"), plain)


def tofu(**changed: Any) -> dict[str, Any]:
    return {"benchmark": {**BENCHMARK, **changed}}


def task(name: str, **more: Any) -> dict[str, Any]:
    return {"eval": {**RECIPE["eval"], "tasks": [{"task": name, **more}]}}


def own(path: str, **source: Any) -> list[dict[str, Any]]:
    """A retain set on the hub whose validation items are in a file."""
    return [{"kind": "qa", "path": "hub:me/none", "shares": HALVES, "validation": {"path": path, **source}}]


HUB = {"path": None, "items": 300}
MUSE = {"name": "muse", "set": "books"}
MSA = {**RECIPE["vector"], "method": "msa", "msa": {"clean": "./none"}}
OTHER_COUNT = "forget quality compares the two on the same ones; set benchmark.items to the number that both have"
MISTAKES: list[tuple[dict[str, Any], str]] = [
    (task("wmdp_bioo"), "eval.tasks: lm-eval has no task 'wmdp_bioo'; did you mean 'wmdp_bio"),
    (task("unlearn_mqc"), "lm-eval has no task 'unlearn_mqc'; did you mean 'unlearn_mcq"),
    (
        task("unlearn_qa", metadata={"items": "ff.jsonl"}),
        "metadata items: there is no file ff.jsonl; did you",
    ),
    (task("tofu_retain_prob", metadata={"tofu": "tofuu"}), "metadata tofu: there is no folder tofuu; did you mean"),
    (tofu(items=300), "forget01_perturbed.json has 6 rows, fewer than the 300 of metadata items"),
    (tofu(set="forget05", **HUB), "benchmark.items is 300, and TOFU's forget05 has 200 questions"),
    (tofu(path="tofuu"), "benchmark.path: there is no folder tofuu here or in"),
    (tofu(set="forget10"), "has no forget10_perturbed.json, which the tasks of forget10 need"),
    (tofu(set="forget1"), "tofu has no set 'forget1'; it has forget01, forget05, forget10; did you mean"),
    ({"benchmark": {**MUSE, "path": "tofu"}}, "the data of muse books cannot be had:"),
    ({"reference": "lgo.json"}, "reference: there is no file lgo.json here or in"),
    ({"reference": "lgo.json"}, "did you mean log.json"),
    (
        {"reference": "long.json"},
        f"reference: long.json: the reference has 9 forget items and the model 6: {OTHER_COUNT}, or TOFU's own "
        "reference for forget01 was trained on retain99",
    ),
    ({"reference": "log5.json"}, f"log5.json: the reference has 5 forget items and the model 6: {OTHER_COUNT}"),
    (
        {"reference": "other.json"},
        "other.json: 6 of the 6 forget items ask something else in the reference: item '0' is 'Who wrote it?' there",
    ),
    (
        {"reference": "log300.json", **tofu(set="forget05", path=None)},
        f"has 300 forget items and the model 200: {OTHER_COUNT}, or TOFU's own reference for forget05 was trained on "
        "retain95",
    ),
    ({"reference": "pico:llama", "teach": None}, "reference: pico:llama is the model that is to forget"),
    ({"reference": "earlier"}, "earlier/reference has no model.safetensors; in it: config.json"),
    ({"reuse": ["tof"]}, "tof; did you mean tofu?"),
    ({"vector": MSA, "teach": None, "reference": None}, "vector.msa.clean: there is no folder ./none"),
    ({"choose": {"metric": "prop"}}, "choose.metric: qa data have no 'prop' in the search; did you mean 'prob'"),
    ({"choose": {"kept": ["perplexity"]}}, "choose.kept: no set that is to be kept has 'perplexity' in the search"),
    (
        {"forget": {**RECIPE["forget"], "validation": {"path": "f.jsonl", "rows": [300, 400]}}},
        "f.jsonl: it has 12 rows, so rows [300, 400] goes beyond its end",
    ),
    ({"retain": own("r.jsonl", rows=[300, 400])}, "retain set 'none': "),
    ({"retain": own("rr.jsonl")}, "no such file; did you mean 'r.jsonl'"),
    (
        {"export": {"push_to_hub": {"repo": "me/a--b"}}},
        "repo: Cannot have -- or .. in repo_id: 'me/a--b'",
    ),
    ({"reference": "log.json", "benchmark": MUSE}, "log.json is a log of TOFU, and no reference for MUSE"),
    ({"reference": "torn.json"}, "torn.json: not JSON"),
    ({"reference": "untaught"}, "reference: the run untaught trained no reference itself"),
    ({"retain": None}, "reference: train needs a retain set to teach"),
    (tofu(path="lacking"), "row 1: 'paraphrased_answer' is missing or empty"),
]


LINES = """name: placed
model:
  path: pico:llama
forget:
  kind: qa
  path: f.jsonl
  shares: {train: all, validation: 0.5, test: 0.5}
retain:
- kind: qa
  path: r.jsonl
- kind: qa
  name: other
  path: u.jsonl
  validation:
    path: h.jsonl
"""


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("  path: f.jsonl", "  path: ff.jsonl", ":6: forget set 'ff': "),
        ("  path: u.jsonl", "  path: uu.jsonl", ":13: retain set 'other': "),
        ("    path: h.jsonl", "    path: hh.jsonl", ":15: retain set 'other': "),
        (
            "  path: pico:llama",
            "  path: pico:llama\n  chat_template: own.jinja",
            ":4: model.chat_template: there is no",
        ),
        ("name: placed", "name: placed\nreuse: [none]", ":2: reuse: there is no run folder"),
    ],
)
def test_what_is_wrong_behind_a_key_has_the_key_s_line(
    here: Path, capfd: pytest.CaptureFixture[str], before: str, after: str, told: str
) -> None:
    (here / "placed.yaml").write_text(LINES.replace(before, after))
    for more in ((), ("--dry-run",)):
        assert f"error: placed.yaml{told}" in refused(here / "placed.yaml", capfd, *more)
    (here / "placed.yaml").write_text(LINES)
    for key, value, said in (
        ("retain.0.path", "rr.jsonl", "retain set 'rr': "),
        ("model.chat_template", "own", "there is"),
    ):
        changed = ("--dry-run", "--set", f"{key}={value}")
        assert f"error: --set {key}: {said}" in refused(here / "placed.yaml", capfd, *changed)


QUANTISED = (
    "quantised copies need the package bitsandbytes: pip install bitsandbytes (the extra [quant] has it), or set"
)
WITHOUT_BITSANDBYTES: list[tuple[dict[str, Any], str]] = [
    ({}, f"robustness.quantize: {QUANTISED}"),
    ({"robustness": None, "model": {"path": "pico:llama", "quantize": "nf4"}}, f"model.quantize: {QUANTISED}"),
]


@pytest.mark.parametrize(
    ("changed", "message", "extra"),
    [(*row, "--dry-run") for row in (*MISTAKES, *WITHOUT_BITSANDBYTES)]
    + [(*row, "--strict") for row in (MISTAKES[0], MISTAKES[14], MISTAKES[19], MISTAKES[21], *WITHOUT_BITSANDBYTES)],
)
def test_it_is_said_at_once(
    changed: dict[str, Any],
    message: str,
    extra: str,
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the plan, and by a run before even the model is loaded."""
    for name, log in (("log", a_log(6)), ("log5", a_log(5)), ("long", a_log(9)), ("log300", a_log(300))):
        (here / f"{name}.json").write_text(json.dumps(log))
    (here / "other.json").write_text(json.dumps(a_log(6, "Who wrote it?")))
    (here / "torn.json").write_text('{"eval_log.json": ')
    write_rows(here / "lacking" / "forget01_perturbed.json", [{"question": "Who?", "answer": "Ada."}])
    # a run that was cut off, and one without a reference
    for name in ("earlier/resolved.yaml", "earlier/reference/config.json", "untaught/resolved.yaml"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("{}")
    if QUANTISED in message:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    said = refused(write_recipe(here, **changed), capfd, extra)
    assert message in said
    assert "[1/" not in said


def test_a_log_that_fits(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of TOFU's authors, or of open-unlearning."""
    (here / "log.json").write_text(json.dumps(a_log(6)))
    assert run(write_recipe(here, reference="log.json"), here / "out", "--dry-run") == 0
    for items in (6, 5):
        scores = {str(n): {"score": 0.5 + n / 4} for n in range(items)}
        (here / "TOFU_EVAL.json").write_text(json.dumps({"forget_truth_ratio": {"value_by_index": scores}}))
        recipe = write_recipe(here, reference="TOFU_EVAL.json")
        if items == 6:
            assert run(recipe, here / "out", "--dry-run") == 0
        else:
            assert "TOFU_EVAL.json: the reference has 5 forget items" in refused(recipe, capfd, "--dry-run")


UNTAUGHT = [{"kind": "qa", "path": "r.jsonl", "shares": {"train": 0.0, "validation": 0.5, "test": 0.5}}]
WORDLESS = {**RECIPE["forget"], "path": "wordless.jsonl"}
AFTER_LOADING: dict[str, tuple[dict[str, Any], str]] = {
    "a layer": (
        {"vector": {**RECIPE["vector"], "lora": {"targets": ["q_prj"]}}},
        "vector.lora.targets: no linear layer of this LlamaForCausalLM is called q_prj (did you mean q_proj?)",
    ),
    "a rank": ({"vector": {**RECIPE["vector"], "lora": {"rank": 4096}}}, "rank 4096"),
    "a metric": (task("unlearn_qa", metric="f1", metadata={"items": "items.jsonl"}), "unlearn_qa has no metric 'f1'"),
    "items to train on": (
        {
            "vector": {**RECIPE["vector"], "method": ["negate", "project"]},
            "retain": UNTAUGHT,
            "reference": None,
        },
        "no retain set has items to train on, and vector.method project needs some",
    ),
    "items to teach a reference": (
        {"retain": UNTAUGHT},
        "reference: train has nothing to teach: no retain set has items to train on",
    ),
    "the reference's tokenizer": ({"reference": "./other"}, "reference: this model has another tokenizer"),
    "room for an answer": (
        {"vector": {**RECIPE["vector"], "forget": {**RECIPE["vector"]["forget"], "max_length": 2}}},
        "forget set 'f': 12 of 12 answers do not fit into max_length (2 tokens)",
    ),
    "room for what is held out": (
        {"holdout": {"kind": "qa", "path": "long.jsonl"}},
        "membership: the model reads 512 tokens at a time, and this item does not fit",
    ),
    "a word to compare": (
        {"holdout": {"kind": "qa", "path": "h.jsonl"}, "eval": {"generate": "none"}, "forget": WORDLESS},
        "forget set 'wordless': 6 of 6 answers have no letter and no digit",
    ),
    "a token": ({"export": {"push_to_hub": {"repo": "me/it"}}}, "export.push_to_hub: no token: set HF_TOKEN"),
}


@pytest.mark.parametrize(("changed", "message"), AFTER_LOADING.values(), ids=AFTER_LOADING)
def test_what_takes_the_model_to_know_is_said_before_anything_is_trained(
    changed: dict[str, Any],
    message: str,
    here: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    write_rows(here / "items.jsonl", [{"prompt": "a", "target": "b", "target_tokens": 1}] * 4)
    write_rows(here / "long.jsonl", [{"question": "Who?", "answer": "far away " * 600}])
    write_rows(here / "wordless.jsonl", [{"question": f"Smile {n} times!", "answer": "☺" * n} for n in range(1, 13)])
    if changed.get("reference") == "./other":
        pico.build("phi", here / "other")
        pico.tokenizer(["Quite other words make quite other tokens."] * 9).save_pretrained(here / "other")
    said = refused(write_recipe(here, **changed), capfd)
    assert message in said
    assert "] teach: " not in said
    assert not (here / "out" / "target").exists()


def test_names_of_tasks_are_looked_up_without_lm_eval(here: Path) -> None:
    """Nothing slow is imported for it, though a name is looked for in all of lm-eval's files."""
    code = (
        "import sys; from unlearn.recipe.evaluation import *\n"
        "print(unheard_of(task_files(shipped_tasks()), ['hellaswag', 'mmlu', 'wmdp_bio', 'unlearn_mcq', 'mmluu']))\n"
        "print(sorted({'lm_eval', 'torch', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["['unlearn_mcq', 'mmluu']", "[]"]


@pytest.mark.slow
def test_no_task_of_lm_eval_is_refused() -> None:
    """lm-eval's own index, which it takes ten seconds to build."""
    from lm_eval.tasks import TaskManager

    files = evaluation.task_files(evaluation.shipped_tasks())
    index = set(TaskManager().task_index) - {*evaluation.task_names(files), *(Path(path).stem for path in files)}
    assert 100 < len(index) < 1000
    assert evaluation.unheard_of(files, index) == []
