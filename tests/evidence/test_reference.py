"""Reference and benchmark of a whole run against independent computations; resumed, reused, killed, and by two."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_arena import (
    EVERYONE,
    RECIPE,
    TOFU,
    copied,
    made,
    read,
    run,
    same,
    stages,
    write_data,
    write_recipe,
)
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy.stats import hmean, ks_2samp
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.errors import EvaluationError, ModelError
from unlearn.evidence import reference as references
from unlearn.evidence.benchmarks import TofuLog, read_samples
from unlearn.recipe.load import load_recipe, tasks_folder
from unlearn.recipe.schema import Recipe
from unlearn.results import RunReport, Who

SECONDS = 300
TOLERANCE = 1e-4  # between one row per answer and packed rows


@pytest.fixture(scope="module")
def report(compared: Path) -> RunReport:
    return read(compared / "run")


def answers(run_folder: Path, who: str, task: str) -> list[dict[str, Any]]:
    """A task's sample file, parsed by nothing of ours."""
    (path,) = (run_folder / "benchmark" / who).glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_reference_scores_are_those_of_bare_lm_eval(compared: Path, report: RunReport) -> None:
    folder = compared / "run" / "reference"
    lm = HFLM(pretrained=str(folder), batch_size=4, device="cpu", dtype="float32", logits_cache=False)
    for role, name in (("forget", "f"), ("retain", "r"), ("utility", "util")):
        items = compared / "run" / "items" / f"{role}.{name}.test.jsonl"
        manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata={"items": str(items)})
        kinds = ["unlearn_qa", "unlearn_qa_rouge"]
        found = simple_evaluate(
            model=lm, tasks=kinds, task_manager=manager, bootstrap_iters=0, gen_kwargs={"max_gen_toks": 6}
        )
        scores = found["results"]["unlearn_qa"] | found["results"]["unlearn_qa_rouge"]
        rows = {r.metric: r for r in report.scores if (r.set, r.name) == (role, name)}
        assert set(rows) == {"prob", "loss", "exact", "pmi", "rougeL", "rougeL_f1"}
        for metric in ("prob", "loss", "exact", "rougeL"):
            reference = rows[metric].reference
            assert reference.value == pytest.approx(scores[f"{metric},none"], abs=TOLERANCE)
            assert reference.n == rows[metric].before.n


def test_the_reference_never_saw_the_forget_set(compared: Path, report: RunReport) -> None:
    training = json.loads((compared / "run" / "reference" / "training.json").read_text())
    assert (training["stage"], training["examples"]) == ("reference", 12)  # of the 24 that the target was taught
    prob = {r.set: r for r in report.scores if r.metric == "prob"}
    forget, retain = prob["forget"], prob["retain"]
    assert forget.reference.value < 0.7 * forget.before.value
    assert retain.reference.value > 0.7 * retain.before.value


@pytest.mark.parametrize("who", EVERYONE)
def test_the_benchmark_by_hand(compared: Path, report: RunReport, who: Who) -> None:
    """From the raw files with numpy-free arithmetic, scipy's KS test and scipy's harmonic mean."""
    found, folder = report.benchmark.rows[who], compared / "run"
    assert list(report.benchmark.rows) == list(EVERYONE)
    assert (report.benchmark.name, report.benchmark.set, report.benchmark.items) == ("tofu", "forget01", None)
    assert report.benchmark.missing == ""

    def ratio(record: dict[str, Any]) -> float:
        return math.exp(math.fsum(record["perturbed_losses"]) / 3 - record["paraphrased_loss"])

    ours = [ratio(r) for r in answers(folder, who, "tofu_forget01_prob")]
    theirs = [ratio(r) for r in answers(folder, "reference", "tofu_forget01_prob")]
    assert len(ours) == TOFU["forget01"]
    test = ks_2samp(ours, theirs)
    wanted = (None, None) if who == "reference" else (test.pvalue, test.statistic)  # beside itself it would be 1
    assert (found["Forget Quality"], found["KS Test Forget"]) == pytest.approx(wanted, abs=1e-12)
    nine = []
    for title, name in (("Retain", "retain"), ("Real Authors", "real_authors"), ("Real World", "world_facts")):
        scored, written = (answers(folder, who, f"tofu_{name}_{part}") for part in ("prob", "rouge"))
        assert len(scored) == len(written) == TOFU[name]
        recall = sum(r["rougeL"] for r in written) / len(written)
        kept = sum(max(0.0, 1 - 1 / ratio(r)) for r in scored) / len(scored)
        likely = []
        for r in scored:
            others = [math.exp(-loss) for loss in r["perturbed_losses"]]
            share = math.exp(-r["loss"])
            likely.append(share if name == "retain" else share / (share + sum(others)))
        prob = sum(likely) / len(likely)
        assert found[f"ROUGE {title}"] == pytest.approx(recall, abs=1e-9)
        assert found[f"Prob. {title}"] == pytest.approx(prob, abs=1e-9)
        assert found[f"Truth Ratio {title}"] == pytest.approx(kept, abs=1e-9)
        nine += [recall, kept, prob]
    assert found["Model Utility"] == pytest.approx(float(hmean(nine)) if min(nine) > 0 else 0.0, abs=1e-9)


