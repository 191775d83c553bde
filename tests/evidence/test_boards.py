"""The leaderboard command: rows from the per-item files of runs or from logs, the files to submit, and its mistakes."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_file_datetime, get_latest_filename, get_results_filenames, make_table
from scipy.stats import hmean, ks_2samp

from unlearn import cli
from unlearn.errors import DataError, EvaluationError, RunFolderError
from unlearn.evidence.benchmarks import SUITES, Log, MuseLog, TheirFigures, TofuLog, forget_quality, rows
from unlearn.evidence.boards import read_run, write_boards
from unlearn.recipe.load import tasks_folder
from unlearn.results import Who
from unlearn.score.evaluate import write_files
from unlearn.score.tasks import quiet_harness

LOSSES = {"target": 0.0, "edited": 1.0, "reference": 1.2}  # nats per token more than what is known by heart
LOGS = os.environ.get("UNLEARN_TOFU_LOGS")
Made = Callable[..., Path]
Said = Callable[[], tuple[str, str]]


def loss(task: str, who: str, item: int) -> tuple[float, float, list[float]]:
    """Of an answer, its paraphrase and two wrong ones: lower for the forget set in models that saw it."""
    base = 0.1 + (LOSSES[who] if "forget" in task else 0.2) + item / 16
    return base, base + 0.25, [1.5 - item / 8, 2.0]


def records(task: str, who: str, count: int) -> list[dict[str, Any]]:
    found = []
    for item in range(count):
        right, reworded, wrong = loss(task, who, item)
        scores: dict[str, Any] = {"rougeL": 0.25 + item / 8, "rougeL_f1": 0.125 + item / 8}
        if task.endswith("_prob"):
            scores = {"loss": right, "paraphrased_loss": reworded, "perturbed_losses": wrong}
        elif "privleak" in task:
            scores = {"min_40": -item - (0.5 + 4 * LOSSES[who] if "forget" in task else 3)}
        found.append({"doc_id": item, "doc": {"id": str(item)}, "filter": "none", **scores})
    return found


def main(arguments: list[str]) -> int:
    return cli.main(["leaderboard", *arguments])


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """``made("name", benchmark="tofu", set="forget01", who=(...), items=5)``: a run's folder, as far as is read."""

    def make(
        name: str = "run",
        benchmark: str = "tofu",
        subset: str = "forget01",
        who: tuple[str, ...] = ("target", "edited", "reference"),
        items: int = 5,
        skip: tuple[str, ...] = (),
    ) -> Path:
        folder, time = tmp_path / "runs" / name, "2026-01-02T03-04-05.678"
        folder.mkdir(parents=True)
        recipe = f"name: {name}-recipe\nbenchmark:\n  name: {benchmark}\n  set: {subset}\n"
        (folder / "resolved.yaml").write_text(recipe)
        tasks = [task for task in SUITES[benchmark].tasks(subset) if task not in skip]
        for model in who:
            place = folder / "benchmark" / model / "the__model"
            place.mkdir(parents=True)
            for task in tasks:
                lines = [json.dumps(record) + "\n" for record in records(task, model, items)]
                (place / f"samples_{task}_{time}.jsonl").write_text("".join(lines))
            counts = {task: {"original": items, "effective": items} for task in tasks}
            results = {"results": {task: {"prob,none": 0.123456} for task in tasks}, "n-samples": counts}
            (place / f"results_{time}.json").write_text(json.dumps(results))
        return folder

    return make


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """``said()``: (stdout, stderr) since the last time."""

    def read() -> tuple[str, str]:
        got = capsys.readouterr()
        return got.out, got.err

    return read


