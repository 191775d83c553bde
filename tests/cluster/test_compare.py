"""``unlearn compare``: figures against independent computations, and what is missing, damaged or hostile."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gridfolder import finish, make
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unlearn.cli import main
from unlearn.cluster.compare import Spread, compare, pareto
from unlearn.cluster.plan import Job
from unlearn.errors import GridError
from unlearn.results import Chosen, RunReport, Score, ScoreRow, SweepPoint, TaskScore

# ---- arithmetic


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_interval_is_students(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-9)
    low, high = (stats.t.ppf(q, len(values) - 1) * stats.sem(values) for q in (0.025, 0.975))
    assert (-(spread.half or 0.0), spread.half) == pytest.approx((low, high), abs=1e-8)


def test_one_run_has_no_interval_and_a_missing_number_leaves_no_mean() -> None:
    assert Spread.of([0.25]) == Spread(0.25, None, 1)
    assert Spread.of([0.25, None, math.nan, math.inf]) == Spread(None, None, 1)
    assert Spread.of([]) == Spread(None, None, 0)
    assert Spread.of([0.9] * 3).half == 0
    assert (Spread.of([0.5] * 3).words(), Spread.of([0.5]).words()) == ("0.500 ± 0.000", "0.500")


numbers = st.one_of(st.just(math.nan), st.integers(0, 4).map(float), st.floats(-2, 2))


@given(st.lists(st.none() | st.tuples(numbers, numbers), max_size=14))
@settings(max_examples=300, deadline=None)
def test_the_pareto_set_is_that_of_a_sweep_by_score(points: list[tuple[float, float] | None]) -> None:
    known = sorted((p[0], -p[1], n) for n, p in enumerate(points) if p is not None and not np.isnan(p).any())
    found, best = set(), None
    for score, kept, n in known:
        if best is None or kept < best[1] or (score, kept) == best:
            best = (score, kept)
            found.add(n)
    assert set(pareto(points)) == found


# ---- folders of runs


def report_of(
    seed: str,
    *,
    forget: float | None = 0.2,
    kept: float | None = 0.8,
    before: float = 0.9,
    validation: Mapping[float, tuple[float, float]] | None = None,
    chosen: float = 1.0,
    met: bool = True,
    metric: str = "acc",
    kept_metric: str = "acc",
    role: Any = "forget",
    higher: bool = True,
    **provenance: Any,
) -> dict[str, Any]:
    """A run: the forget (or learn) set starts at 0.9, the kept one at 0.8; the rest as given, by coefficient."""
    sweep = validation or {1.0: (forget or 0.0, kept or 0.0), 2.0: ((forget or 0.0) / 2, (kept or 0.0) - 0.1)}
    higher_kept = kept_metric != "perplexity"

    def pair(c: float) -> tuple[TaskScore, TaskScore]:
        goal, keeps = (0.9, 0.8) if c == 0 else sweep[c]
        return (
            TaskScore(role, "europe", "validation", metric, higher, Score(goal, 0.04, 50)),
            TaskScore("retain", "africa", "validation", kept_metric, higher_kept, Score(keeps, 0.03, 40)),
        )

    kept_score, forget_score = Score(kept, 0.03, 70), Score(forget, 0.06, 60)  # type: ignore[arg-type]
    report = RunReport(
        name="pico",
        description="",
        chosen=Chosen(chosen, met, "the rule", metric, 0.95, 0.5, (("retain", "africa", kept_metric),)),
        scores=(
            ScoreRow(role, "europe", "test", metric, higher, Score(before, 0.05, 60), forget_score),
            ScoreRow("retain", "africa", "test", kept_metric, higher_kept, Score(0.8, 0.02, 70), kept_score),
        ),
        sweep=tuple(SweepPoint(c, pair(c), True) for c in (0.0, *sweep)),
        examples=(),
        data=tuple(
            {"set": r, "name": n, "kind": "mcq", "rows": 99, "digest": f"{n} {seed}"}
            for r, n in ((role, "europe"), ("retain", "africa"))
        ),
        vector={},
        training=(),
        exports={},
        seconds={"total": 10.0},
        provenance={"target": "base", "versions": {"torch": "2.13"}, **provenance},
    )
    return report.to_json()


def run_folder(root: Path, report: Mapping[str, Any], **recipe: Any) -> Path:
    """A finished run; ``vector__rank=8`` is the recipe's ``vector.rank``."""
    plain: dict[str, Any] = {"name": "pico", "seed": 0, "model": {"path": "m"}, "vector": {"rank": 4}}
    for key, value in recipe.items():
        *parts, last = key.split("__")
        place = plain
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    job = Job(root.name, 0, (), {})
    finish(root.parent, job, report)
    (root.parent / "jobs" / root.name / "resolved.yaml").write_text(json.dumps(plain))
    return root.parent / "jobs" / root.name


