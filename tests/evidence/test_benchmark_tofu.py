"""TOFU's aggregates against hand-computed numbers, scipy, and the figures of the authors' own logs."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from unlearn.errors import DataError, EvaluationError
from unlearn.evidence.benchmarks import SETS, TOFU_COLUMNS, TofuLog, TofuSet, forget_quality, tofu_row, utility

LOGS = os.environ.get("UNLEARN_TOFU_LOGS")
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
    found = tofu_row(TofuLog.from_json(made_up(), "log.json"))
    wanted = by_hand()
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-12)
    kept = [v for k, v in wanted.items() if not k.endswith("Forget")]
    assert len(kept) == 9
    assert found["Model Utility"] == pytest.approx(hmean(kept), abs=1e-12)
    assert found["Model Utility"] == pytest.approx(9 / sum(1 / v for v in kept), abs=1e-12)


def test_the_columns_are_the_authors_and_in_their_order() -> None:
    sets = ("Real Authors", "Real World", "Retain", "Forget")
    twelve = [f"{kind} {title}" for title in sets for kind in ("ROUGE", "Prob.", "Truth Ratio")]
    assert list(TOFU_COLUMNS) == [*twelve, "Model Utility", "Forget Quality", "Method", "Submitted By"]
    log = TofuLog.from_json(made_up(), "log.json")
    assert [*tofu_row(log)][:14] == list(TOFU_COLUMNS)[:14]
    assert [*tofu_row(log, another())][14:] == ["KS Test PVal Forget", "KS Test Forget"]


def test_without_a_reference_there_is_no_forget_quality() -> None:
    log = TofuLog.from_json(made_up(), "log.json")
    alone = tofu_row(log)
    assert [alone[k] for k in ("Forget Quality", "KS Test PVal Forget", "KS Test Forget")] == [None, None, None]


def another() -> TofuLog:
    """The log of another model on the same items."""
    data = made_up()
    data["eval_log_forget.json"]["avg_paraphrased_loss"] = {"0": LN(3), "1": LN(9)}
    return TofuLog.from_json(data, "another")


def test_a_model_is_no_reference_for_itself() -> None:
    """Its forget quality would be 1, whatever it remembers: the same log, a copy, one written with fewer digits."""
    log, again = (TofuLog.from_json(made_up(), name) for name in ("log.json", "again.json"))
    short = made_up()
    for item, value in short[FORGET]["avg_paraphrased_loss"].items():
        short[FORGET]["avg_paraphrased_loss"][item] = float(np.float32(value))
    turned = made_up()
    for column in turned[FORGET].values():
        for item in list(column):
            column[item] = column.pop(item)
        column["0"] = column.pop("0")  # the same items the other way round
    for same in (log, again, TofuLog.from_json(short, "short"), TofuLog.from_json(turned, "turned")):
        with pytest.raises(EvaluationError, match="truth ratios of all 2 forget items are the reference's own"):
            forget_quality(log, same)
        with pytest.raises(EvaluationError, match="never saw the forget set"):
            tofu_row(log, same)
    assert 0 < forget_quality(log, another()).p_value <= 1


@pytest.mark.parametrize("name", ["real_authors", "world_facts", "retain"])
def test_utility_is_0_when_a_part_is(name: str) -> None:
    data = made_up()
    rouge = data[SETS[name][0]]["rougeL_recall"]
    rouge.update(dict.fromkeys(rouge, 0.0))
    assert utility(TofuLog.from_json(data, "log.json")).value == 0.0


def test_the_forget_set_is_no_part_of_utility() -> None:
    data = made_up()
    before = utility(TofuLog.from_json(data, "log.json")).value
    data["eval_log_forget.json"]["rougeL_recall"] = {"0": 0.0, "1": 0.0}
    after = utility(TofuLog.from_json(data, "log.json"))
    assert after.value == before > 0
    assert len(after.parts) == 9


def one_set(paraphrased: list[float], perturbed: list[list[float]], loss: list[float] | None = None) -> TofuSet:
    n = len(paraphrased)
    values = np.array(paraphrased if loss is None else loss)
    return TofuSet(tuple(map(str, range(n))), values, np.array(paraphrased), np.array(perturbed), np.ones(n))


def forgetting(paraphrased: list[float], perturbed: list[list[float]]) -> TofuLog:
    other = one_set([1.0], [[1.0]])
    return TofuLog({**dict.fromkeys(SETS, other), "forget": one_set(paraphrased, perturbed)})


def test_forget_quality_is_scipys_on_the_ratios() -> None:
    draw = np.random.default_rng(3)
    ours, theirs = (forgetting(draw.gamma(2, 1, 80).tolist(), draw.gamma(k, 1, (80, 5)).tolist()) for k in (2.0, 2.6))
    ratios = [
        np.exp(log.sets["forget"].perturbed_losses.mean(-1) - log.sets["forget"].paraphrased_loss)
        for log in (ours, theirs)
    ]
    wanted = ks_2samp(*ratios)
    found = forget_quality(ours, theirs)
    assert (found.p_value, found.statistic, found.n) == (float(wanted.pvalue), float(wanted.statistic), 80)
    assert 0 < found.p_value < 1


def test_forget_quality_of_a_few_items_by_hand() -> None:
    # all of ours below all of theirs: D = 1, and p = 2 / C(6, 3) of the orders are as extreme
    found = forget_quality(forgetting([3.0, 3.1, 3.2], [[1.0]] * 3), forgetting([1.0, 1.1, 1.2], [[1.0]] * 3))
    assert (found.statistic, found.n) == (1.0, 3)
    assert found.p_value == pytest.approx(0.1, abs=1e-12)
    # constant values, of two models: ties all through within each
    flat = forget_quality(forgetting([1.0] * 4, [[2.0]] * 4), forgetting([1.5] * 4, [[2.0]] * 4))
    assert (flat.p_value, flat.statistic) == (pytest.approx(2 / math.comb(8, 4), abs=1e-12), 1.0)
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
    assert found.statistic == 1.0  # though all four ratios are 0 in float64


def test_a_log_survives_its_file() -> None:
    log = TofuLog.from_json(made_up(), "log.json")
    again = TofuLog.from_json(json.loads(json.dumps(log.to_json())), "again.json")
    assert tofu_row(again, another()) == tofu_row(log, another())
    for name, s in log.sets.items():
        other = again.sets[name]
        assert other.items == s.items
        for ours, theirs in (
            (s.loss, other.loss),
            (s.paraphrased_loss, other.paraphrased_loss),
            (s.perturbed_losses, other.perturbed_losses),
            (s.rouge, other.rouge),
        ):
            assert np.array_equal(ours, theirs)
            assert theirs.dtype == np.float64


def test_fields_in_another_order_are_joined_by_item() -> None:
    data = made_up()
    for file in data.values():
        file["avg_paraphrased_loss"] = dict(reversed(file["avg_paraphrased_loss"].items()))
    assert tofu_row(TofuLog.from_json(data, "x"))["Truth Ratio Forget"] == pytest.approx(
        by_hand()["Truth Ratio Forget"]
    )


def drop(*path: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def put(value: Any, *path: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
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


def test_a_log_that_is_a_list_is_named() -> None:
    with pytest.raises(DataError, match=r"log.json: not a log"):
        TofuLog.from_json([1], "log.json")


def samples(forget: str = "forget10") -> dict[str, list[dict[str, Any]]]:
    """The made-up log as lm-eval's records; the two tasks of a set in different orders."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (file, _) in SETS.items():
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
    read = TofuLog.from_samples(samples())
    assert read.forget_set == "forget10"
    assert tofu_row(read) == tofu_row(log)
    plain = {file: {k: v for k, v in c.items() if k != "question"} for file, c in read.to_json().items()}
    assert plain == log.to_json()
    assert read.to_json()["eval_log.json"]["question"] == {"0": "?", "1": "?"}
    assert np.array_equal(read.sets["retain"].rouge, [1.0, 0.5])  # joined, not in the file's order


