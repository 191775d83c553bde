"""TOFU's and MUSE's figures by hand, by scipy and by the authors' own logs; lm-eval's per-item files."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hmean

from unlearn.errors import DataError, EvaluationError
from unlearn.evidence.benchmarks import (
    SETS,
    MuseLog,
    TofuLog,
    TofuSet,
    absent,
    forget_quality,
    privleak,
    read_samples,
    rows,
)
from unlearn.evidence.membership import auc
from unlearn.score.evaluate import write_files

LN = math.log


def fields(loss: list[float], paraphrased: list[float], perturbed: list[list[float]], rouge: list[float]) -> Any:
    """One file of a log, with a field that no aggregate needs."""
    columns = {
        "avg_gt_loss": loss,
        "avg_paraphrased_loss": paraphrased,
        "average_perturb_loss": perturbed,
        "rougeL_recall": rouge,
        "num_token_gt": [4] * len(loss),
    }
    return {name: {str(i): v for i, v in enumerate(values)} for name, values in columns.items()}


def made_up() -> dict[str, Any]:
    """Losses are logarithms of small numbers, so that everything can be computed by hand."""
    return {
        # P = 1/2, 1/4; R = 4, 1/2 (from means ln 8, ln 2 and paraphrases ln 2, ln 4)
        "eval_log.json": fields([LN(2), LN(4)], [LN(2), LN(4)], [[LN(4), LN(16)], [LN(2), LN(2)]], [1.0, 0.5]),
        # P = 1, 1/4; R = 2, 1/4
        "eval_log_forget.json": fields([0.0, LN(4)], [LN(2), LN(8)], [[LN(2), LN(8)], [LN(2), LN(2)]], [0.25, 0.75]),
        # P of the answer among all: (1/2)/(1/2 + 1/4 + 1/4) = 1/2; R = 2
        "eval_real_author_wo_options.json": fields([LN(2)], [LN(2)], [[LN(4), LN(4)]], [0.8]),
        # (1/5)/(1/5 + 1/5 + 1/10) = 2/5; R = sqrt 2
        "eval_real_world_wo_options.json": fields([LN(5)], [LN(5)], [[LN(5), LN(10)]], [0.4]),
    }


def another() -> TofuLog:
    """The log of another model on the same items."""
    data = made_up()
    data["eval_log_forget.json"]["avg_paraphrased_loss"] = {"0": LN(3), "1": LN(9)}
    return TofuLog.from_json(data, "another")


def test_a_model_is_no_reference_for_itself() -> None:
    """Its forget quality would be 1, whatever it remembers: the same log, a copy, one written with fewer digits."""
    log, again = (TofuLog.from_json(made_up(), name) for name in ("log.json", "again.json"))
    short: Any = made_up()
    for item, value in short[FORGET]["avg_paraphrased_loss"].items():
        short[FORGET]["avg_paraphrased_loss"][item] = float(np.float32(value))
    turned: Any = made_up()
    for column in turned[FORGET].values():
        for item in list(column):
            column[item] = column.pop(item)
        column["0"] = column.pop("0")  # the same items the other way round
    for same in (log, again, TofuLog.from_json(short, "short"), TofuLog.from_json(turned, "turned")):
        with pytest.raises(EvaluationError, match=r"truth ratios of all 2 forget items are the .*never"):
            log.row(same)
    assert 0 < forget_quality(log, another())[0] <= 1


def one_set(paraphrased: list[float], perturbed: list[list[float]], loss: list[float] | None = None) -> TofuSet:
    n = len(paraphrased)
    values = np.array(paraphrased if loss is None else loss)
    return TofuSet(tuple(map(str, range(n))), values, np.array(paraphrased), np.array(perturbed), np.ones(n))


def forgetting(paraphrased: list[float], perturbed: list[list[float]]) -> TofuLog:
    other = one_set([1.0], [[1.0]])
    return TofuLog({**dict.fromkeys(SETS, other), "forget": one_set(paraphrased, perturbed)})


def test_forget_quality_of_a_few_items_by_hand() -> None:
    # all of ours below all of theirs: D = 1, and p = 2 / C(6, 3) of the orders are as extreme
    found = forget_quality(forgetting([3.0, 3.1, 3.2], [[1.0]] * 3), forgetting([1.0, 1.1, 1.2], [[1.0]] * 3))
    assert found == (pytest.approx(0.1, abs=1e-12), 1.0)
    # constant values, of two models: ties all through within each
    flat = forget_quality(forgetting([1.0] * 4, [[2.0]] * 4), forgetting([1.5] * 4, [[2.0]] * 4))
    assert flat == (pytest.approx(2 / math.comb(8, 4), abs=1e-12), 1.0)
    with pytest.raises(EvaluationError, match="of a single item is 1 whatever was scored"):
        forget_quality(forgetting([1.0], [[2.0]]), forgetting([5.0], [[2.0]]))


def test_a_broken_models_losses_do_not_overflow() -> None:
    wild = one_set([2000.0, 10.0], [[10.0, 20.0], [3000.0, 3000.0]])
    assert wild.truth_ratio_forget == 0.0
    assert wild.truth_ratio_kept == 0.5
    assert one_set([2000.0], [[2000.0, 2000.0, 2000.0]]).prob_choice == 0.25
    assert one_set([900.0], [[800.0]]).prob_choice == pytest.approx(math.exp(-100), rel=1e-9)
    assert one_set([2000.0], [[2000.0]]).prob == 0.0
    found = forget_quality(forgetting([2000.0, 1999.0], [[1.0]] * 2), forgetting([1998.0, 1997.0], [[1.0]] * 2))
    assert found[1] == 1.0  # though all four ratios are 0 in float64


def drop(*path: str) -> Callable[[Any], None]:
    return put(None, *path)


def put(value: Any, *path: str) -> Callable[[Any], None]:
    """Set a value deep inside; None takes it out."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if value is None:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


