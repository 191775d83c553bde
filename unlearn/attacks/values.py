"""What the attacks on a result found, and how much of what was forgotten they bring back. Frozen values, no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unlearn.wording import counted, listing, percent, short

AttackKind = Literal["none", "quantise", "relearn", "probe", "sample", "lens"]
Who = Literal["target", "edited", "reference"]

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
    "prob": "answer probability",
    "logprob": "log-probability",
    "exact_memorisation": "exact memorisation",
    "rougeL": "ROUGE-L",
    "leak": "share of answers let out",
}


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
        fell = f"{_metric(self.metric)} {short(before.value)} to {short(after.value)}{guess}"
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Robustness:
        """Inverse of :meth:`to_json`."""
        return cls(
            data["set"], data["metric"], tuple(AttackScore(**score) for score in data["scores"]), data.get("chance")
        )

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
        beside = "" if score.metric == self.metric else f" ({_metric(score.metric)})"
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
            + ("" if s.metric == self.metric else f" ({_metric(s.metric)})")
            for s, there, base in known
        ]
        yield f"The retain reference, which never knew it, goes {listing(steps)}."
        if any((self.recovered(there) or 0.0) > 0 and not self._within_chance(there) for _, there, _ in known):
            yield "What it gains as well is learned anew, not brought back."


def _what(score: AttackScore) -> tuple[Any, ...]:
    return score.kind, score.attack, score.metric, score.steps, score.layer


def _metric(name: str) -> str:
    return _METRICS.get(name, name)
