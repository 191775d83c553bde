"""Reports to show: a small one, one with foresight, one with comparisons and attacks; and a strict reader of pages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from unlearn.results import (
    LENS,
    AttackScore,
    Benchmark,
    Chosen,
    Example,
    Foresight,
    Membership,
    Robustness,
    Role,
    RunReport,
    Score,
    ScoreRow,
    SetForesight,
    SweepPoint,
    TaskScore,
    Who,
    quantisation,
    relearning,
)

HOSTILE = '</script><script>alert(1)</script><b onclick="x">\'&"]]>--><svg/onload=1>\x00\x1b[31m\ud800'
KEPT = (("retain", "asia", "acc_norm"), ("utility", "general", "acc_norm"))
VOID = ("meta", "br", "hr", "link", "col")


def score(value: float, stderr: float | None = 0.05, n: int = 48) -> Score:
    return Score(value, stderr, n)


def measured(role: Role, name: str, value: float, metric: str = "acc_norm", higher: bool = True) -> TaskScore:
    return TaskScore(role, name, "validation", metric, higher, score(value, 0.0611, 37))


def point(c: float, forget: float, asia: float, general: float, broken: tuple[str, ...] = ()) -> SweepPoint:
    sets: tuple[tuple[Role, str, float], ...]
    sets = (("forget", "europe", forget), ("retain", "asia", asia), ("utility", "general", general))
    return SweepPoint(c, tuple(measured(*one) for one in sets), not broken, broken)


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


TOFU_ROWS: Mapping[str, Mapping[str, float | str | None]] = {
    "target": {"ROUGE Retain": 0.9431, "Model Utility": 0.6217, "Forget Quality": 0.0031},
    "edited": {"ROUGE Retain": 0.9012, "Model Utility": 0.6024, "Forget Quality": 0.7182},
    "reference": {"ROUGE Retain": 0.9518, "Model Utility": 0.6301, "Forget Quality": None},
}
TOFU = Benchmark("tofu", "forget10", 300, TOFU_ROWS)
MUSE_ROWS: Mapping[str, Mapping[str, float | str | None]] = {
    "target": {"name": "target", "verbmem_f": 57.94, "privleak": None, "knowmem_f": 39.4, "knowmem_r": 62.1},
    "edited": {"name": "mine", "verbmem_f": 11.5, "privleak": None, "knowmem_f": 21.2, "knowmem_r": 60.3},
}
MUSE = Benchmark("muse", "books", None, MUSE_ROWS, "PrivLeak compares with a model that never saw the forget set.")
MEMBERSHIP = tuple(
    Membership(who, attack, auc, auc - 0.04, auc + 0.03, 400, 399)
    for attack, shift in (("loss", 0.0), ("min_k", 0.011))
    for who, auc in (("target", 0.912 + shift), ("edited", 0.547 + shift), ("reference", 0.501 + shift))
)


def attack(
    who: Who, value: float, kind: Any = "none", name: str = "none", steps: int | None = None, layer: int | None = None
) -> AttackScore:
    return AttackScore(name, kind, who, "prob", True, value, 0.0121, 40, steps, layer)


def _attacks() -> tuple[AttackScore, ...]:
    whos: tuple[Who, ...] = ("target", "edited", "reference")
    relearned: tuple[tuple[Who, float, int], ...]
    relearned = (("target", 0.91, 1), ("edited", 0.3, 1), ("edited", 0.74, 20), ("reference", 0.44, 20))
    return (
        *(attack(w, v) for w, v in zip(whos, (0.9, 0.1, 0.12), strict=True)),
        *(attack(w, v, "quantise", quantisation("nf4")) for w, v in zip(whos, (0.88, 0.5, 0.13), strict=True)),
        attack("edited", 0.08, "lens", LENS, layer=1),
        *(attack(w, v, "relearn", relearning(8), steps) for w, v, steps in relearned),
    )


ATTACKS = Robustness("europe", "prob", _attacks())


def with_evidence(**changed: Any) -> RunReport:
    """A report with a reference, a benchmark, membership inference and attacks."""
    scores = tuple(replace(s, reference=Score(0.377, 0.021, 48)) for s in make().scores)
    return make(**{"scores": scores, "benchmark": TOFU, "membership": MEMBERSHIP, "robustness": ATTACKS, **changed})


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


def cells(page: str, label: str) -> list[list[str]]:
    """The rows of the table with a label, as texts; heads first."""
    table = page[page.index(f'aria-label="{label}"') :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[Page(c).text for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r, re.DOTALL)] for r in rows]