def test_which_forget_set_is_meant() -> None:
    both = {**samples("forget01"), **samples("forget10")}
    with pytest.raises(EvaluationError, match="several forget sets were scored \\(forget01, forget10\\)"):
        TofuLog.from_samples(both)
    assert TofuLog.from_samples(both, "forget01").forget_set == "forget01"
    kept = {task: rows for task, rows in samples().items() if "forget" not in task}
    with pytest.raises(
        EvaluationError, match=r"tofu_forget01, tofu_forget05, tofu_forget10, and none was run; .*retain"
    ):
        TofuLog.from_samples(kept)


def test_tasks_that_were_not_run_are_named() -> None:
    some = samples()
    del some["tofu_world_facts_rouge"]
    with pytest.raises(EvaluationError, match="task tofu_world_facts_rouge was not run"):
        TofuLog.from_samples(some)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["tofu_retain_rouge"].pop(), "tofu_retain_prob has 2 items and tofu_retain_rouge 1; item 0"),
        (lambda s: s["tofu_retain_prob"][1].pop("loss"), "task tofu_retain_prob, item 1: loss is missing"),
        (
            lambda s: s["tofu_retain_prob"][1].pop("perturbed_losses"),
            "tofu_retain_prob, perturbed_losses, item '1': no",
        ),
        (lambda s: s["tofu_retain_rouge"][0].update(rougeL=math.nan), "tofu_retain_rouge, item 1: rougeL is nan"),
        (lambda s: s["tofu_retain_prob"].append(s["tofu_retain_prob"][0]), "tofu_retain_prob: 3 records of 2 items"),
    ],
)
def test_bad_samples_are_named(change: Callable[[Any], None], says: str) -> None:
    bad = samples()
    change(bad)
    with pytest.raises(DataError, match=says):
        TofuLog.from_samples(bad)


