"""MUSE's numbers by hand, the direction of its AUC, and the reader of lm-eval's per-item files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import DataError, EvaluationError
from unlearn.evidence.benchmarks import MUSE_COLUMNS, PUBLISHED_AUC, Corpus, MuseLog, muse_row, privleak, read_samples
from unlearn.evidence.boards import absent
from unlearn.evidence.membership import auc
from unlearn.score.evaluate import write_files

FORGET, HOLDOUT = (-1.0, -2.0, -3.0, -4.0), (-0.5, -2.5, -2.5, -4.5)


def records(name: str, values: Sequence[float]) -> list[dict[str, Any]]:
    return [{"doc_id": n, "doc": {"id": str(n)}, "filter": "none", name: v} for n, v in enumerate(values)]


def samples(
    corpus: str = "news", forget: Sequence[float] = FORGET, holdout: Sequence[float] = HOLDOUT
) -> dict[str, list[dict[str, Any]]]:
    return {
        f"muse_{corpus}_verbmem": records("rougeL_f1", (0.2, 0.6)),
        f"muse_{corpus}_knowmem_forget": records("rougeL_f1", (0.0, 0.5, 1.0)),
        f"muse_{corpus}_knowmem_retain": records("rougeL_f1", (0.25,)),
        f"muse_{corpus}_privleak_forget": records("min_40", forget),
        f"muse_{corpus}_privleak_holdout": records("min_40", holdout),
    }


def log(corpus: Corpus = "news", forget: Sequence[float] = FORGET, holdout: Sequence[float] = HOLDOUT) -> MuseLog:
    return MuseLog.from_samples(samples(corpus, forget, holdout), corpus)


def test_a_row_by_hand() -> None:
    # hold-out above forget: -0.5 beats 4, -2.5 beats 2 twice, -4.5 none: 8 of 16
    assert log().auc == 0.5
    found = muse_row(log(), "mine", "published")
    assert tuple(found) == MUSE_COLUMNS == ("name", "verbmem_f", "privleak", "knowmem_f", "knowmem_r")
    assert found == pytest.approx(
        {
            "name": "mine",
            "verbmem_f": 40.0,
            "privleak": (0.5 - 0.4772) / 0.4772 * 100,
            "knowmem_f": 50.0,
            "knowmem_r": 25.0,
        }
    )
    assert muse_row(log("books"), "b", "published")["privleak"] == pytest.approx((0.5 - 0.5393) / 0.5393 * 100)


def test_without_a_reference_there_is_no_privleak() -> None:
    assert muse_row(log(), "mine")["privleak"] is None


def test_the_direction_is_the_authors() -> None:
    # a model that remembers every forget text: MUSE's target model on News is at -99.8
    known = log(forget=(-0.1, -0.2, -0.1, -0.3), holdout=(-3.0, -4.0, -3.5, -5.0))
    assert known.auc == 0.0
    assert privleak(known, "published") == -100.0
    # one that shuns them, like MUSE's NPO at 109.6
    shunned = log(forget=(-9.0,) * 4)
    assert shunned.auc == 1.0
    assert privleak(shunned, "published") == pytest.approx(109.6, abs=0.05)
    # and it is the other way round than for membership, where the forget texts are the members
    assert auc(shunned.min_forget, shunned.min_holdout) == 0.0


def test_privleak_against_a_references_own_samples() -> None:
    base = log(forget=(-1.0, -2.0, -3.0, -5.0))  # of 16 pairs: 4 + 2 + 2 + 1
    assert base.auc == 9 / 16
    assert privleak(log(), base) == pytest.approx((0.5 - 9 / 16) / (9 / 16) * 100)
    moved = log(forget=tuple(value - 1e-9 for value in FORGET))
    for same in (log(), moved):
        with pytest.raises(EvaluationError, match="are the reference's own: this is one model"):
            privleak(log(), same)


def test_a_reference_that_knows_every_forget_text_best_leaves_privleak_out() -> None:
    """PrivLeak divides by the reference's AUC; the other figures need no reference."""
    base = log(forget=(0.0,) * 4)
    assert base.auc == 0.0
    assert privleak(log(), base) is None
    assert muse_row(log(), "mine", base) == {**muse_row(log(), "mine", "published"), "privleak": None}
    assert absent("muse", base).startswith("PrivLeak is absent because the reference's AUC is 0")
    assert absent("muse", log()) == absent("muse", "published") == ""


def test_all_equal_scores_say_nothing() -> None:
    assert log(forget=(-1.0,) * 3, holdout=(-1.0,) * 2).auc == 0.5


