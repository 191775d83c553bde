"""The whole road, as a user walks it: the command line, its report and files, resumed, and read by others."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from pack_arena import scored
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.cli import main
from unlearn.results import RunReport
from unlearn.vector.edit import subtracted
from unlearn.vector.task_vector import TaskVector

RECIPE = ["--recipe", "pico_smoke.yaml"]


def same(folder: Path) -> dict[str, Any]:
    """A report without what may differ between two runs of one recipe: times, the clock, and where the run lies."""
    report = json.loads((folder / "report.json").read_text())
    report.pop("seconds")
    for line in report["training"]:
        line.pop("seconds")
    report["provenance"].pop("date")
    for key in ("command", "code"):
        report["provenance"].pop(key)
    for export in report["exports"].values():
        export.pop("bytes")  # the adapter names its base by its path, and these runs lie in different folders
    return report


def read(folder: Path) -> RunReport:
    return RunReport.from_json(json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module")
def report(smoke: Path) -> RunReport:
    return read(smoke)


def test_the_run_forgets_and_keeps_within_its_rule(report: RunReport) -> None:
    assert report.chosen.bound_met
    assert report.chosen.coefficient > 0
    by_key = {(r.set, r.metric): r for r in report.scores}
    forget, keep = by_key["forget", "prob"], by_key["retain", "prob"]
    assert forget.after.value < forget.before.value - 0.2
    assert keep.after.value / keep.before.value > forget.after.value / forget.before.value
    assert all(r.split == "test" and r.before.n == 6 for r in report.scores)
    assert all(s.split == "validation" for p in report.sweep for s in p.scores)
    assert [p.coefficient for p in report.sweep] == [0, 0.5, 1, 1.5, 2, 3, 4]


def test_report_and_files_agree(smoke: Path, report: RunReport) -> None:
    page = (smoke / "report.html").read_text()
    assert f"{report.chosen.coefficient:g}" in page
    assert "<script src" not in page
    results = list((smoke / "eval").rglob("results_*.json"))
    assert len(results) == len(report.sweep) + 2  # every coefficient on validation, two on test
    provenance = json.loads((smoke / "provenance.json").read_text())
    assert provenance["key"] == report.provenance["key"]
    assert set(provenance["stages"]) >= {"items", "target", "vectors/forget", "vectors/retain", "export/adapter"}


def test_a_second_run_changes_nothing_and_computes_nothing(smoke: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        ignored = (".unlearn-lock", "recipe.yaml", "resolved.yaml")
        return {p: p.stat().st_mtime_ns for p in smoke.rglob("*") if p.is_file() and p.name not in ignored}

    before = times()
    assert main([*RECIPE, "--out", str(smoke)]) == 0
    assert "nothing has changed" in capfd.readouterr().err
    assert times() == before


def test_a_damaged_vector_is_made_again(smoke: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(smoke, copy)
    vector = copy / "vectors" / "forget" / "vector.safetensors"
    raw = bytearray(vector.read_bytes())
    raw[-5] ^= 0xFF
    vector.write_bytes(raw)
    assert main([*RECIPE, "--out", str(copy)]) == 0
    assert "made again" in capfd.readouterr().err
    assert same(copy) == same(smoke)


def test_plain_peft_gives_the_edited_model(smoke: Path, report: RunReport) -> None:
    target = smoke / "target"
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(target)("Norway: Oslo", return_tensors="pt")["input_ids"]
    vector = TaskVector.load(smoke / "vectors" / "edit" / "vector.safetensors")
    with torch.no_grad():
        untouched = model(ids).logits
        with subtracted(model, vector, report.chosen.coefficient):
            wanted = model(ids).logits
        peft = PeftModel.from_pretrained(model, str(smoke / "export" / "adapter")).eval()
        got = peft(ids).logits
    assert (wanted - untouched).abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_bare_lm_eval_on_the_export_agrees_with_the_report(smoke: Path, report: RunReport) -> None:
    peft = str(smoke / "export" / "adapter")
    lm = HFLM(pretrained=str(smoke / "target"), peft=peft, dtype="float32", device="cpu", batch_size=4)
    scores, _ = scored(lm, "unlearn_mcq", items=str(smoke / "items" / "forget.europe.test.jsonl"))
    for row in report.scores:
        if row.set == "forget":
            assert scores[f"{row.metric},none"] == pytest.approx(row.after.value, abs=1e-4), row.metric


def test_merged_weights_are_the_edited_model(smoke: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Read again they say what was scored, and the report has by how much not; or the run says what to do."""
    reuse = ["--set", f"reuse=[{smoke}]", "--set", "export.merged=true"]
    folder = tmp_path / "run"
    assert main([*RECIPE, "--out", str(folder), *reuse]) == 0
    report = read(folder)
    again = report.exports["merged"]["rescored"]
    assert again == json.loads((folder / "export" / "merged" / "export.json").read_text())["rescored"]
    assert again["items"] == 8  # four of each set
    assert again["difference"] < 1e-4 < 0.1 < again["edit"]
    assert "Rescored" in (folder / "report.html").read_text()
    capfd.readouterr()
    less = ["--set", "sweep.coefficients=[0.001]", "--set", "choose.metric=logprob", "--set", "export.dtype=bfloat16"]
    assert main([*RECIPE, "--out", str(tmp_path / "less"), *reuse, *less]) == 2
    said = capfd.readouterr().err
    assert said.count("error:") == 1
    assert "export.merged: rounded to the stored number format, the edit has cosine" in said
    assert "Traceback" not in said
    insists = ["--set", "export.accept_rounding=true"]
    assert main([*RECIPE, "--out", str(tmp_path / "insists"), *reuse, *less, *insists]) == 0


