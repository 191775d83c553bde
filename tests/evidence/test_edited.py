"""``unlearn eval``: a model that was edited elsewhere gets the scores, comparisons and attacks of one edited here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_arena import copied, read, write_recipe
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from unlearn.cli import main
from unlearn.cluster.compare import compare
from unlearn.results import RunReport
from unlearn.text import MISSING

SCORES = {"benchmark": None, "holdout": None, "robustness": None, "reference": None}  # alone


@pytest.fixture(scope="module")
def home(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run that is compared and attacked, and its edited model as somebody else would have it.

    PEFT merges the run's adapter into the run's target: our own code has no part in it.
    """
    folder = Path(shutil.copytree(compared, tmp_path_factory.mktemp("edited") / "home"))
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "target")
    PeftModel.from_pretrained(model, folder / "run" / "export" / "adapter").merge_and_unload().save_pretrained(
        folder / "theirs"
    )
    AutoTokenizer.from_pretrained(folder / "run" / "target").save_pretrained(folder / "theirs")
    return folder


def evaluated(home: Path, out: Path, model: str, *more: str, **changed: Any) -> RunReport:
    """The report of ``unlearn eval`` by the run's recipe, which takes over what the run has of the model before."""
    path = write_recipe(home, reuse=["run"], **changed).rename(home / f"{out.name}.yaml")
    assert main(["eval", str(home / model), str(path), "--out", str(out), *more]) == 0
    return read(out)


def same_scores(ours: RunReport, theirs: RunReport) -> None:
    found = {row.key: row for row in theirs.scores}
    assert [row.key for row in ours.scores] == list(found)
    for row in ours.scores:
        assert row.before == found[row.key].before
        assert row.after.value == pytest.approx(found[row.key].after.value, abs=1e-5), row.key