def shown(out: str) -> dict[str, list[str]]:
    """Lines of the table, by their first column; columns are two blanks apart at least."""
    lines = [[word.strip() for word in line.split("  ") if word.strip()] for line in out.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


def quality(one: str, other: str, items: int = 5) -> float:
    """Forget quality of two of the made-up models, from their losses."""
    ratios = []
    for who in (one, other):
        losses = [loss("tofu_forget01_prob", who, i) for i in range(items)]
        ratios.append([math.exp(sum(wrong) / 2 - reworded) for _, reworded, wrong in losses])
    return float(ks_2samp(*ratios).pvalue)


# -- runs --------------------------------------------------------------------------------------------------------


def test_the_row_of_every_model(made: Made, said: Said) -> None:
    run = made()
    assert main([str(run)]) == 0
    out, err = said()
    assert err == ""
    assert out.splitlines()[0] == f"run-recipe ({run})"
    table = shown(out)
    assert table["tofu forget01"] == ["target", "edited", "reference"]
    probs = [sum(math.exp(-loss("forget", w, i)[0]) for i in range(5)) / 5 for w in LOSSES]
    assert table["Prob. Forget"] == [f"{p:.4f}" for p in probs]
    wanted = [quality(w, "reference") for w in LOSSES]
    assert wanted[0] < wanted[1] < 1
    assert table["Forget Quality"] == [*(f"{q:.4g}" for q in wanted[:2]), "-"]  # none of the reference beside itself
    assert table["ROUGE Retain"] == ["0.5000"] * 3
    assert len(table) == 1 + 1 + 16
    # reports and results are not believed: the samples alone count
    (run / "report.json").write_text('{"scores": "rubbish"}')
    assert main([str(run)]) == 0
    assert "0.123" not in said()[0]


def test_files_of_one_run_and_of_several(made: Made, said: Said, tmp_path: Path) -> None:
    one, two = made("one"), made("two")
    command = [str(one), "--out", str(tmp_path / "a"), "--method", "ours", "--submitted-by", "me"]
    assert main(command) == 0
    out, err = said()
    assert f"wrote {tmp_path / 'a' / 'tofu.csv'}" in err
    assert "wrote" not in out
    with (tmp_path / "a" / "tofu.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["Method"], line["Submitted By"]) == ("ours", "me")
    assert float(line["Forget Quality"]) == pytest.approx(quality("edited", "reference"), rel=1e-12)
    nine = [float(v) for k, v in list(line.items())[:12] if not k.endswith("Forget")]
    assert float(line["Model Utility"]) == pytest.approx(hmean(nine), rel=1e-12)
    other = tmp_path / "elsewhere" / "one"
    shutil.copytree(one, other)
    assert main([str(one), str(two), str(other), "--out", str(tmp_path / "b")]) == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["one", "one-2", "two"]
    log = tmp_path / "b" / "two" / "reference" / "eval_log_aggregated.json"
    said()
    # a log of ours is a reference as well as one of the authors'
    edited = tmp_path / "b" / "one" / "edited" / log.name
    assert main(["--tofu-log", str(edited), "--reference", str(log)]) == 0
    assert json.loads(said()[0])["Forget Quality"] == pytest.approx(quality("edited", "reference"), rel=1e-12)


def test_a_run_without_a_reference(made: Made, said: Said, tmp_path: Path) -> None:
    run, with_one = made("none", who=("target", "edited")), made("with")
    assert main([str(run)]) == 0
    out, err = said()
    assert shown(out)["Forget Quality"] == ["-", "-"]
    assert err.count("\n") == 1
    assert f"{run}: no retain reference, so Forget quality is absent" in err
    assert "--reference" in err
    assert main([str(run), "--reference", str(with_one), "--out", str(tmp_path / "out")]) == 0
    out, err = said()
    assert sorted(err.splitlines()) == sorted(f"wrote {p}" for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["edited", "reference", "target", "tofu.csv"]
    table = shown(out)
    assert table["tofu forget01"] == ["target", "edited", "reference"]
    assert table["Forget Quality"][1] == f"{quality('edited', 'reference'):.4g}"


def test_muse(made: Made, said: Said, tmp_path: Path) -> None:
    run = made("muse", benchmark="muse", subset="books")
    assert main([str(run), "--out", str(tmp_path / "out"), "--method", "ours"]) == 0
    table = shown(said()[0])
    assert table["muse books"] == ["target", "edited", "reference"]

    def auc(who: str) -> float:
        """A hold-out text looks better known than a forget text (ties do not occur)."""
        pairs = [(-h - 3 > -f - (0.5 + 4 * LOSSES[who])) for h in range(5) for f in range(5)]
        return sum(pairs) / len(pairs)

    wanted = [(auc(w) - auc("reference")) / auc("reference") * 100 for w in LOSSES]
    assert wanted[0] < wanted[1] < wanted[2] == 0
    assert table["privleak"] == [*(f"{v:.2f}" for v in wanted[:2]), "-"]
    assert table["verbmem_f"] == ["37.50"] * 3
    assert (tmp_path / "out" / "muse.csv").read_text().splitlines()[2].startswith("ours,37.5,")
    assert main([str(run), "--reference", "published"]) == 0
    table = shown(said()[0])
    assert table["privleak"][1] == f"{(auc('edited') - 0.5393) / 0.5393 * 100:.2f}"
    (tmp_path / "log.json").write_text(json.dumps(a_log()))
    assert main([str(run), "--reference", str(tmp_path / "log.json")]) == 2
    assert "log.json is a log of TOFU, and no reference for MUSE" in said()[1]
    alone = made("alone", benchmark="muse", subset="books", who=("target", "edited"))
    assert main([str(alone)]) == 0
    out, err = said()
    assert shown(out)["privleak"] == ["-", "-"]
    assert "so PrivLeak is absent" in err


# -- logs --------------------------------------------------------------------------------------------------------


def a_log(shift: float = 0.0, items: int = 6) -> dict[str, Any]:
    files = ("eval_log.json", "eval_log_forget.json")
    files += ("eval_real_author_wo_options.json", "eval_real_world_wo_options.json")
    return {
        file: {
            "avg_gt_loss": {str(i): 0.5 + shift + i / 8 for i in range(items)},
            "avg_paraphrased_loss": {str(i): 0.75 + shift + i / 8 for i in range(items)},
            "average_perturb_loss": {str(i): [2.0 - i / 4, 3.0, 2.5] for i in range(items)},
            "rougeL_recall": {str(i): i / 8 for i in range(items)},
            "generated_text": {str(i): ["q", "a", "b"] for i in range(items)},
        }
        for file in files
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """``write("name.json", data)``: the file's path, for a command line."""

    def to(name: str, data: Any) -> str:
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return to


def test_the_row_of_a_log_is_json_and_nothing_else(write: Callable[[str, Any], str], said: Said) -> None:
    log, retain = write("log.json", a_log()), write("retain.json", a_log(1.0))
    assert main(["--tofu-log", log, "--reference", retain, "--method", "λ", "--submitted-by", "me"]) == 0
    out, err = said()
    assert err == ""
    row = json.loads(out)
    assert list(row)[:3] == ["ROUGE Real Authors", "Prob. Real Authors", "Truth Ratio Real Authors"]
    tests = ["Forget Quality", "KS Test PVal Forget", "KS Test Forget"]
    assert list(row)[12:] == ["Model Utility", *tests, "Method", "Submitted By"]
    assert (row["Method"], row["Submitted By"]) == ("λ", "me")
    ratios = [[(7.5 - i / 4) / 3 - 0.75 - shift - i / 8 for i in range(6)] for shift in (0.0, 1.0)]
    assert row["Forget Quality"] == pytest.approx(ks_2samp(*ratios).pvalue, rel=1e-12)
    assert row["Forget Quality"] < 0.5
    assert row["Prob. Forget"] == pytest.approx(sum(math.exp(-0.5 - i / 8) for i in range(6)) / 6, rel=1e-12)
    assert row["ROUGE Forget"] == pytest.approx(2.5 / 8)


def test_a_log_alone(write: Callable[[str, Any], str], said: Said, tmp_path: Path) -> None:
    log = write("log.json", a_log())
    assert main(["--tofu-log", log, "--out", str(tmp_path / "out")]) == 0
    out, err = said()
    row = json.loads(out)
    assert row["Forget Quality"] is None
    assert row["Method"] == "log"
    assert row["Model Utility"] > 0
    assert "Forget Quality is null" in err
    assert "--reference RETAIN.json" in err
    assert (tmp_path / "out" / "tofu.csv").is_file()
    assert list((tmp_path / "out").iterdir()) != []


# -- what open-unlearning writes ---------------------------------------------------------------------------------

THEIRS = {  # its names of the nine parts of model utility, by our column
    **{f"{kind} {title}": f"{short}_{name}" for title, short in (("Real Authors", "ra"), ("Real World", "wf"))
       for kind, name in (("ROUGE", "Q_A_ROUGE"), ("Prob.", "Q_A_Prob_normalised"), ("Truth Ratio", "Truth_Ratio"))},
    **{f"{kind} Retain": f"retain_{name}"
       for kind, name in (("ROUGE", "Q_A_ROUGE"), ("Prob.", "Q_A_Prob"), ("Truth Ratio", "Truth_Ratio"))},
}  # fmt: skip


def evaluated(log: dict[str, Any], aggregator: str = "closer_to_1_better") -> dict[str, Any]:
    """TOFU_EVAL.json of the model of a log in the authors' layout, as open-unlearning's metrics are defined."""
    file = log["eval_log_forget.json"]
    right = np.array(list(file["avg_paraphrased_loss"].values()))
    wrong = np.array(list(file["average_perturb_loss"].values()))
    c, w = np.exp(-right), np.exp(-wrong.mean(1))
    score = c / (c + w + 1e-10) if aggregator == "prob_mean" else w / (c + 1e-10)
    whole = score.mean() if aggregator == "prob_mean" else np.minimum(score, 1 / (score + 1e-10)).mean()
    items = list(file["avg_gt_loss"])

    def metric(values: Any, **columns: Any) -> dict[str, Any]:
        rows = zip(*columns.values(), strict=True)
        by_index = {i: dict(zip(columns, row, strict=True)) for i, row in zip(items, rows, strict=True)}
        return {"agg_value": float(np.mean(values)), "value_by_index": by_index}

    found = {
        "forget_Q_A_PARA_Prob": metric(c, prob=c.tolist(), avg_loss=right.tolist()),
        "forget_Q_A_PERT_Prob": metric(np.exp(-wrong), prob=np.exp(-wrong).tolist(), avg_loss=wrong.tolist()),
        "forget_truth_ratio": metric(whole, score=score.tolist()),
        "forget_Q_A_ROUGE": {"agg_value": 0.25},
        "forget_Q_A_Prob": {"agg_value": 0.5},
        "model_utility": {"agg_value": 0.6},
        "forget_quality": {"agg_value": None},  # without a log of a retain model
        "privleak": {"agg_value": -99.5},
    }
    return found | {name: {"agg_value": n / 16} for n, name in enumerate(THEIRS.values(), 1)}


@pytest.mark.parametrize("aggregator", ["closer_to_1_better", "prob_mean"])
@pytest.mark.parametrize("losses", [True, False])
def test_forget_quality_is_the_same_through_either_layout(aggregator: str, losses: bool) -> None:
    ours, retain = random_log(1), random_log(2)
    wanted = forget_quality(TofuLog.from_json(ours, "a"), TofuLog.from_json(retain, "b"))
    assert 0 < wanted[0] < 1
    theirs = evaluated(retain, aggregator)
    if not losses:
        del theirs["forget_Q_A_PARA_Prob"], theirs["forget_Q_A_PERT_Prob"]
    if not losses and aggregator == "prob_mean":  # shares and ratios cannot be told apart
        with pytest.raises(DataError, match="no score of forget_truth_ratio is above 1"):
            TheirFigures.from_json(theirs, "t")
        return
    read, model = TheirFigures.from_json(theirs, "t"), TheirFigures.from_json(evaluated(ours), "m")
    assert forget_quality(TofuLog.from_json(ours, "a"), read) == pytest.approx(wanted, rel=1e-12)
    assert forget_quality(model, read) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.skipif(not LOGS, reason="UNLEARN_TOFU_LOGS names the folder with the authors' logs, full and retain90")
def test_the_authors_own_logs_through_open_unlearnings_layout(said: Said, tmp_path: Path) -> None:
    for name in ("full", "retain90"):
        log = json.loads((Path(str(LOGS)) / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps(evaluated(log)))
    for log in (Path(str(LOGS)) / "full.json", tmp_path / "full.json"):
        assert main(["--tofu-log", str(log), "--reference", str(tmp_path / "retain90.json")]) == 0
        row = json.loads(said()[0])
        assert row["Forget Quality"] == pytest.approx(2.1942743021891237e-16, rel=1e-9)
        assert row["Truth Ratio Forget"] == pytest.approx(0.4833555856680227, rel=1e-9)


def test_their_figures_stand_beside_ours(made: Made, said: Said, tmp_path: Path) -> None:
    run, place = made(), tmp_path / "tofu_Llama_NPO" / "evals"
    place.mkdir(parents=True)
    log, other = evaluated(a_log(items=5)), evaluated(a_log(1.0, items=5))
    summary = {name: metric["agg_value"] for name, metric in log.items() if metric["agg_value"] is not None}
    summary["forget_quality"] = 0.0625
    (place / "TOFU_SUMMARY.json").write_text(json.dumps(summary))
    (tmp_path / "MUSE_SUMMARY.json").write_text('{"forget_verbmem_ROUGE": 0.2, "privleak": -5.5}')
    assert main([str(run), str(place / "TOFU_SUMMARY.json"), str(tmp_path / "MUSE_SUMMARY.json")]) == 0
    table = shown(said()[0])
    assert table["tofu forget01"] == ["target", "edited", "reference", "tofu_Llama_NPO"]
    for column, name in THEIRS.items():
        assert table[column][-1] == f"{summary[name]:.4f}"
    assert table["privleak"] == ["-5.50"]  # another benchmark's has a table of its own
    # two of one name stand side by side, and so does one that is called like a model of the run
    again = [tmp_path / "more" / name / "evals" / "TOFU_SUMMARY.json" for name in ("tofu_Llama_NPO", "edited")]
    for number, path in enumerate(again):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**summary, "model_utility": number / 8}))
    assert main([str(run), str(place / "TOFU_SUMMARY.json"), *map(str, again)]) == 0
    assert shown(said()[0])["Model Utility"][-3:] == ["0.6000", "0.0000", "0.1250"]
    ratio = f"{summary['forget_truth_ratio']:.4f}"
    assert [table[name][-1] for name in ("Model Utility", "Truth Ratio Forget", "Prob. Forget", "Forget Quality")] == [
        *("0.6000", ratio, "0.5000", "0.0625")
    ]
    # with values of every item the test is made anew, against a reference that is given
    (place / "TOFU_EVAL.json").write_text(json.dumps(log))
    retain = tmp_path / "retain.json"
    retain.write_text(json.dumps(other))
    assert main([str(place / "TOFU_EVAL.json"), str(retain), "--reference", str(retain)]) == 0
    table = shown(said()[0])
    ratios = [[(7.5 - i / 4) / 3 - 0.75 - shift - i / 8 for i in range(5)] for shift in (0.0, 1.0)]
    assert table["Forget Quality"] == [f"{ks_2samp(*ratios).pvalue:.4g}", "-"]
    assert table["Truth Ratio Forget"][0] == ratio
    # a log of other questions is shown beside, and that is said; a summary does not say how many it is of
    (place / "MORE_EVAL.json").write_text(json.dumps(evaluated(a_log(items=6))))
    assert main([str(run), *(str(place / f"{name}.json") for name in ("TOFU_EVAL", "TOFU_SUMMARY", "MORE_EVAL"))]) == 0
    warned = [line for line in said()[1].splitlines() if "forget items" in line]
    assert warned == ["tofu_Llama_NPO is of 6 forget items and run-recipe of 5: not the same questions"]
    # files alone, each benchmark in a table of its own
    assert main([str(place / "TOFU_EVAL.json"), str(tmp_path / "MUSE_SUMMARY.json")]) == 0
    table = shown(said()[0])
    assert (table["tofu"], table["privleak"], table["verbmem_f"]) == (["tofu_Llama_NPO"], ["-5.50"], ["20.00"])
    assert table["knowmem_f"] == ["-"]


def test_their_area_under_the_curve_is_a_reference_for_privleak(made: Made, said: Said, tmp_path: Path) -> None:
    run, log = made("muse", benchmark="muse", subset="books"), tmp_path / "MUSE_EVAL.json"
    log.write_text(json.dumps({"forget_verbmem_ROUGE": {"agg_value": 0.1}, "mia_min_k": {"agg_value": 0.25}}))
    alone = shown(said()[0]) if main([str(run), "--reference", str(log)]) == 0 else {}
    # open-unlearning's area is 1 where the forget set is known best, the authors' where the hold-out set is
    for who, leak in zip(LOSSES, alone["privleak"], strict=False):
        pairs = [(-h - 3 > -f - (0.5 + 4 * LOSSES[who])) for h in range(5) for f in range(5)]
        assert leak == ("-" if who == "reference" else f"{(sum(pairs) / 25 - 0.75) / 0.75 * 100:.2f}")


# -- mistakes ----------------------------------------------------------------------------------------------------


def refused(command: list[str], said: Said, *words: str) -> None:
    """Exit code 2 and one line on stderr; nothing on stdout."""
    assert main(command) == 2
    out, err = said()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_folder_that_is_no_run(tmp_path: Path, said: Said) -> None:
    refused([str(tmp_path)], said, f"{tmp_path} is not the folder of a run (it has no resolved.yaml)")
    refused([str(tmp_path / "nothing")], said, "is not the folder of a run", "give one of runs/, or what --out was")
    (tmp_path / "NPO" / "evals").mkdir(parents=True)
    (tmp_path / "NPO" / "evals" / "TOFU_SUMMARY.json").write_text("{}")
    refused([str(tmp_path / "NPO")], said, "give the file itself, ", "NPO/evals/TOFU_SUMMARY.json")
    refused([str(tmp_path), "--tofu-log", "x.json"], said, "give either the folders of runs, or one log")
    refused(["--tofu-log", str(tmp_path / "none.json")], said, "there is no such file")
    (tmp_path / "resolved.yaml").write_text("name: x\nbenchmark: null\n")
    add = "add `benchmark: {name: tofu, set: forget10}`"
    refused([str(tmp_path)], said, f"{tmp_path}: this run has no benchmark: {add}")
    for text in ("a: [", "- 1\n", "benchmark: {name: tofu, set: news}\n", "benchmark: 3\n"):
        (tmp_path / "resolved.yaml").write_text(text)
        refused([str(tmp_path)], said, "cannot be read as a recipe")


def test_a_run_that_is_not_finished(made: Made, said: Said) -> None:
    run = made(who=("target",))
    refused([str(run)], said, "the edited model was not scored on tofu forget01 (no benchmark/edited)")
    shutil.rmtree(run / "benchmark")
    refused([str(run)], said, "the target and the edited model was not scored", "to its end")
    other = made("other", skip=("tofu_retain_rouge", "tofu_forget01_prob"))
    needs = "needs tasks that were not run: tofu_forget01_prob, tofu_retain_rouge; run the recipe again"
    refused([str(other)], said, needs)


def test_references_that_do_not_fit(made: Made, said: Said, write: Callable[[str, Any], str], tmp_path: Path) -> None:
    run = made()
    other = made("other", subset="forget10")
    refused([str(run), "--reference", str(other)], said, "scored on tofu forget10 and the model on tofu forget01")
    short = made("short", items=4)
    refused([str(run), "--reference", str(short)], said, str(run), "reference has 4 forget items and the model 5")
    none = made("none", who=("target", "edited"))
    refused([str(run), "--reference", str(none)], said, f"--reference {none}: this run has no retain reference")
    muse = made("muse", benchmark="muse", subset="news")
    refused([str(run), "--reference", str(muse)], said, "scored on muse news and the model on tofu forget01")
    refused([str(run), "--reference", "published"], said, "TOFU has no published value")
    summary = write("TOFU_SUMMARY.json", {"model_utility": 0.5})
    refused([str(run), "--reference", summary], said, "has no values of single forget items", "TOFU_EVAL.json")
    refused([str(run), "--reference", write("M.json", {"forget_verbmem_ROUGE": 0.5})], said, "is a log of MUSE")
    muse_run = made("books", benchmark="muse", subset="books")
    refused(
        [str(muse_run), "--reference", write("M.json", {"privleak": 1, "forget_verbmem_ROUGE": 1})], said, "mia_min_k"
    )
    long = write("log.json", a_log())
    refused([str(run), "--reference", long], said, "reference has 6 forget items and the model 5")
    refused(["--tofu-log", long, "--reference", write("r.json", a_log(items=7))], said, "has 7 forget items")
    refused(["--tofu-log", summary, "--reference", long], said, "has no values of single forget items")
    refused(["--tofu-log", long, "--reference", "published"], said, "--reference published is MUSE's")
    refused(["--tofu-log", long, "--reference", str(tmp_path)], said, "is not the folder of a run")


def test_a_mistake_in_the_last_run_is_said_before_anything_is_written(made: Made, said: Said, tmp_path: Path) -> None:
    refused([str(made()), str(tmp_path), "--out", str(tmp_path / "out")], said, "is not the folder of a run")
    assert not (tmp_path / "out").exists()


EVAL = '{"forget_truth_ratio": {"value_by_index": {"0": {"score": %s}}}}'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (EVAL % "null", "forget_truth_ratio, item '0': score is missing"),
        (EVAL % "0.5", "no score of forget_truth_ratio is above 1"),
        ('{"model_utility": NaN}', "model_utility is nan, which is no finite number"),
        (
            '{"forget_Q_A_PARA_Prob": {"value_by_index": {"0": {"avg_loss": 1}}}, "forget_Q_A_PERT_Prob": '
            '{"value_by_index": {"1": {"avg_loss": [1]}}}}',
            "are of different items",
        ),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\x00", "not JSON"),
        ("[]", "no log that is known here"),
        ('{"results": {"tofu": 1}}', "TOFU_EVAL.json or MUSE_EVAL.json, the TOFU_SUMMARY.json or MUSE_SUMMARY.json"),
        ("{}", "eval_log_aggregated.json, an object with eval_real_author_wo_options.json, "),
        ('{"eval_log.json": {}}', "no 'eval_real_author_wo_options.json' in it; a TOFU log has"),
    ],
)
def test_files_that_are_no_logs(write: Callable[[str, Any], str], said: Said, text: str, word: str) -> None:
    path = write("log.json", text)
    refused([path], said, path, word)
    refused(["--tofu-log", path], said, path, word)
    refused(["--tofu-log", write("good.json", a_log()), "--reference", path], said, path, word)


