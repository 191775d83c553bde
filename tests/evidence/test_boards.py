"""Files for leaderboards, read back by whoever takes them: csv, the authors' formulas, lm-eval itself."""

from __future__ import annotations

import csv
import json
import math
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

from unlearn.errors import EvaluationError, RunFolderError
from unlearn.evidence.benchmarks import Log, MuseLog, TofuLog
from unlearn.evidence.boards import muse_csv, muse_summary, read_run, rows, tofu_summary, write_boards
from unlearn.recipe.load import tasks_folder
from unlearn.results import Who
from unlearn.score.evaluate import write_files
from unlearn.score.silence import quiet_harness

FILES = {  # file: (items, perturbed answers)
    "eval_log.json": (7, 3),
    "eval_log_forget.json": (9, 3),
    "eval_real_author_wo_options.json": (5, 2),
    "eval_real_world_wo_options.json": (4, 2),
}


def a_log(seed: int) -> dict[str, dict[str, dict[str, Any]]]:
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
        who: TofuLog.from_json(a_log(i), who)
        for i, who in enumerate(("target", "edited", "reference"))  # type: ignore[misc]
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- TOFU --------------------------------------------------------------------------------------------------------


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
    assert {k: float(v) for k, v in line.items()} == pytest.approx(aggregated(a_log(1), a_log(2)), rel=1e-12)
    # and from the log beside it the authors' aggregator computes the same line
    edited, retain = (json.loads((paths[0].parent / w / "eval_log_aggregated.json").read_text("utf-8"))
                      for w in ("edited", "reference"))  # fmt: skip
    assert {k: float(v) for k, v in line.items()} == pytest.approx(aggregated(edited, retain), rel=1e-12)
    assert edited == a_log(1)


def test_without_a_reference_there_is_no_forget_quality(logs: dict[Who, Log], tmp_path: Path) -> None:
    del logs["reference"]
    write_boards(tmp_path, logs, rows(logs, None, "ours"), "ours", "")
    (line,) = read_csv(tmp_path / "tofu.csv")
    assert line["Forget Quality"] == line["Submitted By"] == ""
    assert float(line["Model Utility"]) > 0
    assert "forget_quality" not in json.loads((tmp_path / "edited" / "TOFU_SUMMARY.json").read_text())
    assert not (tmp_path / "reference").exists()


def test_the_summary_has_openunlearnings_names(logs: dict[Who, Log]) -> None:
    log, data = logs["edited"], a_log(1)
    assert isinstance(log, TofuLog)
    found = tofu_summary(log, rows(logs, logs["reference"], "x")["edited"])
    kept = [f"{s}_Q_A_{m}" for s in ("ra", "wf") for m in ("PERT_Prob", "Prob", "Prob_normalised", "ROUGE")]
    kept += [f"retain_Q_A_{m}" for m in ("PARA_Prob", "PERT_Prob", "Prob", "ROUGE")]
    kept += ["ra_Truth_Ratio", "wf_Truth_Ratio", "retain_Truth_Ratio"]
    forget = [f"forget_Q_A_{m}" for m in ("PARA_Prob", "PERT_Prob", "Prob", "ROUGE")]
    assert list(found) == sorted([*kept, *forget, "forget_truth_ratio", "forget_quality", "model_utility"])
    wanted = aggregated(data, a_log(2))
    same = {
        "model_utility": "Model Utility",
        "forget_quality": "Forget Quality",
        "forget_truth_ratio": "Truth Ratio Forget",
        "forget_Q_A_ROUGE": "ROUGE Forget",
        "forget_Q_A_Prob": "Prob. Forget",
        "retain_Truth_Ratio": "Truth Ratio Retain",
        "retain_Q_A_Prob": "Prob. Retain",
        "ra_Q_A_Prob_normalised": "Prob. Real Authors",
        "wf_Q_A_Prob_normalised": "Prob. Real World",
        "ra_Q_A_ROUGE": "ROUGE Real Authors",
        "wf_Truth_Ratio": "Truth Ratio Real World",
    }
    assert {a: found[a] for a in same} == pytest.approx({a: wanted[b] for a, b in same.items()}, rel=1e-12)
    real = data["eval_real_author_wo_options.json"]
    assert found["ra_Q_A_Prob"] == pytest.approx(np.mean([math.exp(-v) for v in real["avg_gt_loss"].values()]))
    every = [math.exp(-v) for values in real["average_perturb_loss"].values() for v in values]
    assert found["ra_Q_A_PERT_Prob"] == pytest.approx(np.mean(every))
    reworded = data["eval_log.json"]["avg_paraphrased_loss"].values()
    assert found["retain_Q_A_PARA_Prob"] == pytest.approx(np.mean([math.exp(-v) for v in reworded]))


# -- MUSE --------------------------------------------------------------------------------------------------------


def a_muse_log(forget: list[float]) -> MuseLog:
    names = tuple("abcd")
    rouge = [np.array(v) for v in ([0.25, 0.75], [0.5, 0.125], [1.0, 0.5])]
    return MuseLog("books", *rouge, np.array(forget), np.array([-4.0, -3.0, -2.0, -1.0]), names, names)


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
    alone = rows({"edited": edited}, None, "m")
    assert muse_csv(alone).splitlines()[1] == "m,50.0,,31.25,75.0"
    assert "privleak" not in muse_summary(alone["edited"])


# -- what cannot be written --------------------------------------------------------------------------------------


def test_references_of_the_other_benchmark(logs: dict[Who, Log]) -> None:
    with pytest.raises(EvaluationError, match="TOFU has no published value"):
        rows(logs, "published", "m")
    with pytest.raises(EvaluationError, match="a log of TOFU is no reference for MUSE"):
        rows({"edited": a_muse_log([0.0] * 4)}, logs["reference"], "m")


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


# -- lm-eval's own files -----------------------------------------------------------------------------------------


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
    table = make_table(written)
    assert all(f"tofu_{name}_prob" in table for name in ("forget01", "retain", "real_authors", "world_facts"))
    assert "truth_ratio_forget" in table
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
    assert row["Prob. Forget"] == pytest.approx(results["tofu_forget01_prob"]["prob,none"], rel=1e-9)
    assert row["Truth Ratio Forget"] == pytest.approx(
        results["tofu_forget01_prob"]["truth_ratio_forget,none"], rel=1e-9
    )
    assert row["Prob. Real World"] == pytest.approx(results["tofu_world_facts_prob"]["prob_choice,none"], rel=1e-9)
    assert row["ROUGE Retain"] == pytest.approx(results["tofu_retain_rouge"]["rougeL,none"], rel=1e-9)
    assert 0 < float(row["Prob. Forget"] or 0) < 1