FORGET = "eval_log_forget.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("eval_log.json"), r"log.json: no 'eval_log.json' in it; a TOFU log has"),
        (drop(FORGET, "average_perturb_loss"), r"log.json, eval_log_forget.json: no 'average_perturb_loss'"),
        (put({}, FORGET, "avg_gt_loss"), "no 'avg_gt_loss' with an entry per item"),
        (drop(FORGET, "rougeL_recall", "1"), "'rougeL_recall' has 1 items and 'avg_gt_loss' 2; item '1'"),
        (drop(FORGET, "avg_gt_loss", "0"), "'avg_paraphrased_loss' has 2 items and 'avg_gt_loss' 1; item '0'"),
        (put(math.nan, FORGET, "avg_gt_loss", "1"), "avg_gt_loss, item '1' is nan, which is no finite number"),
        (put("0.5", FORGET, "rougeL_recall", "0"), "rougeL_recall, item '0' is '0.5', which is no"),
        (put(True, FORGET, "rougeL_recall", "0"), "rougeL_recall, item '0' is True, which is no"),
        (put(1.5, FORGET, "average_perturb_loss", "0"), "item '0': no list of the perturbed answers' losses"),
        (put([], FORGET, "average_perturb_loss", "1"), "item '1': no list of the perturbed answers' losses"),
        (put([1.0], FORGET, "average_perturb_loss", "1"), "item '1': 1 perturbed answers where others have 2"),
        (put([1.0, math.inf], FORGET, "average_perturb_loss", "1"), "item '1', entry 2 is inf, which is no"),
    ],
)
def test_a_bad_log_is_named(change: Callable[[Any], None], says: str) -> None:
    data = made_up()
    change(data)
    with pytest.raises(DataError, match=says):
        TofuLog.from_json(data, "log.json")


