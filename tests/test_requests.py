"""Several requests, addition and analogy, end to end on a pico model: order, withdrawal, and nothing done twice."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from unlearn import run
from unlearn.cluster.compare import compare
from unlearn.errors import EvaluationError
from unlearn.report.words import headline
from unlearn.results import RunReport
from unlearn.train.vectors import VECTOR_FILE
from unlearn.vector.task_vector import TaskVector

SHARES = {"train": "all", "validation": 0.5, "test": 0.5}
LATER = {"train": 0.0, "validation": 0.5, "test": 0.5}
TERM = {"train": 1.0, "validation": 0.0, "test": 0.0}


def a_set(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "path": f"{name}.jsonl", "kind": "qa", "prompt": "{question}", "shares": SHARES, **more}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets' files, and the folders of runs."""
    folder = tmp_path_factory.mktemp("requests")
    for i, name in enumerate(("one", "two", "near", "form")):
        rows = [{"question": f"{name} {k}", "answer": f"{chr(97 + (k * (i + 2)) % 26)}{i}{k}"} for k in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def start(home: Path, pico_phi: Path) -> Callable[..., RunReport]:
    """``start(out, **parts)`` runs a recipe of those parts in ``home/out``."""

    def begin(out: str, **parts: Any) -> RunReport:
        recipe: dict[str, Any] = {
            "name": "r",
            "model": {"path": str(pico_phi), "device": "cpu"},
            "retain": [a_set("near", shares=LATER)],
            "vector": {
                "correlation": None,
                "lora": {"rank": 2, "alpha": 4.0},
                "forget": {"steps": 8, "batch_size": 4, "learning_rate": 0.02},
            },
            "sweep": {"coefficients": [0.5, 1.0, 1.5]},
            "choose": {"keep": 0.3},
            "eval": {"generate": "none", "examples": 1},
            **parts,
        }
        (home / f"{out}.json").write_text(json.dumps(recipe))
        return run(home / f"{out}.json", out=home / out)

    return begin


@pytest.fixture(scope="module")
def both(start: Callable[..., RunReport]) -> RunReport:
    """Two requests at once, in the folder ``both``."""
    return start("both", forget=ONE, also_forget=[TWO])


def scores(report: RunReport) -> dict[Any, Any]:
    return {(r.set, r.name, r.metric): (r.before.value, r.after.value) for r in report.scores}


def stages(folder: Path) -> dict[str, int]:
    """When each stage was sealed."""
    return {str(p.parent.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("stage.json")}


def seal(folder: Path, stage: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / stage / "stage.json").read_text())
    return found


ONE, TWO = a_set("one"), a_set("two")


def test_the_order_of_requests_does_not_matter(start: Callable[..., RunReport], both: RunReport, home: Path) -> None:
    there = both
    back = start("back", forget=TWO, also_forget=[ONE])
    assert there.vector["digest"] == back.vector["digest"]
    assert there.vector["requests"] == back.vector["requests"]
    assert [r["name"] for r in there.vector["requests"]] == ["one", "two"]
    assert there.chosen.coefficient == back.chosen.coefficient > 0
    assert scores(there) == scores(back)
    assert {s.name for s in there.scores if s.set == "forget"} == {"one", "two"}
    for name in ("one", "two"):
        before, after = scores(there)["forget", name, "prob"]
        assert after < before
    files = [TaskVector.load(home / out / "vectors/edit" / VECTOR_FILE).digest() for out in ("both", "back")]
    assert files[0] == files[1] == there.vector["digest"]


def test_a_chain_of_requests_and_a_growing_one_are_lines_of_a_table(
    start: Callable[..., RunReport], both: RunReport, home: Path
) -> None:
    """MUSE's sustainability and scalability: a request starts from the model that the one before left."""
    first = start("first", forget=ONE, export={"merged": True})
    left = {"path": str(home / "first" / "export" / "merged"), "device": "cpu"}
    second = start("second", forget=TWO, model=left)
    kept = ("retain", "near", "prob")
    assert first.chosen.coefficient > 0
    assert second.chosen.coefficient > 0
    assert scores(second)[kept][0] == pytest.approx(scores(first)[kept][1], rel=1e-3)
    assert scores(second)[kept][0] != pytest.approx(scores(first)[kept][0], rel=1e-3)
    compare([home / name for name in ("first", "second", "both")], home / "out")
    with (home / "out" / "compare.csv").open(newline="") as file:
        lines = {line["run"]: line for line in csv.DictReader(file)}
    for name, report in {"first": first, "second": second, "both": both}.items():
        found = [float(lines[name][f"retain near prob {when}"]) for when in ("before", "after")]
        assert found == list(scores(report)[kept])


def test_a_request_is_withdrawn_exactly(
    start: Callable[..., RunReport], both: RunReport, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {r["name"]: r["digest"] for r in both.vector["requests"]}
    never = start("never", forget=TWO)
    capsys.readouterr()
    withdrawn = start("withdrawn", forget=TWO, reuse=["both"])
    said = "".join(capsys.readouterr())
    assert "vectors/forget: taken from" in said
    assert "steps, loss" not in said, "fitted again"
    assert withdrawn.vector["digest"] == never.vector["digest"] == parts["two"]
    assert (withdrawn.chosen, withdrawn.sweep, scores(withdrawn)) == (never.chosen, never.sweep, scores(never))


def test_nothing_is_scored_twice(start: Callable[..., RunReport], both: RunReport, home: Path) -> None:
    report, folder = both, home / "again"
    shutil.copytree(home / "both", folder)
    made = stages(folder)
    tried = json.loads((folder / "joint/trail/trail.json").read_text())
    assert tried["names"] == [["forget", "one"], ["forget", "two"]]
    combinations = [tuple(c) for c, _, _ in tried["tried"]]
    assert combinations[:3] == [(0.5, 0.5), (1.0, 1.0), (1.5, 1.5)]
    assert len(set(combinations)) == len(combinations)
    assert sum(s.startswith("joint/") and s.endswith("validation") for s in made) == len(combinations)
    # what the balance found is on the sweep's way; its stage is the same one, copied
    share = {r["name"]: r["coefficient"] for r in report.vector["requests"]}
    weights = [share["one"] / report.chosen.coefficient, share["two"] / report.chosen.coefficient]
    on_the_way = [c for c in (0.5, 1.0, 1.5) if any(t == pytest.approx([w * c for w in weights]) for t in combinations)]
    assert on_the_way
    by_key = {seal(folder, s)["key"]: s for s in made if s.startswith("joint/") and s.endswith("validation")}
    for c in on_the_way:
        here = seal(folder, f"eval/{c:g}/validation")
        assert here["files"] == seal(folder, by_key[here["key"]])["files"], "lm-eval's own files have a date in them"
    # a run that was cut off in the sweep goes on where it was
    for name in ("report.json", "provenance.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "eval/1")
    again = start("again", forget=ONE, also_forget=[TWO])
    assert scores(again) == scores(report)
    assert again.chosen == report.chosen
    now = stages(folder)
    assert {s: t for s, t in now.items() if not s.startswith("eval/1/")} == {
        s: t for s, t in made.items() if not s.startswith("eval/1/")
    }


def test_bisection_takes_fewer_points_of_the_diagonal(start: Callable[..., RunReport], home: Path) -> None:
    grid = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
    report = start(
        "bisected",
        forget=ONE,
        also_forget=[TWO],
        sweep={"coefficients": grid, "search": "bisect"},
        choose={"keep": 0.9},
    )
    tried = json.loads((home / "bisected/joint/trail/trail.json").read_text())["tried"]
    assert 0 < sum(len(set(c)) == 1 for c, _, _ in tried) <= len(grid) / 2 + 1
    assert report.chosen.search == "bisect"
    assert len(report.vector["requests"]) == 2


def test_addition(start: Callable[..., RunReport]) -> None:
    report = start("added", learn=[ONE, TWO])
    assert report.chosen.rule.startswith("most learning of one (prob) and two (prob)")
    assert report.chosen.bound_met
    for name in ("one", "two"):
        before, after = scores(report)["learn", name, "prob"]
        assert after > 2 * before
    assert all(r["coefficient"] > 0 for r in report.vector["requests"])


def test_forgetting_and_learning_at_once(start: Callable[..., RunReport]) -> None:
    report = start("at-once", forget=ONE, learn=[TWO])
    found = scores(report)
    assert found["forget", "one", "prob"][0] > found["forget", "one", "prob"][1]
    assert found["learn", "two", "prob"][0] < found["learn", "two", "prob"][1]


def test_analogy(start: Callable[..., RunReport], home: Path) -> None:
    rows = [json.loads(line) for line in (home / "one.jsonl").read_text().splitlines()]
    told = [{"question": f"say {r['question']}", "answer": r["answer"]} for r in rows]
    (home / "told.jsonl").write_text("\n".join(map(json.dumps, told)))
    terms = {k: a_set(n, shares=TERM) for k, n in (("a", "two"), ("b", "form"), ("c", "one"))}
    report = start("analogy", learn=[a_set("told", shares=LATER)], analogy=terms)
    folder = home / "analogy"
    a, b, c = (TaskVector.load(folder / f"vectors/term-{n}" / VECTOR_FILE) for n in ("two", "form", "one"))
    edit = TaskVector.load(folder / "vectors/edit" / VECTOR_FILE)
    assert (edit + (c + b - a)).norm() < 1e-5 * edit.norm(), "what is subtracted is minus the analogy"
    assert not (folder / "vectors/learn-told").exists(), "the goal is never trained on"
    assert not list((folder / "items").glob("term*"))
    assert {s.set for s in report.scores} == {"learn", "retain"}
    before, after = scores(report)["learn", "told", "prob"]
    assert after > before


def hopeless(home: Path, name: str) -> dict[str, Any]:
    """A set of choices whose right answer is so long that any model takes the other: it scores 0."""
    rows = [
        {
            "question": f"{name} {k}?",
            "choices": ["a", f"no {k} model would say all of this {'and more ' * 9}"],
            "answer": 1,
        }
        for k in range(8)
    ]
    (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return a_set(name, kind="mcq", shares=LATER)


def test_what_is_kept_and_scores_nothing_is_said_or_an_error(
    start: Callable[..., RunReport], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = hopeless(home, "blind")
    with pytest.raises(
        EvaluationError, match=r"nothing that is to be kept could show harm.* retain blind acc is 0 before"
    ):
        start("alone", forget=ONE, retain=[blind])
    mild = {"sweep": {"coefficients": [0.1, 0.5]}, "choose": {"keep": 0.3, "collapse": 100.0}}
    report = start("beside", forget=ONE, retain=[blind, a_set("near", shares=LATER)], **mild)
    assert "! retain blind acc is 0 before the edit" in "".join(capsys.readouterr())
    (warning,) = (w for w in report.warnings if "blind acc" in w)
    assert warning.endswith("so that nothing can break its bound: it cannot show harm (validation items)")
    assert report.chosen.coefficient > 0
    assert headline(report).endswith("but 1 of 2 could not have shown harm.")


def test_nothing_to_forget_is_an_error(start: Callable[..., RunReport], home: Path) -> None:
    unknown = {**hopeless(home, "unknown"), "shares": SHARES}
    with pytest.raises(EvaluationError, match=r"nothing to forget .* forget unknown acc is 0\.000"):
        start("unknown", forget=unknown)


def test_answers_and_passages_weigh_alike(start: Callable[..., RunReport], home: Path) -> None:
    """The choice and the balance, from the report's own scores by another hand."""
    passages = [{"text": " ".join(f"{chr(97 + (i * k) % 26)}{i}" for i in range(60))} for k in range(1, 9)]
    (home / "book.jsonl").write_text("\n".join(map(json.dumps, passages)))
    book = a_set("book", kind="text", prompt=None, prefix=8, length=40)
    report = start("alike", forget=ONE, also_forget=[book], choose={"keep": 0.0, "collapse": 100.0})
    assert report.chosen.goals == (("forget", "one", "prob"), ("forget", "book", "perplexity"))

    def left(prob: float, perplexity: float, base: tuple[float, float]) -> float:
        return (prob / base[0] + base[1] / perplexity) / 2

    at = {p.coefficient: [s.score.value for goal in report.chosen.goals for s in p.scores if s.key == goal]
          for p in report.sweep}  # fmt: skip
    shares = {c: left(*values, base=tuple(at[0.0])) for c, values in at.items()}  # type: ignore[arg-type]
    assert shares[0.0] == 1
    assert report.chosen.coefficient == min(shares, key=lambda c: shares[c])
    trail = json.loads((home / "alike" / "joint" / "trail" / "trail.json").read_text())
    assert min(value for _, value, _ in trail["tried"]) == pytest.approx(min(shares.values()))