def test_a_reference_of_something_else_is_refused() -> None:
    with pytest.raises(EvaluationError, match="scored on MUSE books and the model on news"):
        privleak(log(), log("books"))
    with pytest.raises(EvaluationError, match="the reference has 3 forget texts and the model 4"):
        privleak(log(), log(forget=FORGET[:3]))
    with pytest.raises(EvaluationError, match="the reference has 2 holdout texts and the model 4"):
        privleak(log(), log(holdout=HOLDOUT[:2]))
    moved = samples()
    for record in moved["muse_news_privleak_holdout"]:
        record["doc"]["id"] = "x" + record["doc"]["id"]
    with pytest.raises(EvaluationError, match="4 holdout texts, such as '0', are not the reference's"):
        privleak(log(), MuseLog.from_samples(moved, "news"))


def test_tasks_that_were_not_run_are_named() -> None:
    with pytest.raises(EvaluationError, match=r"task muse_books_verbmem was not run.*muse_news_verbmem"):
        MuseLog.from_samples(samples(), "books")


def test_a_value_that_is_none_is_named() -> None:
    bad = samples()
    del bad["muse_news_privleak_forget"][2]["min_40"]
    with pytest.raises(DataError, match="task muse_news_privleak_forget, item 2: min_40 is missing"):
        MuseLog.from_samples(bad, "news")


def test_the_published_values_are_of_both_corpora() -> None:
    assert PUBLISHED_AUC == {"news": 0.4772, "books": 0.5393}


# --- lm-eval's files -------------------------------------------------------------------------------------------------


_OTHER = {
    "arguments": [],
    "resps": [],
    "filtered_resps": [],
    "target": "",
    "doc_hash": "",
    "prompt_hash": "",
    "target_hash": "",
}


def written(folder: Path, model: str = "m", own: dict[str, list[dict[str, Any]]] | None = None) -> Path:
    """Files of an evaluation, by lm-eval's own writer; returns the results file."""
    own = samples() if own is None else own
    full = {task: [{**r, **_OTHER} for r in rows] for task, rows in own.items()}
    results = {
        "results": {task: {"alias": task} for task in own},
        "configs": {task: {} for task in own},
        "n-samples": {task: {"original": 99, "effective": len(rows)} for task, rows in own.items()},
    }
    return write_files(folder, model, results, full, 1.0)


def test_lm_evals_files_come_back_in_order(tmp_path: Path) -> None:
    own = {task: rows[::-1] for task, rows in samples().items()}
    results = written(tmp_path, own=own)
    for folder in (tmp_path, results.parent):
        found = read_samples(folder)
        assert sorted(found) == sorted(own)
        assert [r["min_40"] for r in found["muse_news_privleak_forget"]] == list(FORGET)
        assert muse_row(MuseLog.from_samples(found, "news"), "m") == muse_row(log(), "m")


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
    assert [(r["doc_id"], r["filter"]) for r in read_samples(tmp_path)["task"]] == [
        (0, "none"),
        (0, "strict"),
        (1, "none"),
        (1, "strict"),
    ]


def only(path: Path) -> Path:
    return next(path.parent.glob("samples_muse_news_privleak_forget_*.jsonl"))


def cut(path: Path) -> None:
    only(path).write_bytes(only(path).read_bytes()[:-20])


def shorten(path: Path) -> None:
    only(path).write_bytes(b"".join(only(path).read_bytes().splitlines(keepends=True)[:3]))


def double(path: Path) -> None:
    only(path).write_bytes(only(path).read_bytes() * 2)


def no_item(path: Path) -> None:
    only(path).write_text('{"a": 1}\n', "utf-8")


def not_text(path: Path) -> None:
    only(path).write_bytes(b"\xff\xfe\n")


def uncounted(path: Path) -> None:
    path.write_text("{}", "utf-8")


def unreadable(path: Path) -> None:
    path.write_text("{", "utf-8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, r"samples_muse_news_privleak_forget_\S+.jsonl, line 4: not JSON"),
        (shorten, r"3 items, but results_\S+.json says that 4 were scored"),
        (double, r"line 5: item 0 is there twice"),
        (no_item, r"line 1: no record of an item"),
        (not_text, r"line 1: not JSON"),
        (uncounted, r"results_\S+.json: does not say how many items of muse_news_\w+ were scored"),
        (unreadable, r"results_\S+.json: cannot be read"),
        (Path.unlink, r"results_\S+.json, written with it, is not beside it"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(written(tmp_path))
    with pytest.raises(DataError, match=says):
        read_samples(tmp_path)


def test_folders_without_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_samples(tmp_path / "none")
    with pytest.raises(DataError, match=r"no samples_<task>_<time>.jsonl in it"):
        read_samples(tmp_path)
    written(tmp_path, "one")
    written(tmp_path, "two")
    with pytest.raises(DataError, match=r"evaluations of 2 models \(one, two\); name one"):
        read_samples(tmp_path)
