"""What a run found: frozen values and their JSON. No I/O, no torch; ``report.json`` is exactly this."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from unlearn.attacks.values import Robustness

SCHEMA = 1
Role = Literal["forget", "learn", "retain", "utility"]
Who = Literal["target", "edited", "reference"]
Verdict = Literal["irrelevant", "aligned", "contradictory"]


@dataclass(frozen=True, slots=True)
class Score:
    """One measured number. ``stderr`` is None where lm-eval has no estimate; ``n`` counts items."""

    value: float
    stderr: float | None
    n: int

    def interval(self, z: float = 1.96) -> tuple[float, float] | None:
        """Normal-approximation confidence interval (95 % by default)."""
        if self.stderr is None:
            return None
        return self.value - z * self.stderr, self.value + z * self.stderr


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
    vectors' cosine per module; and what the theory makes of it (see :mod:`unlearn.prediction`).
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
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: the file was written under another schema, or has not what a report has.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, Mapping) else None
            raise ValueError(f"report schema {schema!r} is not {SCHEMA}")
        try:
            return cls._read(data)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a report: {error!r}") from error

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> RunReport:
        return cls(
            name=data["name"],
            description=data["description"],
            chosen=_chosen(data["chosen"]),
            scores=tuple(
                ScoreRow(**{**r, **{k: Score(**r[k]) for k in ("before", "after", "reference") if r.get(k)}})
                for r in data["scores"]
            ),
            sweep=tuple(
                SweepPoint(
                    coefficient=p["coefficient"],
                    scores=tuple(TaskScore(**{**s, "score": Score(**s["score"])}) for s in p["scores"]),
                    within_bound=p["within_bound"],
                    broken=tuple(p["broken"]),
                    collapsed=p.get("collapsed", ""),
                )
                for p in data["sweep"]
                if p.get("share", 1) == 1  # earlier versions ruled some out on a part of the items
            ),
            examples=tuple(Example(**e) for e in data["examples"]),
            data=tuple(data["data"]),
            vector=data["vector"],
            training=tuple(data["training"]),
            exports=data["exports"],
            seconds=data["seconds"],
            provenance=data["provenance"],
            warnings=tuple(data["warnings"]),
            foresight=foresight_from_json(data["foresight"]) if data.get("foresight") else None,
            benchmark=Benchmark(**data["benchmark"]) if data.get("benchmark") else None,
            membership=tuple(Membership(**m) for m in data.get("membership", ())),
            robustness=Robustness.from_json(data["robustness"]) if data.get("robustness") else None,
        )


def _chosen(data: Mapping[str, Any]) -> Chosen:
    """From JSON; older reports lack some of the fields that have a default."""
    kept, goals = (tuple(tuple(key) for key in data.get(name, ())) for name in ("kept", "goals"))
    return Chosen(**{**data, "kept": kept, "goals": goals, "grid": tuple(data.get("grid", ()))})


def foresight_from_json(data: Mapping[str, Any]) -> Foresight:
    """Inverse of ``dataclasses.asdict``."""
    goals, kept = (tuple(SetForesight(**entry) for entry in data[key]) for key in ("goals", "kept"))
    return Foresight(goals, kept)
