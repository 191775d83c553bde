"""Reports in sentences and figures, and read back from their files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import (
    ATTACKS,
    KEPT,
    MEMBERSHIP,
    MUSE,
    TOFU,
    Page,
    foreseen,
    make,
    measured,
    row,
    score,
    with_evidence,
)

from unlearn.recipe.evaluation import ChooseSpec
from unlearn.report.figures import frontier, memory, missed, share_kept, worst_kept
from unlearn.report.page import render_html
from unlearn.report.words import (
    Point,
    benchmark_line,
    evidence_facts,
    headline,
    how_good,
    loss_changes,
    membership_line,
    memory_line,
    reading,
    remarks,
    wording_line,
)
from unlearn.results import Chosen, Foresight, Robustness, Role, RunReport, SetForesight, SweepPoint
from unlearn.results import verdict as correlation_verdict
from unlearn.score.search import holds, judge
from unlearn.text import duration, file_size, number, parameters, percent, tick_label


def test_the_headline_says_what_is_left() -> None:
    at = " at λ = 1.5; every kept metric stayed within its bound."
    assert headline(make()) == (
        f"The model still answers 46 % of what it was asked to forget: europe accuracy fell from 0.92 to 0.46{at}"
    )
    choice = replace(row("forget", "europe", 0.917, 0.458), chance=0.25)
    assert headline(make(scores=(choice,))) == (
        "The model still answers 46 % of what it was asked to forget, where guessing would give 25 %: "
        f"europe accuracy fell from 0.92 to 0.46{at}"
    )
    guessing = replace(row("forget", "europe", 0.917, 0.25), chance=0.25)
    assert headline(make(scores=(guessing,))).startswith(
        "The model answers 25 % of what it was asked to forget, no more than the 25 % that guessing would give: "
    )
    none = make(chosen=replace(make().chosen, coefficient=0.0, bound_met=False))
    assert headline(none) == "No coefficient passed the rule; the model is unchanged."
    worse = replace(row("forget", "europe", 0.5, 0.6), chance=0.25)
    assert headline(make(scores=(worse,))).startswith(
        "The model did not forget: europe accuracy rose from 0.50 to 0.60 (guessing gives 0.25) at"
    )
    # 1.96 * hypot(.05, .05) = .1386: a fall of .10 is within it, one of .15 is not
    assert headline(make(scores=(row("forget", "europe", 0.6, 0.5),))).startswith(
        "The model forgot no more than chance may explain: europe accuracy fell"
    )
    assert headline(make(scores=(row("forget", "europe", 0.6, 0.45),))).startswith("The model still answers 45 % of")
    broke = make(chosen=Chosen(2.0, False, "r", "acc_norm", 0.95, 0.5, KEPT))
    assert headline(broke).endswith("but the bound was not met (retain asia acc_norm fell to 0.703 from 0.875).")


@pytest.mark.parametrize(
    ("metric", "higher", "before", "after", "words"),
    [
        ("prob", True, 0.872, 0.476, "still gives what it was asked to forget a probability of 48 %"),
        ("exact", True, 0.9, 0.004, "still answers less than 1 % of what it was asked to forget"),
        ("exact_memorisation", True, 0.96, 0.79, "still recites 79 % of what it was asked to forget"),
        ("extraction_strength", True, 0.9, 0.2, "still scores 0.20 on what it was asked to forget"),
        ("perplexity", False, 12.0, 37.2, "now finds what it was asked to forget 3.10 times less likely"),
        ("loss", False, 1.0, 3.0, "now finds what it was asked to forget 7.39 times less likely"),
        ("logprob", True, -1.0, -3.0, "now finds what it was asked to forget 7.39 times less likely"),
    ],
)
def test_what_is_left_is_said_in_words_for_each_metric(
    metric: str, higher: bool, before: float, after: float, words: str
) -> None:
    chosen = replace(make().chosen, forget_metric=metric)
    report = make(chosen=chosen, scores=(row("forget", "book", before, after, metric, higher),))
    assert headline(report).startswith(f"The model {words}: book ")


def test_the_headline_tells_every_request() -> None:
    """The first alone would hide that the second is remembered better than before."""
    goals = (("forget", "europe", "acc_norm"), ("forget", "book", "perplexity"), ("learn", "africa", "acc_norm"))
    scores = (
        replace(row("forget", "europe", 0.9, 0.3), chance=0.25),
        row("forget", "book", 30.0, 29.0, "perplexity", False),
        replace(row("learn", "africa", 0.6, 0.7), chance=0.25),
    )
    assert headline(make(chosen=replace(make().chosen, goals=goals), scores=scores)) == (
        "The model still answers 30 % of europe, where guessing would give 25 % (accuracy 0.90 to 0.30), "
        "did not forget book (perplexity 30.00 to 29.00) and "
        "learned no more of africa than chance may explain (accuracy 0.60 to 0.70, guessing gives 0.25) "
        "at λ = 1.5; every kept metric stayed within its bound."
    )


def test_the_headline_of_an_addition_says_what_was_learned() -> None:
    learned = (row("learn", "africa", 0.7, 1.0), row("learn", "oceania", 0.8, 0.8), row("utility", "general", 0.7, 0.7))
    assert headline(make(scores=learned)) == (
        "The model learned africa (accuracy 0.70 to 1.00) and did not learn oceania (accuracy 0.80 to 0.80) "
        "at λ = 1.5; every kept metric stayed within its bound."
    )


def test_why_nothing_passed() -> None:
    nothing = replace(make().chosen, coefficient=0.0, bound_met=False)
    at_once = make(chosen=nothing, sweep=(make().sweep[3], make().sweep[0]))
    assert remarks(at_once)[0].startswith(
        "At the smallest coefficient tried, λ = 2, the bound was broken: retain asia acc_norm fell to 0.703 from 0.875."
    )
    assert "no better than at λ = 0" in remarks(make(chosen=nothing))[0]
    assert remarks(at_once)[0] in Page(render_html(at_once)).text


@pytest.mark.parametrize(
    ("metric", "before", "after", "keep", "perplexity", "met"),
    [
        ("acc", 20 / 26, 19 / 26, 0.95, 0.5, True),  # just 95 %, and as floats a little less
        ("acc", 20 / 26, 18 / 26, 0.95, 0.5, False),
        ("perplexity", 30.0, 31.0, 1.0, 0.5, False),  # scaled by what keep leaves, a rise would weigh nothing
        ("perplexity", 30.0, 30.4, 1.0, 0.5, True),
        ("perplexity", 30.0, 30.1, 0.95, 0.0, False),  # 99.7 % of the perplexity, and yet no rise was allowed
        ("perplexity", 30.0, 30.0, 0.95, 0.0, True),
        ("acc", 0.8, math.nan, 0.95, 0.5, False),
    ],
)
def test_the_verdict_on_test_items_is_the_rules(
    metric: str, before: float, after: float, keep: float, perplexity: float, met: bool
) -> None:
    key, higher = ("retain", "asia", metric), metric == "acc"
    chosen = Chosen(1.5, True, "r", "acc_norm", keep, perplexity, (key,))
    report = make(
        chosen=chosen,
        scores=(row("forget", "europe", 0.9, 0.4), row("retain", "asia", before, after, metric, higher)),
    )
    base, here = (replace(measured("retain", "asia", v, metric, higher)) for v in (before, after))
    rule = ChooseSpec.model_validate({"keep": keep, "perplexity": perplexity})
    assert judge(1.5, [here], [base], [key], rule).within_bound is met
    assert (report.scores[1] not in missed(report)) is met
    assert ("but not on test items" in headline(report)) is not met
    assert bool(remarks(report)) is not met
    source = render_html(report)
    assert ("▼" in source) is not met
    assert ("not met here" in source) is (not met and math.isfinite(after))


@given(
    st.sampled_from([("acc", True), ("loss", False), ("logprob", True), ("perplexity", False)]),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.sampled_from([0.5, 0.95, 1.0]),
    st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=200, deadline=None)
def test_the_pictures_measure_and_the_verdict_agree(
    kind: tuple[str, bool], before: float, after: float, keep: float, perplexity: float
) -> None:
    """Above the bound in the picture is within the bound by the rule, whatever the metric and the bounds."""
    metric, higher = kind
    sign = -1 if metric == "logprob" else 1
    share = share_kept(metric, higher, sign * before, sign * after, keep, perplexity)
    assert share is not None
    if abs(share - keep) > 1e-6:
        assert (share > keep) is holds(metric, higher, sign * before, sign * after, keep, perplexity)


def test_a_kept_set_that_cannot_show_harm_is_in_the_headline_and_its_row() -> None:
    scores = (
        row("forget", "europe", 0.9, 0.4),
        row("retain", "asia", 0.0, 0.0),
        replace(row("utility", "general", 0.7, 0.7), chance=0.25),
    )
    report = make(scores=scores)
    assert headline(report).endswith("every kept metric stayed within its bound, but 1 of 2 could not have shown harm.")
    assert "was 0" in Page(render_html(report)).text
    guessed = replace(scores[2], before=score(0.25))
    assert headline(make(scores=(*scores[:2], guessed))).endswith("; but no kept set could have shown harm.")
    assert headline(make()).endswith("every kept metric stayed within its bound.")


@pytest.mark.parametrize(
    ("metric", "higher", "before", "after", "share"),
    [
        ("acc", True, 0.8, 0.6, 0.75),
        ("acc", True, 0.0, 0.2, None),
        ("loss", False, 2.0, 2.5, 0.8),
        ("logprob", True, -3.0, -4.0, 0.75),
        ("logprob", True, -3.0, 1.0, 1.0),
        ("perplexity", False, 30.0, 30.5, 0.95),  # the largest rise allowed lies on the bound
        ("perplexity", False, 30.0, 29.5, 1.05),
        ("acc", True, 0.8, math.nan, None),
    ],
)
def test_share_kept(metric: str, higher: bool, before: float, after: float, share: float | None) -> None:
    found = share_kept(metric, higher, before, after, 0.95, 0.5)
    assert found == (None if share is None else pytest.approx(share))


def test_frontier_takes_the_worst_kept_metric_against_zero() -> None:
    points = frontier(make())
    assert [p.coefficient for p in points] == [0.0, 0.75, 1.5, 2.0]
    assert points[3].shares == pytest.approx({"retain/asia": 0.703 / 0.875, "utility/general": 0.641 / 0.72})
    assert points[3].worst == pytest.approx(0.703 / 0.875)
    assert not points[3].within_bound
    assert worst_kept(make()) == make().scores[1]


def test_reports_are_read_back_also_those_of_earlier_versions() -> None:
    chosen = replace(make().chosen, search="bisect", grid=(0.75, 1.5))
    sweep = (*make().sweep[:3], replace(make().sweep[3], collapsed="perplexity"))
    chance = replace(ATTACKS, chance=0.25)
    evidence = [with_evidence(**changed) for changed in ({"robustness": chance}, {"benchmark": MUSE}, {})]
    for report in (make(chosen=chosen, sweep=sweep), foreseen(), *evidence):
        plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert plain["schema"] == 1
        assert RunReport.from_json(plain) == report
    del plain["robustness"]["chance"]
    assert RunReport.from_json(plain) == with_evidence()
    for key in ("foresight", "benchmark", "membership", "robustness"):
        del plain[key]
    for key in ("search", "grid", "goals"):
        del plain["chosen"][key]
    for line in (*plain["scores"], *(s for p in plain["sweep"] for s in p["scores"])):
        for key in {"chance", "reference"} & set(line):
            del line[key]
    for at in plain["sweep"]:
        del at["collapsed"]
    assert RunReport.from_json(plain) == make()
    plain["sweep"][1]["share"] = 0.5  # as earlier versions wrote of one that was scored on half of the items
    assert RunReport.from_json(plain).sweep == (make().sweep[0], *make().sweep[2:])


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"chosen": None}, {"scores": 3}, {"sweep": [{}]}, {"sweep": None}, {"seconds": []}]
)
def test_what_is_no_report_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="report"):
        RunReport.from_json({**make().to_json(), **change})
    for value in (None, [], "x", {}):
        with pytest.raises(ValueError, match="report schema"):
            RunReport.from_json(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.4583, "0.458"), (31.42, "31.42"), (317.04, "317.0"), (12345.6, "12346"), (1.2e12, "1.2×10¹²"),
     (3e-6, "3.0×10⁻⁶"), (-0.459, "−0.459"), (0.0, "0.000"), (math.nan, "–"), (None, "–"), (math.inf, "∞"),
     (999_999.6, "1.0×10⁶")],
)  # fmt: skip
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_other_wordings() -> None:
    assert [duration(s) for s in (0.42, 48.4, 59.6, 133.0, 3900.0)] == [
        "0.4 s",
        "48 s",
        "1 min 00 s",
        "2 min 13 s",
        "1 h 05 min",
    ]
    assert [file_size(n) for n in (512, 4_100_000, 2_840_000_000)] == ["512 bytes", "4.1 MB", "2.8 GB"]
    sizes = (53_312, 999_400, 999_600, 1_235_814_400)
    assert [parameters(n).split(" p")[0] for n in sizes] == ["53 K", "999 K", "1 M", "1,236 M"]
    assert [percent(s) for s in (0.9643, 1.0, None, -0.5, 1e14)] == ["96.4 %", "100 %", "–", "−50 %", "1.0×10¹⁶ %"]
    assert [tick_label(v) for v in (0.25, 150.0, 1e6, 2e-5, -3.0)] == ["0.25", "150", "10⁶", "2×10⁻⁵", "−3"]


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
    assert [name for name, _ in evidence_facts(with_evidence())] == ["tofu", "membership", "robustness"]
    assert evidence_facts(make()) == []
    plain_only = Robustness("europe", "prob", ATTACKS.scores[:3])
    assert evidence_facts(make(robustness=plain_only)) == []  # nothing was attacked


@pytest.mark.parametrize(
    ("accuracy", "pmi", "became"),
    [(0.9, 8.0, "kept"), (0.458, 6.6, "suppressed"), (0.458, 1.6, "forgotten"), (0.3, -0.5, "forgotten")],
)
def test_what_is_only_said_less_often_is_suppressed(accuracy: float, pmi: float, became: str) -> None:
    rows = (row("forget", "europe", 0.917, accuracy), row("forget", "europe", 8.0, pmi, "pmi"))
    report = make(scores=(*rows, *make().scores[1:]))
    found = memory(report, rows[0])
    assert found is not None
    assert (found.became, found.left) == (became, max(0.0, pmi / 8))
    assert f"europe is {became}: " in memory_line(report)
    assert ("memory", memory_line(report)) in evidence_facts(report)
    unknown = replace(rows[1], before=score(0.05))
    assert memory(make(scores=(rows[0], unknown)), rows[0]) is None, "it was not known before"
    broken = replace(rows[1], after=score(math.nan))
    assert memory(make(scores=(rows[0], broken)), rows[0]) is None
    assert memory_line(make()) == ""


@pytest.mark.parametrize(("never", "left"), [(4.0, 0.25), (5.0, 0.0), (6.0, 0.0), (-1.0, 0.625), (math.nan, 0.625)])
def test_what_a_model_that_never_knew_has_is_no_memory(never: float, left: float) -> None:
    rows = (
        row("forget", "europe", 0.917, 0.458),
        replace(row("forget", "europe", 8.0, 5.0, "pmi"), reference=score(never)),
    )
    report = make(scores=rows)
    found = memory(report, rows[0])
    assert found is not None
    assert (found.became, found.left) == ("forgotten" if left <= 0.2 else "suppressed", pytest.approx(left))
    assert ("in a model that never knew" in memory_line(report)) == (never > 0)
    knew = replace(rows[1], reference=score(8.0))
    assert memory(make(scores=(rows[0], knew)), rows[0]) is None, "there was no more to be had"


# --- what was foreseen, held against what came ---


def entry(role: Role, name: str, slope: float, alpha: float | None = None, metric: str = "loss") -> SetForesight:
    return SetForesight(role, name, metric, slope, 40, 0.99, alpha, 0.05, 0.3, {}, correlation_verdict(alpha, 0.05))


def losses(c: float, *values: float) -> SweepPoint:
    """Losses in nats of f, m, b, c and a; a perplexity beside every one, which must not be used."""
    scores = []
    sets: tuple[tuple[Role, str], ...]
    sets = (("forget", "f"), ("retain", "m"), ("retain", "b"), ("utility", "c"), ("retain", "a"))
    for (role, name), loss in zip(sets, values, strict=True):
        scores.append(measured(role, name, math.exp(9 * loss), "perplexity", False))
        named = ("logprob", True) if name == "m" else ("loss", False)
        scores.append(measured(role, name, -loss if name == "m" else loss, *named))
    return SweepPoint(c, tuple(scores), True)


SWEEP = (losses(1.0, 5.0, 3.5, 2.2, 3.0, 3.5), losses(0.0, 1.0, 2.0, 2.0, 3.0, 2.0))
M, A = entry("retain", "m", 1.0, 0.5, "logprob"), entry("retain", "a", 1.0, 0.5)  # a is m in other units
B, C = entry("retain", "b", 0.5, 0.2), entry("utility", "c", 0.1, 0.3)


def of(kept: tuple[SetForesight, ...], sweep: tuple[SweepPoint, ...] = SWEEP, at: float = 1.0) -> RunReport:
    chosen = replace(make().chosen, coefficient=at)
    return make(chosen=chosen, sweep=sweep, foresight=Foresight((entry("forget", "f", 3.0),), kept))


def test_readings_say_the_range() -> None:
    assert "up to an order of 1/α² = 6.25" in reading(entry("retain", "a", 1.0, -0.4))
    assert "1/α²" in reading(entry("retain", "a", 1.0, 0.01))
    assert "no λ comes with a guarantee" in reading(entry("retain", "a", 1.0, 0.4))
    assert "only the slope" in reading(replace(entry("retain", "a", 1.0), alpha_vectors=None))


def test_predictions_are_held_against_what_came_by_hand() -> None:
    assert loss_changes(A, SWEEP) == (Point(0, 0, 0), Point(1, 1.5, 1))
    assert loss_changes(A, SWEEP[:1]) == (), "without λ = 0 there is no change"
    # |1.5 - 1|, |.2 - .5|, |0 - .1|
    off = "the straight line was off by"
    assert how_good(of((A, B, C))) == f"At λ = 1 {off} 0.300 nats per token on average over 3 kept sets."
    assert how_good(of((M, B, C))) == (
        f"At λ = 1 {off} 0.500 nats per answer on average over 1 kept set and 0.200 nats per token on average over "
        "2 kept sets."
    )
    assert how_good(of((A, B, C), at=0.0)).startswith("At λ = 1 "), "nothing was chosen: the smallest tried"
    for nothing in (of((A, B), SWEEP[1:], 0.0), of((A, B), at=2.0)):
        assert how_good(nothing) == "The sweep has no loss of a kept set to hold against the prediction."


@pytest.mark.parametrize(
    ("after", "doubt"),
    [(0.88, ": what has gone from one wording alone is not forgotten"), (0.4, "")],
)
def test_sets_in_a_chat_template_are_compared_with_their_plain_wording(after: float, doubt: str) -> None:
    rows = (row("forget", "europe", 0.92, 0.46), row("forget", "europe@plain", 0.9, after))
    said = wording_line(make(scores=rows))
    did = "forgot no more than chance may explain of europe@plain" if doubt else "still answers 40 % of europe@plain"
    assert said.startswith(f"asked outside its chat template the model {did} (accuracy 0.90 to ")
    assert said.endswith(f"; in it 0.92 to 0.46{doubt}")
    assert wording_line(make()) == ""
    assert "asked outside its chat template" in render_html(make(scores=rows))