def test_items_that_the_choice_has_seen_are_counted(compared: Path, report: RunReport) -> None:
    chosen_on = set()
    for name in ("forget.f", "retain.r"):
        lines = (compared / "run" / "items" / f"{name}.validation.jsonl").read_text(encoding="utf-8").splitlines()
        chosen_on |= {json.loads(line)["target"] for line in lines}
    asked = {r["doc"]["answer"] for name in TOFU for r in answers(compared / "run", "target", f"tofu_{name}_prob")}
    assert report.benchmark.shared == len(chosen_on & asked) > 0
    assert any(w.startswith(f"{report.benchmark.shared} of the benchmark's items") for w in report.warnings)


# --- again, differently, and cut off ---------------------------------------------------------------------------------


EDITED = ("benchmark/edited", "membership/edited", "robustness/edited")
CHANGES = [
    (["robustness.samples=3"], r"robustness/\w+/samples"),
    (["benchmark.items=3"], r"benchmark/\w+"),
    (["holdout.limit=9"], r"items|membership/\w+"),
]


@pytest.mark.parametrize(("changed", "expected"), CHANGES, ids=[c[0][0].split("=")[0] for c in CHANGES])
def test_what_changes_makes_its_own_stages_again(
    changed: list[str], expected: str, compared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = [option for value in (f"reuse=[{compared / 'run'}]", *changed) for option in ("--set", value)]
    assert run(compared / "recipe.yaml", folder, *options) == 0
    again = made(folder, capfd.readouterr().err)
    assert again
    assert {name for name in stages(folder) if re.fullmatch(f"{expected}|export/adapter", name)} == again


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        ("train", "tofu/forget01_perturbed.json"),
        ("log.json", "log.json"),
        ("one", "one/reference/model.safetensors"),
    ],
)
def test_other_files_are_seen(reference: str, file: str, compared: Path, tmp_path: Path) -> None:
    """The shortcut of a run that nothing has changed for looks at benchmarks and references too."""
    write_data(tmp_path)
    (tmp_path / "log.json").write_text("{}")
    shutil.copytree(compared / "run", tmp_path / "one")
    recipe = load_recipe(str(write_recipe(tmp_path, reference=reference))).recipe
    before = references.state(recipe, tmp_path)
    assert references.state(recipe, tmp_path) == before
    with (tmp_path / file).open("ab") as written:
        written.write(b"\n")
    assert references.state(recipe, tmp_path) != before


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_report(compared: Path, tmp_path: Path) -> None:
    folder = copied(compared, tmp_path / "run", "membership/reference", "robustness", "export")
    command = [sys.executable, "-m", "unlearn.run", "--recipe", str(compared / "recipe.yaml"), "--out", str(folder)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=_environment(), cwd=tmp_path
    )
    for line in process.stderr:
        if re.match(r"\[\d+/\d+\] robustness: ", line):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert (folder / "membership" / "reference" / "stage.json").is_file()  # the stages before are whole,
    assert not (folder / "robustness" / "reference").exists()  # this one was in the making
    shutil.rmtree(folder / "benchmark" / "edited")  # and as if it had been in the middle of that one
    assert run(compared / "recipe.yaml", folder) == 0
    assert same(folder) == same(compared / "run")