def samples(forget: str = "forget10") -> dict[str, list[dict[str, Any]]]:
    """The made-up log as lm-eval's records; the two tasks of a set in different orders."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (file, *_) in SETS.items():
        task, log = f"tofu_{forget if name == 'forget' else name}", made_up()[file]
        ids = list(log["avg_gt_loss"])
        common = [{"doc_id": int(i), "doc": {"id": i, "question": "?"}} for i in ids]
        found[f"{task}_prob"] = [
            {
                **c,
                "loss": log["avg_gt_loss"][i],
                "paraphrased_loss": log["avg_paraphrased_loss"][i],
                "perturbed_losses": log["average_perturb_loss"][i],
            }
            for c, i in zip(common, ids, strict=True)
        ]
        rouge = [{**c, "rougeL": log["rougeL_recall"][i]} for c, i in zip(common, ids, strict=True)]
        found[f"{task}_rouge"] = rouge[::-1]
    return found


def test_samples_give_what_the_log_gives() -> None:
    log = TofuLog.from_json(made_up(), "log.json")
    read = TofuLog.from_samples(samples(), "forget10")
    assert read.forget_set == "forget10"
    assert read.row() == log.row()
    plain = {file: {k: v for k, v in c.items() if k != "question"} for file, c in read.to_json().items()}
    assert plain == log.to_json()
    assert read.to_json()["eval_log.json"]["question"] == {"0": "?", "1": "?"}
    assert np.array_equal(read.sets["retain"].rouge, [1.0, 0.5])  # joined, not in the file's order


def test_tasks_that_were_not_run_are_named() -> None:
    some = samples()
    del some["tofu_world_facts_rouge"]
    with pytest.raises(EvaluationError, match="task tofu_world_facts_rouge was not run"):
        TofuLog.from_samples(some, "forget10")
    with pytest.raises(EvaluationError, match="task tofu_retain_prob was not run"):
        TofuLog.from_samples({**samples(), "tofu_retain_prob": []}, "forget10")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s["tofu_retain_rouge"].pop(),
            "_rouge: 'rougeL_recall' has 1 items and 'avg_gt_loss' 2; item '0'",
        ),
        (
            lambda s: s["tofu_retain_prob"][1].pop("loss"),
            "retain_prob and tofu_retain_rouge, avg_gt_loss, item '1' is missing",
        ),
        (
            lambda s: s["tofu_retain_prob"][1].pop("perturbed_losses"),
            "tofu_retain_rouge, average_perturb_loss, item '1': no",
        ),
        (
            lambda s: s["tofu_retain_rouge"][0].update(rougeL=math.nan),
            "retain_rouge, rougeL_recall, item '1' is nan",
        ),
        (lambda s: s["tofu_retain_prob"].append(s["tofu_retain_prob"][0]), "tofu_retain_prob: 3 records of 2 items"),
    ],
)
def test_bad_samples_are_named(change: Callable[[Any], None], says: str) -> None:
    bad = samples()
    change(bad)
    with pytest.raises(DataError, match=says):
        TofuLog.from_samples(bad, "forget10")


def test_a_reference_of_something_else_is_refused() -> None:
    log = TofuLog.from_samples(samples(), "forget10")
    with pytest.raises(EvaluationError, match="scored on forget05 and the model on forget10"):
        forget_quality(log, TofuLog.from_samples(samples("forget05"), "forget05"))
    with pytest.raises(EvaluationError, match="the reference has 3 forget items and the model 2"):
        log.row(forgetting([1.0] * 3, [[1.0, 2.0]] * 3))
    with pytest.raises(EvaluationError, match="reference has 1 perturbed answers for each forget item and the model 2"):
        forget_quality(log, forgetting([1.0] * 2, [[1.0]] * 2))
    other = samples()
    for task in ("tofu_forget10_prob", "tofu_forget10_rouge"):
        for record in other[task]:
            record["doc"] = {"id": str(record["doc_id"] + 1)}
    with pytest.raises(EvaluationError, match=r"1 of the 2 forget items are not the reference's \(such as '0'\)"):
        forget_quality(log, TofuLog.from_samples(other, "forget10"))
    # a log that does not say which set it is of can stand for any
    assert forget_quality(log, another())


def asking(questions: list[str], as_the_authors: bool = False) -> TofuLog:
    """The other model's log, which says what it was asked."""
    data = another().to_json()
    if as_the_authors:
        texts = [[f"Question: {question}\n", "Answer: who knows", "Answer: Ada"] for question in questions]
        data[FORGET]["generated_text"] = {str(n): text for n, text in enumerate(texts)}
    else:
        data[FORGET]["question"] = {str(n): question for n, question in enumerate(questions)}
    return TofuLog.from_json(data, "log")


