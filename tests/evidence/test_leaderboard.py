"""The command: rows from the per-item files of runs, TOFU's row from logs, and what it says of mistakes."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import hmean, ks_2samp

from unlearn import cli

LOGS = os.environ.get("UNLEARN_TOFU_LOGS")
TOFU = tuple(f"tofu_{s}_{p}" for s in ("forget01", "retain", "real_authors", "world_facts") for p in ("prob", "rouge"))
LOSSES = {"target": 0.0, "edited": 1.0, "reference": 1.2}  # nats per token more than what is known by heart
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
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = f"name: {name}-recipe\nbenchmark:\n  name: {benchmark}\n  set: {subset}\n"
        (folder / "resolved.yaml").write_text(recipe)
        parts = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout")
        tasks = [t.replace("forget01", subset) for t in TOFU] if benchmark == "tofu" else []
        tasks += [f"muse_{subset}_{part}" for part in parts if benchmark == "muse"]
        for model in who:
            place = folder / "benchmark" / model / "the__model"
            place.mkdir(parents=True)
            run = [t for t in tasks if t not in skip]
            for task in run:
                lines = [json.dumps(record) + "\n" for record in records(task, model, items)]
                (place / f"samples_{task}_2026-01-02T03-04-05.678.jsonl").write_text("".join(lines))
            counts = {task: {"original": items, "effective": items} for task in run}
            results = {"results": {task: {"prob,none": 0.123456} for task in run}, "n-samples": counts}
            (place / "results_2026-01-02T03-04-05.678.json").write_text(json.dumps(results))
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
    assert (
        cli.main(
            ["leaderboard", "--tofu-log", str(tmp_path / "b" / "one" / "edited" / log.name), "--reference", str(log)]
        )
        == 0
    )
    assert json.loads(said()[0])["Forget Quality"] == pytest.approx(quality("edited", "reference"), rel=1e-12)


def _written(path: Path) -> tuple[int, int, str]:
    """The order in which files are written: the table first, then by model."""
    order = ["target", "edited", "reference"]
    return (path.suffix != ".csv", order.index(path.parent.name) if path.parent.name in order else 9, path.name.lower())


def test_a_run_without_a_reference(made: Made, said: Said, tmp_path: Path) -> None:
    run, with_one = made("none", who=("target", "edited")), made("with")
    assert main([str(run)]) == 0
    out, err = said()
    assert shown(out)["Forget Quality"] == ["-", "-"]
    assert err.count("\n") == 1
    assert f"{run}: no retain reference, so forget quality is absent" in err
    assert "--reference" in err
    assert main([str(run), "--reference", str(with_one), "--out", str(tmp_path / "out")]) == 0
    out, err = said()
    assert err.splitlines() == [
        f"wrote {p}" for p in sorted((tmp_path / "out").rglob("*"), key=_written) if p.is_file()
    ]
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
    assert main([str(run), "--reference", str(tmp_path / "log.json")]) == 2
    assert "MUSE has no log files" in said()[1]
    alone = made("alone", benchmark="muse", subset="books", who=("target", "edited"))
    assert main([str(alone)]) == 0
    out, err = said()
    assert shown(out)["privleak"] == ["-", "-"]
    assert "so PrivLeak is absent" in err


def test_a_reference_with_an_auc_of_0(made: Made, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PrivLeak divides by it: the figure is left out with the reason, and the others stay."""
    monkeypatch.setitem(LOSSES, "reference", -1.0)  # every forget text is likelier to it than every hold-out text
    run = made("muse", benchmark="muse", subset="books")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    out, err = said()
    table = shown(out)
    assert table["privleak"] == ["-", "-", "-"]
    assert table["verbmem_f"] == ["37.50"] * 3
    assert f"{run}: PrivLeak is absent because the reference's AUC is 0" in " ".join(err.split())
    assert (tmp_path / "out" / "muse.csv").read_text().splitlines()[1].startswith("target,37.5,,")