Make = Callable[[Any, int], Mapping[str, Any]]


def grid_of(root: Path, axis: str, values: Sequence[Any], seeds: Sequence[int], made: Make) -> list[Path]:
    return [
        run_folder(root / f"{value}-{seed}".replace("/", "_"), made(value, seed), seed=seed, **{axis: value})
        for value in values
        for seed in seeds
    ]


def compared(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """The families in report.json, which is JSON that any program reads."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    compare(folders, out)
    return list(json.loads((out / "report.json").read_text(), parse_constant=refuse)["families"])


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "compare.csv").read_text())))


def test_means_over_seeds_are_of_each_setting_and_leave_the_seed_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = {(rank, seed): rng.uniform(0.1, 0.4, 2) for rank in (4, 8) for seed in range(3)}

    def made(rank: int, seed: int) -> dict[str, Any]:
        return report_of(str(seed), forget=drawn[rank, seed][0], kept=0.6 + drawn[rank, seed][1] / 2)

    folders = grid_of(tmp_path, "vector__rank", (4, 8), range(3), made)
    (family,) = compared(folders, tmp_path)
    assert [s["settings"] for s in family["settings"]] == [{"vector.rank": "4"}, {"vector.rank": "8"}]
    assert (family["goal"], family["sign"], family["seeds"]) == ("europe acc", 1, ["0", "1", "2"])
    for setting, rank in zip(family["settings"], (4, 8), strict=True):
        after = [drawn[rank, seed][0] for seed in range(3)]
        kept = [(0.6 + drawn[rank, seed][1] / 2) / 0.8 for seed in range(3)]
        for values, got in ((after, setting["after"]), (kept, setting["kept"])):
            low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
            assert (got["mean"] - got["half"], got["mean"] + got["half"]) == pytest.approx((low, high))
        assert setting["before"]["mean"] == pytest.approx(0.9)
        assert setting["label"] == f"rank={rank}"
    rows = rows_of(tmp_path)
    assert len(rows) == 6
    first = {"run": "4-0", "vector.rank": "4", "seed": "0", "lambda": "1.0", "bound_met": "True"}
    assert {key: rows[0][key] for key in first} == first
    assert float(rows[0]["forget_after"]) == pytest.approx(drawn[4, 0][0])
    page = (tmp_path / "report.html").read_text()
    assert page.count('<svg class="chart"') == 2
    assert "rank=8" in page


def test_a_frontier_holds_the_coefficients_that_all_runs_were_scored_at(tmp_path: Path) -> None:
    first = {1.0: (0.6, 0.8), 1.5: (0.5, 0.8), 2.0: (0.4, 0.72), 3.0: (0.1, 0.1)}
    second = {1.0: (0.4, 0.76), 2.0: (0.2, 0.64)}
    folders = grid_of(
        tmp_path, "vector__rank", (4,), (0, 1), lambda _, seed: report_of(str(seed), validation=(first, second)[seed])
    )
    steps = compared(folders, tmp_path)[0]["settings"][0]["frontier"]
    assert [step[0] for step in steps] == [0.0, 1.0, 2.0]
    assert steps[2][1]["mean"] == pytest.approx(0.3)
    assert steps[2][2]["mean"] == pytest.approx((0.9 + 0.8) / 2)


def test_the_choice_is_made_on_validation_means_whatever_the_test_items_say(tmp_path: Path) -> None:
    test = {4: (0.10, 0.8), 8: (0.30, 0.8), 16: (0.05, 0.5)}
    valid = {4: (0.35, 0.78), 8: (0.20, 0.8), 16: (0.01, 0.5)}

    def made(rank: int, seed: int) -> dict[str, Any]:
        sweep = {1.0: (valid[rank][0] + 0.01 * seed, valid[rank][1])}
        forget, kept = test[rank]
        return report_of(str(seed), forget=forget, kept=kept, validation=sweep, met=rank != 16)

    (family,) = compared(grid_of(tmp_path, "vector__rank", (4, 8, 16), (0, 1), made), tmp_path)
    assert family["choice"] == 1  # 16 forgets most, and met its bound in no run
    assert family["pareto"] == [0, 2]
    assert any("rank=8 forgets most within the bound; it is not in the Pareto set" in r for r in family["remarks"])
    assert [(s["met"], s["met_on_test"]) for s in family["settings"]] == [(2, 2), (2, 2), (0, 0)]
    unbound = grid_of(tmp_path / "b", "vector__rank", (4, 8), (0,), lambda r, s: report_of("0", met=False))
    (family,) = compared(unbound, tmp_path)
    assert family["choice"] is None
    assert [s[name]["half"] for s in family["settings"] for name in ("before", "after", "kept")] == [None] * 6
    said = ["One run per setting", "No setting met its bound in every run"]
    assert [r.partition(",")[0] for r in family["remarks"]] == said
    assert "One run per setting, so no intervals" in " ".join((tmp_path / "report.html").read_text().split())


@pytest.mark.parametrize("axis", ["model__path", "forget__where__continent", "choose__metric", "teach__steps"])
def test_settings_that_ask_another_question_are_no_rivals(tmp_path: Path, axis: str) -> None:
    folders = [
        run_folder(tmp_path / f"{a}{rank}", report_of("0"), **{axis: a, "vector__rank": rank})
        for a in ("a", "b")
        for rank in (4, 8)
    ]
    found = compared(folders, tmp_path)
    assert [len(family["settings"]) for family in found] == [2, 2]
    assert [family["question"].rpartition("=")[2] for family in found] == ["a", "b"]


@pytest.mark.parametrize("axis", ["vector__forget__steps", "forgetful", "sweep__choose", "vector__method"])
def test_settings_whose_name_only_holds_that_of_a_question_are_rivals(tmp_path: Path, axis: str) -> None:
    folders = grid_of(tmp_path, axis, ("a", "b" * 200), (0,), lambda _, seed: report_of(str(seed)))
    (family,) = compared(folders, tmp_path / "out")
    assert (family["question"], len(family["settings"])) == ("", 2)
    assert max(len(setting["label"]) for setting in family["settings"]) == 90


def test_recipes_that_differ_are_kept_apart_and_those_that_do_not_are_one(tmp_path: Path) -> None:
    """Whatever they are called."""

    def runs(name: str, seeds: Sequence[int], **recipe: Any) -> list[Path]:
        return [run_folder(tmp_path / f"{name}-{s}", report_of(str(s)), name=name, seed=s, **recipe) for s in seeds]

    one, other = runs("one", (0, 1)), runs("two", (0, 1), vector__correlation=True)
    (family,) = compared([*one, *other], tmp_path)
    assert [[Path(run).name[:3] for run in s["runs"]] for s in family["settings"]] == [["one"] * 2, ["two"] * 2]
    (family,) = compared([*one, *runs("same", (2,))], tmp_path)
    assert [s["runs"] for s in family["settings"]] == [["one-0", "one-1", "same-2"]]
    with pytest.raises(GridError, match="one-0 and same-0 are the same run"):
        compare([*one, *runs("same", (0,))], tmp_path)


def test_what_is_learned_or_is_a_perplexity_is_better_when_higher(tmp_path: Path) -> None:
    folders = grid_of(
        *(tmp_path, "vector__rank", (4, 8), (0,)),
        lambda rank, _: report_of("0", role="learn", forget=0.95 if rank == 8 else 0.92),
    )
    (family,) = compared(folders, tmp_path)
    assert (family["sign"], family["choice"], family["pareto"]) == (-1, 1, [1])
    assert family["remarks"][-1] == "On validation means rank=8 learns most within the bound."
    assert "forgets" not in (tmp_path / "report.html").read_text()
    text = report_of("0", forget=40.0, metric="perplexity", higher=False, kept=1.0, kept_metric="perplexity")
    (family,) = compared([run_folder(tmp_path / "t", text)], tmp_path)
    assert family["sign"] == -1
    # what is kept goes by the bound: a rise of 0.2 of the 0.5 allowed
    assert family["settings"][0]["kept"]["mean"] == pytest.approx(1 - 0.05 * 0.2 / 0.5)


def test_what_could_not_show_harm_is_said(tmp_path: Path) -> None:
    """Its share is 100 %, whatever was done to the model."""

    def made(_: Any, seed: int) -> dict[str, Any]:
        report = report_of(str(seed))
        for entry in (*report["scores"], *(s for p in report["sweep"] for s in p["scores"])):
            entry["chance"] = 0.25
        report["sweep"][0]["scores"][1]["score"]["value"] = 0.8 - 0.55 * seed
        return report

    (family,) = compared(grid_of(tmp_path, "vector__rank", (4,), (0, 1), made), tmp_path)
    said = "retain africa acc could show no harm: 0, or no more than chance, before the edit (4-1)."
    assert family["remarks"] == [said]
    assert said in (tmp_path / "report.html").read_text()


def two_goals(*, prob: float, perplexity: float) -> dict[str, Any]:
    """A run that forgets answers (.90 before) and passages (a perplexity of 30 before)."""
    report = report_of("0", forget=prob, metric="prob")
    book = {"name": "book", "metric": "perplexity", "higher_is_better": False}
    before, after = ({"value": v, "stderr": 0.5, "n": 9} for v in (30.0, perplexity))
    report["scores"].append({**report["scores"][0], **book, "before": before, "after": after})
    for point in report["sweep"]:
        point["scores"].append({**point["scores"][0], **book, "score": before if point["coefficient"] == 0 else after})
    report["chosen"]["goals"] = [["forget", "europe", "prob"], ["forget", "book", "perplexity"]]
    return report


def test_goals_of_unlike_units_weigh_alike(tmp_path: Path) -> None:
    """One point of perplexity outweighed all there is of a probability when scores were averaged as they are."""
    figures = {4: (0.10, 30.0), 8: (0.95, 31.0)}
    folders = grid_of(
        *(tmp_path, "vector__rank", (4, 8), (0,)),
        lambda rank, _: two_goals(prob=figures[rank][0], perplexity=figures[rank][1]),
    )
    (family,) = compared(folders, tmp_path)
    assert family["goal"] == "mean share left of europe prob, book perplexity"
    assert (family["sign"], family["choice"], family["pareto"]) == (1, 0, [0])
    for setting, share in zip(family["settings"], ((0.10 / 0.90 + 1) / 2, (0.95 / 0.90 + 30 / 31) / 2), strict=True):
        assert setting["before"]["mean"] == 1
        assert setting["after"]["mean"] == pytest.approx(share)
        assert setting["validation"]["mean"] == pytest.approx(share)


@pytest.mark.parametrize(("second", "kept"), [(0.5, 0.5), (0.9, 0.9), (None, None), (1.2, 1.0)])
def test_kept_is_what_suffered_most(tmp_path: Path, second: float | None, kept: float | None) -> None:
    """Of two kept sets: the smaller share; without a number in one of them there is none, whatever the other keeps."""
    report = report_of("0")
    report["scores"].append({**report["scores"][1], "name": "asia"})
    report["scores"][2] |= {
        side: {"value": value, "stderr": None, "n": 9} for side, value in (("before", 1.0), ("after", second))
    }
    report["chosen"]["kept"].append(["retain", "asia", "acc"])
    (family,) = compared([run_folder(tmp_path / "a", report)], tmp_path)
    assert family["settings"][0]["kept"]["mean"] == (None if kept is None else pytest.approx(kept))


def test_a_score_without_a_number_hides_nothing(tmp_path: Path) -> None:
    folders = grid_of(
        *(tmp_path, "vector__rank", (4, 8), (0, 1)),
        lambda rank, seed: report_of(str(seed), forget=None if (rank, seed) == (4, 1) else 0.2),
    )
    (family,) = compared(folders, tmp_path)
    assert family["settings"][0]["after"] == {"mean": None, "half": None, "n": 1}
    assert family["pareto"] == [1]
    assert rows_of(tmp_path)[1]["forget_after"] == ""


def test_no_coefficient_is_none_and_a_bound_that_test_items_break_is_counted(tmp_path: Path) -> None:
    def made(rank: int, seed: int) -> dict[str, Any]:
        # 19 of 20 keep just .95, whatever floats make of it
        return report_of(str(seed), kept=0.76 if rank == 4 else 0.75, chosen=float(seed or rank == 8), met=True)

    (family,), _ = compare(grid_of(tmp_path, "vector__rank", (4, 8), (0, 1), made), tmp_path)
    assert [s.cells()[:2] for s in family.settings] == [["2", "none 1"], ["2", "1"]]
    assert [(s.met, s.met_on_test) for s in family.settings] == [(2, 2), (2, 0)]
    found = [(row["lambda"], row["met_on_test"]) for row in rows_of(tmp_path)]
    assert found == [("", "True"), ("1.0", "True"), ("1.0", "False"), ("1.0", "False")]


def test_unequal_seeds_are_marked_and_not_compared(tmp_path: Path) -> None:
    def made(rank: int, seed: int) -> dict[str, Any]:
        return report_of(str(seed), forget=0.2 + 0.1 * (rank != 16) + 0.3 * (seed == 3))

    folders = grid_of(tmp_path, "vector__rank", (4, 8, 16), (0, 1, 2), made)[:-1]
    folders += grid_of(tmp_path, "vector__rank", (32,), (0, 1, 2, 3), made)
    (family,) = compared(folders, tmp_path)
    assert family["seeds"] == ["0", "1", "2"]
    assert [s["compared"] for s in family["settings"]] == [True, True, False, True]
    assert family["choice"] == 0  # 16 forgets more, on other seeds
    assert [s["after"]["n"] for s in family["settings"]] == [3, 3, 2, 3]  # more seeds than the others: left out
    assert any("not compared, for want of one of these: rank=16" in r for r in family["remarks"])


def with_data(report: dict[str, Any], **changed: Any) -> dict[str, Any]:
    report["data"][0] |= changed
    return report


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (with_data(report_of("1"), rows=98), "data"),
        (report_of("1", target="another"), "base model"),
        ({**report_of("1", target="taught", base="another"), "training": [{"stage": "teach"}]}, "base model"),
        (report_of("1", metric="prob"), "metrics"),
        (report_of("1", kept_metric="acc_norm"), "metrics"),
    ],
)
def test_what_was_measured_otherwise_is_never_averaged(tmp_path: Path, odd: dict[str, Any], said: str) -> None:
    """The recipes differ in nothing but the seed; what was measured does."""
    folders = [run_folder(tmp_path / "a", report_of("0")), run_folder(tmp_path / "b", odd, seed=1)]
    with pytest.raises(GridError, match=rf"a and b cannot be compared: .* not the same {said}"):
        compare(folders, tmp_path)


def test_one_seed_splits_data_in_one_way_and_a_run_counts_once(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "a", report_of("0"))
    other = run_folder(tmp_path / "b", with_data(report_of("0"), digest="another file"), vector__rank=8)
    with pytest.raises(GridError, match="not the same data"):
        compare([first, other], tmp_path)
    with pytest.raises(GridError, match="a and b are the same run"):
        compare([first, run_folder(tmp_path / "b", report_of("0"))], tmp_path)
    # another limit is other data, and another question
    folders = [
        run_folder(tmp_path / f"{n}-{s}", with_data(report_of(f"{n}{s}"), rows=n), forget__limit=n, seed=s)
        for n in (6, 12)
        for s in (0, 1)
    ]
    assert [len(family["settings"]) for family in compared(folders, tmp_path)] == [1, 1]


@pytest.mark.parametrize(("versions", "said"), [(("2.12", "2.13"), "2.12, 2.13"), ((None, "0.19"), "0.19, none")])
def test_other_versions_are_averaged_but_said(versions: tuple[str | None, str], said: str, tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / str(n), report_of(str(n), versions={"torch": version}), seed=n)
        for n, version in enumerate(versions)
    ]
    (family,) = compared(folders, tmp_path)
    assert family["remarks"] == [f"Averaged as if they were one: torch {said}."]


def test_taught_models_differ_and_their_base_does_not(tmp_path: Path) -> None:
    for known in ({"base": "base"}, {}):  # reports did not always have it
        folders = grid_of(
            *(tmp_path, "vector__rank", (4, 8), (0, 1)),
            lambda r, s: {**report_of(str(s), target=f"{r}{s}", **known), "training": [{"stage": "teach"}]},  # noqa: B023
        )
        assert len(compared(folders, tmp_path)) == 1


# ---- missing, damaged, hostile


def test_what_is_missing_of_a_grid_is_listed_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = make(tmp_path, 5, prepared=False)
    assert main(["compare", str(tmp_path)]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    assert "Nothing to compare yet" in (tmp_path / "report.html").read_text()
    for n, job in enumerate(grid.jobs[:4]):
        finish(tmp_path, job, report_of(str(n)))
        (job.folder(tmp_path) / "resolved.yaml").write_text(json.dumps({"name": "pico", "seed": n}))
    (grid.jobs[1].folder(tmp_path) / "provenance.json").unlink()
    damaged = grid.jobs[2].folder(tmp_path) / "report.json"
    damaged.write_text(damaged.read_text() + " ")
    finish(tmp_path, grid.jobs[3], {**report_of("3"), "scores": [{"unknown": 1}]})
    before = {p: p.read_bytes() for p in tmp_path.rglob("jobs/*/*")}
    assert main(["compare", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    for n, said in ((1, "no report.json of a run that has ended"), (2, "is not the one"), (3, ""), (4, "no report")):
        assert f"! {grid.jobs[n].name}: " in err
        assert said in err
    assert len(rows_of(tmp_path)) == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("jobs/*/*")} == before  # no run is touched
    # a run that was named itself is a mistake
    assert main(["compare", str(grid.jobs[2].folder(tmp_path)), "--out", str(tmp_path / "x")]) == 2
    assert main(["compare", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"scores": None},
        {"sweep": [{"coefficient": 1}]},
        {"chosen": {}},
        {"data": [1]},
        {"seconds": {"total": "soon"}},
        {"sweep": [{"coefficient": 0, "scores": "x", "within_bound": True, "broken": []}]},
        {"provenance": []},
        {"scores": [{**report_of("1")["scores"][0], "chance": "one in four"}]},
    ],
    ids=lambda change: repr(change)[:40],
)
def test_a_sealed_report_of_the_wrong_shape_is_missing_and_hides_nothing(tmp_path: Path, change: Any) -> None:
    grid = make(tmp_path, 4, prepared=False)
    for n, job in enumerate(grid.jobs):
        finish(tmp_path, job, {**report_of(str(n)), **(change if n == 1 else {})})
        (job.folder(tmp_path) / "resolved.yaml").write_text(json.dumps({"name": "pico", "seed": n}))
    pipe = grid.jobs[3].folder(tmp_path) / "report.json"
    pipe.unlink()
    os.mkfifo(pipe)  # which is not waited for
    (family,), missing = compare([tmp_path], tmp_path)
    assert [line.partition(":")[0] for line in missing] == [grid.jobs[n].name for n in (1, 3)]
    assert family.settings[0].after.n == 2


HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def test_hostile_names_stay_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(json.dumps(report_of("0")).replace("europe", "@SUM(A1)<svg onload=x>"))
    cells = {"=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0", "-1.5e-3": "-1.5e-3", "a=b": "a=b", "1e5": "1e5"}
    cells |= {text: f"'{text}" for text in ("=1+1", "+a", "-a", "-1+2", "@a", "  =1", "|a", "%a")}
    values = (HOSTILE, "\t=1", *cells)
    folders = [run_folder(tmp_path / f"-{n}<img onerror=x>", report, vector__x=v) for n, v in enumerate(values)]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    page = (tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.found & {"script", "img"}
    assert not tags.handlers
    assert "\x1b" not in page
    assert [row["vector.x"] for row in rows_of(tmp_path / "out")][2:] == list(cells.values())
    found = [c for row in csv.reader(io.StringIO((tmp_path / "out" / "compare.csv").read_text())) for c in row]
    assert not [c for c in found if c.lstrip().startswith(("=", "+", "@"))]
    assert [c for c in found if c.startswith("-")] == ["-1.5e-3"]
    assert "\x1b" not in "".join(found)


def test_whether_it_is_forgotten_is_counted_over_the_seeds(tmp_path: Path) -> None:
    def made(_: Any, seed: int) -> Mapping[str, Any]:
        report = report_of(str(seed))
        before, after = ({"value": value, "stderr": 0.1, "n": 60} for value in (8.0, 1.0 if seed else 6.0))
        told = report["scores"][0] | {"metric": "pmi", "before": before, "after": after}
        return report | {"scores": [*report["scores"], told]}

    for seeds, words in (((0, 1), "suppressed 1, forgotten 1"), ((1, 2), "forgotten")):
        folders = grid_of(tmp_path / str(seeds), "vector__rank", [4], seeds, made)
        assert compare(folders, tmp_path / "out")[0][0].settings[0].cells()[4] == words
    untold = grid_of(tmp_path / "untold", "vector__rank", [4], [0], lambda _, seed: report_of(str(seed)))
    assert compare(untold, tmp_path / "out")[0][0].settings[0].cells()[4] == "–"


def test_many_runs_make_a_page_of_bounded_size(tmp_path: Path) -> None:
    folders = grid_of(tmp_path, "vector__rank", range(60), (0, 1), lambda r, s: report_of(str(s)))
    compared(folders, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