@pytest.mark.parametrize("as_the_authors", [False, True])
def test_a_reference_of_another_forget_set_is_known_by_its_questions(as_the_authors: bool) -> None:
    """As many items with the same numbers: only what was asked tells that a log of retain90 is none for forget01."""
    asked = samples("forget01")
    for task in ("tofu_forget01_prob", "tofu_forget01_rouge"):
        for record in asked[task]:
            record["doc"]["question"] = ("Who is Ada?", "Where does  Bob live?")[record["doc_id"]]
    log = TofuLog.from_samples(asked, "forget01")
    assert forget_quality(log, asking(["Who is Ada?", "Where does Bob live?"], as_the_authors))
    other = asking(["Who is Ada?", "What does Cyd write?"], as_the_authors)
    said = (
        "1 of the 2 forget items ask something else in the reference: item '1' is 'What does Cyd write\\?' there and "
    )
    with pytest.raises(EvaluationError, match=said + "'Where does Bob live\\?' here.*forget01 was trained on retain99"):
        forget_quality(log, other)
    # two logs, neither of which says what set it is of
    with pytest.raises(EvaluationError, match="2 of the 2 forget items ask something else"):
        forget_quality(asking(["Who?", "When?"]), asking(["How?", "Why?"], as_the_authors))


@pytest.mark.parametrize("name", ["forget", "retain", "real_authors", "world_facts"])
def test_figures_are_never_of_fewer_parts(name: str) -> None:
    log = TofuLog.from_json(made_up(), "log.json")
    nothing = TofuSet((), np.array([]), np.array([]), np.zeros((0, 3)), np.array([]))
    broken = TofuSet(("0",), np.array([np.nan]), np.array([1.0]), np.ones((1, 3)), np.array([1.0]))
    for lost in (nothing, broken):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(EvaluationError, match=f"cannot be computed: .*{SETS[name][1]}.*no number, or no items"):
                TofuLog({**log.sets, name: lost}).row()


KNOWN, HOLDOUT = (-1.0, -2.0, -3.0, -4.0), (-0.5, -2.5, -2.5, -4.5)


def records(name: str, values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"doc_id": n, "doc": {"id": str(n)}, "filter": "none", name: v} for n, v in enumerate(values)]


def muse_samples(
    corpus: str = "news", forget: Sequence[float] = KNOWN, holdout: Sequence[float] = HOLDOUT
) -> dict[str, list[dict[str, Any]]]:
    return {
        f"muse_{corpus}_verbmem": records("rougeL_f1", (0.2, 0.6)),
        f"muse_{corpus}_knowmem_forget": records("rougeL_f1", (0.0, 0.5, 1.0)),
        f"muse_{corpus}_knowmem_retain": records("rougeL_f1", (0.25,)),
        f"muse_{corpus}_privleak_forget": records("min_40", forget),
        f"muse_{corpus}_privleak_holdout": records("min_40", holdout),
    }


def muse_log(corpus: str = "news", forget: Sequence[float] = KNOWN, holdout: Sequence[float] = HOLDOUT) -> MuseLog:
    return MuseLog.from_samples(muse_samples(corpus, forget, holdout), corpus)


def test_a_row_by_hand() -> None:
    # hold-out above forget: -0.5 beats 4, -2.5 beats 2 twice, -4.5 none: 8 of 16
    assert muse_log().auc == 0.5
    wanted = {"name": "mine", "verbmem_f": 40.0, "privleak": (0.5 - 0.4772) / 0.4772 * 100}
    wanted |= {"knowmem_f": 50.0, "knowmem_r": 25.0}
    found = muse_log().row("published", "mine")
    assert found == pytest.approx(wanted)
    assert list(found) == list(wanted), "in the authors' order"
    assert muse_log("books").row("published", "b")["privleak"] == pytest.approx((0.5 - 0.5393) / 0.5393 * 100)


def test_the_direction_is_the_authors() -> None:
    # a model that remembers every forget text: MUSE's target model on News is at -99.8
    known = muse_log(forget=(-0.1, -0.2, -0.1, -0.3), holdout=(-3.0, -4.0, -3.5, -5.0))
    assert known.auc == 0.0
    assert privleak(known, "published") == -100.0
    # one that shuns them, like MUSE's NPO at 109.6
    shunned = muse_log(forget=(-9.0,) * 4)
    assert shunned.auc == 1.0
    assert privleak(shunned, "published") == pytest.approx(109.6, abs=0.05)
    assert muse_log(forget=(-1.0,) * 3, holdout=(-1.0,) * 2).auc == 0.5, "equal scores say nothing"
    # and it is the other way round than for membership, where the forget texts are the members
    assert auc(list(shunned.forget.values()), list(shunned.holdout.values())) == 0.0


