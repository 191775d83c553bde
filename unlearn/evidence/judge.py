"""The forget score of any model in memory, with any prompts, through lm-eval and on the very scale of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unlearn.data.items import Item, digest
from unlearn.data.sets import LoadedSet
from unlearn.errors import EvaluationError
from unlearn.recipe.data import Kind
from unlearn.recipe.schema import Recipe
from unlearn.results import PLAIN, AttackKind, AttackScore, Who
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import PackedLM, interface
from unlearn.score.silence import quiet_harness
from unlearn.score.tasks import build_tasks

FORGET_METRIC: dict[Kind, str] = {"mcq": "acc", "qa": "prob", "text": "exact_memorisation"}


@dataclass(frozen=True, slots=True)
class Judged:
    """A score with its items' own, in their order; ``stderr`` of the mean, None for a single item."""

    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    values: tuple[float, ...]

    @classmethod
    def mean(cls, metric: str, higher_is_better: bool, values: Sequence[float]) -> Judged:
        """Of at least one item; the standard error is s / sqrt(n), as lm-eval has it."""
        n = len(values)
        if not n:
            raise EvaluationError(f"{metric}: there are no items to score")
        centre = math.fsum(values) / n
        spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
        return cls(metric, higher_is_better, centre, spread, tuple(values))

    def entry(self, who: Who, attack: str = PLAIN, kind: AttackKind = "none", **place: int) -> AttackScore:
        """This score as a line of the table of attacks, perhaps at a number of ``steps`` or at a ``layer``."""
        n = len(self.values)
        return AttackScore(attack, kind, who, self.metric, self.higher_is_better, self.value, self.stderr, n, **place)


class Judge:
    """Scores models on the same items: accuracy (mcq), answer probability (qa), exact memorisation (text).

    Args:
        loaded: The forget set.
        items: Which of its items, with whatever prompts.
        tokenizer: The models'.
        folder: Where the items are written for lm-eval; each choice of items has a folder of its own in it.
        recipe: For the seed and the engine (``eval.engine``, ``batch_tokens``, ``batch_size``).
    """

    def __init__(
        self, loaded: LoadedSet, items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe
    ) -> None:
        if not items:
            raise EvaluationError(f"robustness: there are no items of {loaded.role} set {loaded.name!r} to attack")
        self.loaded = loaded
        self.kind: Kind = loaded.spec.kind
        self.items = tuple(items)
        self.metric = FORGET_METRIC[self.kind]
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._folder = folder
        self._asked: dict[str, Judge] = {}
        only = replace(loaded, test=self.items)
        # with the hf engine passages are recited only where that is asked for
        changed = {
            "eval": recipe.eval.model_copy(update={"tasks": ()}),
            "choose": recipe.choose.model_copy(update={"metric": self.metric}),
        }
        place = folder / _content(self.items)
        self._tasks = build_tasks([only], "test", recipe.model_copy(update=changed), tokenizer, place)

    @property
    def chance(self) -> float | None:
        """What guessing scores; None where the items are no choices."""
        return math.fsum(1 / len(i.choices) for i in self.items) / len(self.items) if self.kind == "mcq" else None

    def score(self, model: PreTrainedModel, label: str = "scoring") -> Judged:
        """The forget score of a model as it is now."""
        return self.scores(model, label)[self.metric]

    def scores(self, model: PreTrainedModel, label: str = "scoring") -> Mapping[str, Judged]:
        """Every metric of the set's tasks that is a mean over items (mcq: also logprob), by name."""
        return self.read(self.lm(model, label))

    def read(self, lm: HFLM) -> Mapping[str, Judged]:
        """The same from lm-eval's interface to a model."""
        result = evaluate(lm, self._tasks, model_name="attacked", bootstrap=0)
        values = result.values()
        found: dict[str, Judged] = {}
        for score in result.scores:
            items = values.get(score.key)
            if items is not None and score.metric != "perplexity":  # which is no mean over items
                in_order = [items[number][0] for number in sorted(items)]
                found[score.metric] = Judged.mean(score.metric, score.higher_is_better, in_order)
        return found

    def asking(self, items: Sequence[Item]) -> Judge:
        """A judge of the same set with other items or other prompts; the same one when it is asked for again."""
        name = _content(items)
        if name not in self._asked:
            self._asked[name] = Judge(self.loaded, items, self.tokenizer, self._folder, self.recipe)
        return self._asked[name]

    def docs(self) -> list[dict[str, Any]]:
        """The items as lm-eval has them, with ``continuation`` (text): what generated text is compared with."""
        return [dict(doc) for doc in next(iter(self._tasks.tasks.values())).eval_docs]

    def lm(self, model: PreTrainedModel, label: str = "scoring") -> HFLM:
        """lm-eval's interface to a model, by the recipe's engine."""
        with quiet_harness():
            lm = interface(model, self.tokenizer, self.recipe.eval)
        if isinstance(lm, PackedLM):
            lm.label = label
        return lm


def _content(items: Sequence[Item]) -> str:
    return digest([[i.id, i.prompt, i.target, i.choices, i.answer] for i in items])[:16]
