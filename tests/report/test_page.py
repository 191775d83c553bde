"""The HTML report: whole, safe against any text, every number shown where it belongs."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from compared_arena import read
from reports import (
    ATTACKS,
    FORESIGHT,
    MUSE,
    Page,
    attack,
    cells,
    foreseen,
    make,
    measured,
    point,
    row,
    score,
    with_evidence,
)

from unlearn.report.figures import frontier
from unlearn.report.page import changes, render_html
from unlearn.report.words import attacks_line, headline, how_searched
from unlearn.results import Chosen, Example, Fluency, Robustness, Score, SweepPoint, relearning, sampling
from unlearn.text import coefficient, number


def heads(source: str) -> list[str]:
    return re.findall(r"<h2>(.*?)(?:<|$)", source)


def section(source: str, title: str) -> str:
    start = source.index(f"<h2>{title}")
    return source[start : source.index("</section>", start)]


def test_the_page_is_well_formed_and_asks_for_nothing() -> None:
    source = render_html(foreseen())
    page = Page(source)
    assert source.startswith("<!doctype html>")
    assert page.tags["html"] == page.tags["h1"] == page.tags["main"] == 1
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not page.values("src")
    assert not page.values("href")
    assert all(value.startswith("#") for value in page.values("xlink:href"))
    assert not re.search(r"url\((?!#)|@import|https?:", source)
    assert any("default-src 'none'" in value for value in page.values("content"))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) >= 4
    for value in page.values("aria-labelledby"):
        assert set(value.split()) <= set(ids)
    for opening in re.findall(r"<svg[^>]*>", source):
        assert 'aria-hidden="true"' in opening or ("aria-label" in opening and 'role="img"' in opening)
    assert re.search(r'<desc id="frontier-wide-d">λ 0: forget 0.925 ± 0.120, kept 100 %; λ 0.75', source)


def test_a_report_shows_its_page_in_a_notebook() -> None:
    shown = foreseen()._repr_html_()
    assert html.unescape(shown.partition('srcdoc="')[2].rpartition('" style=')[0]) == render_html(foreseen())


def test_the_parts_come_in_the_order_a_reader_wants_and_say_which_items_they_are_of() -> None:
    source = render_html(make())
    assert re.findall(r'<h2>([^<]+)(?:<span class="chip">([^<]+)</span>)?', source) == [
        ("Frontier", "validation items"),
        ("Scores as λ grows", "validation items"),
        ("Before and after", "test items"),
        ("In the model&#x27;s words", "test items"),
        ("The whole sweep", "validation items"),
        ("Data", ""),
        ("How it was made", ""),
    ]
    assert heads(render_html(foreseen()))[1:4] == [
        "Scores as λ grows",
        "What could be known beforehand",
        "Before and after",
    ]
    evidence = ["Beside a model that never knew", "TOFU", "Membership inference", "What comes back"]
    assert heads(render_html(with_evidence()))[3:7] == evidence
    mixed = make(scores=(*make().scores, replace(make().scores[1], split="validation", name="hellaswag")))
    assert ">Items</th>" in render_html(mixed)
    assert ">Items</th>" not in source


def test_each_number_of_the_report_is_shown() -> None:
    report = make()
    page = Page(render_html(report))
    text = page.text + " ".join(v for _, _, v in page.attributes)
    for line in report.scores:
        for found in (line.before, line.after):
            assert number(found.value) in text
            assert str(found.n) in text
    for at in report.sweep:
        assert coefficient(at.coefficient) in text
        assert all(number(s.score.value) in text for s in at.scores)
    for shown in (
        "± 0.098", "± 0.120",  # 1.96 * .05 on test items, 1.96 * .0611 on validation items
        "−0.459", "97.6 %", "2 min 13 s", "1 min 38 s", "4471", "17", "3.8127", "2.317", "4.1 MB", "2.13.0",
        "retain asia acc_norm fell to 0.703 from 0.875", "Two rows were cut.", "2025-11-22 15:01",
        "loss from 2.300 to 0.400",
    ):  # fmt: skip
        assert shown in text, shown
    table = section(render_html(report), "The whole sweep")
    here = table[table.index('<tr class="here">') :]
    assert here.startswith('<tr class="here"><th scope="row">1.5<small> chosen</small></th><td class="verdict">within')
    assert table.count('class="here"') == 1


def test_the_page_says_how_the_coefficient_was_looked_for() -> None:
    steps = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    found = make(chosen=replace(make().chosen, search="bisect", grid=steps))
    words = "Found by bisection: 3 of the grid's 8 coefficients were scored."
    assert how_searched(found) == words
    assert Page(render_html(found)).text.count(words) == 2
    every = make(chosen=replace(make().chosen, grid=(0.75, 1.5, 2.0)))
    assert how_searched(every) == "All 3 coefficients of the grid were scored."
    assert how_searched(make()) is None, "a report from before there was a choice"


def test_the_frontier_has_each_coefficient_where_it_belongs() -> None:
    source = section(render_html(make()), "Frontier")
    drawing = source[: source.index("</svg>")]
    found = re.findall(r'<g><title>λ = ([\d.]+)[^<]*</title>.*?<use [^>]*?x="([\d.]+)" y="([\d.]+)"', drawing)
    assert [c for c, *_ in found] == ["0", "0.75", "1.5", "2"]
    xs, ys = ([float(spot[n]) for spot in found] for n in (1, 2))
    assert xs == sorted(xs, reverse=True)  # the forget score falls
    assert (xs[0] - xs[1]) / (xs[0] - xs[3]) == pytest.approx((0.925 - 0.801) / (0.925 - 0.251), abs=1e-3)
    kept = [1.0, 1.0, 0.852 / 0.875, 0.703 / 0.875]  # the worst of the kept sets
    assert (ys[2] - ys[0]) / (ys[3] - ys[0]) == pytest.approx((1 - kept[2]) / (1 - kept[3]), abs=1e-3)
    assert ys[0] == ys[1]
    bound = re.search(r"M [\d.]+ ([\d.]+) L [\d.]+ \1 ?\"[^>]*stroke: var\(--bound\)", drawing)
    assert bound
    assert ys[2] < float(bound[1]) < ys[3]


@pytest.mark.parametrize(("left", "became"), [(6.6, "suppressed"), (1.6, "forgotten")])
def test_the_frontier_and_the_table_say_whether_it_is_forgotten(left: float, became: str) -> None:
    known = (*make().scores, row("forget", "europe", 8.0, left, "pmi"))
    source = render_html(make(scores=known))
    assert source.count(f"chosen, λ = 1.5: {became}") == 1
    assert section(source, "Frontier").count(f">λ = 1.5: {became}<") == 1  # there is no room on the narrow one
    assert re.findall(r'data-label="Kept"><span>([a-z]+)</span>', section(source, "Before and after")) == [became]
    untouched = replace(make().chosen, coefficient=0.0)
    assert f": {became}" not in section(render_html(make(scores=known, chosen=untouched)), "Frontier")


def test_what_was_foreseen_is_shown_beside_what_came() -> None:
    source = render_html(foreseen())
    page = Page(source)
    for shown in (
        "0.991", "0.420 ± 0.059", "0.211", "+1.500", "aligned",  # 1.96 * 0.03
        "Predicted at λ = 1.5", "+2.250", "+0.750", "−0.021", "+0.188",
        "retain/asia. Aligned: no λ comes with a guarantee", "utility/general. No fine-tuning on this set",
        "a reading, not a bound", "λ 2: measured +1.000, predicted +3.000",
        # |.75 - 2.25| and |.1875 + .021|
        "the straight line was off by 1.500 nats per answer on average over 1 kept set and 0.208 nats per token",
        "Cosine of the vectors per module: retain/asia, 4 modules",
    ):  # fmt: skip
        assert shown in page.text, shown
    layers = cells(source, "Cosines per module, retain/asia")
    assert [line[0] for line in layers[1:]] == ["0", "2", "10", "–"]
    assert page.tags["svg"] > Page(render_html(replace(foreseen(), foresight=None))).tags["svg"]
    assert "What could be known" not in render_html(make())
    bare = render_html(make(foresight=FORESIGHT, sweep=()))
    assert "The sweep has no loss of a kept set" in Page(bare).text


def test_collapsed_coefficients_are_marked() -> None:
    gone = replace(make().sweep[3], collapsed="the held-out perplexity is 1e6 <b>")
    source = render_html(make(sweep=(*make().sweep[:3], gone)))
    page = Page(source)
    assert "× predictions collapsed: the held-out perplexity is 1e6 <b>; retain asia acc_norm fell" in page.text
    assert "A cross: there the model's predictions have collapsed" in page.text
    assert "outside the bound, predictions collapsed" in section(source, "Frontier")
    legend = source[source.index('class="legend"') : source.index("</ul>", source.index('class="legend"'))]
    assert "predictions collapsed" in legend
    assert "bound broken" not in legend
    fine = render_html(make())
    assert "collapsed" not in fine
    assert "bound broken" in fine


# --- comparisons and attacks ---


def test_every_figure_of_a_comparison_is_in_its_column() -> None:
    page = render_html(with_evidence())
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
    only = (replace(make().scores[0], reference=Score(0.5, None, 1)), *make().scores[1:])
    page = render_html(with_evidence(benchmark=MUSE, scores=only))
    assert "<h2>MUSE" in page
    assert MUSE.missing in Page(page).text
    assert [r[0] for r in cells(page, "Benchmark")[1:]] == ["verbmem_f", "knowmem_f", "knowmem_r"]  # no empty row
    assert [r[-1] for r in cells(page, "Scores beside the reference")[1:]] == ["0.500"]  # rows with one, alone


def test_attacks_and_what_comes_back() -> None:
    page = render_html(with_evidence())
    table = cells(page, "Attacks on the result")
    assert table[0] == ["Attack", "before", "after", "never knew", "Came back"]
    shown = {r[0]: r[1:] for r in table[1:]}
    margin = "± 0.024"
    assert shown["as it is"] == [f"0.900 {margin}", f"0.100 {margin}", f"0.120 {margin}", "–"]
    assert shown["4-bit quantisation"][-1] == "50 %"  # (.5 - .1) / (.9 - .1)
    assert shown["relearning on 8 forgotten items, 1 step"][-1] == "25 %"
    assert shown["relearning on 8 forgotten items, 20 steps"] == ["–", f"0.740 {margin}", f"0.440 {margin}", "80 %"]
    assert not [name for name in shown if "lens" in name], "folded away below the table"
    assert cells(page, "The logit lens")[1:] == [["the logit lens, layer 1", "–", f"0.080 {margin}", "–", "nothing"]]
    text = Page(page).text
    assert attacks_line(ATTACKS) in text
    assert "80 % comes back with 20 steps of relearning" in text
    assert "after: 0: 0.100, 1: 0.300, 20: 0.740" in text, "the curve"
    without = replace(ATTACKS, scores=tuple(s for s in ATTACKS.scores if s.who != "edited"))
    table = cells(render_html(with_evidence(robustness=without)), "Attacks on the result")
    assert table[0] == ["Attack", "before", "never knew", "Came back"]
    assert {r[-1] for r in table[1:]} == {"–"}


def test_attacks_scored_otherwise_name_their_metric_and_chance() -> None:
    plain = [replace(s, attack="greedy answers", metric="rougeL") for s in ATTACKS.scores[:2]]
    best = replace(attack("edited", 0.4, "sample", sampling(8)), metric="rougeL")
    found = Robustness("europe", "prob", (*ATTACKS.scores, *plain, best))
    shown = {r[0]: r[-1] for r in cells(render_html(with_evidence(robustness=found)), "Attacks on the result")[1:]}
    assert shown["greedy answers (rougeL)"] == "–"
    assert shown["the best of 8 samples (rougeL)"] == "37.5 %"
    choices = tuple(replace(s, metric="acc") for s in ATTACKS.scores)
    found = replace(ATTACKS, metric="acc", scores=choices, chance=0.25)
    assert "Of what was forgotten (accuracy 0.90 to 0.10, chance 0.25)" in attacks_line(found)
    page = render_html(
        with_evidence(scores=tuple(replace(s, chance=0.25) for s in with_evidence().scores), robustness=found)
    )
    assert "Guessing would score 0.250." in Page(page).text
    assert cells(page, "Scores beside the reference")[1][1] == "acc_norm chance 0.25"


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [-3.0, -1.0], [math.nan, 0.5]])
def test_curves_of_nothing_and_of_zeros_are_drawn(values: list[float]) -> None:
    relearned = tuple(
        replace(attack("edited", v, "relearn", relearning(8), n), metric="logprob") for n, v in enumerate(values)
    )
    found = Robustness("europe", "logprob", (replace(attack("edited", 0.0), metric="logprob"), *relearned))
    source = render_html(with_evidence(robustness=found))
    Page(source)
    assert not re.search(r"\b(nan|inf)\b", source, re.I)


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
    files = {p.name for p in (compared / "run" / "figures").iterdir()}
    stems = {"frontier", "curve-1-forget-f", "foresight-1-forget-f", "relearning-1-relearning-on-2-forgotten-items"}
    assert {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "png")} <= files
    text = (compared / "run" / "report.json").read_text(encoding="utf-8")
    assert report.to_json() == json.loads(text)


# --- missing pieces and extremes ---


def test_nothing_but_one_score() -> None:
    bare = make(
        chosen=Chosen(1.0, True, "r", "acc_norm"), scores=make().scores[:1], examples=(), data=(), vector={},
        training=(), exports={}, seconds={}, provenance={}, warnings=(), description="",
        sweep=(SweepPoint(0.0, (measured("forget", "europe", 0.9),), True),),
    )  # fmt: skip
    page = Page(render_html(bare))
    assert "No kept set was scored" in page.text
    assert "no kept set was measured" in page.text
    assert "How it was made" not in page.text
    assert "1 coefficient, 1 metric" in page.text
    assert page.tags["svg"] == 1
    assert "Nothing was scored." in Page(render_html(replace(bare, scores=(), sweep=()))).text
    many = tuple(point(i / 8, 0.9 - i / 40, 0.88 - i / 100, 0.7) for i in range(17))
    assert render_html(make(sweep=many)).count("worst kept") >= 2 * 17
    Page(render_html(make(sweep=many[:1])))


def test_missing_values_show_as_a_dash_and_never_as_nan() -> None:
    nan, inf = math.nan, math.inf
    broken = make(
        scores=(replace(make().scores[0], after=score(nan, None)), replace(make().scores[1], before=score(inf, nan))),
        sweep=(*make().sweep[:2], replace(point(1.5, nan, nan, 0.7), within_bound=False), point(2.0, inf, 0.5, 0.5)),
        vector={"norm": nan, "nothing": None, "empty": [], "map": {}},
        training=({"stage": "forget", "losses": [nan, nan, nan, nan], "loss_first": nan, "seconds": nan},),
        seconds={"load": nan, "search": 3.0},
    )
    source = render_html(broken)
    assert not re.search(r"\bnan\b|\binf\b", source, re.I)
    text = Page(source).text
    assert "–" in text
    assert "∞" in text
    assert not re.search(r"\bNone\b", text)


def test_perplexities_of_a_million_million_get_a_logarithmic_axis() -> None:
    sweep = tuple(
        SweepPoint(c, (measured("forget", "book", v, "perplexity", False),
                       measured("retain", "other", 30 + c, "perplexity", False)), c < 1)
        for c, v in ((0.0, 31.0), (0.5, 80.0), (1.0, 4e6), (2.0, 1.2e12))
    )  # fmt: skip
    chosen = Chosen(0.5, True, "r", "perplexity", 0.95, 0.5, (("retain", "other", "perplexity"),))
    scores = (
        row("forget", "book", 31.0, 1.2e12, "perplexity", False),
        row("retain", "other", 30.0, 30.4, "perplexity", False),
    )
    text = Page(render_html(make(chosen=chosen, sweep=sweep, scores=scores))).text
    for shown in ("1.2×10¹²", "10⁷", "more forgotten →", "a rise of 0.500 lies on the bound", "+0.400"):
        assert shown in text
    assert headline(make(chosen=chosen, sweep=sweep, scores=scores)).startswith(
        "The model now finds what it was asked to forget 3.9×10¹⁰ times less likely: book perplexity rose from 31.00 to"
    )


def test_examples_fold_long_prompts_and_mark_changed_words() -> None:
    prompt = "beginning " + "word " * 400 + "the very end"
    source = render_html(make(examples=(Example("forget", "europe", prompt, "a", "A.", "c"),)))
    summary = re.search(r"<details><summary>(… .*?)</summary>beginning", source, re.S)
    assert summary
    assert summary[1].endswith("the very end")
    assert len(summary[1]) < 300
    assert source.count("✓</span>") == 1
    read = Fluency(0.25, 0.0), Fluency(0.75, math.log(40)), Fluency(0.5, None)
    asked = [Example("forget", "europe", prompt, "a", "A.", "c", read[0], one) for one in read[1:]]
    assert "Repeated 25 % → 62.5 % · perplexity 1.000 → 40.00" in Page(render_html(make(examples=tuple(asked)))).text
    assert "Repeated 2" not in source  # of a report that does not have it
    before, after = changes("when he was young & strong", "when he was old & very strong")
    assert before == "when he was <del>young</del> &amp; strong"
    assert after == "when he was <ins>old</ins> &amp; <ins>very</ins> strong"
    assert changes("Tokyo", "Tokyo")[1] == '<span class="same">Tokyo</span>'
    assert changes("Paris", "") == ("<del>Paris</del>", "–")
    left, right = changes("a " * 2000, "b " * 2000)
    assert (left.count("<del>"), right.count("<ins>")) == (1, 1)


def test_chance_stands_beside_every_accuracy_of_a_choice() -> None:
    chances = {"europe": 0.25, "asia": 0.2}
    base = make()
    scores = tuple(replace(r, chance=chances.get(r.name)) for r in base.scores)
    sweep = tuple(
        replace(p, scores=tuple(replace(s, chance=chances.get(s.name)) for s in p.scores)) for p in base.sweep
    )
    source = render_html(make(scores=scores, sweep=sweep))
    text = Page(source).text
    assert "europe, accuracy (chance 0.25)" in text, "the card"
    assert "0.878 → 0.857, test items, n = 48; chance 0.20" in text, "the card of what was kept"
    assert "forget · acc_norm ↑, chance 0.25" in text, "the curve"
    assert text.count("acc_norm ↑ chance 0.25") == 1, "the table"
    assert text.count("acc_norm ↑chance 0.25") == 1, "the sweep"
    assert "chance" not in Page(render_html(base)).text.replace("than chance", "")


def test_several_goals_and_additions_have_an_axis_of_their_own() -> None:
    goals = (("forget", "europe", "acc_norm"), ("forget", "book", "perplexity"))
    sweep = tuple(
        SweepPoint(c, (measured("forget", "europe", a), measured("forget", "book", p, "perplexity", False),
                       measured("retain", "asia", 0.8)), True)
        for c, a, p in ((0.0, 0.9, 30.0), (1.0, 0.3, 40.0), (2.0, 0.9, 29.0))
    )  # fmt: skip
    scores = (
        row("forget", "europe", 0.9, 0.3),
        row("forget", "book", 30.0, 40.0, "perplexity", False),
        row("retain", "asia", 0.8, 0.8),
    )
    report = make(chosen=replace(make().chosen, goals=goals), sweep=sweep, scores=scores)
    found = [p.forget.value for p in frontier(report) if p.forget]
    assert found == pytest.approx([1, (0.3 / 0.9 + 30 / 40) / 2, (1 + 30 / 29) / 2])
    text = Page(render_html(report)).text
    assert "Asked to forget 100 % → 54.2 % left of 2 sets, on average" in text
    assert "mean left of europe and book ← more done" in text
    assert "book perplexity 30.00 → 40.00, n = 48" in text
    learned = make(
        chosen=replace(make().chosen, goals=(("learn", "africa", "acc_norm"),)),
        sweep=tuple(
            SweepPoint(c, (measured("learn", "africa", v), measured("retain", "asia", 0.8)), True)
            for c, v in ((0.0, 0.5), (1.0, 0.9))
        ),
        scores=(row("learn", "africa", 0.5, 0.9),),
    )
    text = Page(render_html(learned)).text
    assert "No kept set was scored" not in text
    assert "learn score: africa acc_norm more learned →" in text


def test_a_long_metric_name_does_not_leave_the_narrow_chart() -> None:
    name = "m" * 200
    sweep = tuple(replace(p, scores=(replace(p.scores[0], metric=name), *p.scores[1:])) for p in make().sweep)
    chosen, scores = replace(make().chosen, forget_metric=name), (row("forget", "europe", 0.9, 0.4, name),)
    report = make(chosen=chosen, sweep=sweep, scores=scores)
    titles = re.findall(r">(forget score: europe m+…   ← more forgotten)<", render_html(report))
    assert len(titles) == 2
    assert len(titles[1]) * 6.6 <= 2 * (360 - 198)  # it is centred on 198, the middle of the frame
