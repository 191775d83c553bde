"""What a run found: frozen values and their JSON. No I/O, no torch; ``report.json`` is exactly this."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from unlearn.text import counted, listing, percent, short

AttackKind = Literal["none", "quantise", "relearn", "probe", "sample", "lens"]
Who = Literal["target", "edited", "reference"]
Read = TypeVar("Read")

PLAIN = "none"  # the attack of a score that was taken without one
GREEDY = "greedy answers"  # without an attack as well: what samples are compared with
LENS = "the logit lens"
_BEST = " (the best one)"
_Z95 = 1.96
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
    "exact": "exact-answer rate",
    "exact_match": "exact-match rate",
    "exact_memorisation": "exact memorisation",
    "extraction_strength": "extraction strength",
    "logprob": "log-probability",
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
    return f"{name}{_BEST}" if best else name


def sampling(samples: int) -> str:
    """The name of the attack that lets the best of so many sampled continuations count."""
    return f"the best of {counted(samples, 'sample')}"


@dataclass(frozen=True, slots=True)
class AttackScore:
    """The forget score of one model under one attack (``kind`` none: without any).

    ``attack`` is a name that can stand in a sentence. ``steps`` counts those of relearning; ``layer`` is the one that
    the lens looked at, from 1, the last one being the model's own answer. ``stderr`` is None where ``n`` items are too
    few for an estimate.
    """

    attack: str
    kind: AttackKind
    who: Who
    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    n: int
    steps: int | None = None
    layer: int | None = None

    def described(self) -> str:
        """The attack with its steps or its layer."""
        if self.steps is not None:
            return f"{counted(self.steps, 'step')} of {self.attack}"
        return self.attack if self.layer is None else f"layer {self.layer} of {self.attack}"


@dataclass(frozen=True, slots=True)
class Robustness:
    """All scores of the attacks on one forget set.

    Args:
        set: Its name.
        metric: The main forget metric; scores of others (samples have ROUGE-L) have plain scores of their own.
        scores: In the order in which a table should have them.
        chance: What guessing scores, where the metric is the accuracy of a choice.
    """

    set: str
    metric: str
    scores: tuple[AttackScore, ...]
    chance: float | None = None

    def plain(self, who: Who, metric: str | None = None) -> AttackScore | None:
        """A model's score without an attack; of the main metric when none is named."""
        wanted = (who, metric or self.metric, "none")
        return next((s for s in self.scores if (s.who, s.metric, s.kind) == wanted), None)

    def same(self, score: AttackScore, who: Who) -> AttackScore | None:
        """Another model's score under the same attack."""
        return next((s for s in self.scores if s.who == who and _what(s) == _what(score)), None)

    def recovered(self, score: AttackScore) -> float | None:
        """(score - the same model's plain score) / (plain target - plain edited): 0 nothing comes back, 1 all of it.

        For the edited model that is the share of the forgotten which the attack brings back; for a retain reference it
        is what one that never knew it gains under the same attack, in the same unit. The sign of the metric cancels.

        Returns:
            None where a plain score is missing, or where the edit forgot nothing that can be told from chance: less
            than the standard errors of the two plain scores together.
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

    def worst(self) -> AttackScore | None:
        """The attack that brings most of it back to the edited model, the first of several; None if none can tell."""
        found = [(r, s) for s in self._attacks("edited") if (r := self.recovered(s)) is not None]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def sentence(self) -> str:
        """What the attacks bring back, in plain English; empty where nothing was attacked.

        Of relearning the last step counts, of the lens the layer that shows most. A change smaller than 1.96 standard
        errors (of both scores, as if their items were different ones) cannot be told from chance, and such attacks are
        only counted.
        """
        shown = self._shown()
        if not shown:
            return ""
        before, after = self.plain("target"), self.plain("edited")
        if before is None or after is None:
            return "What the attacks bring back cannot be told: a score without an attack is missing."
        guess = "" if self.chance is None else f", chance {short(self.chance)}"
        fell = f"{plain_metric(self.metric)} {short(before.value)} to {short(after.value)}{guess}"
        told = [(s, r) for s in shown if (r := self.recovered(s)) is not None]
        if not told:
            return f"The edit forgot nothing that can be told from chance ({fell}), so nothing can come back."
        # of the wordings of a probe their mean counts here: the best of several is high by chance alone
        told = [(s, r) for s, r in told if not s.attack.endswith(_BEST)] or told
        strong = sorted((t for t in told if self._matters(*t)), key=lambda t: -t[1])
        weak = len(told) - len(strong)
        if strong:
            (first, share), *others = strong
            parts = [f"{self._share(first, share)} comes back with {first.described()}"]
            parts += [f"{self._share(s, r)} with {s.described()}" for s, r in others]
            rest = f"; with {counted(weak, 'other attack')} nothing that can be told from chance" if weak else ""
            said = f"Of what was forgotten ({fell}), {listing(parts)}{rest}."
        else:
            none = "the one attack brings" if weak == 1 else f"none of {weak} attacks brings"
            back = "nothing back" if weak == 1 else "anything back"
            said = f"Of what was forgotten ({fell}), {none} {back} that can be told from chance."
        return " ".join([said, *self._of_the_reference([s for s, _ in told])])

    def _attacks(self, who: Who) -> Iterator[AttackScore]:
        return (s for s in self.scores if s.who == who and s.kind != "none")

    def _shown(self) -> list[AttackScore]:
        """One score of the edited model for each attack; the lens's last layer is its own answer and no attack."""
        groups: dict[tuple[str, str, str], list[AttackScore]] = {}
        own = max((s.layer for s in self._attacks("edited") if s.layer is not None), default=None)
        for score in self._attacks("edited"):
            if own is not None and score.layer == own:
                continue
            groups.setdefault((score.kind, score.attack, score.metric), []).append(score)
        return [max(scores, key=self._says_most) for scores in groups.values()]

    def _says_most(self, score: AttackScore) -> tuple[float, float]:
        return score.steps or 0, score.value if score.higher_is_better else -score.value

    def _matters(self, score: AttackScore, share: float) -> bool:
        """Whether something comes back, as far as chance allows to say."""
        return round(share, 2) > 0 and not self._within_chance(score)

    def _share(self, score: AttackScore, share: float) -> str:
        beside = "" if score.metric == self.metric else f" ({plain_metric(score.metric)})"
        return percent(round(share, 2)) + beside

    def _within_chance(self, score: AttackScore) -> bool:
        base = self.plain(score.who, score.metric)
        if base is None or score.stderr is None or base.stderr is None:
            return False
        return abs(score.value - base.value) < _Z95 * math.hypot(score.stderr, base.stderr)

    def _of_the_reference(self, told: Sequence[AttackScore]) -> Iterator[str]:
        """What a model that never knew it makes of the attacks that bring something back: it can learn as well."""
        strong = [s for s in told if self._matters(s, self.recovered(s) or 0.0)]
        pairs = [(s, self.same(s, "reference"), self.plain("reference", s.metric)) for s in strong]
        known = [(s, there, base) for s, there, base in pairs if there is not None and base is not None]
        if not known:
            return
        steps = [
            f"from {short(base.value)} to {short(there.value)} under {s.described()}"
            + ("" if s.metric == self.metric else f" ({plain_metric(s.metric)})")
            for s, there, base in known
        ]
        yield f"The retain reference, which never knew it, goes {listing(steps)}."
        if any((self.recovered(there) or 0.0) > 0 and not self._within_chance(there) for _, there, _ in known):
            yield "What it gains as well is learned anew, not brought back."