def test_a_model_is_no_reference_for_itself(
    made: Made, said: Said, write: Callable[[str, Any], str], tmp_path: Path
) -> None:
    """The same log, a copy, and a run whose reference is its own target: an error, and no forget quality of 1."""
    log = write("log.json", a_log())
    for same in (log, write("copy.json", json.dumps(a_log(), indent=1))):
        refused(["--tofu-log", log, "--reference", same], said, f"{log} beside {same}", "this is one model")
    run = made()
    shutil.rmtree(run / "benchmark" / "reference")
    shutil.copytree(run / "benchmark" / "target", run / "benchmark" / "reference")
    refused([str(run), "--out", str(tmp_path / "out")], said, str(run), "this is one model", "(found with the target)")
    assert not (tmp_path / "out").exists()
    muse = made("muse", benchmark="muse", subset="books")
    shutil.rmtree(muse / "benchmark" / "reference")
    shutil.copytree(muse / "benchmark" / "edited", muse / "benchmark" / "reference")
    refused([str(muse)], said, str(muse), "PrivLeak of 0", "(found with the edited model)")


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
    assert list(row)[12:] == [
        "Model Utility",
        "Forget Quality",
        "KS Test PVal Forget",
        "KS Test Forget",
        "Method",
        "Submitted By",
    ]
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


def test_a_log_against_a_run(write: Callable[[str, Any], str], made: Made, said: Said) -> None:
    data = a_log(items=5)
    for column in data["eval_log_forget.json"].values():
        for item, value in column.items():
            column[item] = value[:2] if isinstance(value, list) else value
    assert main(["--tofu-log", write("log.json", data), "--reference", str(made())]) == 0
    row = json.loads(said()[0])
    ours = [math.exp((5.0 - i / 4) / 2 - 0.75 - i / 8) for i in range(5)]
    losses = [loss("forget", "reference", i) for i in range(5)]
    theirs = [math.exp(sum(wrong) / 2 - reworded) for _, reworded, wrong in losses]
    assert row["Forget Quality"] == pytest.approx(ks_2samp(ours, theirs).pvalue, rel=1e-12)


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
    refused([str(tmp_path / "nothing")], said, "is not the folder of a run")
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


def test_tasks_that_were_not_run(made: Made, said: Said) -> None:
    run = made(skip=("tofu_retain_rouge", "tofu_forget01_prob"))
    refused(
        [str(run)], said, "needs tasks that were not run: tofu_forget01_prob, tofu_retain_rouge; run the recipe again"
    )
    other = made("muse", benchmark="muse", subset="news", skip=("muse_news_privleak_holdout",))
    refused([str(other)], said, "muse news needs tasks that were not run: muse_news_privleak_holdout")


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
    long = write("log.json", a_log())
    refused([str(run), "--reference", long], said, "reference has 6 forget items and the model 5")
    refused(["--tofu-log", long, "--reference", write("r.json", a_log(items=7))], said, "has 7 forget items")
    refused(["--tofu-log", long, "--reference", "published"], said, "--reference published is MUSE's")
    refused(["--tofu-log", long, "--reference", str(tmp_path)], said, "is not the folder of a run")


def test_a_mistake_in_the_last_run_is_said_before_anything_is_written(made: Made, said: Said, tmp_path: Path) -> None:
    refused([str(made()), str(tmp_path), "--out", str(tmp_path / "out")], said, "is not the folder of a run")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\x00", "not JSON"),
        ("[]", "not a log in the layout of TOFU's authors"),
        ("{}", "eval_real_author_wo_options.json"),
    ],
)
def test_files_that_are_no_logs(write: Callable[[str, Any], str], said: Said, text: str, word: str) -> None:
    path = write("log.json", text)
    refused(["--tofu-log", path], said, path, word)
    refused(["--tofu-log", write("good.json", a_log()), "--reference", path], said, path, word)