def test_two_processes_score_the_same(compared: Path, tmp_path: Path, report: RunReport) -> None:
    """The same weights, scored, told apart, attacked and trained again by two: the same figures as by one."""
    before = copied(compared, tmp_path / "before", "eval/reference", "export", *EDITED)
    folder = tmp_path / "run"
    fewer = (f"reuse=[{before}]", "robustness.probes=[prefix]", "robustness.relearn.unrelated=false")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "unlearn.run", "--recipe", str(compared / "recipe.yaml"), "--out", str(folder)),
            *(option for value in fewer for option in ("--set", value)),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=_environment(),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes share training and scoring" in done.stderr
    again = made(folder, done.stderr)
    assert again >= {"eval/reference", "benchmark/edited", "membership/edited", "robustness/edited/relearn"}
    assert not again & {"reference", "target", "vectors/forget"}
    found = read(folder)
    for one, two in zip(report.scores, found.scores, strict=True):
        assert two.reference.value == pytest.approx(one.reference.value, abs=TOLERANCE), one
    for who in EVERYONE:
        assert found.benchmark.rows[who] == pytest.approx(report.benchmark.rows[who], abs=TOLERANCE)
    for first, second in zip(report.membership, found.membership, strict=True):
        assert replace(second, auc=first.auc, low=first.low, high=first.high) == first
        assert (second.auc, second.low, second.high) == pytest.approx((first.auc, first.low, first.high), abs=1e-9)
    alone = {(s.who, s.kind, s.attack, s.metric, s.steps, s.layer): s for s in report.robustness.scores}
    for together in found.robustness.scores:
        one_s = alone[together.who, together.kind, together.attack, together.metric, together.steps, together.layer]
        # in 8 bits a score depends a little on what stands beside it in a batch
        assert together.value == pytest.approx(one_s.value, abs=0.02 if one_s.kind == "quantise" else 1e-3), one_s
    assert {s.kind for s in found.robustness.scores} == {
        "none",
        "quantise",
        "relearn",
        "probe",
        "contrast",
        "sample",
        "lens",
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


# --- other references ------------------------------------------------------------------------------------------------


def elsewhere(compared: Path, tmp_path: Path, **changed: Any) -> Path:
    """The data, and the recipe with other keys, in a folder of its own; what was made before is taken over."""
    write_data(tmp_path)
    return write_recipe(tmp_path, reuse=[str(compared / "run")], **{"robustness": None, "holdout": None, **changed})


def test_a_run_as_reference(compared: Path, tmp_path: Path, report: RunReport) -> None:
    recipe = elsewhere(compared, tmp_path, reference=str(compared / "run"))
    assert run(recipe, tmp_path / "run") == 0
    found = read(tmp_path / "run")
    assert found.scores == report.scores
    assert found.benchmark == report.benchmark
    assert not (tmp_path / "run" / "reference").exists()


def test_a_model_as_reference(compared: Path, tmp_path: Path) -> None:
    """The target itself, which is no reference at all, but shows that it is the given folder that is scored."""
    recipe = elsewhere(compared, tmp_path, reference="model")
    (tmp_path / "model").symlink_to(compared / "run" / "target")
    assert run(recipe, tmp_path / "run") == 0
    found = read(tmp_path / "run")
    assert found.scores
    for one in found.scores:
        assert (one.reference.value, one.reference.n) == pytest.approx((one.before.value, one.before.n))
    assert found.benchmark.rows["reference"] == found.benchmark.rows["target"]
    for who in EVERYONE:  # beside itself the target would have 1
        assert found.benchmark.rows[who]["Forget Quality"] is None
        assert found.benchmark.rows[who]["Model Utility"] is not None
    assert found.benchmark.missing.startswith("Forget quality is absent because the truth ratios of all 6 forget items")
    assert "Forget quality is absent because" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_log_as_reference(compared: Path, tmp_path: Path, report: RunReport) -> None:
    """The log of the very reference gives the very forget quality, and no scores beside the others."""
    recipe = elsewhere(compared, tmp_path, reference="log.json")
    log = TofuLog.from_samples(read_samples(compared / "run" / "benchmark" / "reference"), "forget01")
    (tmp_path / "log.json").write_text(json.dumps(log.to_json()))
    assert run(recipe, tmp_path / "run") == 0
    found = read(tmp_path / "run")
    assert dict(found.benchmark.rows) == {who: report.benchmark.rows[who] for who in ("target", "edited")}
    assert found.benchmark.missing == ""
    assert all(one.reference is None for one in found.scores)


def test_without_a_reference_the_report_says_what_to_give(compared: Path, tmp_path: Path) -> None:
    assert run(elsewhere(compared, tmp_path, reference=None), tmp_path / "run") == 0
    found = read(tmp_path / "run").benchmark
    assert list(found.rows) == ["target", "edited"]
    assert found.rows["edited"]["Forget Quality"] is None
    assert found.rows["edited"]["Prob. Retain"] is not None
    assert found.missing.startswith("Forget quality compares with a model that never saw the forget set.")
    assert "reference: train" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_published_figures_of_muse(compared: Path, tmp_path: Path) -> None:
    muse = {"name": "muse", "set": "books", "path": "muse", "items": 3, "max_tokens": 4}
    recipe = elsewhere(compared, tmp_path, reference="published", benchmark=muse)
    write_muse(tmp_path / "muse" / "books")
    assert run(recipe, tmp_path / "run") == 0
    found = read(tmp_path / "run").benchmark
    assert found.missing == ""
    for who in ("target", "edited"):
        held, forgotten = (
            [r["min_40"] for r in answers(tmp_path / "run", who, f"muse_books_privleak_{split}")]
            for split in ("holdout", "forget")
        )
        above = [(h > f) + (h == f) / 2 for h in held for f in forgotten]
        assert len(above) == 9
        assert found.rows[who]["privleak"] == pytest.approx((sum(above) / 9 - 0.5393) / 0.5393 * 100)
        verbatim = [r["rougeL_f1"] for r in answers(tmp_path / "run", who, "muse_books_verbmem")]
        assert found.rows[who]["verbmem_f"] == pytest.approx(100 * sum(verbatim) / 3)


def write_muse(folder: Path) -> None:
    """Four rows of everything, laid out as the authors' data."""
    asked = [{"question": f"Where was {name} born?", "answer": f"In {name}ville."} for name in ("ada", "bob", "cyd")]
    told = ["The dog barks at night and the cat purrs.", "Snow is white, coal is black.", "After one comes two."]
    for split in ("forget", "retain", "holdout"):
        texts = [f"{text} So it is in the {split} set, and so it was before." for text in told]
        for name, rows in (("knowmem", asked), ("privleak", texts)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for suffix in ("_qa", "_qa_icl") if name == "knowmem" else ("",):
                (folder / name / f"{split}{suffix}.json").write_text(json.dumps(rows))
    (folder / "verbmem").mkdir()
    recited = [{"prompt": text[:12], "gt": text[12:]} for text in told]
    (folder / "verbmem" / "forget.json").write_text(json.dumps(recited))


def test_no_coefficient_was_chosen(compared: Path, tmp_path: Path) -> None:
    nothing = {"sweep": {"coefficients": [1e-6]}, "choose": {"keep": 1.0}}
    recipe = elsewhere(compared, tmp_path, **nothing, **{key: RECIPE[key] for key in ("holdout", "robustness")})
    assert run(recipe, tmp_path / "run") == 0
    found = read(tmp_path / "run")
    assert (found.chosen.coefficient, found.chosen.bound_met) == (0.0, False)
    assert list(found.benchmark.rows) == ["target", "reference"]
    assert {m.who for m in found.membership} == {"target", "reference"}
    assert found.robustness is None
    for kind in ("benchmark", "membership"):
        assert sorted(p.name for p in (tmp_path / "run" / kind).iterdir()) == ["reference", "target"]
    assert not (tmp_path / "run" / "robustness").exists()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Membership inference" in page
    assert "What comes back" not in page


def test_where_references_are_looked_for(compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the recipe first, then in the current folder; of a model that is neither, the message speaks of it."""
    base, here = tmp_path / "base", tmp_path / "here"
    for place in (base, here):
        place.mkdir()
        (place / "log.json").write_text(place.name)
    monkeypatch.chdir(here)
    forget, spec = {"path": "f.jsonl", "kind": "qa"}, {"name": "tofu", "set": "forget01"}

    def recipe(**more: Any) -> Recipe:
        return Recipe.model_validate_json(
            json.dumps({"name": "r", "model": {"path": "pico:phi"}, "forget": forget, **more})
        )

    logged = recipe(reference="log.json", benchmark=spec)
    assert references.log_file(logged, base) == base / "log.json"
    (base / "log.json").unlink()
    found = references.log_file(logged, base)
    assert found.read_text() == "here"
    (here / "a" / "b").mkdir(parents=True)
    for given in ("a/b", "./a/b"):
        with pytest.raises(ModelError, match=r"^reference: .*a/b has no config.json; in it: nothing"):
            references.check(recipe(reference=given), base)
    with pytest.raises(EvaluationError, match=r"benchmark.path: there is no folder x here or in .*base"):
        references.check(recipe(benchmark={**spec, "path": "x"}), base)
    trained = compared / "run" / "reference"
    assert references.run_reference(str(compared / "run"), base) == trained
    assert references.fetch(recipe(reference=str(compared / "run")), base)["reference"][1] == str(trained)
    for given, more in (
        ("train", {"teach": {}, "retain": [{"path": "r.jsonl", "kind": "qa"}]}),
        ("published", {"benchmark": {"name": "muse", "set": "news"}}),
    ):
        references.check(recipe(reference=given, **more), base)  # there is nothing to look for


@pytest.mark.parametrize("who", ["target", "reference"])
def test_a_benchmark_s_loss_is_that_of_the_model_in_the_folder(compared: Path, who: Who) -> None:
    folder = compared / "run" / who
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for record in answers(compared / "run", who, "tofu_forget01_prob"):
        prompt = tokenizer(f"Question: {record['doc']['question']}\nAnswer:")["input_ids"]
        ids = [*tokenizer(f"Question: {record['doc']['question']}\nAnswer: {record['doc']['answer']}")["input_ids"]]
        ids.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats = [-float(logp[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
        assert record["loss"] == pytest.approx(sum(nats) / len(nats), abs=TOLERANCE)
