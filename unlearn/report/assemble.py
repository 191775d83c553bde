"""What a run found, put into the lines of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.data.sets import LoadedSet
from unlearn.evidence.reference import Subjects
from unlearn.recipe.data import DataSet
from unlearn.recipe.schema import Key, Recipe
from unlearn.results import (
    CONTRAST,
    LENS,
    Benchmark,
    Chosen,
    Membership,
    Robustness,
    ScoreRow,
    SweepPoint,
    TaskScore,
    probing,
)
from unlearn.score import search
from unlearn.store import provenance
from unlearn.text import counted
from unlearn.train.vectors import Goal, Vectors
from unlearn.vector.task_vector import TaskVector

_FEW = 20  # items under which an accuracy moves in steps that a bound of 95 % cannot resolve


@dataclass(frozen=True)
class Evidence:
    """Which models were compared, and what came of every comparison and attack."""

    subjects: Subjects
    beside: tuple[TaskScore, ...]  # what the reference scores
    benchmark: Benchmark | None
    membership: tuple[Membership, ...]
    attacks: Robustness | None


def score_rows(
    before: Sequence[TaskScore], after: Sequence[TaskScore], reference: Sequence[TaskScore]
) -> tuple[ScoreRow, ...]:
    later, never = {s.key: s for s in after}, {s.key: s.score for s in reference}
    return tuple(
        ScoreRow(
            *(s.set, s.name, s.split, s.metric, s.higher_is_better),
            *(s.score, later[s.key].score, never.get(s.key), s.chance),
        )
        for s in before
    )


def data_line(loaded: LoadedSet) -> dict[str, Any]:
    spec: DataSet = loaded.spec
    where = provenance.tidy(spec.path)
    return {
        "set": loaded.role,
        "name": loaded.name,
        "kind": spec.kind,
        "path": where,
        **loaded.counts,
        "digest": loaded.digest,
    }


def vector_line(
    recipe: Recipe, vectors: Vectors, edit: TaskVector, weights: Mapping[Goal, float], coefficient: float
) -> dict[str, Any]:
    """What is subtracted, and for every request its share in it."""
    spec = recipe.vector
    line: dict[str, Any] = {
        "method": " + ".join(spec.steps()),
        "rank": edit.rank(),
        "modules": len(edit.modules),
        "norm": round(edit.norm(), 4),
    }
    if (given := spec.given()) is not None:
        line["from"] = provenance.tidy(given.words())
    first = next(iter(vectors.fitted.values()))
    if len(vectors.fitted) == 1:
        line["forget_norm"] = round(first.norm(), 4)
    if spec.uses("contrast"):
        line["mu"] = 1.0 if spec.mu is None else spec.mu
    if vectors.retain is not None:
        line["retain_norm"] = round(vectors.retain.norm(), 4)
        line["cosine_forget_retain"] = round(first.cosine(vectors.retain), 4)
    if len(vectors.parts) > 1:
        line["requests"] = [
            {
                "set": goal[0],
                "name": goal[1],
                "coefficient": round(weights[goal] * coefficient, 6),
                "norm": round(part.norm(), 4),
                "digest": part.digest(),
            }
            for goal, part in sorted(vectors.parts.items())
        ]
    return {**line, "digest": edit.digest(), "file": "vectors/edit/vector.safetensors"}


def warnings(
    recipe: Recipe,
    sets: Sequence[LoadedSet],
    chosen: Chosen,
    points: Sequence[SweepPoint],
    before: Sequence[TaskScore],
    evidence: Evidence,
    training: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    """What a careful reader would ask about."""
    found, subjects, benchmark = [], evidence.subjects, evidence.benchmark
    chose = chosen.search != "given"
    small = [f"{s.role} {s.name} ({len(s.validation)})" for s in sets if 0 < len(s.validation) < _FEW]
    if small and chose:
        found.append(f"few validation items, so the coefficient is chosen on coarse scores: {', '.join(small)}")
    if chose and chosen.coefficient > 0 and chosen.coefficient == recipe.sweep.grid()[-1]:
        found.append(
            f"the largest coefficient of the grid ({chosen.coefficient:g}) was chosen: larger ones may do more"
        )
    if benchmark is not None and benchmark.shared and chose and chosen.coefficient > 0:
        found.append(
            f"{benchmark.shared} of the benchmark's items are among the validation items that the coefficient was "
            "chosen on: keep them apart (validation: {path: ..., rows: [a, b]}) for a figure that no choice has seen"
        )
    if subjects.reference is not None and subjects.reference.fingerprint == subjects.target.fingerprint:
        found.append(
            "the reference has the very weights of the model before: what stands beside it says nothing; give a model "
            "that never saw the forget set"
        )
    if subjects.given is not None and subjects.given.fingerprint == subjects.target.fingerprint:
        found.append("the edited model is the very model before: nothing was edited")
    if subjects.given is not None and recipe.model.chat_template == "auto":
        ours, theirs = (m.tokenizer.chat_template for m in (subjects.target, subjects.given))
        if theirs and theirs != ours:
            found.append(
                "the edited model has another chat template than the recipe's model, in whose it was asked: give its "
                "own as a file (model.chat_template) to ask both in that"
            )
    if subjects.given is not None and evidence.attacks and getattr(subjects.given.model, "is_quantized", False):
        found.append("the edited model is quantised, so that attacks which change its weights were left out")
    found += [
        f"{line['stage']}: of {counted(line['prompts_cut'], 'prompt')} the beginning was left out, because it did not "
        "fit into max_length beside the answer: raise max_length to train on all of it"
        for line in training
        if line.get("prompts_cut")
    ]
    if not recipe.retain and not recipe.utility:
        found.append("nothing was asked to be kept: add retain and utility sets to see what the edit costs")
    return (*found, *_doubts(chosen, points, before), *left_out(recipe, evidence.attacks))


def _doubts(chosen: Chosen, points: Sequence[SweepPoint], before: Sequence[TaskScore]) -> list[str]:
    """Which goals and kept metrics the scores before the edit make pointless, on validation or else on test items."""
    base = [p.scores for p in points if p.coefficient == 0]
    found: dict[Key, str] = {}
    for scores in (before, *base):
        doubted = search.doubted(scores, chosen.goals, chosen.kept, chosen.keep)
        found |= {key: f"{search.say_key(key)} {why} ({scores[0].split} items)" for key, why in doubted.items()}
    return list(found.values())


def left_out(recipe: Recipe, found: Robustness | None) -> tuple[str, ...]:
    """Attacks that the recipe asks for and that were not made: the data or the model have not what they need."""
    spec = recipe.robustness
    if spec is None or found is None:
        return ()
    names, kinds = {s.attack for s in found.scores}, {s.kind for s in found.scores}
    lost = [probing(probe) for probe in spec.probes if probing(probe) not in names]
    if spec.relearn is not None and spec.relearn.unrelated and not any("unrelated" in name for name in names):
        lost.append("relearning on unrelated texts")
    if spec.contrast and "contrast" not in kinds:
        lost.append(CONTRAST)
    if spec.lens and "lens" not in kinds:
        lost.append(LENS)
    return (f"left out, because these data or this model do not allow it: {', '.join(lost)}",) if lost else ()
