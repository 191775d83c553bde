"""One run from start to end: stage order, the shortcut when nothing changed, and the report."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from unlearn import checks
from unlearn import processes as distributed
from unlearn.console import is_main_process, quiet_libraries, say
from unlearn.data.files import source_path
from unlearn.evidence import reference as references
from unlearn.model import locate as fetch
from unlearn.processes import told
from unlearn.recipe.data import DataSet, Source
from unlearn.recipe.load import LoadedRecipe
from unlearn.recipe.metrics import Key
from unlearn.recipe.schema import Recipe
from unlearn.report.page import render_html
from unlearn.report.terminal import render_table
from unlearn.results import LENS, Benchmark, Chosen, Robustness, RunReport, ScoreRow, SweepPoint, TaskScore, probing
from unlearn.score import search
from unlearn.store import provenance
from unlearn.store.files import fingerprint, write_json_atomic, write_text_atomic
from unlearn.store.stages import Pool, RunFolder
from unlearn.text import counted

if TYPE_CHECKING:
    from unlearn.data.sets import LoadedSet
    from unlearn.pipeline_stages import Goal, Subjects, Vectors
    from unlearn.vector.task_vector import TaskVector

_LESS = "stop what else runs there"
_FEW = 20  # items under which an accuracy moves in steps that a bound of 95 % cannot resolve


def execute(
    loaded: LoadedRecipe, out: Path | None, fresh: bool = False, *, pool: Path | None = None, prepare: bool = False
) -> RunReport | None:
    """Run what is left to run of a recipe, print the result and return it.

    Args:
        loaded, out, fresh: see :func:`unlearn.run`.
        pool: A folder of stages that many runs share (:mod:`unlearn.store.stages`).
        prepare: Make only what other runs can share (the model, what it is taught, a trained reference) and return
            None.

    Raises:
        UnlearnError: see :func:`unlearn.run`.
    """
    # what a batch system gives a run is no part of what is run
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"cluster": None}))
    shared = Pool(pool.absolute()) if pool is not None else None
    recipe, base = loaded.recipe, loaded.source.parent
    with told(recipe.name, _LESS), RunFolder.open(out, recipe, loaded.text, fresh) as folder:
        say(f"{recipe.name}: {folder.root}")
        key = fingerprint(_plain(recipe), _inputs(recipe, base), provenance.surroundings())
        if distributed.several():
            _fetch(recipe, base)  # before they join: whoever waits for a download there is taken for lost
        distributed.join()
        if distributed.count() > 1:
            say(f"{distributed.count()} processes share training and scoring")
        try:
            report = None if prepare else _unchanged(folder, key)
            if prepare:
                _prepare(loaded, folder, shared)
            elif report is None:
                report = _run(loaded, folder, shared, key)
            else:
                say("nothing has changed since this run was finished; --fresh runs it again")
        finally:
            distributed.leave()
        if report is not None and is_main_process():
            render_table(report, Console())
            say(f"report: {folder.root / 'report.html'}")
    return report


def _fetch(recipe: Recipe, base: Path) -> None:
    """Have every model that the run reads on this machine, converted."""
    checks.check_reach(recipe, base)
    quiet_libraries()  # before they are imported
    from unlearn import pipeline_stages as fitted
    from unlearn.model import locate as fetch

    fetch.locate(recipe.model, base)
    if references.is_model(recipe) and recipe.reference != "train":
        references.locate(recipe, base)
    fitted.clean_checkpoint(recipe, base)


def _prepare(loaded: LoadedRecipe, folder: RunFolder, pool: Pool | None) -> None:
    """The stages before a run's own: nothing of them depends on vectors, coefficients or rules."""
    recipe = loaded.recipe
    checks.read_local(recipe.sets(), loaded.source.parent)
    checks.check_reach(recipe, loaded.source.parent)
    quiet_libraries()  # before they are imported
    from unlearn.pipeline_stages import Pipeline

    checks.check(recipe, loaded.source.parent)
    pipe = Pipeline(recipe, loaded.source.parent, folder, pool)
    base = pipe.load()
    if recipe.teach is not None:
        sets = pipe.data(base)
        pipe.teach(base, sets)
        if recipe.reference == "train":
            pipe.reference(sets)


def _run(loaded: LoadedRecipe, folder: RunFolder, pool: Pool | None, key: str) -> RunReport | None:
    recipe = loaded.recipe
    checks.read_local(recipe.sets(), loaded.source.parent)
    checks.check_reach(recipe, loaded.source.parent)
    quiet_libraries()  # before they are imported
    from unlearn.pipeline_stages import Pipeline, Subjects
    from unlearn.report.publish import CardFacts

    checks.check(recipe, loaded.source.parent, hub=True)
    began = time.monotonic()
    pipe = Pipeline(recipe, loaded.source.parent, folder, pool)
    base = pipe.load()
    sets = pipe.data(base)
    pipe.look(base, sets)
    models = {"base": base.fingerprint}
    target = pipe.teach(base, sets)
    models["target"] = target.fingerprint
    del base  # after a teaching nothing needs it any more, and it is as large as the target
    vectors = pipe.vectors(target, sets)
    weights = pipe.balance(target, sets, vectors.parts)
    edit = pipe.edit(vectors, weights)
    foresight = pipe.foresee(target, sets, vectors, edit)
    points, chosen = pipe.sweep(target, sets, edit)
    before, after, examples = pipe.test(target, sets, edit, chosen.coefficient)
    subjects = Subjects(target, edit, chosen.coefficient, pipe.reference(sets))
    beside = pipe.reference_scores(subjects, sets)
    benchmark = pipe.benchmark(subjects, sets)
    membership = pipe.membership(subjects, sets)
    robustness = pipe.robustness(subjects, sets)
    distributed.wait()
    distributed.leave()
    if not is_main_process():
        return None  # training and scoring are shared among processes; the rest is the main one's
    rows, training = _rows(before, after, beside), pipe.training(vectors)
    exports = pipe.export(target, sets, edit, CardFacts(recipe, chosen, rows))
    who = provenance.collect(loaded.source, sys.argv, {"key": key, "model": recipe.model.path, **models})
    report = RunReport(
        name=recipe.name,
        description=recipe.description,
        chosen=chosen,
        scores=rows,
        sweep=points,
        examples=examples,
        data=tuple(_data_line(s) for s in sets),
        vector=_vector_line(recipe, vectors, edit, weights, chosen.coefficient),
        training=training,
        exports=exports,
        seconds=pipe.seconds,
        provenance=who,
        warnings=(
            *_warnings(recipe, sets, chosen, benchmark, subjects, training),
            *_doubts(chosen, points, before),
            *left_out(recipe, robustness),
        ),
        foresight=foresight,
        benchmark=benchmark,
        membership=membership,
        robustness=robustness,
    )
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    folder.check()
    page = render_html(report)
    write_text_atomic(folder.path("report.html"), page)
    write_text_atomic(folder.path("report.json"), text)
    digests = {f"{n}_sha256": hashlib.sha256(t.encode()).hexdigest() for n, t in (("report", text), ("page", page))}
    sealed = {**digests, "stages": pipe.stages}
    write_json_atomic(folder.path("provenance.json"), {**who, **sealed})
    say(f"finished in {time.monotonic() - began:.0f} s", style="bold")
    return report