def test_nothing_passes_so_nothing_changes(smoke: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    less = ["--set", f"reuse=[{smoke}]", "--set", "sweep.coefficients=[0.000001]"]
    assert main([*RECIPE, "--out", str(folder), "--strict", *less]) == 1
    report = read(folder)
    assert (report.chosen.coefficient, report.chosen.bound_met) == (0.0, False)
    assert report.exports == {}
    assert not (folder / "export").exists()
    assert all(r.before == r.after for r in report.scores)


def test_each_metric_that_is_named_must_be_kept(smoke: Path, tmp_path: Path) -> None:
    named = ["--set", f"reuse=[{smoke}]", "--set", "choose.kept=[acc,prob,acc]"]
    assert main([*RECIPE, "--out", str(tmp_path / "run"), *named]) == 0
    report = read(tmp_path / "run")
    assert report.chosen.kept == (("retain", "africa", "acc"), ("retain", "africa", "prob"))
    assert "every kept metric (acc and prob) stays within its bound" in report.chosen.rule
    assert "retain/africa, acc against" in (tmp_path / "run" / "report.html").read_text()
    before, *rest = ({s.key: s.score.value for s in point.scores} for point in report.sweep)
    within = [all(scores[key] >= 0.95 * before[key] for key in report.chosen.kept) for scores in rest]
    assert [point.within_bound for point in report.sweep[1:]] == within
    assert set(within) == {True, False}
    plain = {p.coefficient for p in read(smoke).sweep[1:] if p.within_bound}
    assert plain > {p.coefficient for p in report.sweep[1:] if p.within_bound}, "accuracy alone allows more"


def test_a_named_metric_that_would_bind_nothing_is_refused_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = ["--set", "choose.kept=[acc]", "--set", "retain.0.shares={train: 0.5, validation: 0, test: 0.5}"]
    assert main([*RECIPE, "--out", str(tmp_path / "run"), *named]) == 2
    assert "error: --set choose.kept: 'acc' would bind nothing" in capfd.readouterr().err
    assert not (tmp_path / "run" / "target").exists()
    given = ["--set", "edited.model=pico:phi"]  # and nothing is searched for
    assert main([*RECIPE, "--out", str(tmp_path / "given"), *named, *given]) == 0
    assert read(tmp_path / "given").chosen.kept == (("retain", "africa", "acc"),)


BISECT = (
    *("--set", "retain.0.where={continent: [Africa, Asia]}", "--set", "retain.0.limit=84"),
    *("--set", "retain.0.shares={train: all, validation: 0.5, test: 0.5}", "--set", "teach.steps=150"),
    *("--set", "sweep.coefficients=[1, 2, 3, 4, 6, 8, 10, 12]"),
)


@pytest.mark.slow
def test_bisection_agrees_with_the_grid_for_half_of_its_cost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, cut, grid = tmp_path / "run", tmp_path / "cut", tmp_path / "grid"
    bisect = (*RECIPE, *BISECT, "--set", "sweep.search=bisect")
    assert main([*bisect, "--out", str(folder)]) == 0
    report = read(folder)
    tried = [p for p in report.sweep if p.coefficient > 0]
    assert report.chosen.search == "bisect"
    assert report.chosen.grid == (1, 2, 3, 4, 6, 8, 10, 12)
    assert report.chosen.bound_met
    assert len(tried) <= 4
    assert f"{len(tried)} of the grid's 8 coefficients were scored" in html.unescape(
        (folder / "report.html").read_text()
    )

    # killed before one of them was scored
    accepted = folder / "eval" / f"{report.chosen.coefficient:g}"
    shutil.copytree(folder, cut)
    shutil.rmtree(cut / "eval" / accepted.name / "validation")
    assert main([*bisect, "--out", str(cut)]) == 0
    assert same(cut) == same(folder)

    # the whole grid, which takes what is there
    shutil.copytree(folder, grid)
    capfd.readouterr()
    assert main([*RECIPE, *BISECT, "--out", str(grid)]) == 0
    assert f"eval/{accepted.name}/validation: as before" in capfd.readouterr().err
    assert "search: grid" in (grid / "resolved.yaml").read_text()
    full = read(grid)
    assert full.chosen.search == "grid"
    assert [p.coefficient for p in full.sweep] == [0, *full.chosen.grid]
    steps = full.chosen.grid
    assert abs(steps.index(report.chosen.coefficient) - steps.index(full.chosen.coefficient)) <= 1
    whole = {p.coefficient: p for p in full.sweep}
    assert all(whole[p.coefficient] == p for p in report.sweep)


MISTAKES: list[tuple[list[str], Sequence[str]]] = [
    (["--set", "vector.lora.rang=4"], ["rang", "rank"]),
    (["--set", "sweep.coefficients=a"], ["sweep.coefficients"]),
    (["--set", "vector.lora.targets=[c_attn]"], ["c_attn", "q_proj"]),
    (["--set", "forget.path=nowhere.jsonl"], ["nowhere.jsonl"]),
    (["--set", "forget.columns.question=contry"], ["contry", "country"]),
    (["--set", "retain.0.where.continent=Europe"], ["forget", "retain"]),
    (["--set", "model.path=no/such/folder/here"], ["no/such/folder/here", "model.path"]),
    (["--set", "vector.forget.learning_rate=1e30"], ["learning_rate"]),
    (["--set", "retain.0.shares={train: 0, validation: 0.5, test: 0.5}"], ["contrast", "shares.train"]),
    (["--set", "choose.metric=perplexity"], ["choose.metric", "acc"]),
    (["--set", "choose.kept=[acc,pni]"], ["choose.kept", "'pni'", "did you mean 'pmi'?"]),
    (["--set", "choose.kept=[]"], ["choose.kept"]),
    (
        ["--set", "choose.kept=[acc]", "--set", "retain=[]", "--set", "vector.method=negate"],
        ["no retain or utility set"],
    ),
    (["--set", "eval.tasks=[{task: hellaswog}]"], ["hellaswog", "hellaswag"]),
]


@pytest.mark.parametrize(("extra", "said"), MISTAKES, ids=[m[0][1].split("=")[0] for m in MISTAKES])
def test_a_mistake_is_one_message_and_exit_code_2(
    extra: list[str], said: Sequence[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*RECIPE, "--out", str(tmp_path / "run"), *extra]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert err.count("error:") == 1
    for word in said:
        assert word in err


def long_questions(folder: Path, **forget: Any) -> Path:
    """A recipe whose forget set has six questions of 1,200 words in eight."""
    rows = [
        (f"What does {name} like? {'And so on. ' * (400 * (n < 6))}", f"{name} likes tea.")
        for n, name in enumerate(["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"])
    ]
    near = [(f"Where is {name}?", f"In {name}land.") for name in ("Oz", "Uz", "Az", "Iz", "Ez", "Yz")]
    for name, pairs in (("f", rows), ("r", near)):
        lines = [json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in pairs]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    shares = {"train": "all", "validation": 0.5, "test": 0.5}
    recipe = {
        "name": "long",
        "model": {"path": "pico:phi"},
        "forget": {"kind": "qa", "path": "f.jsonl", "shares": shares, **forget},
        "retain": [{"kind": "qa", "path": "r.jsonl", "shares": shares}],
        "vector": {"forget": {"steps": 2, "max_length": 64}, "correlation": None},
        "sweep": {"coefficients": [1]},
    }
    path = folder / "long.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def test_questions_that_are_cut_are_counted_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = str(long_questions(tmp_path))
    with (tmp_path / "f.jsonl").open("r+", encoding="utf-8") as file:
        file.write(file.readlines()[-1])  # once more
    assert main(["--recipe", recipe, "--out", str(tmp_path / "run")]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "forget f: 8 train, 4 validation, 4 test, 1 doubled" in said
    assert "6 prompts of 8 had to lose up to" in said
    assert "longer than 512 tokens: their beginnings are not read" in caplog.text, "scoring cuts them as well"
    report = read(tmp_path / "run")
    (line,) = report.training
    assert (line["examples"], line["prompts_cut"]) == (8, 6)
    assert any("of 6 prompts the beginning was left out" in warning for warning in report.warnings)
    assert "of 6 prompts the beginning was left out" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "Who?", "answer": "far " * 99},
            ["forget set 'f': 1 of 9 answers", "raise max_length to", "'Question: Who?"],
        ),
        ({"question": "Smile!", "answer": "😀"}, ["forget set 'f'", "no letter and no digit", "eval.generate"]),
    ],
)
def test_answers_that_no_row_or_score_can_hold(
    row: dict[str, str], said: Sequence[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = long_questions(tmp_path, validation={"path": "v.jsonl"})
    (tmp_path / "v.jsonl").write_text(json.dumps({"question": "And?", "answer": "No."}) + "\n")
    with (tmp_path / "f.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shares = "forget.shares={train: all, validation: 0, test: 1}"
    assert main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--set", shares]) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert not (tmp_path / "run" / "vectors" / "forget").exists()
    for word in said:
        assert word in " ".join(err.split())


def test_from_python(smoke: Path) -> None:
    import unlearn

    found = unlearn.run("pico_smoke.yaml", out=smoke)
    assert isinstance(found, unlearn.RunReport)
    assert found.to_json() == json.loads((smoke / "report.json").read_text())
    assert issubclass(unlearn.Recipe, BaseModel)
    assert unlearn.TaskVector is TaskVector
    with pytest.raises(unlearn.errors.RecipeError, match="seeds"):
        unlearn.run("pico_smoke.yaml", set={"seeds": 1})


def test_another_recipes_folder_is_refused(smoke: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--out", str(smoke), "--set", "seed=7"]) == 2
    err = capfd.readouterr().err
    assert "seed" in err
    assert "--fresh" in err


def test_quick_answers_do_not_import_torch(tmp_path: Path) -> None:
    code = f"""import sys; from unlearn.cli import main
for flag in ("--help", "--list", "--schema", "--dry-run"):
    try: main([*{RECIPE!r}, flag])
    except SystemExit: pass
print(sorted({{"torch", "transformers", "datasets", "peft", "lm_eval"}} & set(sys.modules)), file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout.count("pico_smoke") >= 2
