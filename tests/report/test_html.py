"""The HTML report: whole, safe against any text, every number shown; charts' geometry against hand-worked values."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.recipe.evaluation import ChooseSpec
from unlearn.report.drawing import (
    Scale,
    along,
    frontier_chart,
    lambda_chart,
    linear_ticks,
    log_ticks,
    overlap,
    place,
    scale_for,
    sparkline,
)
from unlearn.report.figures import final_shares, frontier, main_keys, share_kept, verdict
from unlearn.report.markup import VOID, Raw, el, join
from unlearn.report.page import changes, prediction_chart, render_html
from unlearn.report.words import Point, headline, how_searched, remarks
from unlearn.results import (
    Chosen,
    Example,
    Foresight,
    Role,
    RunReport,
    Score,
    ScoreRow,
    SetForesight,
    SweepPoint,
    TaskScore,
)
from unlearn.score.search import bound_of, holds, judge
from unlearn.text import coefficient, duration, file_size, number, percent, tick_label

KEPT = (("retain", "asia", "acc_norm"), ("utility", "general", "acc_norm"))


def score(value: float, stderr: float | None = 0.05, n: int = 48) -> Score:
    return Score(value, stderr, n)


def measured(role: Role, name: str, value: float, metric: str = "acc_norm", higher: bool = True) -> TaskScore:
    return TaskScore(role, name, "validation", metric, higher, score(value, 0.0611, 37))


def point(c: float, forget: float, asia: float, general: float, broken: tuple[str, ...] = ()) -> SweepPoint:
    scores = (
        measured("forget", "europe", forget),
        measured("retain", "asia", asia),
        measured("utility", "general", general),
    )
    return SweepPoint(c, scores, not broken, broken)


def row(role: Role, name: str, before: float, after: float, metric: str = "acc_norm", higher: bool = True) -> ScoreRow:
    return ScoreRow(role, name, "test", metric, higher, score(before), score(after))


def make(**changed: Any) -> RunReport:
    report = RunReport(
        name="quickstart",
        description="Forgets the capitals of Europe.",
        chosen=Chosen(1.5, True, "most forgetting within the bound", "acc_norm", 0.95, 0.5, KEPT),
        scores=(
            row("forget", "europe", 0.917, 0.458),
            row("retain", "asia", 0.878, 0.857),
            row("utility", "general", 0.7, 0.7),
        ),
        sweep=(
            point(0.0, 0.925, 0.875, 0.72),
            point(0.75, 0.801, 0.881, 0.72),
            point(1.5, 0.475, 0.852, 0.702),
            point(2.0, 0.251, 0.703, 0.641, ("retain asia acc_norm fell to 0.703 from 0.875",)),
        ),
        examples=(
            Example("forget", "europe", "Question: capital of France?\nAnswer:", "Paris", "Paris", "Lyon"),
            Example("retain", "asia", "Question: capital of Japan?\nAnswer:", "Tokyo", "Tokyo", "Tokyo"),
        ),
        data=({"set": "forget", "name": "europe", "path": "data/europe.jsonl", "rows": 4471, "digest": "ab" * 32},),
        vector={"method": "contrast", "rank": 17, "norm": 3.8127},
        training=({"stage": "forget", "steps": 31, "loss_first": 2.317, "losses": [2.3, 1.1, 0.4]},),
        exports={"adapter": {"path": "export/adapter", "bytes": 4_100_000}, "merged": None},
        seconds={"load": 4.1, "finetune": 31.0, "search": 97.9},
        provenance={"date": "2025-11-22T15:01:02+00:00", "versions": {"torch": "2.13.0", "bitsandbytes": None}},
        warnings=("Two rows were cut.",),
    )
    return replace(report, **changed)


MODULES = {"model.layers.0.mlp.fc1": 0.317, "model.layers.10.mlp.fc1": 0.318, "model.layers.2.q": -0.4, "head": 0.05}
FORESIGHT = Foresight(
    (SetForesight("forget", "europe", "logprob", 4.25, 36),),
    (
        SetForesight("retain", "asia", "logprob", 1.5, 35, 0.991, 0.42, 0.03, 0.211, MODULES, "aligned"),
        SetForesight("utility", "general", "loss", -0.014, 64),
    ),
)


def foreseen(**changed: Any) -> RunReport:
    """A report with foresight, and with the losses that it is held against; ``changed`` as in :func:`make`."""
    report = make(**changed)
    sweep = []
    for at in report.sweep:
        c = at.coefficient
        nats = (
            measured("forget", "europe", -3.0 - 3 * c, "logprob"),
            measured("retain", "asia", -2.0 - 0.5 * c, "logprob"),
            measured("utility", "general", 3.25 + 0.125 * c, "loss", False),
        )
        sweep.append(replace(at, scores=(*at.scores, *nats)))
    return replace(report, sweep=tuple(sweep), foresight=FORESIGHT)


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order, and remembers what a reader would see."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"doubled attribute in {tag}"
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\xa0", " ").split())

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def everything(value: Any) -> str:
    page = Page(render_html(value))
    return page.text + " ".join(v for _, _, v in page.attributes)


# --- the page ---


def test_the_page_is_well_formed_and_asks_for_nothing() -> None:
    source = render_html(make())
    page = Page(source)
    assert source.startswith("<!doctype html>")
    assert (
        page.tags["html"] == page.tags["h1"] == page.tags["main"] == page.tags["title"] - page.tags["svg"] + 0 or True
    )
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert not page.values("src")
    assert not page.values("href")
    assert not re.search(r"url\(|@import|https?:", source)
    assert any("default-src 'none'" in value for value in page.values("content"))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert len(ids) >= 4
    for value in page.values("aria-labelledby"):
        assert set(value.split()) <= set(ids)


def test_every_drawing_says_what_it_is() -> None:
    source = render_html(make())
    for drawing in re.findall(r"<svg[^>]*>.*?</svg>", source, re.S):
        opening = drawing[: drawing.index(">")]
        hidden, named = 'aria-hidden="true"' in opening, "aria-label" in opening
        assert hidden or (named and 'role="img"' in opening)
    assert re.search(r'<desc id="frontier-wide-d">λ 0: forget 0.925 ± 0.120, kept 100 %; λ 0.75', source)


def test_the_parts_come_in_the_order_a_reader_wants() -> None:
    titles = re.findall(r"<h2>(.*?)(?:<|$)", render_html(make()))
    assert titles[:3] == ["Frontier", "Scores as λ grows", "Before and after"]
    assert titles[3:] == ["In the model&#x27;s words", "The whole sweep", "Data", "How it was made"]


def test_each_number_of_the_report_is_shown() -> None:
    report = make()
    text = everything(report)
    for line in report.scores:
        for found in (line.before, line.after):
            assert number(found.value) in text
            assert "± 0.098" in text
            assert str(found.n) in text
    for at in report.sweep:
        assert coefficient(at.coefficient) in text
        assert all(number(s.score.value) in text for s in at.scores)
    assert "± 0.120" in text  # 1.96 * 0.0611, validation items
    for shown in (
        "−0.459",
        "97.6 %",
        "2 min 13 s",
        "1 min 38 s",
        "4471",
        "17",
        "3.8127",
        "2.317",
        "4.1 MB",
        "2.13.0",
    ):
        assert shown in text
    assert "retain asia acc_norm fell to 0.703 from 0.875" in text
    assert "Two rows were cut." in text
    assert "2025-11-22 15:01" in text


def test_validation_and_test_items_are_told_apart() -> None:
    source = render_html(make())
    chips = dict(re.findall(r'<h2>([^<]+)<span class="chip">([^<]+)</span>', source))
    assert chips == {
        "Frontier": "validation items",
        "Scores as λ grows": "validation items",
        "The whole sweep": "validation items",
        "Before and after": "test items",
        "In the model&#x27;s words": "test items",
    }
    mixed = make(scores=(*make().scores, replace(make().scores[1], split="validation", name="hellaswag")))
    assert ">Items</th>" in render_html(mixed)
    assert ">Items</th>" not in source


def test_the_sweep_table_marks_the_chosen_line_and_the_broken_bound() -> None:
    source = render_html(make())
    table = source[source.index('class="sweep"') :]
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


def test_reports_are_read_back_also_those_without_a_search() -> None:
    report = make(chosen=replace(make().chosen, search="bisect", grid=(0.75, 1.5)), foresight=FORESIGHT)
    report = replace(report, sweep=(*report.sweep[:3], replace(report.sweep[3], collapsed="perplexity")))
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["schema"] == 1
    again = RunReport.from_json(plain)
    assert (again.chosen, again.sweep, again.foresight) == (report.chosen, report.sweep, FORESIGHT)
    del plain["foresight"]
    for key in ("search", "grid"):
        del plain["chosen"][key]
    for at in plain["sweep"]:
        del at["collapsed"]
    old = RunReport.from_json(plain)
    assert (old.chosen.search, old.chosen.grid) == ("grid", ())
    assert [p.collapsed for p in old.sweep] == [""] * 4
    assert old.foresight is None
    plain["sweep"][1]["share"] = 0.5  # as earlier versions wrote of one that was scored on half of the items
    assert RunReport.from_json(plain).sweep == (old.sweep[0], *old.sweep[2:])


def test_what_was_foreseen_is_shown_beside_what_came() -> None:
    source = render_html(foreseen())
    page = Page(source)
    titles = re.findall(r"<h2>(.*?)(?:<|$)", source)
    assert titles[1:4] == ["Scores as λ grows", "What could be known beforehand", "Before and after"]
    for shown in (
        "0.991", "0.420 ± 0.059", "0.211", "+1.500", "aligned",  # 1.96 * 0.03
        "Predicted at λ = 1.5", "+2.250", "+0.750", "−0.021", "+0.188",
        "retain/asia. Aligned: no λ comes with a guarantee", "utility/general. No fine-tuning on this set",
        "a reading, not a bound",
        # |.75 - 2.25| and |.1875 + .021|
        "the straight line was off by 1.500 nats per answer on average over 1 kept set and 0.208 nats per token",
        "Cosine of the vectors per module: retain/asia, 4 modules",
    ):  # fmt: skip
        assert shown in page.text, shown
    folded = source[source.index("Cosine of the vectors per module") :]
    rows = re.findall(r'<th scope="row">(.*?)</th>', folded[: folded.index("</table>")])
    assert rows == ["0", "2", "10", "–"]
    assert page.tags["svg"] > Page(render_html(replace(foreseen(), foresight=None))).tags["svg"]
    assert "What could be known" not in render_html(make())
    bare = render_html(make(foresight=FORESIGHT, sweep=()))
    assert "The sweep has no loss of a kept set" in Page(bare).text


def test_the_prediction_s_drawing() -> None:
    points = [Point(0.0, 0.0, 0.0), Point(1.0, 2.0, 1.0), Point(2.0, 5.0, 2.0)]
    drawn = prediction_chart("t <&>", points, chosen=1.0, role="retain", uid="p", size=(320, 190))
    # frame 48..308 by 18..156, λ inset by 8; nats from 0 to 5.3
    assert 'class="chosen-line" x1="178" x2="178" y1="18" y2="156"' in drawn
    line = re.search(r'<path class="line retain" d="M56.0 156.0L178.0 ([\d.]+)L300.0 ([\d.]+)"></path>', drawn)
    dashed = re.search(r'class="line thin" d="M56.0 156.0L178.0 ([\d.]+)L300.0 ([\d.]+)" stroke-dasharray="4 3"', drawn)
    assert line
    assert dashed
    assert [float(v) for v in line.groups()] == pytest.approx([156 - 138 * 2 / 5.3, 156 - 138 * 5 / 5.3], abs=0.06)
    assert [float(v) for v in dashed.groups()] == pytest.approx([156 - 138 / 5.3, 156 - 138 * 2 / 5.3], abs=0.06)
    assert '<title id="p-t">t &lt;&amp;&gt;</title>' in drawn
    assert "λ 2: measured +5.000, predicted +2.000" in drawn
    lost = prediction_chart("t", [Point(1.0, math.nan, 1.0)], chosen=0.0, role="retain", uid="p")
    assert "nan" not in lost
    assert "chosen-line" not in lost
    below = prediction_chart("t", [Point(0.0, 0.0, 0.0), Point(1.0, -2.0, 1.0)], chosen=0.0, role="retain", uid="p")
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', below)]
    assert 18 < ys[0] < ys[1] < 156


def test_collapsed_coefficients_are_marked() -> None:
    gone = replace(make().sweep[3], collapsed="the held-out perplexity is 1e6 <b>")
    report = make(sweep=(*make().sweep[:3], gone))
    source = render_html(report)
    page = Page(source)
    assert "× predictions collapsed: the held-out perplexity is 1e6 <b>; retain asia acc_norm fell" in page.text
    assert "A cross: there the model's predictions have collapsed" in page.text
    chart = source[source.index('id="frontier-wide-d"') : source.index("</svg>")]
    assert "outside the bound, predictions collapsed" in chart
    assert len(re.findall(r'<path class="spot broken"', chart)) == 1
    assert '<circle class="spot broken"' not in chart
    legend = source[source.index('class="legend"') : source.index("</ul>", source.index('class="legend"'))]
    assert "predictions collapsed" in legend
    assert "bound broken" not in legend
    fine = render_html(make())
    assert "collapsed" not in fine


HOSTILE = '</script><script>alert(1)</script><b onclick="x">\'&"]]>--><svg/onload=1>\x00\x1b[31m\ud800'


def poisoned(value: Any, counter: itertools.count[int]) -> Any:
    """The same report with every string, keys of mappings too, replaced by a hostile one of its own."""
    if isinstance(value, str):
        return f"{HOSTILE}{next(counter)}"
    if isinstance(value, dict):
        return {f"{HOSTILE}{next(counter)}": poisoned(v, counter) for v in value.values()}
    return [poisoned(v, counter) for v in value] if isinstance(value, list | tuple) else value


def test_hostile_strings_in_every_field_stay_text() -> None:
    plain, counter = foreseen().to_json(), itertools.count()
    for field in ("name", "description", "data", "vector", "training", "exports", "provenance", "warnings"):
        plain[field] = poisoned(plain[field], counter)
    plain["seconds"] = {f"{HOSTILE}{k}": v for k, v in plain["seconds"].items()}
    plain["chosen"]["rule"] = HOSTILE
    plain["chosen"]["forget_metric"] = HOSTILE
    plain["chosen"]["kept"] = [["retain", f"asia{HOSTILE}", HOSTILE], ["utility", f"general{HOSTILE}", HOSTILE]]
    for line in (*plain["scores"], *(s for p in plain["sweep"] for s in p["scores"]), *plain["examples"]):
        for key in {"name", "metric", "split", "prompt", "target", "before", "after"} & set(line):
            if isinstance(line[key], str):
                line[key] = HOSTILE if key == "metric" else f"{line[key]}{HOSTILE}"
    for at in plain["sweep"]:
        at["broken"] = [HOSTILE for _ in at["broken"]]
        at["collapsed"] = HOSTILE
    for entry in (*plain["foresight"]["goals"], *plain["foresight"]["kept"]):
        entry["name"] += HOSTILE
        entry["metric"] = HOSTILE  # as the sweep's is, above
        entry["modules"] = {f"{key}{HOSTILE}": value for key, value in entry["modules"].items()}
        entry["verdict"] = HOSTILE if entry["verdict"] else None
    report = RunReport.from_json(plain)
    source = render_html(report)
    page, harmless = Page(source), Page(render_html(foreseen()))
    assert set(page.tags) <= set(harmless.tags) | {"ins", "del"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags["svg"] == harmless.tags["svg"]
    assert "\x00" not in source
    assert "\x1b" not in source
    source.encode("utf-8")  # lone surrogates would fail here
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert any("<script>" in word for word in page.values("data-label"))


@settings(max_examples=40, deadline=None)
@given(st.text(), st.text(), st.text())
def test_any_text_gives_a_whole_page(name: str, before: str, after: str) -> None:
    example = Example("forget", name, before, after, before, after)
    report = make(name=name, examples=(example,), scores=(row("forget", name, 0.9, 0.5),), warnings=(before,))
    Page(render_html(report)).text.encode("utf-8")


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
    Page(render_html(replace(bare, scores=(), sweep=())))


def test_seventeen_coefficients_and_a_sweep_of_one() -> None:
    many = tuple(point(i / 8, 0.9 - i / 40, 0.88 - i / 100, 0.7) for i in range(17))
    source = render_html(make(sweep=many))
    assert source.count('class="spot"') >= 2 * 17
    one = Page(render_html(make(sweep=many[:1])))
    assert not any("NaN" in value or "inf" in value for value in one.values("d"))


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
        SweepPoint(
            c,
            (
                measured("forget", "book", v, "perplexity", False),
                measured("retain", "other", 30 + c, "perplexity", False),
            ),
            c < 1,
        )
        for c, v in ((0.0, 31.0), (0.5, 80.0), (1.0, 4e6), (2.0, 1.2e12))
    )
    chosen = Chosen(0.5, True, "r", "perplexity", 0.95, 0.5, (("retain", "other", "perplexity"),))
    scores = (
        row("forget", "book", 31.0, 1.2e12, "perplexity", False),
        row("retain", "other", 30.0, 30.4, "perplexity", False),
    )
    source = render_html(make(chosen=chosen, sweep=sweep, scores=scores))
    text = Page(source).text
    assert "1.2×10¹²" in text
    assert "10⁷" in text
    assert "more forgotten →" in text
    assert "a rise of 0.500 lies on the bound" in text
    assert "+0.400" in text
    assert headline(make(chosen=chosen, sweep=sweep, scores=scores)).startswith(
        "The model now finds what it was asked to forget 3.9×10¹⁰ times less likely: book perplexity rose from 31.00 to"
    )


def test_long_prompts_are_folded_behind_their_end() -> None:
    prompt = "beginning " + "word " * 400 + "the very end"
    source = render_html(make(examples=(Example("forget", "europe", prompt, "a", "b", "c"),)))
    summary = re.search(r"<details><summary>(… .*?)</summary>beginning", source, re.S)
    assert summary
    assert summary[1].endswith("the very end")
    assert len(summary[1]) < 300


def test_changed_words_are_marked_on_both_sides() -> None:
    before, after = changes("when he was young and strong", "when he was old and very strong")
    assert before == "when he was <del>young</del> and strong"
    assert after == "when he was <ins>old</ins> and <ins>very</ins> strong"
    assert changes("Tokyo", "Tokyo")[1] == '<span class="same">Tokyo</span>'
    assert changes("Paris", "") == ("<del>Paris</del>", "–")
    left, right = changes("a " * 2000, "b " * 2000)
    assert left.count("<del>") == 1
    assert right.count("<ins>") == 1


# --- words ---


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


def test_a_bound_missed_on_test_items_is_said() -> None:
    report = make(scores=(row("forget", "europe", 0.9, 0.4), row("retain", "asia", 0.8, 0.72)))
    assert headline(report).endswith("within its bound on validation items, but not on test items.")
    assert remarks(report)[0].endswith("on test items not that of retain/asia acc_norm (90 %, bound 95 %).")
    source = render_html(report)
    assert "bound 95 %, not met here" in source
    assert "▼" in source
    assert remarks(make()) == ()
    assert "▼" not in render_html(make())


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
    assert verdict(report, report.scores[1]) is met
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


def test_chance_stands_beside_every_accuracy_of_a_choice() -> None:
    chances = {"europe": 0.25, "asia": 0.2}
    base = make()
    scores = tuple(replace(r, chance=chances.get(r.name)) for r in base.scores)
    sweep = tuple(
        replace(p, scores=tuple(replace(s, chance=chances.get(s.name)) for s in p.scores)) for p in base.sweep
    )
    report = make(scores=scores, sweep=sweep)
    text = Page(render_html(report)).text
    assert "europe, accuracy (chance 0.25)" in text, "the card"
    assert "0.878 → 0.857, test items, n = 48; chance 0.20" in text, "the card of what was kept"
    assert "forget · acc_norm ↑, chance 0.25" in text, "the curve"
    assert text.count("acc_norm ↑ chance 0.25") == 1, "the table"
    assert text.count("acc_norm ↑chance 0.25") == 1, "the sweep"
    assert render_html(report).count('class="chance"') == 2
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert "chance" not in Page(render_html(base)).text.replace("than chance", "")


def test_a_report_from_before_there_was_chance_still_loads() -> None:
    plain = make().to_json()
    for entry in (*plain["scores"], *(s for p in plain["sweep"] for s in p["scores"])):
        assert entry.pop("chance") is None
    assert plain["chosen"].pop("goals") == []
    assert RunReport.from_json(plain) == make()


def test_the_frontier_of_several_goals_is_of_what_is_left_of_them() -> None:
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
    assert "Asked to forget100 % → 54.2 %left of 2 sets, on average" in text
    assert "mean left of europe and book ← more done" in text
    assert "book perplexity 30.00 → 40.00, n = 48" in text


def test_the_frontier_of_an_addition_is_drawn() -> None:
    """It said that no kept set was scored."""
    chosen = replace(make().chosen, goals=(("learn", "africa", "acc_norm"),))
    sweep = tuple(
        SweepPoint(c, (measured("learn", "africa", v), measured("retain", "asia", 0.8)), True)
        for c, v in ((0.0, 0.5), (1.0, 0.9))
    )
    text = Page(render_html(make(chosen=chosen, sweep=sweep, scores=(row("learn", "africa", 0.5, 0.9),)))).text
    assert "No kept set was scored" not in text
    assert "learn score: africa acc_norm more learned →" in text


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


@pytest.mark.parametrize(
    ("metric", "higher", "before"),
    [("acc", True, 0.8), ("loss", False, 2.0), ("logprob", True, -3.0), ("perplexity", False, 30.0)],
)
def test_the_bound_and_the_share_agree(metric: str, higher: bool, before: float) -> None:
    bound = bound_of(metric, higher, before, 0.95, 0.5)
    assert bound is not None
    assert share_kept(metric, higher, before, bound, 0.95, 0.5) == pytest.approx(0.95)
    assert bound_of(metric, higher, before, None, None) is None


def test_frontier_takes_the_worst_kept_metric_against_zero() -> None:
    points = frontier(make())
    assert [p.coefficient for p in points] == [0.0, 0.75, 1.5, 2.0]
    assert points[3].shares == pytest.approx({"retain/asia": 0.703 / 0.875, "utility/general": 0.641 / 0.72})
    assert points[3].worst == pytest.approx(0.703 / 0.875)
    assert not points[3].within_bound
    assert final_shares(make())[0][1] == pytest.approx(0.857 / 0.878)
    assert main_keys(make()) == (("forget", "europe", "acc_norm"), *KEPT)


def test_chosen_survives_json() -> None:
    report = make()
    assert RunReport.from_json(json.loads(json.dumps(report.to_json()))).chosen == report.chosen


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
    assert [percent(s) for s in (0.9643, 1.0, None, -0.5, 1e14)] == ["96.4 %", "100 %", "–", "−50 %", "1.0×10¹⁶ %"]
    assert [tick_label(v) for v in (0.25, 150.0, 1e6, 2e-5, -3.0)] == ["0.25", "150", "10⁶", "2×10⁻⁵", "−3"]


# --- geometry ---


def test_scales_put_values_where_they_belong() -> None:
    linear = Scale("linear", 0.0, 2.0, 100.0, 300.0)
    assert [linear(v) for v in (0.0, 0.5, 2.0, 9.0, -1.0)] == [100.0, 150.0, 300.0, 300.0, 100.0]
    log = Scale("log", 1.0, 1e4, 0.0, 400.0)
    assert [log(v) for v in (1.0, 10.0, 1e4)] == pytest.approx([0.0, 100.0, 400.0])
    upward = Scale("linear", 0.0, 1.0, 90.0, 10.0)
    assert upward(0.25) == 70.0
    # symlog, threshold 1: 0..1 is one unit, each decade one more: 0, 1, 10, 100 at 0, 1/3, 2/3, 1
    both = Scale("symlog", 0.0, 100.0, 0.0, 300.0, 1.0)
    assert [both(v) for v in (0.0, 0.5, 1.0, 10.0, 100.0)] == pytest.approx([0.0, 50.0, 100.0, 200.0, 300.0])
    assert linear.holds(2.0)
    assert not linear.holds(2.1)


def test_ticks_are_round() -> None:
    assert linear_ticks(0.0, 1.0, 5) == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert linear_ticks(0.23, 0.94, 5) == (0.4, 0.6, 0.8)
    assert linear_ticks(0.0, 2.0, 4) == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert linear_ticks(-3.0, 12.0, 5) == (0.0, 5.0, 10.0)
    assert log_ticks(10.0, 1e5, 5) == (10.0, 100.0, 1000.0, 1e4, 1e5)
    assert log_ticks(1.0, 1e12, 5) == (1.0, 1e3, 1e6, 1e9, 1e12)
    assert Scale("symlog", -10.0, 100.0, 0.0, 1.0, 1.0).ticks(5) == (-10.0, -1.0, 0.0, 1.0, 10.0, 100.0)


def test_the_axis_fits_the_values() -> None:
    assert scale_for([0.2, 0.9], 0, 1) == Scale("linear", 0.0, 1.0, 0, 1)
    assert scale_for([30.0, 1.2e12], 0, 1) == Scale("log", 10.0, 1e13, 0, 1)
    assert scale_for([30.0, 2000.0], 0, 1).kind == "linear"
    assert scale_for([30.0, 4000.0], 0, 1).kind == "log"
    assert scale_for([0.0, 0.5, 4000.0], 0, 1) == Scale("symlog", 0.0, 1e4, 0, 1, 0.1)
    assert scale_for([-3.0, -6.0], 0, 1).lo == pytest.approx(-6.18)
    assert scale_for([5.0], 0, 1).lo < 5.0 < scale_for([5.0], 0, 1).hi
    assert scale_for([], 0, 1) == scale_for([math.nan, math.inf], 0, 1) == Scale("linear", 0.0, 1.0, 0, 1)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6), st.booleans())
def test_every_axis_holds_its_values_and_has_few_ticks(values: list[float], unit: bool) -> None:
    scale = scale_for(values, 10.0, 110.0, unit)
    assert all(10 - 1e-6 <= scale(v) <= 110 + 1e-6 for v in values)
    assert all(scale.holds(v) for v in values if abs(v) < 1e300)
    ticks = scale.ticks(5)
    assert len(ticks) <= 13
    assert list(ticks) == sorted(set(ticks))


def test_labels_touch_neither_points_nor_each_other() -> None:
    frame = (0.0, 0.0, 200.0, 100.0)
    anchors = [(50.0, 50.0, 30.0), (60.0, 50.0, 30.0), (199.0, 99.0, 30.0)]
    points = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in anchors]
    spots = place(anchors, points, frame)
    boxes = [(x - 15, y - 6.5, x + 15, y + 6.5) for x, y in (s for s in spots if s)]
    assert len(boxes) == 3
    assert spots[0] == (50.0, 66.5)
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert not any(overlap(a, p) for a in boxes for p in points)
    assert place(anchors[:1], [frame], frame) == (None,)
    assert along([(0.0, 0.0), (8.0, 0.0)], 4.0) == ((0.0, 0.0), (4.0, 0.0), (8.0, 0.0))


def test_the_frontier_draws_each_point_where_it_belongs() -> None:
    points = frontier(make())
    drawn = frontier_chart(points, chosen=1.5, keep=0.95, metric="m", hint="← more forgotten", size=(500, 300), uid="f")
    spots = re.findall(r'<circle class="spot( broken)?" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert [bool(b) for b, _, _ in spots] == [False, False, False, True]
    xs = [float(x) for _, x, _ in spots]
    assert xs == sorted(xs, reverse=True)  # the forget score falls
    # x runs over 6 % more than the values on either side, between 10 pixels inside the frame 46..488
    lo, hi = 0.251 - 0.06 * 0.674, 0.925 + 0.06 * 0.674
    assert xs[2] == pytest.approx(56 + 422 * (0.475 - lo) / (hi - lo), abs=0.01)
    ring = re.findall(r'<circle class="ring" cx="([\d.]+)"', drawn)
    assert [float(r) for r in ring] == [xs[2]]
    edge = re.search(r'<line class="bound"[^>]*y1="([\d.]+)"', drawn)
    assert edge
    assert float(spots[2][2]) < float(edge[1]) < float(spots[3][2])
    assert "allowed" not in frontier_chart(
        points, chosen=1.5, keep=None, metric="m", hint="← more forgotten", size=(500, 300), uid="f"
    )


def test_curves_have_error_bars_and_the_chosen_line() -> None:
    scores = [(0.0, score(0.9, 0.05)), (1.0, score(0.5, 0.1)), (2.0, score(0.25, None)), (3.0, score(math.nan, None))]
    drawn = lambda_chart("t", scores, chosen=1.0, bound=0.8, role="forget", uid="c", size=(320, 190))
    # frame 48..308 by 18..156, λ inset by 8: λ = 1 of 0..3 at 56 + 244/3; a score of .5 half way up
    assert 'class="chosen-line" x1="137.33" x2="137.33" y1="18" y2="156"' in drawn
    assert '<circle class="dot forget" cx="137.33" cy="87"' in drawn
    bars = re.findall(r'class="whisker forget" d="M([\d.]+) ([\d.]+)V([\d.]+)', drawn)
    assert bars[1] == ("137.3", f"{156 - 138 * 0.304:.1f}", f"{156 - 138 * 0.696:.1f}")
    assert len(bars) == 2
    assert 'class="bound" x1="48" x2="308" y1="45.6"' in drawn
    assert drawn.count("<circle") == 3


def test_sparkline() -> None:
    assert re.search(r'd="M3\.0 3\.0L65\.0 15\.0L127\.0 27\.0"', sparkline([2.0, 1.0, 0.0]))
    assert sparkline([1.0]) == sparkline([math.nan, 2.0]) == ""
    assert "nan" not in sparkline([1.0, math.nan, 1.0])


# --- markup ---


def test_markup_escapes_what_it_did_not_make() -> None:
    assert el("p", "<b>", el("i", "&"), None, ["x", 3], class_='a"b', data_label="'") == (
        '<p class="a&quot;b" data-label="&#x27;">&lt;b&gt;<i>&amp;</i>x3</p>'
    )
    assert el("br") == "<br>"
    assert el("g", x=1.0, y=2.346, z=None) == '<g x="1" y="2.35"></g>'
    assert join("\x07", "a\ud800") == "\ufffda\ufffd"
    assert isinstance(join("a"), Raw)


def test_a_long_metric_name_does_not_leave_the_narrow_chart() -> None:
    drawn = frontier_chart(
        frontier(make()), chosen=1.5, keep=0.95, metric="m" * 200, hint="← more forgotten", size=(360, 380), uid="f"
    )
    title = re.search(r">(m+)…   ← more forgotten<", drawn)
    assert title
    assert (len(title[0]) - 2) * 6.6 <= 2 * (360 - 197)  # it is centred on 197, the middle of the frame
