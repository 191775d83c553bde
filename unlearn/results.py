"""What a run found: frozen values and their JSON. No I/O, no torch; ``report.json`` is exactly this."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from importlib import import_module
from typing import Any, Literal, TypeVar

from unlearn.text import counted

AttackKind = Literal["none", "quantise", "relearn", "probe", "contrast", "sample", "lens"]
Who = Literal["target", "edited", "reference"]
Read = TypeVar("Read")

PLAIN = "none"  # the attack of a score that was taken without one
GREEDY = "greedy answers"  # without an attack as well: what samples are compared with
LENS = "the logit lens"
CONTRAST = "a choice beside the same question about others"
BEST = " (the best one)"
_NOTHING = 1e-9  # a smaller difference of scores is rounding
_QUANTISATIONS = {"nf4": "4-bit quantisation", "int8": "8-bit quantisation"}
_PROBES = {
    "paraphrase": "other wordings",
    "prefix": "a text that sets the scene",
    "few_shot": "solved examples in the prompt",
    "template": "templates in other languages",
}
_METRICS = {
    "acc": "accuracy",
    "acc_norm": "accuracy",
    "acc_pmi": "accuracy beside other prompts",
    "exact": "exact-answer rate",
    "exact_match": "exact-match rate",
    "exact_memorisation": "exact memorisation",
    "extraction_strength": "extraction strength",
    "logprob": "log-probability",
    "pmi": "pointwise information",
    "prob": "answer probability",
    "rougeL": "ROUGE-L",
    "rougeL_f1": "ROUGE-L F1",
    "leak": "share of answers let out",
}


def plain_metric(metric: str) -> str:
    """A metric's name in a sentence."""
    return _METRICS.get(metric, metric)


def quantisation(kind: str) -> str:
    """The name of the attack by a quantised copy (``nf4`` or ``int8``)."""
    return _QUANTISATIONS.get(kind, f"{kind} quantisation")


def relearning(items: int, unrelated: bool = False) -> str:
    """The name of the attack by fine-tuning on ``items`` forgotten items, or on as many unrelated texts."""
    return f"relearning on {counted(items, 'unrelated text' if unrelated else 'forgotten item')}"


def probing(probe: str, best: bool = False) -> str:
    """The name of the attack by other prompts: the mean over its wordings, or the wording that brings back most."""
    name = _PROBES.get(probe, probe)
    return f"{name}{BEST}" if best else name


def sampling(samples: int) -> str:
    """The name of the attack that lets the best of so many sampled continuations count."""
    return f"the best of {counted(samples, 'sample')}"


@dataclass(frozen=True, slots=True)
class AttackScore:
    """The forget score of one model under one attack (``kind`` none: without any)."""

    attack: str  # a name that can stand in a sentence
    kind: AttackKind
    who: Who
    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None  # None where ``n`` items are too few for an estimate
    n: int
    steps: int | None = None  # of relearning
    layer: int | None = None  # the one that the lens looked at, from 1; the last is the model's own answer

    @property
    def under(self) -> tuple[AttackKind, str, str, int | None, int | None]:
        """What the scores of all models under one attack have in common."""
        return self.kind, self.attack, self.metric, self.steps, self.layer