def _unchanged(folder: RunFolder, key: str) -> RunReport | None:
    """The report of a run that was finished under ``key`` and whose every file is still whole, else None."""
    try:
        sealed = json.loads(folder.path("provenance.json").read_text(encoding="utf-8"))
        text, page = (folder.path(name).read_bytes() for name in ("report.json", "report.html"))
        if sealed["key"] != key or hashlib.sha256(text).hexdigest() != sealed["report_sha256"]:
            return None
        if hashlib.sha256(page).hexdigest() != sealed["page_sha256"]:
            return None
        report = RunReport.from_json(json.loads(text))
        if not report.provenance.items() <= sealed.items():
            return None
        stages = dict(sealed["stages"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(folder.finished(name, stage_key, verify="size") for name, stage_key in stages.items())
    return report if whole else None


def _inputs(recipe: Recipe, base: Path) -> list[Any]:
    """What the recipe's files are now: SHA-256 of data files, size and time of model files. What the hub has counts by
    its revision, and the device not at all: a finished report can be read on a machine without a GPU.
    """
    sources: list[Source] = []
    for _, data in recipe.sets():
        sources += [data, *(s for s in (data.validation, data.test) if s is not None)]
    found: list[Any] = []
    for source in sources:
        path = source_path(source, base)
        if not source.path.startswith("hub:") and path.is_file():
            with path.open("rb") as f:
                found.append([source.path, hashlib.file_digest(f, "sha256").hexdigest()])
    clean = recipe.vector.msa.clean if recipe.vector.msa else None
    for model in (recipe.model.path, clean):
        place = fetch.find(model.partition("#")[0], base) if model else None
        found.append([] if place is None else references.files_of(place))
    return [*found, *references.state(recipe, base)]


def _rows(
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


def _data_line(loaded: LoadedSet) -> dict[str, Any]:
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


def _vector_line(
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


def _warnings(
    recipe: Recipe,
    sets: Sequence[LoadedSet],
    chosen: Chosen,
    benchmark: Benchmark | None,
    subjects: Subjects,
    training: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    """What a careful reader would ask about."""
    found = []
    small = [f"{s.role} {s.name} ({len(s.validation)})" for s in sets if 0 < len(s.validation) < _FEW]
    if small:
        found.append(f"few validation items, so the coefficient is chosen on coarse scores: {', '.join(small)}")
    if chosen.coefficient > 0 and chosen.coefficient == recipe.sweep.grid()[-1]:
        found.append(
            f"the largest coefficient of the grid ({chosen.coefficient:g}) was chosen: larger ones may do more"
        )
    if benchmark is not None and benchmark.shared and chosen.coefficient > 0:
        found.append(
            f"{benchmark.shared} of the benchmark's items are among the validation items that the coefficient was "
            "chosen on: keep them apart (validation: {path: ..., rows: [a, b]}) for a figure that no choice has seen"
        )
    if subjects.reference is not None and subjects.reference.fingerprint == subjects.target.fingerprint:
        found.append(
            "the reference has the very weights of the model before: what stands beside it says nothing; give a model "
            "that never saw the forget set"
        )
    found += [
        f"{line['stage']}: of {counted(line['prompts_cut'], 'prompt')} the beginning was left out, because it did not "
        "fit into max_length beside the answer: raise max_length to train on all of it"
        for line in training
        if line.get("prompts_cut")
    ]
    if not recipe.retain and not recipe.utility:
        found.append("nothing was asked to be kept: add retain and utility sets to see what the edit costs")
    return tuple(found)


def _doubts(chosen: Chosen, points: Sequence[SweepPoint], before: Sequence[TaskScore]) -> list[str]:
    """Which goals and kept metrics the scores before the edit make pointless, on validation or else on test items."""
    base = next(p.scores for p in points if p.coefficient == 0)
    found: dict[Key, str] = {}
    for scores in (before, base):
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
    if spec.lens and "lens" not in kinds:
        lost.append(LENS)
    return (f"left out, because these data or this model do not allow it: {', '.join(lost)}",) if lost else ()


def _plain(recipe: Recipe) -> Mapping[str, Any]:
    plain: dict[str, Any] = recipe.model_dump(mode="json", exclude={"cluster"})
    return plain
