"""Comparisons and attacks as people read them: the lines of a table and of a plan, and the sections of the page."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared_arena import read
from rich.console import Console
from test_html import HOSTILE, Page, make, poisoned, row

from unlearn.plan import evidence_steps
from unlearn.recipe.schema import Recipe
from unlearn.report.assemble import left_out
from unlearn.report.page import evidence_sections, relearning_chart, render_html, robustness_section
from unlearn.report.terminal import render_table
from unlearn.report.words import benchmark_line, evidence_facts, membership_line
from unlearn.results import (
    LENS,
    AttackScore,
    Benchmark,
    Membership,
    Robustness,
    RunReport,
    Score,
    Who,
    probing,
    quantisation,
    relearning,
    sampling,
)
from unlearn.text import number

TOFU_ROWS: Mapping[str, Mapping[str, float | str | None]] = {
    "target": {"ROUGE Retain": 0.9431, "Model Utility": 0.6217, "Forget Quality": 0.0031},
    "edited": {"ROUGE Retain": 0.9012, "Model Utility": 0.6024, "Forget Quality": 0.7182},
    "reference": {"ROUGE Retain": 0.9518, "Model Utility": 0.6301, "Forget Quality": None},
}
TOFU = Benchmark("tofu", "forget10", 300, TOFU_ROWS)
MUSE = Benchmark(
    "muse",
    "books",
    None,
    {
        "target": {"name": "target", "verbmem_f": 57.94, "privleak": None, "knowmem_f": 39.4, "knowmem_r": 62.1},
        "edited": {"name": "mine", "verbmem_f": 11.5, "privleak": None, "knowmem_f": 21.2, "knowmem_r": 60.3},
    },
    "PrivLeak compares with a model that never saw the forget set.",
)
MEMBERSHIP = tuple(
    Membership(who, attack, auc, auc - 0.04, auc + 0.03, 400, 399)
    for attack, shift in (("loss", 0.0), ("min_k", 0.011))
    for who, auc in (("target", 0.912 + shift), ("edited", 0.547 + shift), ("reference", 0.501 + shift))
)


def attack(
    who: Who, value: float, kind: Any = "none", name: str = "none", steps: int | None = None, layer: int | None = None
) -> AttackScore:
    return AttackScore(name, kind, who, "prob", True, value, 0.0121, 40, steps, layer)


ATTACKS = Robustness(
    "europe",
    "prob",
    (
        *(attack(w, v) for w, v in (("target", 0.9), ("edited", 0.1), ("reference", 0.12))),
        *(
            attack(w, v, "quantise", quantisation("nf4"))
            for w, v in (("target", 0.88), ("edited", 0.5), ("reference", 0.13))
        ),
        attack("edited", 0.08, "lens", LENS, layer=1),
        *(
            attack(w, v, "relearn", relearning(8), steps)
            for w, v, steps in (("target", 0.91, 1), ("edited", 0.3, 1), ("edited", 0.74, 20), ("reference", 0.44, 20))
        ),
    ),
)


def whole(**changed: Any) -> RunReport:
    """A report with a reference, a benchmark, membership inference and attacks."""
    scores = tuple(replace(s, reference=Score(0.377, 0.021, 48)) for s in make().scores)
    return make(**{"scores": scores, "benchmark": TOFU, "membership": MEMBERSHIP, "robustness": ATTACKS, **changed})


def cells(page: str, label: str) -> list[list[str]]:
    """The rows of the table with a label, as texts; heads first."""
    table = page[page.index(f'aria-label="{label}"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[Page(c).text for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r, re.DOTALL)] for r in rows]


# --- lines -----------------------------------------------------------------------------------------------------------


def test_the_line_of_a_benchmark() -> None:
    assert benchmark_line(TOFU) == (
        "Forget Quality: before 0.003, after 0.718; Model Utility: before 0.622, after 0.602, never knew 0.630"
    )
    assert benchmark_line(MUSE) == (
        "verbmem_f: before 57.94, after 11.50; knowmem_f: before 39.40, after 21.20; "
        "knowmem_r: before 62.10, after 60.30. PrivLeak compares with a model that never saw the forget set."
    )
    assert benchmark_line(replace(TOFU, rows={})) == ""


def test_the_line_of_membership_inference() -> None:
    assert membership_line(MEMBERSHIP) == (
        "AUC by Min-k: before 0.923 (0.883 to 0.953), after 0.558 (0.518 to 0.588), "
        "never knew 0.512 (0.472 to 0.542); .5 is a coin"
    )


def test_facts_are_those_that_the_run_has() -> None:
    assert [name for name, _ in evidence_facts(whole())] == ["tofu", "membership", "robustness"]
    assert evidence_facts(make()) == []
    plain_only = Robustness("europe", "prob", ATTACKS.scores[:3])
    assert evidence_facts(make(robustness=plain_only)) == []  # nothing was attacked


def test_the_table_has_the_lines() -> None:
    console = Console(width=2000, file=io.StringIO(), record=True)
    render_table(whole(), console)
    said = console.export_text()
    for _, line in evidence_facts(whole()):
        assert line in said


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_the_sections_in_order() -> None:
    page = render_html(whole())
    heads = ["Beside a model that never knew", "TOFU", "Membership inference", "What comes back"]
    places = [page.index(f"<h2>{head}") if f"<h2>{head}" in page else -1 for head in heads]
    assert -1 not in places
    assert places == sorted(places)
    Page(page)
    bare = render_html(make())
    assert not [head for head in heads if f"<h2>{head}" in bare]
    assert evidence_sections(make()) is None


def test_every_number_is_in_its_column() -> None:
    page = render_html(whole())
    beside = cells(page, "Scores beside the reference")
    assert beside[0] == ["Set", "Metric", "Before", "After", "Never knew"]
    assert beside[1] == ["forget/europe", "acc_norm", "0.917 ± 0.098", "0.458 ± 0.098", "0.377 ± 0.041"]
    assert len(beside) == 4
    assert cells(page, "Benchmark") == [
        ["Figure", "before", "after", "never knew"],
        ["ROUGE Retain", "0.943", "0.901", "0.952"],
        ["Model Utility", "0.622", "0.602", "0.630"],
        ["Forget Quality", "0.003", "0.718", "–"],
    ]
    assert cells(page, "Membership inference") == [
        ["Attack", "before", "after", "never knew"],
        ["loss", "0.912 0.872 to 0.942", "0.547 0.507 to 0.577", "0.501 0.461 to 0.531"],
        ["min_k", "0.923 0.883 to 0.953", "0.558 0.518 to 0.588", "0.512 0.472 to 0.542"],
    ]
    text = Page(page).text
    assert "TOFU forget10, the first 300 items of every set" in text
    assert "400 forget items against 399 held out" in text


def test_attacks_and_what_comes_back() -> None:
    page = render_html(whole())
    table = cells(page, "Attacks on the result")
    assert table[0] == ["Attack", "before", "after", "never knew", "Came back"]
    shown = {r[0]: r[1:] for r in table[1:]}
    margin = "± 0.024"
    assert shown["as it is"] == [f"0.900 {margin}", f"0.100 {margin}", f"0.120 {margin}", "–"]
    assert shown["4-bit quantisation"][-1] == "50 %"  # (.5 - .1) / (.9 - .1)
    layers = {r[0]: r[1:] for r in cells(page, "The logit lens")[1:]}
    assert layers["the logit lens, layer 1"] == ["–", f"0.080 {margin}", "–", "nothing"]
    assert not [name for name in shown if "lens" in name], "folded away below the table"
    assert shown["relearning on 8 forgotten items, 1 step"][-1] == "25 %"
    assert shown["relearning on 8 forgotten items, 20 steps"] == ["–", f"0.740 {margin}", f"0.440 {margin}", "80 %"]
    assert ATTACKS.sentence() in Page(page).text
    assert "80 % comes back with 20 steps of relearning" in ATTACKS.sentence()


def test_chance_stands_beside_accuracies_under_attack_and_of_the_reference() -> None:
    choices = tuple(replace(s, metric="acc") for s in ATTACKS.scores)
    found = replace(ATTACKS, metric="acc", scores=choices, chance=0.25)
    assert "Of what was forgotten (accuracy 0.90 to 0.10, chance 0.25)" in found.sentence()
    scores = tuple(replace(s, chance=0.25) for s in whole().scores)
    page = render_html(whole(scores=scores, robustness=found))
    assert "Guessing would score 0.250." in Page(page).text
    assert cells(page, "Scores beside the reference")[1][1] == "acc_norm chance 0.25"
    assert Robustness.from_json(found.to_json()) == found
    assert Robustness.from_json({k: v for k, v in found.to_json().items() if k != "chance"}).chance is None


def test_without_an_edited_model_nothing_can_come_back() -> None:
    alone = Robustness("europe", "prob", tuple(s for s in ATTACKS.scores if s.who != "edited"))
    table = cells(str(robustness_section(alone)), "Attacks on the result")
    assert table[0] == ["Attack", "before", "never knew", "Came back"]
    assert {r[-1] for r in table[1:]} == {"–"}


def test_other_metrics_are_named() -> None:
    scores = (
        *ATTACKS.scores,
        replace(ATTACKS.scores[0], attack="greedy answers", metric="rougeL"),
        replace(ATTACKS.scores[1], attack="greedy answers", metric="rougeL"),
        replace(ATTACKS.scores[1], attack=sampling(8), kind="sample", metric="rougeL", value=0.4),
    )
    table = cells(str(robustness_section(Robustness("europe", "prob", scores))), "Attacks on the result")
    shown = {r[0]: r[-1] for r in table[1:]}
    assert shown["greedy answers (rougeL)"] == "–"
    assert shown["the best of 8 samples (rougeL)"] == "37.5 %"


def test_what_is_missing_is_said() -> None:
    page = render_html(whole(benchmark=MUSE))
    text = Page(page).text
    assert "<h2>MUSE" in page
    assert MUSE.missing in text
    assert "the first" not in text[text.index("MUSE books") :][:20]
    assert [r[0] for r in cells(page, "Benchmark")[1:]] == ["verbmem_f", "knowmem_f", "knowmem_r"]  # no empty row
    no_margin = replace(make().scores[0], reference=Score(0.5, None, 1))
    page = render_html(whole(scores=(no_margin, *make().scores[1:])))
    assert [r[-1] for r in cells(page, "Scores beside the reference")[1:]] == ["0.500"]  # rows with one, alone


def points(chart: str, role: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle class="dot {role}" cx="([\d.]+)" cy="([\d.]+)"', chart)
    return [(float(x), float(y)) for x, y in found]


def test_the_curve_of_relearning() -> None:
    chart = str(relearning_chart("t", {"edited": [(0, 0.1), (1, 0.3), (20, 0.74)], "target": [(0, 0.9)]}, uid="u"))
    Page(chart)
    edited, target = points(chart, "retain"), points(chart, "forget")
    assert (len(edited), len(target)) == (3, 1)
    (x0, y0), (x1, y1), (x2, y2) = edited
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 20, abs=1e-2)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.2 / 0.64, abs=1e-2)
    assert target[0][0] == x0
    assert target[0][1] < y2 < y1 < y0  # higher scores stand higher
    assert "after, 20 steps: 0.740" in Page(chart).text


@pytest.mark.parametrize(
    "lines",
    [{}, {"edited": []}, {"edited": [(0, 0.0)]}, {"edited": [(0, 0.0), (5, 0.0)]}, {"edited": [(0, -3.0), (5, -1.0)]}],
)
def test_curves_of_nothing_and_of_zeros_are_drawn(lines: dict[Who, list[tuple[int, float]]]) -> None:
    chart = str(relearning_chart("t", lines, uid="u"))
    Page(chart)
    assert "nan" not in chart.lower()
    inside = points(chart, "retain")
    assert len(inside) == sum(map(len, lines.values()))
    assert all(48 <= x <= 308 and 17.9 <= y <= 156.1 for x, y in inside)


def test_hostile_names_stay_text() -> None:
    plain, counter = whole().to_json(), itertools.count()
    bench = plain["benchmark"]
    bench["set"] = HOSTILE
    bench["missing"] = HOSTILE
    bench["rows"] = {
        who: {f"{name}{HOSTILE}": value for name, value in columns.items()} | {HOSTILE: HOSTILE}
        for who, columns in bench["rows"].items()
    }
    for entry in plain["membership"]:
        entry["attack"] += HOSTILE
    plain["robustness"]["set"] = HOSTILE
    for entry in plain["robustness"]["scores"]:
        entry["attack"] += HOSTILE
    for line in plain["scores"]:
        line["name"], line["metric"] = poisoned([line["name"], line["metric"]], counter)
    source = render_html(RunReport.from_json(plain))
    page, harmless = Page(source), Page(render_html(whole()))
    assert set(page.tags) <= set(harmless.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "\x00" not in source
    source.encode("utf-8")
    assert page.text.count("<script>alert(1)</script>") > 20


# --- reports as files ------------------------------------------------------------------------------------------------


def test_a_report_survives_its_file(compared: Path) -> None:
    for report in (whole(), whole(benchmark=MUSE, robustness=None), read(compared / "run")):
        back = RunReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False)))
        assert back == report
    text = (compared / "run" / "report.json").read_text(encoding="utf-8")
    assert read(compared / "run").to_json() == json.loads(text)


def test_reports_from_before_are_still_read(compared: Path) -> None:
    plain = json.loads((compared / "run" / "report.json").read_text(encoding="utf-8"))
    for name in ("benchmark", "membership", "robustness"):
        del plain[name]
    for line in plain["scores"]:
        del line["reference"]
    old = RunReport.from_json(plain)
    assert (old.benchmark, old.membership, old.robustness) == (None, (), None)
    assert {line.reference for line in old.scores} == {None}
    assert "What comes back" not in render_html(old)


def test_the_run_s_own_page_has_its_figures(compared: Path) -> None:
    report = read(compared / "run")
    page = (compared / "run" / "report.html").read_text(encoding="utf-8")
    assert report.benchmark is not None
    assert report.robustness is not None
    columns = {r[0]: r[1:] for r in cells(page, "Benchmark")[1:]}
    for name in ("Forget Quality", "Model Utility", "Prob. Forget"):
        assert columns[name] == [number(report.benchmark.rows[w][name]) for w in report.benchmark.rows]  # type: ignore[arg-type]
    assert len(cells(page, "Membership inference")) == 6  # five attacks under the heads
    lines = {(s.kind, s.attack, s.metric, s.steps, s.layer) for s in report.robustness.scores}
    rows = [r for label in ("Attacks on the result", "The logit lens") for r in cells(page, label)[1:]]
    assert len(rows) == len(lines)


# --- the plan --------------------------------------------------------------------------------------------------------


def steps(**more: Any) -> Sequence[str]:
    made_of = {
        "name": "r",
        "model": {"path": "pico:phi"},
        "forget": {"path": "f.jsonl", "kind": "qa"},
        "retain": [{"path": "r.jsonl", "kind": "qa"}],
        "teach": {},
    }
    return list(evidence_steps(Recipe.model_validate_json(json.dumps({**made_of, **more}))))


TOFU_SPEC = {"name": "tofu", "set": "forget05"}


def test_a_plan_without_comparisons_says_nothing() -> None:
    assert steps() == []


def test_the_plan_of_comparisons() -> None:
    assert steps(
        reference="train",
        benchmark={**TOFU_SPEC, "items": 30},
        holdout={"path": "h.jsonl", "kind": "qa"},
        robustness={},
    ) == [
        "reference: teach the base model the retain sets alone, in the same way; score it on the same test items",
        "benchmark: tofu forget05 on 3 models, the first 30 items of every set",
        "membership: can the forget set be told from h, which no model has seen?",
        "attack 3 models: copies in nf4 and int8, 20 steps of relearning on 8 forget items, "
        "other prompts (paraphrase, prefix, few-shot, template), the best of 8 samples and the logit lens",
    ]
    passages = {"path": "t.txt", "kind": "text"}
    assert steps(utility=[passages], robustness={"quantize": [], "samples": 0, "lens": False}) == [
        "attack 2 models: 20 steps of relearning on 8 forget items and on unrelated texts and other prompts "
        "(paraphrase, prefix, few-shot, template)"
    ]


def test_attacks_that_do_not_apply_are_neither_planned_nor_left_out_in_silence() -> None:
    """Passages have no question to reword; solved examples need a retain set of questions."""
    passages = {"path": "t.txt", "kind": "text"}
    asked = {"quantize": [], "samples": 0, "relearn": None}
    only = ["attack 2 models: other prompts (prefix) and the logit lens"]
    assert steps(forget=passages, robustness=asked) == only
    assert steps(retain=[passages], robustness={**asked, "probes": ["prefix", "few_shot"]}) == only
    plain = {"name": "r", "model": {"path": "pico:phi"}, "forget": passages, "robustness": {"quantize": []}}
    recipe = Recipe.model_validate_json(json.dumps(plain))
    scores = (attack("edited", 0.1), attack("edited", 0.2, "probe", probing("prefix")))
    (said,) = left_out(recipe, Robustness("t", "prob", scores))
    assert said == (
        "left out, because these data or this model do not allow it: other wordings, solved examples in the prompt, "
        "templates in other languages, relearning on unrelated texts, the logit lens"
    )
    made = [probing(p) for p in ("paraphrase", "prefix", "few_shot", "template")]
    whole = [attack("edited", 0.2, "probe", name) for name in made]
    whole += [attack("edited", 0.2, "relearn", relearning(4, True)), attack("edited", 0.2, "lens", LENS, layer=1)]
    assert left_out(recipe, Robustness("t", "prob", tuple(whole))) == left_out(recipe, None) == ()


def test_the_plan_of_other_references() -> None:
    assert steps(reference="runs/other", benchmark=TOFU_SPEC) == [
        "reference: runs/other, a model that never saw the forget set, scored on the same test items",
        "benchmark: tofu forget05 on 3 models, all items",
    ]
    assert steps(reference="log.json", benchmark=TOFU_SPEC) == [
        "benchmark: tofu forget05 on 2 models, all items, compared with log.json"
    ]
    assert steps(reference="published", benchmark={"name": "muse", "set": "news"}) == [
        "benchmark: muse news on 2 models, all items, compared with published"
    ]
    assert steps(benchmark=TOFU_SPEC) == ["benchmark: tofu forget05 on 2 models, all items"]


def test_the_plan_of_some_attacks() -> None:
    few: dict[str, Any] = {"quantize": [], "probes": ["few_shot"], "samples": 1, "lens": False}
    assert steps(robustness={**few, "relearn": {"items": 1, "steps": [1], "unrelated": False}}) == [
        "attack 2 models: 1 step of relearning on 1 forget item, other prompts (few-shot) and the best of 1 sample"
    ]
    nothing = {**few, "probes": [], "samples": 0, "relearn": None}
    assert steps(robustness=nothing) == ["attack 2 models: no attack is switched on"]


def test_a_row_without_a_reference_beside_rows_with_one() -> None:
    scores = (replace(make().scores[0], reference=Score(0.1, 0.01, 9)), row("retain", "asia", 0.9, 0.8))
    table = cells(render_html(whole(scores=scores)), "Scores beside the reference")
    assert [r[0] for r in table[1:]] == ["forget/europe"]