@dataclass(frozen=True, slots=True)
class Robustness:
    """All scores of the attacks on one forget set."""

    set: str
    metric: str  # the main forget metric; scores of others (samples have ROUGE-L) have plain scores of their own
    scores: tuple[AttackScore, ...]  # in the order in which a table should have them
    chance: float | None = None  # what guessing scores, where the metric is the accuracy of a choice

    def plain(self, who: Who, metric: str | None = None) -> AttackScore | None:
        """A model's score without an attack; of the main metric when none is named."""
        wanted = (who, metric or self.metric, "none")
        return next((s for s in self.scores if (s.who, s.metric, s.kind) == wanted), None)

    def recovered(self, score: AttackScore) -> float | None:
        """(score - the same model's plain score) / (plain target - plain edited): 0 nothing comes back, 1 all of it.

        For the edited model that is the share of the forgotten which the attack brings back; for a retain reference it
        is what one that never knew it gains under the same attack, in the same unit. The sign of the metric cancels.
        None where a plain score is missing, or where the edit forgot less than the standard errors of the two plain
        scores together.
        """
        before, after, base = (self.plain(w, score.metric) for w in ("target", "edited", score.who))
        if before is None or after is None or base is None:
            return None
        forgotten = before.value - after.value
        noise = math.hypot(before.stderr or 0.0, after.stderr or 0.0)
        # not >= : a NaN is no measure either
        if not (forgotten if before.higher_is_better else -forgotten) > max(noise, _NOTHING):
            return None
        return (score.value - base.value) / forgotten


# -- what a run found


SCHEMA = 1
Role = Literal["forget", "learn", "retain", "utility"]
Verdict = Literal["irrelevant", "aligned", "contradictory"]
_IRRELEVANT = 0.1  # a smaller correlation counts as none
_SURE = 2.0  # standard errors beyond which a correlation counts as one


@dataclass(frozen=True, slots=True)
class Score:
    """One measured number. ``stderr`` is None where lm-eval has no estimate; ``n`` counts items."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A score with what it measures: which set, which data, which metric."""

    set: Role
    name: str
    split: str
    metric: str
    higher_is_better: bool
    score: Score
    chance: float | None = None  # what guessing scores, where the metric is the accuracy of a choice

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity across coefficients and splits."""
        return self.set, self.name, self.metric


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One line of the before/after table."""

    set: Role
    name: str
    split: str
    metric: str
    higher_is_better: bool
    before: Score
    after: Score
    reference: Score | None = None  # of the retain reference, a model that never saw what is forgotten
    chance: float | None = None  # what guessing scores, where the metric is the accuracy of a choice

    @property
    def key(self) -> tuple[str, str, str]:
        """Identity, as that of a :class:`TaskScore`."""
        return self.set, self.name, self.metric


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """All validation scores at one coefficient, and which kept metrics broke their bound there."""

    coefficient: float
    scores: tuple[TaskScore, ...]
    within_bound: bool
    broken: tuple[str, ...] = ()
    collapsed: str = ""  # why the model counts as broken there; empty where it does not


@dataclass(frozen=True, slots=True)
class Chosen:
    """The coefficient picked by rule. ``coefficient`` 0 with ``bound_met`` False: nothing passed, nothing changes."""

    coefficient: float
    bound_met: bool
    rule: str
    forget_metric: str
    keep: float | None = None  # the recipe's bound, as is ``perplexity``; None: not recorded
    perplexity: float | None = None
    kept: tuple[tuple[str, str, str], ...] = ()  # (set, name, metric) it was put on; empty: all of retain and utility
    # how the coefficient was looked for among those of ``grid``; given: not at all, the model was edited elsewhere
    search: Literal["grid", "bisect", "given"] = "grid"
    grid: tuple[float, ...] = ()  # above 0; empty: not recorded
    goals: tuple[tuple[str, str, str], ...] = ()  # those to be driven down or up; empty: not recorded


@dataclass(frozen=True, slots=True)
class Fluency:
    """How a written answer reads, without a look at the right one.

    ``repetition`` is the share of its runs of four tokens that it has already written (1908.04319, seq-rep-4), ``loss``
    its nats per token under the target model, whichever model wrote it; None where nothing was written.
    """

    repetition: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class Example:
    """One test item as the model answers it before and after."""

    set: Role
    name: str
    prompt: str
    target: str
    before: str
    after: str
    before_fluency: Fluency | None = None  # None: not recorded
    after_fluency: Fluency | None = None