def test_a_task_without_items_is_named() -> None:
    with pytest.raises(EvaluationError, match="task tofu_retain_prob has no items"):
        TofuLog.from_samples({**samples(), "tofu_retain_prob": []})


def test_a_reference_of_something_else_is_refused() -> None:
    log = TofuLog.from_samples(samples())
    with pytest.raises(EvaluationError, match="scored on forget05 and the model on forget10"):
        forget_quality(log, TofuLog.from_samples(samples("forget05")))
    with pytest.raises(EvaluationError, match="the reference has 3 forget items and the model 2"):
        tofu_row(log, forgetting([1.0] * 3, [[1.0, 2.0]] * 3))
    with pytest.raises(EvaluationError, match="reference has 1 perturbed answers for each forget item and the model 2"):
        forget_quality(log, forgetting([1.0] * 2, [[1.0]] * 2))
    other = samples()
    for task in ("tofu_forget10_prob", "tofu_forget10_rouge"):
        for record in other[task]:
            record["doc"] = {"id": str(record["doc_id"] + 1)}
    with pytest.raises(EvaluationError, match=r"1 of the 2 forget items are not the reference's \(such as '0'\)"):
        forget_quality(log, TofuLog.from_samples(other))
    # a log that does not say which set it is of can stand for any
    assert forget_quality(log, another()).n == 2


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
    log = TofuLog.from_samples(asked)
    assert forget_quality(log, asking(["Who is Ada?", "Where does Bob live?"], as_the_authors)).n == 2
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
    rest = TofuLog({n: s for n, s in log.sets.items() if n != name})
    for figure in (utility, tofu_row):
        with pytest.raises(EvaluationError, match=f"need all of real_authors, .* and there is no {name}$"):
            figure(rest)
    nothing = TofuSet((), np.array([]), np.array([]), np.zeros((0, 3)), np.array([]))
    broken = TofuSet(("0",), np.array([np.nan]), np.array([1.0]), np.ones((1, 3)), np.array([1.0]))
    for lost in (nothing, broken):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(EvaluationError, match=f"cannot be computed: .*{SETS[name][1]}.*no number, or no items"):
                utility(TofuLog({**log.sets, name: lost}))


@pytest.mark.skipif(not LOGS, reason="UNLEARN_TOFU_LOGS names no folder with the authors' Phi-1.5 logs")
def test_the_authors_logs_give_the_published_figures() -> None:
    full, retain = (
        TofuLog.from_json(json.loads((Path(str(LOGS)) / f"{name}.json").read_text("utf-8")), name)
        for name in ("full", "retain90")
    )
    found = tofu_row(full, retain)
    rounded = {k: f"{v:.6f}" for k, v in found.items() if v is not None}
    assert rounded["Model Utility"] == "0.522074"
    assert rounded["Prob. Forget"] == "0.928239"
    assert rounded["ROUGE Forget"] == "0.924861"
    assert rounded["Truth Ratio Forget"] == "0.483356"
    assert rounded["KS Test Forget"] == "0.346667"
    assert f"{found['Forget Quality']:.4e}" == "2.1943e-16"
    assert forget_quality(full, retain).n == 300