def _what(score: AttackScore) -> tuple[Any, ...]:
    return score.kind, score.attack, score.metric, score.steps, score.layer


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
    """All validation scores at one coefficient, and which kept metrics broke their bound there.

    ``collapsed`` says why the model counts as broken there; empty where it does not.
    """

    coefficient: float
    scores: tuple[TaskScore, ...]
    within_bound: bool
    broken: tuple[str, ...] = ()
    collapsed: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The coefficient picked by rule. ``coefficient`` 0 with ``bound_met`` False: nothing passed, nothing changes.

    ``keep`` and ``perplexity`` are the recipe's bound (None: not recorded), ``kept`` the (set, name, metric) it was
    put on (empty: every retain and utility metric of the sweep), ``goals`` those to be driven down or up (empty: not
    recorded). ``search`` says how the coefficient was looked for
    among those of ``grid`` (above 0; empty: not recorded).
    """

    coefficient: float
    bound_met: bool
    rule: str
    forget_metric: str
    keep: float | None = None
    perplexity: float | None = None
    kept: tuple[tuple[str, str, str], ...] = ()
    search: Literal["grid", "bisect"] = "grid"
    grid: tuple[float, ...] = ()
    goals: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One test item as the model answers it before and after."""

    set: Role
    name: str
    prompt: str
    target: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class SetForesight:
    """What could be known of one set before the edit.

    ``slope`` is d/dlambda at 0 of its loss under theta - lambda * tau, in nats per unit of lambda, on ``items`` of its
    items; the loss is that of the sweep's ``metric`` (``logprob``, negated, or ``loss``). None where it came out as no
    finite number; so with the correlations.

    The rest compares the forget sets' fine-tuning with one on this set, and is empty where there is none: the
    correlations of outputs, of changes of outputs (with its standard error) and of the two vectors, all in [-1, 1]; the
    vectors' cosine per module; and the :func:`verdict` on it.
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
    """A published benchmark's own figures, by model and by their column names.

    ``missing`` says what could not be computed and what to give for it; empty when nothing is missing. ``shared``
    counts the benchmark's items that the coefficient was chosen on.
    """

    name: str
    set: str
    items: int | None
    rows: Mapping[str, Mapping[str, float | str | None]]
    missing: str = ""
    shared: int = 0


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


def foresight_from_json(data: Mapping[str, Any]) -> Foresight:
    """Inverse of ``dataclasses.asdict``."""
    return read(Foresight, data)