def test_it_finds_what_the_run_that_made_the_model_found(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    run, report = read(home / "run"), evaluated(home, out, "theirs")
    same_scores(report, run)
    assert [row.reference for row in report.scores] == [row.reference for row in run.scores]
    assert [(e.prompt, e.before, e.after) for e in report.examples] == [
        (e.prompt, e.before, e.after) for e in run.examples
    ]
    assert [(m.who, m.attack) for m in report.membership] == [(m.who, m.attack) for m in run.membership]
    assert [m.auc for m in report.membership] == pytest.approx([m.auc for m in run.membership], abs=1e-6)
    assert report.robustness is not None
    assert run.robustness is not None
    attacked = {(s.who, *s.under): s.value for s in run.robustness.scores}
    assert {(s.who, *s.under): s.value for s in report.robustness.scores} == pytest.approx(attacked, abs=1e-3)
    assert report.benchmark is not None
    assert run.benchmark is not None
    for who, row in run.benchmark.rows.items():
        assert report.benchmark.rows[who] == pytest.approx(dict(row), abs=1e-4), who
    # nothing was chosen, fitted, swept or exported
    assert (report.chosen.search, report.sweep, report.exports) == ("given", (), {})
    assert report.chosen.bound_met
    stages = json.loads((out / "provenance.json").read_text())["stages"]
    assert not any(name.startswith(("vectors", "export", "eval/0.5", "foresight")) for name in stages)
    page = (out / "report.html").read_text()
    assert "Frontier" not in page
    assert "one that was edited elsewhere" in page
    # a row beside the run's
    capsys.readouterr()
    assert main(["leaderboard", str(home / "run"), str(out)]) == 0
    rows = [line.split()[-3:] for line in capsys.readouterr().out.splitlines() if line.startswith("Prob. Forget")]
    assert rows[0] == rows[1]
    # again: nothing to do, until the model under that name is another one
    assert main(["eval", str(home / "theirs"), str(home / "eval.yaml"), "--out", str(out)]) == 0
    assert "nothing has changed" in capsys.readouterr().err


def test_an_adapter_is_scored_on_the_model_that_the_recipe_teaches(home: Path, tmp_path: Path) -> None:
    same_scores(evaluated(home, tmp_path / "alone", "run/export/adapter", **SCORES), read(home / "run"))
    more = ("--adapter", str(home / "run" / "export" / "adapter"))
    report = evaluated(home, tmp_path / "both", "run/target", *more, **SCORES)
    same_scores(report, read(home / "run"))
    assert report.name == "compared-adapter"
    found, _ = compare([home / "run", tmp_path / "alone"], tmp_path / "compared")
    assert sorted(setting.cells()[1] for family in found for setting in family.settings) == ["1", MISSING]


def test_it_goes_on_where_it_was_killed_and_sees_another_model(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "theirs", home / "swapped")
    first = evaluated(home, tmp_path / "run", "swapped", **SCORES)
    copied(tmp_path, tmp_path / "again", "eval/edited")
    (tmp_path / "run.yaml").write_text((home / "run.yaml").read_text())
    command = ["eval", str(home / "swapped"), str(home / "run.yaml"), "--out", str(tmp_path / "again")]
    assert main(command) == 0
    assert read(tmp_path / "again").scores == first.scores
    assert "eval/0/test: as before" in capsys.readouterr().err
    shutil.rmtree(home / "swapped")
    shutil.copytree(home / "run" / "target", home / "swapped")
    assert main(command) == 0
    second = read(tmp_path / "again")
    assert all(row.before == row.after for row in second.scores)
    assert "the edited model is the very model before: nothing was edited" in second.warnings
    assert second.provenance["edited"] == second.provenance["target"]


def test_kept_scores_out_of_their_bound_are_said(home: Path, tmp_path: Path) -> None:
    strict = {**SCORES, "choose": {"keep": 0.99}}
    path = write_recipe(home, reuse=["run"], **strict).rename(home / "strict.yaml")
    assert main(["eval", str(home / "theirs"), str(path), "--out", str(tmp_path / "run"), "--strict"]) == 1
    report = read(tmp_path / "run")
    assert not report.chosen.bound_met
    assert "went out of bounds" in (tmp_path / "run" / "report.html").read_text()


def test_no_training_rows_are_needed(home: Path, tmp_path: Path) -> None:
    sets = {name: {"kind": "qa", "path": f"{name}.jsonl", "shares": {"train": 0.0, "test": 0.5}} for name in "fr"}
    report = evaluated(
        home, tmp_path / "run", "theirs", **SCORES, teach=None, forget=sets["f"], retain=[sets["r"]], vector=None
    )
    assert {row.split for row in report.scores} == {"test"}


@pytest.fixture
def strange(home: Path, tmp_path: Path) -> Path:
    """Models and adapters that cannot be taken."""
    base = AutoModelForCausalLM.from_pretrained(home / "theirs")
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, prompts).save_pretrained(tmp_path / "prompts")
    base = AutoModelForCausalLM.from_pretrained(home / "theirs")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    shutil.copytree(home / "theirs", tmp_path / "words")
    tokens = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    one, two = list(tokens["model"]["vocab"])[-2:]
    tokens["model"]["vocab"] |= {one: tokens["model"]["vocab"][two], two: tokens["model"]["vocab"][one]}
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(tokens))
    shutil.copytree(home / "theirs", tmp_path / "begun")
    words = AutoTokenizer.from_pretrained(tmp_path / "begun")
    end = words.eos_token
    begin = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, words.eos_token_id)])
    words.backend_tokenizer.post_processor = begin
    words.save_pretrained(tmp_path / "begun")
    return tmp_path


REFUSED = {
    "no/such/model": "error: MODEL: there is no folder",
    "words": "MODEL: this model has another tokenizer than the target",
    "begun": "MODEL: this model's tokenizer has the target's vocabulary and reads a text otherwise",
    "prompts": "it adds to the prompts, not to the weights",
    "pickled": "adapter_model.safetensors is missing",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_scored_is_one_message(
    home: Path, strange: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = write_recipe(home, reuse=["run"], **SCORES).rename(home / "refused.yaml")
    assert main(["eval", str(strange / name), str(path), "--out", str(strange / "run")]) == 2
    error = capsys.readouterr().err
    assert REFUSED[name] in " ".join(error.split())
    assert error.count("error:") == 1
    assert "[5/5]" not in error


def test_a_recipe_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "somewhere"]) == 2
    assert "which recipe?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_scored_and_its_weights_are_left_alone(home: Path, tmp_path: Path, bits: int) -> None:
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(home / "theirs", quantization_config=how)
    model.save_pretrained(home / f"int{bits}")
    AutoTokenizer.from_pretrained(home / "theirs").save_pretrained(home / f"int{bits}")
    report = evaluated(home, tmp_path / "run", f"int{bits}", **{**SCORES, "robustness": {"samples": 0, "probes": []}})
    after = {row.key: row.after.value for row in report.scores}
    for row in read(home / "run").scores:
        if row.metric == "prob":
            assert after[row.key] == pytest.approx(row.after.value, abs=0.05)
    assert report.robustness is not None
    assert {s.kind for s in report.robustness.scores if s.who == "edited"} <= {"none", "contrast", "lens"}
    assert any("quantised, so that attacks" in said for said in report.warnings)
    assert not torch.isnan(torch.tensor(list(after.values()))).any()
