"""The merged report of a grid: figures against independent computations, and what is missing, damaged or hostile."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unlearn.cluster.compare import about
from unlearn.cluster.csv import text_cell
from unlearn.cluster.grid import GRID_FILE, Axis, FrozenRecipe, Grid, Job, job_folder
from unlearn.cluster.job_state import JobState
from unlearn.cluster.numbers import Spread, common_seeds, pareto, t95
from unlearn.cluster.report import main, merge, write
from unlearn.cluster.words import OVER_RUNS, label, short_names
from unlearn.errors import GridError
from unlearn.results import Chosen, RunReport, Score, ScoreRow, SweepPoint, TaskScore

WHEN = "2026-01-02T03:04:05+00:00"
LAMBDAS = (0.0, 1.0, 2.0)
Values = Mapping[str, Any]


def grid_of(axes: Mapping[str, Sequence[str]], recipes: Sequence[str] = ("pico",)) -> Grid:
    """Every recipe times every value."""
    jobs = []
    for recipe, name in enumerate(recipes):
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            jobs.append(Job(len(jobs), f"{name}-{len(jobs)}", recipe, (), chosen, None))
    frozen = tuple(FrozenRecipe(n, f"{n}.yaml", f"name: {n}\n") for n in recipes)
    return Grid("pico", WHEN, ".", frozen, tuple(Axis(k, tuple(v)) for k, v in axes.items()), (), tuple(jobs))


def report_of(
    job: Job,
    *,
    forget: float = 0.2,
    kept: float = 0.8,
    validation: Mapping[float, tuple[float, float]] | None = None,
    chosen: float = 1.0,
    met: bool = True,
    metric: str = "acc",
    kept_metric: str = "acc",
    role: str = "forget",
    higher: bool = True,
    **provenance: Any,
) -> dict[str, Any]:
    """A run: the forget (or learn) set starts at 0.9, the kept one at 0.8; the rest as given, by coefficient."""
    sweep = validation or {1.0: (forget, kept), 2.0: (forget / 2, kept - 0.1)}
    kept_higher = kept_metric != "perplexity"

    def pair(c: float) -> tuple[TaskScore, TaskScore]:
        goal, keeps = (0.9, 0.8) if c == 0 else sweep[c]
        return (
            TaskScore(role, "europe", "validation", metric, higher, Score(goal, 0.04, 50)),  # type: ignore[arg-type]
            TaskScore("retain", "africa", "validation", kept_metric, kept_higher, Score(keeps, 0.03, 40)),
        )

    seed = job.settings.get("seed", "0")
    lines = [("forget" if role == "forget" else role, "europe"), ("retain", "africa")]
    report = RunReport(
        name="pico",
        description="",
        chosen=Chosen(chosen, met, "the rule", metric, 0.95, 0.5, (("retain", "africa", kept_metric),)),
        scores=(
            ScoreRow(role, "europe", "test", metric, higher, Score(0.9, 0.05, 60), Score(forget, 0.06, 60)),  # type: ignore[arg-type]
            ScoreRow("retain", "africa", "test", kept_metric, kept_higher, Score(0.8, 0.02, 70), Score(kept, 0.03, 70)),
        ),
        sweep=tuple(SweepPoint(c, pair(c), True) for c in (0.0, *sweep)),
        examples=(),
        data=tuple({"set": r, "name": n, "kind": "mcq", "rows": 99, "digest": f"{n} {seed}"} for r, n in lines),
        vector={"digest": f"vector of {job.name}"},
        training=(),
        exports={},
        seconds={"total": 10.0 + job.index},
        provenance={
            "target": "base",
            "versions": {"torch": "2.13"},
            "code": {"commit": "abc", "dirty": False},
            "machine": {"cpu": "A CPU", "cores": 4, "gpus": []},
            "python": "3.11.9",
            "date": WHEN + job.name,
            **provenance,
        },
    )
    return report.to_json()


def finish(root: Path, job: Job, report: Values, state: bool = True) -> Path:
    """What a finished job leaves."""
    folder = job_folder(root, job.name)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report)
    (folder / "report.json").write_text(text)
    seal = {"report_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / "provenance.json").write_text(json.dumps(seal))
    if state:
        JobState("done", 1, 5, "node7", WHEN, WHEN, slurm="12_3", exit=0).save(root, job.name)
    return folder


def filled(root: Path, grid: Grid, make: Callable[[Job], Values] = report_of) -> Grid:
    grid.save(root)
    for job in grid.jobs:
        finish(root, job, make(job))
    return grid


def merged_json(root: Path) -> dict[str, Any]:
    page = write(root)
    assert page == root / "report.html"

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    return json.loads((root / "report.json").read_text(), parse_constant=refuse)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_students_t_is_that_of_scipy() -> None:
    for freedom in [*range(1, 60), 199, 998, 999]:
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_interval_is_that_of_scipy(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert spread.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    assert spread.half == pytest.approx(half, abs=1e-8)
    assert (spread.n, spread.absent) == (len(values), 0)


def test_one_run_has_no_interval_and_a_missing_number_leaves_no_mean() -> None:
    assert Spread.of([0.25]) == Spread(1, 0, 0.25, None, None)
    assert Spread.of([0.25, None, math.nan, math.inf]) == Spread(1, 3, None, None, None)
    assert Spread.of([]) == Spread(0, 0, None, None, None)
    assert Spread.of([1e308, 1.5e308]).mean == pytest.approx(1.25e308)
    assert Spread.of([0.5] * 3).half == 0


def brute_force(points: Sequence[tuple[float | None, float | None]]) -> set[int]:
    known = {i: p for i, p in enumerate(points) if all(v is not None and math.isfinite(v) for v in p)}
    return {
        i
        for i, (left, kept) in known.items()
        if not any(a <= left and b >= kept and (a < left or b > kept) for a, b in known.values())  # type: ignore[operator]
    }


numbers = st.one_of(st.none(), st.just(math.nan), st.integers(0, 4).map(float), st.floats(-2, 2))


@given(st.lists(st.tuples(numbers, numbers), max_size=14))
@settings(max_examples=300, deadline=None)
def test_the_pareto_set_is_that_of_brute_force(points: list[tuple[float | None, float | None]]) -> None:
    assert pareto(points) == brute_force(points)


def test_equal_points_stand_or_fall_together() -> None:
    assert pareto([(1.0, 0.9), (1.0, 0.9), (1.0, 0.8), (2.0, 0.9), (0.5, 0.1)]) == {0, 1, 4}
    assert pareto([(1.0, 0.9), (0.5, 0.9), (1.0, 0.9)]) == {1}


def test_settings_are_compared_on_the_seeds_that_most_have() -> None:
    assert common_seeds([("0", "1"), ("0", "1"), ("0",)]) == ("0", "1")
    assert common_seeds([("0",), ("0",), ("0", "1")]) == ("0",)
    assert common_seeds([("0",), ("0", "1")]) == ("0", "1")  # as frequent: the larger set
    assert common_seeds([(), ()]) == ()


# ---- groups, means, frontiers ---------------------------------------------------------------------------------------


def test_means_over_seeds_are_of_each_setting_and_leave_the_seed_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grid = grid_of({"vector.lora.rank": ("4", "8"), "seed": ("0", "1", "2")})
    drawn = {job.name: rng.uniform(0.1, 0.4, 2) for job in grid.jobs}
    filled(tmp_path, grid, lambda j: report_of(j, forget=drawn[j.name][0], kept=0.6 + drawn[j.name][1] / 2))
    found = merged_json(tmp_path)
    assert [s["settings"] for s in found["settings"]] == [{"vector.lora.rank": "4"}, {"vector.lora.rank": "8"}]
    for setting, jobs in zip(found["settings"], (grid.jobs[:3], grid.jobs[3:]), strict=True):
        after = [drawn[j.name][0] for j in jobs]
        kept = [(0.6 + drawn[j.name][1] / 2) / 0.8 for j in jobs]
        for values, got in ((after, setting["test"]["goal"]), (kept, setting["test"]["kept_worst"])):
            low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            assert got["mean"] == pytest.approx(np.mean(values))
            assert (got["mean"] - got["half"], got["mean"] + got["half"]) == pytest.approx((low, high))
            assert got["n"] == 3
        line = next(s for s in setting["scores"] if s["set"] == "forget")
        assert line["before"]["mean"] == pytest.approx(0.9)
        assert line["after"]["stderr_over_items"] == pytest.approx(0.06)  # of the items of one run: not over runs
        assert line["after"]["half"] == pytest.approx(setting["test"]["goal"]["half"])
        assert [r["seed"] for r in setting["runs"]] == ["0", "1", "2"]
    page = (tmp_path / "report.html").read_text()
    assert OVER_RUNS in unescape(page)
    assert "items, s.e." in page


def test_a_frontier_holds_the_coefficients_that_all_runs_were_scored_at(tmp_path: Path) -> None:
    grid = grid_of({"seed": ("0", "1")})
    first = {1.0: (0.6, 0.8), 1.5: (0.5, 0.8), 2.0: (0.4, 0.72), 3.0: (0.1, 0.1)}
    second = {1.0: (0.4, 0.76), 2.0: (0.2, 0.64)}
    grid.save(tmp_path)
    finish(tmp_path, grid.jobs[0], report_of(grid.jobs[0], validation=first))
    part = report_of(grid.jobs[1], validation={**second, 3.0: (0.1, 0.1)})
    part["sweep"][-1]["share"] = 0.25  # ruled out on a part of the items by an earlier version
    finish(tmp_path, grid.jobs[1], part)
    steps = merged_json(tmp_path)["settings"][0]["frontier"]
    assert [s["lambda"] for s in steps] == [0.0, 1.0, 2.0]
    assert steps[2]["goal"]["mean"] == pytest.approx(0.3)
    assert steps[2]["kept_worst"]["mean"] == pytest.approx((0.9 + 0.8) / 2)
    rows = rows_of(tmp_path / "frontier.csv")
    assert len(rows) == 5 + 3
    assert (rows[4]["lambda"], rows[4]["forget/europe/acc/validation/value"]) == ("3.0", "0.1")
    assert [r["chosen"] for r in rows] == ["false", "true", *["false"] * 4, "true", "false"]


def test_the_choice_is_made_on_validation_means_whatever_the_test_items_say(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8", "16"), "seed": ("0", "1")})
    test = {"4": (0.10, 0.8), "8": (0.30, 0.8), "16": (0.05, 0.5)}
    valid = {"4": (0.35, 0.78), "8": (0.20, 0.8), "16": (0.01, 0.5)}

    def make(job: Job) -> Values:
        rank = job.settings["rank"]
        drift = 0.01 * int(job.settings["seed"])
        forget, kept = test[rank]
        sweep = {1.0: (valid[rank][0] + drift, valid[rank][1])}
        return report_of(job, forget=forget, kept=kept, validation=sweep, met=rank != "16")

    filled(tmp_path, grid, make)
    found = merged_json(tmp_path)["comparisons"][0]
    assert found["choice"] == 1
    assert found["ranked_on_validation"] == [1, 0]  # 16 forgets most, and met its bound in no run
    assert found["pareto_test"] == [0, 2]
    assert found["pareto_validation"] == [1, 2]
    assert found["lead_over_second"]["mean"] == pytest.approx(0.15)
    said = " ".join(found["remarks"])
    assert "Pareto sets differ" in said
    assert "not in the Pareto set of test means" in said
    page = (tmp_path / "report.html").read_text()
    assert "Pareto: test only" in page
    assert "Pareto: validation only" in page


def test_a_lead_within_its_interval_is_said_to_be_chance(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8"), "seed": ("0", "1", "2")})
    noise = {"4": (0.0, 0.2, -0.1), "8": (0.15, -0.05, 0.05)}
    filled(tmp_path, grid, lambda j: report_of(j, forget=0.4 + noise[j.settings["rank"]][int(j.settings["seed"])]))
    assert any("no more than chance" in line for line in merged_json(tmp_path)["comparisons"][0]["remarks"])


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    filled(tmp_path, grid_of({"rank": ("4", "8")}))
    found = merged_json(tmp_path)
    goal = found["settings"][0]["test"]["goal"]
    assert (goal["n"], goal["half"], goal["sd"]) == (1, None, None)
    assert any("no intervals" in w for w in found["warnings"])


@pytest.mark.parametrize("axis", ["model.path", "forget.where.continent", "choose.metric", "teach.steps"])
def test_settings_that_ask_another_question_are_no_rivals(tmp_path: Path, axis: str) -> None:
    filled(tmp_path, grid_of({axis: ("a", "b"), "vector.lora.rank": ("4", "8")}))
    found = merged_json(tmp_path)
    assert [c["settings"] for c in found["comparisons"]] == [[0, 1], [2, 3]]
    assert [c["question"] for c in found["comparisons"]] == [{axis: "a"}, {axis: "b"}]


def test_recipes_are_kept_apart_also_under_equal_settings(tmp_path: Path) -> None:
    grid = filled(tmp_path, grid_of({"seed": ("0", "1")}, ("one", "two")))
    found = merged_json(tmp_path)
    assert [len(s["runs"]) for s in found["settings"]] == [2, 2]
    assert [c["name"] for c in found["comparisons"]] == ["one", "two"]
    assert len(grid.jobs) == 4


def test_what_is_learned_is_better_when_higher(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8")})
    filled(tmp_path, grid, lambda j: report_of(j, role="learn", forget=0.95 if j.settings["rank"] == "8" else 0.92))
    family = merged_json(tmp_path)["comparisons"][0]
    assert family["goal"] == {"label": "europe acc", "better": "higher"}
    assert (family["choice"], family["pareto_test"]) == (1, [1])


def test_a_perplexity_is_reckoned_by_its_bound(tmp_path: Path) -> None:
    grid = grid_of({"choose.perplexity": ("0.5", "1")})
    filled(tmp_path, grid, lambda j: report_of(j, kept=1.0, kept_metric="perplexity"))
    found = merged_json(tmp_path)
    # a rise of 0.2 of the 0.5 allowed
    assert found["settings"][0]["test"]["kept_worst"]["mean"] == pytest.approx(1 - 0.05 * 0.2 / 0.5)
    assert len(found["comparisons"]) == 2  # shares of different bounds do not compare


def two_goals(job: Job, *, prob: float, perplexity: float) -> dict[str, Any]:
    """A run that forgets answers (.90 before) and passages (a perplexity of 30 before)."""
    report = report_of(job, forget=prob, metric="prob")
    book = {"name": "book", "metric": "perplexity", "higher_is_better": False}
    before, after = ({"value": v, "stderr": 0.5, "n": 9} for v in (30.0, perplexity))
    report["scores"].append({**report["scores"][0], **book, "before": before, "after": after})
    for point in report["sweep"]:
        value = before if point["coefficient"] == 0 else after
        point["scores"].append({**point["scores"][0], **book, "score": value})
    report["data"].append({**report["data"][0], "name": "book", "kind": "text", "digest": f"b {job.settings['seed']}"})
    report["data"][0]["kind"] = "qa"
    report["chosen"]["goals"] = [["forget", "europe", "prob"], ["forget", "book", "perplexity"]]
    return report


@pytest.mark.parametrize("recorded", [True, False])
def test_goals_of_unlike_units_weigh_alike(tmp_path: Path, recorded: bool) -> None:
    """One point of perplexity outweighed all there is of a probability when scores were averaged as they are."""
    grid = grid_of({"rank": ("4", "8"), "seed": ("0", "1")})

    def make(job: Job) -> Values:
        four = job.settings["rank"] == "4"
        report = two_goals(job, prob=0.10 if four else 0.95, perplexity=30.0 if four else 31.0)
        report["chosen"] |= {} if recorded else {"goals": []}
        return report

    filled(tmp_path, grid, make)
    found = merged_json(tmp_path)
    family = found["comparisons"][0]
    assert family["goal"] == {"label": "mean share left of europe prob, book perplexity", "better": "lower"}
    assert (family["choice"], family["pareto_test"], family["pareto_validation"]) == (0, [0], [0])
    for group, left in zip(found["settings"], ((0.10 / 0.90 + 1) / 2, (0.95 / 0.90 + 30 / 31) / 2), strict=True):
        assert group["goal_before"]["mean"] == 1
        assert group["test"]["goal"]["mean"] == pytest.approx(left)
        assert group["validation"]["goal"]["mean"] == pytest.approx(left)
    page = (tmp_path / "report.html").read_text()
    assert "Asked to forget" in page
    assert "← better (forget)" in page


def test_a_forget_set_of_passages_is_not_called_learned(tmp_path: Path) -> None:
    """Its perplexity is to rise, as what is learned is."""
    grid = filled(tmp_path, grid_of({"seed": ("0", "1")}),
                  lambda j: report_of(j, forget=40.0, metric="perplexity", higher=False))  # fmt: skip
    assert merged_json(tmp_path)["comparisons"][0]["goal"] == {"label": "europe perplexity", "better": "higher"}
    page = (tmp_path / "report.html").read_text()
    assert "Asked to forget" in page
    assert "Learned" not in page
    assert "better (forget) →" in page
    assert len(grid.jobs) == 2


def test_a_bound_that_test_items_break_is_counted(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8"), "seed": ("0", "1")})
    # 19 of 20 keep just .95, whatever floats make of it
    filled(tmp_path, grid, lambda j: report_of(j, kept=0.76 if j.settings["rank"] == "4" else 0.75))
    found = merged_json(tmp_path)["settings"]
    assert [(g["bound_met"], g["bound_met_on_test"]) for g in found] == [(2, 2), (2, 0)]
    assert [row["bound_met_on_test"] for row in rows_of(tmp_path / "jobs.csv")] == ["true", "true", "false", "false"]
    assert "2 of 2<small> test: 0</small>" in (tmp_path / "report.html").read_text()


def test_what_could_not_show_harm_is_said_and_chance_is_shown(tmp_path: Path) -> None:
    def make(job: Job) -> Values:
        report = report_of(job)
        for entry in (*report["scores"], *(s for p in report["sweep"] for s in p["scores"])):
            entry["chance"] = 0.25
        if job.index == 1:
            report["sweep"][0]["scores"][1]["score"]["value"] = 0.25
        return report

    filled(tmp_path, grid_of({"seed": ("0", "1")}), make)
    found = merged_json(tmp_path)
    (said,) = (w for w in found["warnings"] if "harm" in w)
    assert said.startswith("retain africa acc was 0 or no more than chance before the edit in 1 job (pico-1)")
    assert {s["chance"] for s in found["settings"][0]["scores"]} == {0.25}
    assert "acc</code> ↑<small> chance 0.25</small>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("where", ["scores", "sweep"])
def test_a_chance_that_is_no_number_is_damaged(tmp_path: Path, where: str) -> None:
    grid = grid_of({"seed": ("0",)})
    report = report_of(grid.jobs[0])
    (report["scores"] if where == "scores" else report["sweep"][0]["scores"])[0]["chance"] = "one in four"
    grid.save(tmp_path)
    finish(tmp_path, grid.jobs[0], report)
    assert "a chance is no number" in merged_json(tmp_path)["missing"][0]["said"]


def test_a_score_without_a_number_hides_nothing(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8"), "seed": ("0", "1")})

    def make(job: Job) -> Values:
        report = report_of(job)
        if job.index == 1:
            report["scores"][0]["after"]["value"] = None
            report["sweep"][1]["scores"][1]["score"]["value"] = None
        return report

    filled(tmp_path, grid, make)
    found = merged_json(tmp_path)
    first = found["settings"][0]
    assert first["test"]["goal"] == {"n": 1, "absent": 1, "mean": None, "sd": None, "half": None}
    assert first["test"]["kept_worst"]["mean"] == pytest.approx(1)
    assert first["validation"]["kept_worst"]["absent"] == 1
    assert found["comparisons"][0]["pareto_test"] == [1]
    assert "1 of 2 runs without a number" in (tmp_path / "report.html").read_text()
    assert rows_of(tmp_path / "jobs.csv")[1]["forget/europe/acc/test/after"] == ""


@pytest.mark.parametrize(("second", "kept"), [(0.5, 0.5), (0.9, 0.9), (None, None), (1.2, 1.0)])
def test_kept_is_what_suffered_most(tmp_path: Path, second: float | None, kept: float | None) -> None:
    """Of two kept sets: the smaller share; without a number in one of them there is none, whatever the other keeps."""
    grid = grid_of({"seed": ("0",)})
    report = report_of(grid.jobs[0])
    report["scores"].append({**report["scores"][1], "name": "asia"})
    report["scores"][2]["before"] = {"value": 1.0, "stderr": None, "n": 9}
    report["scores"][2]["after"] = {"value": second, "stderr": None, "n": 9}
    for point in report["sweep"]:
        value = 1.0 if point["coefficient"] == 0 else second
        more = {**point["scores"][1], "name": "asia", "score": {"value": value, "stderr": None, "n": 9}}
        point["scores"].append(more)
    report["chosen"]["kept"].append(["retain", "asia", "acc"])
    grid.save(tmp_path)
    finish(tmp_path, grid.jobs[0], report)
    found = merged_json(tmp_path)["settings"][0]
    for split in ("test", "validation"):
        assert found[split]["kept_worst"]["mean"] == (None if kept is None else pytest.approx(kept))


# ---- what is missing, damaged, or not comparable --------------------------------------------------------------------


def test_every_way_to_be_missing_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    grid = grid_of({"seed": tuple(str(i) for i in range(10))})
    filled(tmp_path, grid)
    jobs = grid.jobs

    def gone(index: int) -> Path:
        folder = job_folder(tmp_path, jobs[index].name)
        (folder / "report.json").unlink()
        return folder

    def say(index: int, state: str, error: str | None = None) -> None:
        JobState(state, 2, 1, "n", WHEN, WHEN, exit=1, error=error).save(tmp_path, jobs[index].name)  # type: ignore[arg-type]

    gone(0)
    say(0, "failed", "Traceback\n  File x\nRuntimeError: out of memory token=hunter2\n")
    gone(1)
    (tmp_path / "state" / f"{jobs[1].name}.json").unlink()
    gone(2)
    say(2, "running")
    gone(3)
    say(3, "stopped")
    gone(4)  # says that it is done
    gone(5)
    (tmp_path / "state" / f"{jobs[5].name}.json").write_text("{")
    flipped = job_folder(tmp_path, jobs[6].name) / "report.json"
    flipped.write_text(flipped.read_text().replace("0.9", "0.8", 1))
    (job_folder(tmp_path, jobs[7].name) / "provenance.json").unlink()
    text = '{"schema": 1, "data": [], "training": []'
    folder = job_folder(tmp_path, jobs[8].name)
    (folder / "report.json").write_text(text)
    (folder / "provenance.json").write_text(json.dumps({"report_sha256": hashlib.sha256(text.encode()).hexdigest()}))
    found = merged_json(tmp_path)
    assert found["jobs"] == {"planned": 10, "finished": 1, "set_aside": 0, "missing": 9}
    why = {m["job"]: (m["why"], m["said"]) for m in found["missing"]}
    names = [why[j.name][0] for j in jobs[:9]]
    assert names == ["failed", "never began", "said running", "stopped", *["damaged"] * 3, "unfinished", "damaged"]
    assert why[jobs[0].name][1] == "RuntimeError: out of memory token=***"
    assert "SHA-256 differs" in why[jobs[6].name][1]
    rows = rows_of(tmp_path / "jobs.csv")
    assert [r["job"] for r in rows] == [j.name for j in jobs]
    assert (rows[0]["state"], rows[9]["state"]) == ("failed", "finished")
    page = (tmp_path / "report.html").read_text()
    assert "out of memory" in page
    assert "hunter2" not in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 99),
        ("scores", None),
        ("sweep", [{"coefficient": 1}]),
        ("chosen", {}),
        ("data", [1]),
        ("seconds", {"total": "soon"}),
        ("sweep", [{"coefficient": 0, "scores": "x", "within_bound": True, "broken": []}]),
        ("provenance", []),
    ],
)
def test_a_sealed_report_of_the_wrong_shape_is_damaged(tmp_path: Path, key: str, value: Any) -> None:
    grid = filled(tmp_path, grid_of({"seed": ("0", "1", "2")}))
    finish(tmp_path, grid.jobs[1], {**report_of(grid.jobs[1]), key: value})
    found = merged_json(tmp_path)
    assert [m["why"] for m in found["missing"]] == ["damaged"]
    assert found["settings"][0]["test"]["goal"]["n"] == 2


def test_a_report_that_is_being_replaced_is_not_called_damaged(tmp_path: Path) -> None:
    grid = filled(tmp_path, grid_of({"seed": ("0", "1")}))
    (job_folder(tmp_path, grid.jobs[0].name) / "report.json").write_text("{}")
    JobState("running", 2, 1, "n", WHEN, WHEN).save(tmp_path, grid.jobs[0].name)
    assert merged_json(tmp_path)["missing"][0]["why"] == "said running"


def test_a_report_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    grid = filled(tmp_path, grid_of({"seed": ("0", "1")}))
    place = job_folder(tmp_path, grid.jobs[0].name) / "report.json"
    place.unlink()
    os.mkfifo(place)
    missing = merged_json(tmp_path)["missing"]
    assert [(m["why"], "ordinary file" in m["said"]) for m in missing] == [("damaged", True)]


def test_unequal_seeds_are_marked_and_not_compared(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8", "16"), "seed": ("0", "1", "2")})
    filled(tmp_path, grid, lambda j: report_of(j, forget=0.2 + 0.1 * (j.settings["rank"] != "16")))
    lost = grid.jobs[8]
    (job_folder(tmp_path, lost.name) / "report.json").unlink()
    found = merged_json(tmp_path)
    family, last = found["comparisons"][0], found["settings"][2]
    assert family["seeds_compared"] == ["0", "1", "2"]
    assert family["compared"] == [0, 1]
    assert family["choice"] == 0  # 16 forgets more, on other seeds
    assert last["seeds_lacking"] == ["2"]
    assert last["test"]["goal"]["n"] == 2
    assert last["on_compared_seeds"] is None
    assert any("compared on the seeds 0, 1 and 2" in w and "rank=16" in w for w in found["warnings"])
    page = (tmp_path / "report.html").read_text()
    assert "2 of 3<b" in page
    assert "other seeds: not compared" in page


def test_more_seeds_than_the_others_are_left_out_of_the_comparison(tmp_path: Path) -> None:
    grid = grid_of({"rank": ("4", "8", "16"), "seed": ("0", "1")})

    def made(job: Job) -> dict[str, Any]:
        later = job.settings["seed"] == "1"
        found = report_of(job, forget=0.5 if later else 0.1, chosen=2.0 if later else 1.0, met=not later)
        found["scores"][0]["before"]["value"] = 0.7 if later else 0.9
        return found

    filled(tmp_path, grid, made)
    for job in (grid.jobs[1], grid.jobs[3]):
        (job_folder(tmp_path, job.name) / "report.json").unlink()
    third = merged_json(tmp_path)["settings"][2]
    assert third["test"]["goal"]["mean"] == pytest.approx(0.3)
    assert third["goal_before"]["mean"] == pytest.approx(0.8)
    assert third["on_compared_seeds"]["test"]["goal"]["mean"] == pytest.approx(0.1)
    assert third["on_compared_seeds"]["goal_before"]["mean"] == pytest.approx(0.9)
    # what stands in a row, or on a card, is of the same runs
    rows = re.findall("<tr.*?</tr>", (tmp_path / "report.html").read_text(), re.DOTALL)
    (row,) = (unescape(re.sub("<[^>]*>", " ", r)) for r in rows if "rank=16" in r and "Bound" not in r and " of " in r)
    assert "2 of 2 ● ● 1 1 of 1 0.900 0.100 100 %" in " ".join(row.split())


def other(job: Job, **changed: Any) -> dict[str, Any]:
    return {**report_of(job), **changed}


def with_digest(job: Job, **changed: Any) -> dict[str, Any]:
    report = report_of(job)
    report["data"][0] |= changed
    return report


def taught(job: Job, **provenance: Any) -> dict[str, Any]:
    return {**report_of(job, target=f"taught {job.name}", **provenance), "training": [{"stage": "teach"}]}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (lambda j: with_digest(j, digest="another file"), "other data in forget europe (digest)"),
        (lambda j: with_digest(j, rows=98), "other data in forget europe (rows)"),
        (lambda j: report_of(j, target="another"), "another base model"),
        (lambda j: taught(j, base="another"), "another base model"),
        (lambda j: report_of(j, metric="prob"), "its goals, kept metrics or bound"),
        (lambda j: report_of(j, kept_metric="acc_norm"), "its goals, kept metrics or bound"),
    ],
)
def test_what_was_measured_otherwise_is_set_aside(
    tmp_path: Path, odd: Callable[[Job], dict[str, Any]], said: str
) -> None:
    grid = filled(tmp_path, grid_of({"rank": ("4", "8", "16"), "seed": ("0", "1")}))
    finish(tmp_path, grid.jobs[3], odd(grid.jobs[3]))
    found = merged_json(tmp_path)
    assert [a["job"] for a in found["set_aside"]] == [grid.jobs[3].name]
    assert any(said in w for w in found["warnings"])
    assert found["settings"][1]["test"]["goal"]["n"] == 1
    assert rows_of(tmp_path / "jobs.csv")[3]["state"] == "set aside"
    assert [r["counts"] for r in rows_of(tmp_path / "frontier.csv") if r["job"] == grid.jobs[3].name] == ["false"] * 3


@pytest.mark.parametrize("known", [{"base": "base"}, {}])  # reports did not always have it
def test_taught_models_differ_and_their_base_does_not(tmp_path: Path, known: dict[str, str]) -> None:
    filled(tmp_path, grid_of({"rank": ("4", "8"), "seed": ("0", "1")}), lambda j: taught(j, **known))
    assert merged_json(tmp_path)["set_aside"] == []


def test_a_copied_folder_is_found(tmp_path: Path) -> None:
    grid = filled(tmp_path, grid_of({"seed": ("0", "1", "2")}))
    finish(tmp_path, grid.jobs[2], report_of(grid.jobs[0]))
    found = merged_json(tmp_path)
    assert {a["job"] for a in found["set_aside"]} == {grid.jobs[0].name, grid.jobs[2].name}
    assert found["settings"][0]["test"]["goal"]["n"] == 1


def test_a_data_axis_may_change_the_data_and_the_seed_its_split(tmp_path: Path) -> None:
    grid = grid_of({"forget.limit": ("6", "12"), "seed": ("0", "1")})
    filled(tmp_path, grid, lambda j: with_digest(j, digest=f"{dict(j.settings)}", rows=int(j.settings["forget.limit"])))
    found = merged_json(tmp_path)
    assert found["set_aside"] == []
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"versions": {"torch": "2.12"}}, "2 versions of torch"),
        ({"code": {"commit": "def", "dirty": False}}, "2 commits of this program"),
        ({"code": {"commit": "abc", "dirty": True}}, "abc with changes"),
        ({"python": "3.12.1"}, "2 versions of Python"),
    ],
)
def test_other_versions_are_averaged_but_said_and_marked(tmp_path: Path, odd: dict[str, Any], said: str) -> None:
    grid = filled(tmp_path, grid_of({"rank": ("4", "8"), "seed": ("0", "1")}))
    finish(tmp_path, grid.jobs[3], report_of(grid.jobs[3], **odd))
    found = merged_json(tmp_path)
    assert [w for w in found["warnings"] if said in w and grid.jobs[3].name in w]
    assert [bool(s["notes"]) for s in found["settings"]] == [False, True]
    assert found["settings"][1]["test"]["goal"]["n"] == 2


def test_taught_models_that_differ_within_a_seed_are_said(tmp_path: Path) -> None:
    grid = grid_of({"vector.lora.rank": ("4", "8"), "seed": ("0", "1")})

    def make(job: Job) -> Values:
        seed, taught = job.settings["seed"], {"training": [{"stage": "teach"}]}
        return {**report_of(job, target=f"{seed}{job.index if job.index == 3 else ''}"), **taught}

    filled(tmp_path, grid, make)
    found = merged_json(tmp_path)
    assert found["set_aside"] == []
    assert any("taught alike" in w and "2 jobs" in w for w in found["warnings"])


def test_a_seed_without_effect_is_said(tmp_path: Path) -> None:
    filled(tmp_path, grid_of({"seed": ("0", "1")}), lambda j: other(j, vector={"digest": "same"}))
    assert "very same vector" in merged_json(tmp_path)["settings"][0]["notes"][0]


# ---- nothing finished, mistakes, hostile text -----------------------------------------------------------------------


def test_runs_in_which_no_coefficient_passed_say_so_among_the_coefficients(tmp_path: Path) -> None:
    def make(job: Job) -> Values:
        met = int(job.settings["seed"]) < {"4": 3, "8": 1, "16": 0}[job.settings["rank"]]
        return report_of(job, chosen=1.0 if met else 0.0, met=met)

    filled(tmp_path, grid_of({"rank": ("4", "8", "16"), "seed": ("0", "1", "2")}), make)
    merged_json(tmp_path)
    page = (tmp_path / "report.html").read_text()
    for cell in (">1<", ">1, none (2×)<", ">none<"):
        assert page.count(f'<td class="num"{cell}/td>') == 1, cell


def test_nothing_finished_is_a_page_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid_of({"rank": ("4", "8")}).save(tmp_path)
    assert main([str(tmp_path)]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    assert "nothing to compare" in (tmp_path / "report.html").read_text()
    assert len(rows_of(tmp_path / "jobs.csv")) == 2
    assert rows_of(tmp_path / "frontier.csv") == []
    assert merged_json(tmp_path)["jobs"]["missing"] == 2


def test_mistakes_are_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    (tmp_path / GRID_FILE).write_text("{")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 2
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "", "a/b", "a\0b"])
def test_a_job_cannot_lie_outside_the_grid(tmp_path: Path, name: str) -> None:
    grid = grid_of({"seed": ("0",)})
    replace(grid, jobs=(replace(grid.jobs[0], name=name),)).save(tmp_path)
    with pytest.raises(GridError, match="is no name of a job"):
        merge(tmp_path)


HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    grid = grid_of({"vector.<b>": (HOSTILE, "=cmd|' /C calc'!A0"), "seed": ("0", "1")}, (HOSTILE,))
    jobs = tuple(replace(j, name=f"-job{j.index}<img src=x onerror=alert(1)>") for j in grid.jobs)
    grid = replace(grid, name="<b onclick=x>&", jobs=jobs)
    grid.save(tmp_path)
    for job in jobs[:3]:
        report = report_of(job, python=HOSTILE + str(job.index))
        finish(tmp_path, job, json.loads(json.dumps(report).replace("europe", "@SUM(A1)<svg onload=x>")))
    JobState("failed", 1, 1, "n", WHEN, WHEN, error=f"+{HOSTILE}").save(tmp_path, jobs[3].name)
    write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.found & {"script", "img", "b>"}
    assert not tags.handlers
    assert "\x1b" not in page
    for table in ("jobs.csv", "frontier.csv"):
        cells = [c for row in csv.reader(io.StringIO((tmp_path / table).read_text())) for c in row]
        assert not [c for c in cells if c.startswith(("=", "+", "@", "\t"))]
        assert not [c for c in cells if c.startswith("-") and not c[1:].replace(".", "").isdigit()]
        assert "\x1b" not in "".join(cells)
    assert rows_of(tmp_path / "jobs.csv")[3]["why"].startswith("'+<script>")


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+a", "'+a"),
        ("-a", "'-a"),
        ("@a", "'@a"),
        ("\t=1", "'\t=1"),
        ("  =1", "'  =1"),
        ("-1.5e-3", "-1.5e-3"),
        ("-1+2", "'-1+2"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_no_cell_is_a_formula_and_numbers_stay(value: str, cell: str) -> None:
    assert text_cell(value) == cell


def test_jobs_csv_has_every_score_with_its_error_and_count(tmp_path: Path) -> None:
    grid = filled(tmp_path, grid_of({"vector.lora.rank": ("4", "8"), "seed": ("0", "1")}))
    rows = rows_of(tmp_path / "jobs.csv") if write(tmp_path) else []
    assert len(rows) == len(grid.jobs)
    first = rows[0]
    wanted = {
        "vector.lora.rank": "4",
        "seed": "0",
        "lambda": "1.0",
        "bound_met": "true",
        "forget/europe/acc/test/before": "0.9",
        "forget/europe/acc/test/before_stderr": "0.05",
        "forget/europe/acc/test/after": "0.2",
        "forget/europe/acc/test/after_stderr": "0.06",
        "forget/europe/acc/test/after_n": "60",
        "retain/africa/acc/test/after": "0.8",
        "seconds": "10.0",
        "where": "4 cores, A CPU",
        "queue_job": "12_3",
    }
    assert {k: first[k] for k in wanted} == wanted
    assert "node7" not in (tmp_path / "jobs.csv").read_text()  # reports are shared, hosts are nobody's business


def test_no_job_is_touched_and_nothing_is_left_behind(tmp_path: Path) -> None:
    grid = filled(tmp_path, grid_of({"seed": ("0", "1")}))

    def content() -> dict[str, bytes]:
        found = (p for name in ("jobs", "state") for p in (tmp_path / name).rglob("*") if p.is_file())
        return {str(p): p.read_bytes() for p in found}

    before = content()
    write(tmp_path)
    write(tmp_path)
    assert content() == before
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {GRID_FILE, "jobs", "state", "report.json", "report.html", "jobs.csv", "frontier.csv"}
    assert len(grid.jobs) == 2


def test_a_large_grid_makes_a_page_of_bounded_size(tmp_path: Path) -> None:
    grid = grid_of({"rank": tuple(str(i) for i in range(120)), "seed": ("0", "1")})
    filled(tmp_path, grid, lambda j: report_of(j, forget=0.1 + 0.001 * j.index, kept=0.76 + 0.0003 * j.index))
    write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 3e6 * 240 / 1000
    assert "60 further settings" in page
    assert page.count('class="forest"') == 2 * 60
    assert "114 others" in page  # six in a style of their own


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["vector.lora.rank", "vector.retain.rank", "seed"]) == {
        "vector.lora.rank": "lora.rank",
        "vector.retain.rank": "retain.rank",
        "seed": "seed",
    }
    assert label({}, "pico") == "pico"
    assert len(label({"a": "x" * 500}, "pico")) == 90


def test_a_whole_part_of_a_recipe_covers_what_lies_in_it() -> None:
    assert about("forget.where.continent", ("forget",))
    assert about("eval", ("eval.tasks",))
    assert not about("forgetful", ("forget",))
    assert not about("vector.forget.steps", ("forget",))


def test_it_imports_nothing_slow() -> None:
    heavy = {"torch", "numpy", "scipy", "transformers"}
    code = f"import sys, unlearn.cluster.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_two_real_runs_are_merged(tmp_path: Path) -> None:
    from unlearn import run

    grid = grid_of({"seed": ("0", "1")})
    grid.save(tmp_path)
    values = []
    for job in grid.jobs:
        flags = [f"seed={job.settings['seed']}"]
        report = run("pico_smoke.yaml", set=flags, out=job_folder(tmp_path, job.name))
        values.append(next(r.after.value for r in report.scores if (r.set, r.metric) == ("forget", "acc")))
    assert main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["set_aside"] == []
    assert found["settings"][0]["test"]["goal"]["mean"] == pytest.approx(np.mean(values))
    assert found["comparisons"][0]["goal"]["label"] == "europe acc"