# -- the files -------------------------------------------------------------------------------------------------------


FILES = {  # file: (items, perturbed answers)
    "eval_log.json": (7, 3),
    "eval_log_forget.json": (9, 3),
    "eval_real_author_wo_options.json": (5, 2),
    "eval_real_world_wo_options.json": (4, 2),
}


def random_log(seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """A log in the authors' layout, of random losses."""
    rng = np.random.default_rng(seed)
    found = {}
    for file, (n, p) in FILES.items():
        numbers = [str(i) for i in range(n)]
        loss = rng.gamma(2, 0.5, n)
        found[file] = {
            "avg_gt_loss": dict(zip(numbers, loss.tolist(), strict=True)),
            "avg_paraphrased_loss": dict(zip(numbers, (loss + rng.gamma(1, 0.3, n)).tolist(), strict=True)),
            "average_perturb_loss": dict(zip(numbers, rng.gamma(4, 0.5, (n, p)).tolist(), strict=True)),
            "rougeL_recall": dict(zip(numbers, rng.uniform(0.1, 1, n).tolist(), strict=True)),
        }
    return found


def aggregated(log: dict[str, Any], retain: dict[str, Any]) -> dict[str, float]:
    """What TOFU's authors say their aggregator computes, from their log files: written from the paper's formulas."""
    names = {"eval_real_author_wo_options.json": "Real Authors", "eval_real_world_wo_options.json": "Real World"}
    names |= {"eval_log.json": "Retain", "eval_log_forget.json": "Forget"}
    found = {}
    for file, name in names.items():
        columns = {field: np.array(list(values.values())) for field, values in log[file].items()}
        p = np.exp(-columns["avg_gt_loss"])
        if name.startswith("Real"):
            p = p / (p + np.exp(-columns["average_perturb_loss"]).sum(1))
        r = np.exp(columns["average_perturb_loss"].mean(1) - columns["avg_paraphrased_loss"])
        found[f"ROUGE {name}"] = columns["rougeL_recall"].mean()
        found[f"Prob. {name}"] = p.mean()
        ratio = np.minimum(r, 1 / r) if name == "Forget" else np.maximum(0, 1 - 1 / r)
        found[f"Truth Ratio {name}"] = ratio.mean()
    found["Model Utility"] = hmean([v for k, v in found.items() if not k.endswith("Forget")])
    ratios = []
    for data in (log, retain):
        part = data["eval_log_forget.json"]
        wrong = np.array(list(part["average_perturb_loss"].values())).mean(1)
        ratios.append(np.exp(wrong - np.array(list(part["avg_paraphrased_loss"].values()))))
    found["Forget Quality"] = ks_2samp(*ratios).pvalue
    return found


@pytest.fixture
def logs() -> dict[Who, Log]:
    return {
        who: TofuLog.from_json(random_log(i), who)
        for i, who in enumerate(("target", "edited", "reference"))  # type: ignore[misc]
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_submission_is_what_the_authors_would_compute(logs: dict[Who, Log], tmp_path: Path) -> None:
    found = rows(logs, logs["reference"], "ours")
    paths = write_boards(tmp_path / "new" / "out", logs, found, 'task "vector",\n λ = 1', "a, b")
    assert [p.relative_to(tmp_path / "new" / "out").as_posix() for p in paths] == [
        "tofu.csv",
        *(
            f"{w}/{n}"
            for w in ("target", "edited", "reference")
            for n in ("eval_log_aggregated.json", "TOFU_SUMMARY.json")
        ),
    ]
    assert sorted(p for p in (tmp_path / "new").rglob("*") if p.is_file()) == sorted(paths)
    (line,) = read_csv(paths[0])
    # the header of the authors' own example of a submission
    assert ",".join(line) == (
        "ROUGE Real Authors,Prob. Real Authors,Truth Ratio Real Authors,ROUGE Real World,Prob. Real World,"
        "Truth Ratio Real World,ROUGE Retain,Prob. Retain,Truth Ratio Retain,ROUGE Forget,Prob. Forget,"
        "Truth Ratio Forget,Model Utility,Forget Quality,Method,Submitted By"
    )
    assert (line.pop("Method"), line.pop("Submitted By")) == ('task "vector", λ = 1', "a, b")
    assert {k: float(v) for k, v in line.items()} == pytest.approx(aggregated(random_log(1), random_log(2)), rel=1e-12)
    # and from the log beside it the authors' aggregator computes the same line
    edited, retain = (json.loads((paths[0].parent / w / "eval_log_aggregated.json").read_text("utf-8"))
                      for w in ("edited", "reference"))  # fmt: skip
    assert {k: float(v) for k, v in line.items()} == pytest.approx(aggregated(edited, retain), rel=1e-12)
    assert edited == random_log(1)


def test_the_summary_has_openunlearnings_names(logs: dict[Who, Log]) -> None:
    log, data = logs["edited"], random_log(1)
    found = log.summary(rows(logs, logs["reference"], "x")["edited"])
    kept = [f"{s}_Q_A_{m}" for s in ("ra", "wf") for m in ("PERT_Prob", "Prob", "Prob_normalised", "ROUGE")]
    kept += [f"retain_Q_A_{m}" for m in ("PARA_Prob", "PERT_Prob", "Prob", "ROUGE")]
    kept += ["ra_Truth_Ratio", "wf_Truth_Ratio", "retain_Truth_Ratio"]
    forget = [f"forget_Q_A_{m}" for m in ("PARA_Prob", "PERT_Prob", "Prob", "ROUGE")]
    assert list(found) == sorted([*kept, *forget, "forget_truth_ratio", "forget_quality", "model_utility"])
    wanted = aggregated(data, random_log(2))
    ours = "model_utility forget_quality forget_truth_ratio forget_Q_A_ROUGE forget_Q_A_Prob retain_Truth_Ratio "
    ours += "retain_Q_A_Prob ra_Q_A_Prob_normalised wf_Q_A_Prob_normalised ra_Q_A_ROUGE wf_Truth_Ratio"
    theirs = ["Model Utility", "Forget Quality", "Truth Ratio Forget", "ROUGE Forget", "Prob. Forget"]
    theirs += ["Truth Ratio Retain", "Prob. Retain", "Prob. Real Authors", "Prob. Real World", "ROUGE Real Authors"]
    same = dict(zip(ours.split(), [*theirs, "Truth Ratio Real World"], strict=True))
    assert {a: found[a] for a in same} == pytest.approx({a: wanted[b] for a, b in same.items()}, rel=1e-12)
    real = data["eval_real_author_wo_options.json"]
    assert found["ra_Q_A_Prob"] == pytest.approx(np.mean([math.exp(-v) for v in real["avg_gt_loss"].values()]))
    every = [math.exp(-v) for values in real["average_perturb_loss"].values() for v in values]
    assert found["ra_Q_A_PERT_Prob"] == pytest.approx(np.mean(every))
    reworded = data["eval_log.json"]["avg_paraphrased_loss"].values()
    assert found["retain_Q_A_PARA_Prob"] == pytest.approx(np.mean([math.exp(-v) for v in reworded]))


def a_muse_log(forget: list[float]) -> MuseLog:
    parts = ([0.25, 0.75], [0.5, 0.125], [1.0, 0.5], forget, [-4.0, -3.0, -2.0, -1.0])
    return MuseLog("books", *({str(n): value for n, value in enumerate(values)} for values in parts))


def test_muses_files(tmp_path: Path) -> None:
    # the authors' AUC, a hold-out text above a forget text: 0 of 16, 4 of 16, 8 of 16 pairs
    target, edited, retrained = (a_muse_log(v) for v in ([0.0] * 4, [-1.5] * 4, [-2.5] * 4))
    logs: dict[Who, Log] = {"target": target, "edited": edited, "reference": retrained}
    found = rows(logs, retrained, "task vector, λ = 1")
    write_boards(tmp_path, logs, found, "task vector, λ = 1", "nobody")
    lines = read_csv(tmp_path / "muse.csv")
    assert [list(line) for line in lines] == [["name", "verbmem_f", "privleak", "knowmem_f", "knowmem_r"]] * 3
    assert [line["name"] for line in lines] == ["target", "task vector, λ = 1", "retrain"]
    assert [float(line["privleak"]) for line in lines[:2]] == pytest.approx([-100, -50])
    assert lines[2]["privleak"] == "", "of the reference there is nothing to compare"
    assert {(line["verbmem_f"], line["knowmem_f"], line["knowmem_r"]) for line in lines} == {("50.0", "31.25", "75.0")}
    summary = json.loads((tmp_path / "edited" / "MUSE_SUMMARY.json").read_text())
    assert summary == {
        "forget_knowmem_ROUGE": 0.3125,
        "forget_verbmem_ROUGE": 0.5,
        "privleak": pytest.approx(-50),
        "retain_knowmem_ROUGE": 0.75,
    }
    assert list(summary) == sorted(summary)
    assert "privleak" not in edited.summary(rows({"edited": edited}, None, "m")["edited"])


def test_numbers_that_no_file_can_hold(logs: dict[Who, Log], tmp_path: Path) -> None:
    found = rows(logs, logs["reference"], "m")
    found["target"]["ROUGE Retain"] = float("nan")
    with pytest.raises(EvaluationError, match="ROUGE Retain of the target is nan"):
        write_boards(tmp_path / "out", logs, found, "m", "")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(logs: dict[Who, Log], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="choose another one with --out"):
        write_boards(tmp_path / "file", logs, rows(logs, None, "m"), "m", "")


@pytest.mark.skipif(not LOGS, reason="UNLEARN_TOFU_LOGS names the folder with the authors' logs, full and retain90")
def test_the_authors_own_logs(said: Said) -> None:
    """Their leaderboard's row of Phi-1.5 before unlearning (forget10)."""
    folder = Path(str(LOGS))
    assert main(["--tofu-log", str(folder / "full.json"), "--reference", str(folder / "retain90.json")]) == 0
    row = json.loads(said()[0])
    assert row["Model Utility"] == pytest.approx(0.5220737132035153, rel=1e-9)
    assert row["Forget Quality"] == pytest.approx(2.1942743021891237e-16, rel=1e-9)
    assert row["KS Test Forget"] == pytest.approx(0.346667, abs=5e-7)
    assert row["Prob. Forget"] == pytest.approx(0.9282394842423192, rel=1e-9)
    assert row["ROUGE Forget"] == pytest.approx(0.9248612622630048, rel=1e-9)
    assert row["Truth Ratio Forget"] == pytest.approx(0.4833555856680227, rel=1e-9)
    assert row["Prob. Real World"] == pytest.approx(0.40899845221380016, rel=1e-9)


def test_damaged_samples(made: Made, said: Said) -> None:
    run = made()
    (path,) = (run / "benchmark" / "edited").rglob("samples_tofu_retain_prob_*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    refused([str(run)], said, "4 items", "5 were scored")
    record = json.loads(lines[-1])
    del record["perturbed_losses"]
    path.write_text("".join(lines[:-1]) + json.dumps(record) + "\n")
    refused([str(run)], said, str(run / "benchmark" / "edited"), "tofu_retain_prob", "item '4'")


def test_a_pico_model_from_lm_eval_to_the_board(
    pico_phi: Path, tmp_path: Path, capitals: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TOFU's tasks through lm-eval, files by its tracker, read by its own tools and by ours."""
    data = tmp_path / "tofu"
    data.mkdir()
    cities = json.loads(capitals("all.json", 0, 20).read_text("utf-8"))
    for at, name in enumerate(("forget01", "retain", "real_authors", "world_facts")):
        lines = [
            {
                "question": row["question"],
                "answer": row["answer"],
                "perturbed_answer": [c for c in row["choices"] if c != row["answer"]],
                **({"paraphrased_answer": f"It is {row['answer']}."} if at < 2 else {}),
            }
            for row in cities[at * 3 : at * 3 + 3]
        ]
        (data / f"{name}_perturbed.json").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    metadata = {"tofu": str(data), "tokenizer": str(pico_phi), "max_tokens": 4}
    with quiet_harness():
        found = simple_evaluate(
            HFLM(pretrained=str(pico_phi), batch_size=8, device="cpu", dtype="float32"),
            tasks=["tofu_forget01"],
            task_manager=TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=metadata),
            metadata=metadata,
            bootstrap_iters=0,
        )
    assert found is not None
    samples = found.pop("samples")
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text("name: pico\nbenchmark:\n  name: tofu\n  set: forget01\n")
    for who in ("target", "edited", "reference"):
        path = write_files(run / "benchmark" / who, "pico", found, samples, 1.0)

    # lm-eval finds the results, takes their time from the name, and makes its table of them
    names = [str(p) for p in path.parent.iterdir()]
    assert get_latest_filename(get_results_filenames(names)) == str(path)
    written = json.loads(path.read_text("utf-8"))
    assert get_file_datetime(path.name).startswith("20")
    assert "truth_ratio_forget" in make_table(written)
    # its card of results reads them so
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    again = loaded["results"][0]
    assert again["tofu_forget01_prob"]["prob,none"] == written["results"]["tofu_forget01_prob"]["prob,none"]

    # and ours computes from the items what lm-eval computed
    bench = read_run(run)
    with pytest.raises(EvaluationError, match=r"this is one model.*\(found with the target\)"):
        rows(bench.logs, bench.logs["reference"], "m")
    row = rows(bench.logs, None, "m")["edited"]
    results = written["results"]
    for column, task, metric in (
        ("Prob. Forget", "tofu_forget01_prob", "prob"),
        ("Truth Ratio Forget", "tofu_forget01_prob", "truth_ratio_forget"),
        ("Prob. Real World", "tofu_world_facts_prob", "prob_choice"),
        ("ROUGE Retain", "tofu_retain_rouge", "rougeL"),
    ):
        assert row[column] == pytest.approx(results[task][f"{metric},none"], rel=1e-9)
    assert 0 < float(row["Prob. Forget"] or 0) < 1