@dataclass(frozen=True, slots=True)
class SetForesight:
    """What could be known of one set before the edit.

    ``slope`` is d/dlambda at 0 of its loss under theta - lambda * tau, in nats per unit of lambda, on ``items`` of its
    items; the loss is that of the sweep's ``metric`` (``logprob``, negated, or ``loss``). The rest compares the forget
    sets' fine-tuning with one on this set, where there is one: the correlations of outputs, of changes of outputs (with
    its standard error) and of the two vectors, in [-1, 1]; the vectors' cosine per module; and the :func:`verdict`.
    What came out as no finite number is None.
    """

    set: Role
    name: str
    metric: str
    slope: float | None
    items: int
    alpha_outputs: float | None = None
    alpha_changes: float | None = None
    alpha_stderr: float | None = None
    alpha_vectors: float | None = None
    modules: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None


def verdict(alpha: float | None, stderr: float | None) -> Verdict | None:
    """What a correlation of changes makes of two tasks; None where there is no number.

    Irrelevant: below .1 in size, or below two standard errors. Otherwise aligned above 0 and contradictory below.
    """
    if alpha is None or not math.isfinite(alpha):
        return None
    if abs(alpha) < _IRRELEVANT or (stderr is not None and abs(alpha) < _SURE * stderr):
        return "irrelevant"
    return "aligned" if alpha > 0 else "contradictory"


@dataclass(frozen=True, slots=True)
class Foresight:
    """What could be known before the edit, of the sets it is for (those to forget first) and of every kept set."""

    goals: tuple[SetForesight, ...]
    kept: tuple[SetForesight, ...]


@dataclass(frozen=True, slots=True)
class Membership:
    """How well one attack tells forget items from held-out ones: area under the ROC curve with its 95 % interval.

    .5: not at all. ``members`` and ``others`` count the items of each side.
    """

    who: Who
    attack: str
    auc: float
    low: float
    high: float
    members: int
    others: int


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published benchmark's own figures, by model and by their column names."""

    name: str
    set: str
    items: int | None
    rows: Mapping[str, Mapping[str, float | str | None]]
    missing: str = ""  # what could not be computed and what to give for it
    shared: int = 0  # the benchmark's items that the coefficient was chosen on


@dataclass(frozen=True, slots=True)
class RunReport:
    """Everything a run found."""

    name: str
    description: str
    chosen: Chosen
    scores: tuple[ScoreRow, ...]
    sweep: tuple[SweepPoint, ...]
    examples: tuple[Example, ...]
    data: tuple[Mapping[str, Any], ...]
    vector: Mapping[str, Any]
    training: tuple[Mapping[str, Any], ...]
    exports: Mapping[str, Any]
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    foresight: Foresight | None = None
    benchmark: Benchmark | None = None
    membership: tuple[Membership, ...] = ()
    robustness: Robustness | None = None
    schema: int = field(default=SCHEMA)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, ``schema`` first."""
        plain = json.loads(json.dumps(asdict(self)))  # tuples become lists, as in the file
        return {"schema": plain.pop("schema"), **plain}

    def _repr_html_(self) -> str:
        """The whole page, in a frame of a notebook."""
        page = import_module("unlearn.report.page").render_html(self)  # which stands on this module, and not under it
        return f'<iframe srcdoc="{escape(page)}" style="width: 100%; height: 720px; border: 0"></iframe>'

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunReport:
        """Inverse of :meth:`to_json`, also for reports of earlier versions; ValueError where it is no report."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, Mapping) else None
            raise ValueError(f"report schema {schema!r} is not {SCHEMA}")
        sweep = data.get("sweep")
        if isinstance(sweep, list):  # earlier versions ruled some coefficients out on a part of the items
            sweep = [p for p in sweep if not isinstance(p, Mapping) or p.get("share", 1) == 1]
        return read(cls, {**data, "sweep": sweep})


def read(kind: type[Read], data: Any) -> Read:
    """A value of this module from plain JSON; ValueError where it does not fit."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"not a report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