def test_privleak_against_a_references_own_samples() -> None:
    base = muse_log(forget=(-1.0, -2.0, -3.0, -5.0))  # of 16 pairs: 4 + 2 + 2 + 1
    assert base.auc == 9 / 16
    assert privleak(muse_log(), base) == pytest.approx((0.5 - 9 / 16) / (9 / 16) * 100)
    moved = muse_log(forget=tuple(value - 1e-9 for value in KNOWN))
    for same in (muse_log(), moved):
        with pytest.raises(EvaluationError, match="are the reference's own: this is one model"):
            privleak(muse_log(), same)


def test_a_reference_that_knows_every_forget_text_best_leaves_privleak_out() -> None:
    """PrivLeak divides by the reference's AUC; the other figures need no reference."""
    base = muse_log(forget=(0.0,) * 4)
    assert base.auc == 0.0
    assert privleak(muse_log(), base) is None
    assert muse_log().row(base, "mine") == {**muse_log().row("published", "mine"), "privleak": None}
    assert absent("muse", base).startswith("PrivLeak is absent because the reference's AUC is 0")
    assert absent("muse", muse_log()) == absent("muse", "published") == ""


def test_a_reference_of_other_texts_is_refused() -> None:
    with pytest.raises(EvaluationError, match="scored on MUSE books and the model on news"):
        privleak(muse_log(), muse_log("books"))
    with pytest.raises(EvaluationError, match="the reference has 3 forget texts and the model 4"):
        privleak(muse_log(), muse_log(forget=KNOWN[:3]))
    with pytest.raises(EvaluationError, match="the reference has 2 holdout texts and the model 4"):
        privleak(muse_log(), muse_log(holdout=HOLDOUT[:2]))
    moved = muse_samples()
    for record in moved["muse_news_privleak_holdout"]:
        record["doc"]["id"] = "x" + record["doc"]["id"]
    with pytest.raises(EvaluationError, match="4 holdout texts, such as '0', are not the reference's"):
        privleak(muse_log(), MuseLog.from_samples(moved, "news"))


def test_references_of_the_other_benchmark() -> None:
    with pytest.raises(EvaluationError, match="TOFU has no published value"):
        rows({"edited": another()}, "published", "m")
    with pytest.raises(EvaluationError, match="a log of TOFU is no reference for MUSE"):
        rows({"edited": muse_log()}, another(), "m")


def test_a_value_that_is_none_is_named() -> None:
    bad = muse_samples()
    del bad["muse_news_privleak_forget"][2]["min_40"]
    with pytest.raises(DataError, match="task muse_news_privleak_forget, item 2: min_40 is missing"):
        MuseLog.from_samples(bad, "news")


# --- lm-eval's files -------------------------------------------------------------------------------------------------


_OTHER: dict[str, Any] = {"arguments": [], "resps": [], "filtered_resps": []}
_OTHER |= dict.fromkeys(("target", "doc_hash", "prompt_hash", "target_hash"), "")


def written(folder: Path, model: str = "m", own: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """Files of an evaluation, by lm-eval's own writer; returns the results file."""
    own = muse_samples() if own is None else own
    full = {task: [{**r, **_OTHER} for r in rows] for task, rows in own.items()}
    results = {
        "results": {task: {"alias": task} for task in own},
        "configs": {task: {} for task in own},
        "n-samples": {task: {"original": 99, "effective": len(rows)} for task, rows in own.items()},
    }
    return write_files(folder, model, results, full, 1.0)


def test_lm_evals_files_come_back_in_order(tmp_path: Path) -> None:
    own = {task: rows[::-1] for task, rows in muse_samples().items()}
    results = written(tmp_path, own=own)
    for folder in (tmp_path, results.parent):
        found = read_samples(folder)
        assert sorted(found) == sorted(own)
        assert [r["min_40"] for r in found["muse_news_privleak_forget"]] == list(KNOWN)
        assert MuseLog.from_samples(found, "news").row(None, "m") == muse_log().row(None, "m")


def test_the_newest_file_of_a_task_counts(tmp_path: Path) -> None:
    written(tmp_path)
    task = "muse_news_verbmem"
    where = written(tmp_path, own={task: records("rougeL_f1", (1.0,))}).parent
    found = read_samples(where)
    assert [r["rougeL_f1"] for r in found[task]] == [1.0]
    assert len(found["muse_news_knowmem_forget"]) == 3  # from the older evaluation, which is the newest with it


def test_two_filters_of_one_item_are_no_doubles(tmp_path: Path) -> None:
    one = records("exact", (1.0, 0.0))
    results = written(tmp_path, own={"task": [*one, *({**r, "filter": "strict"} for r in one)]})
    whole = json.loads(results.read_text())
    whole["n-samples"]["task"]["effective"] = 2
    results.write_text(json.dumps(whole))
    found = [(r["doc_id"], r["filter"]) for r in read_samples(tmp_path)["task"]]
    assert found == [(0, "none"), (0, "strict"), (1, "none"), (1, "strict")]


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Do that to one task's samples, given the results' path."""

    def damage(results: Path) -> None:
        (path,) = results.parent.glob("samples_muse_news_privleak_forget_*.jsonl")
        path.write_bytes(change(path.read_bytes()))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (changed(lambda b: b[:-20]), r"samples_muse_news_privleak_forget_\S+.jsonl, line 4: not JSON"),
        (
            changed(lambda b: b"".join(b.splitlines(keepends=True)[:3])),
            r"3 items, but results_\S+.json says that 4 were scored",
        ),
        (changed(lambda b: b * 2), r"line 5: item 0 is there twice"),
        (changed(lambda b: b'{"a": 1}\n'), r"line 1: no record of an item"),
        (changed(lambda b: b"\xff\xfe\n"), r"line 1: not JSON"),
        (lambda path: path.write_text("{}"), r"results_\S+.json: does not say how many items of muse_news_\w+ were"),
        (lambda path: path.write_text("{"), r"results_\S+.json: cannot be read"),
        (Path.unlink, r"results_\S+.json, written with it, is not beside it"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(written(tmp_path))
    with pytest.raises(DataError, match=says):
        read_samples(tmp_path)


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no samples_<task>_<time>.jsonl in it"):
        read_samples(tmp_path)


def by_hand() -> dict[str, float]:
    return {
        "ROUGE Real Authors": 0.8,
        "Prob. Real Authors": 0.5,
        "Truth Ratio Real Authors": 0.5,
        "ROUGE Real World": 0.4,
        "Prob. Real World": 0.4,
        "Truth Ratio Real World": 1 - 1 / math.sqrt(2),
        "ROUGE Retain": 0.75,
        "Prob. Retain": 0.375,
        "Truth Ratio Retain": (0.75 + 0.0) / 2,
        "ROUGE Forget": 0.5,
        "Prob. Forget": 0.625,
        "Truth Ratio Forget": (0.5 + 0.25) / 2,
    }


def test_a_small_log_by_hand() -> None:
    data = made_up()
    for file in data.values():  # the fields are joined by item, not by place
        file["avg_paraphrased_loss"] = dict(reversed(file["avg_paraphrased_loss"].items()))
    wanted = by_hand()
    for log in (TofuLog.from_json(made_up(), "log.json"), TofuLog.from_json(data, "log.json")):
        found = log.row()
        assert {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-12)
        kept = [v for k, v in wanted.items() if not k.endswith("Forget")]
        assert len(kept) == 9
        assert found["Model Utility"] == pytest.approx(hmean(kept), abs=1e-12)


@pytest.mark.parametrize("name", ["real_authors", "world_facts", "retain"])
def test_utility_is_0_when_a_part_is(name: str) -> None:
    data = made_up()
    rouge = data[SETS[name][0]]["rougeL_recall"]
    rouge.update(dict.fromkeys(rouge, 0.0))
    assert TofuLog.from_json(data, "log.json").row()["Model Utility"] == 0.0
