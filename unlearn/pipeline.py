"""One run, from recipe to report. Each step that takes the store is made once and found again by what it depends on."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from unlearn import processes
from unlearn.console import is_main_process, say
from unlearn.data.chat import chat_of, unused_template
from unlearn.data.sets import LoadedSet, asked_back, at_prefixes, load_sets, plainly, write_items
from unlearn.evidence import benchmarks
from unlearn.evidence import reference as references
from unlearn.evidence.attacks import attacked_items, run_attacks
from unlearn.evidence.foresight import foresee_cost
from unlearn.evidence.membership import infer_membership, require_rows
from unlearn.evidence.reference import Subjects, load_edited, load_reference, score_reference
from unlearn.model import load as models
from unlearn.model import locate
from unlearn.model.load import Loaded
from unlearn.recipe.schema import Recipe, goal_metrics, kept_metrics
from unlearn.report.assemble import Evidence, data_line, score_rows, vector_line, warnings
from unlearn.report.exports import export, exported
from unlearn.report.page import render_html, save_figures
from unlearn.report.publish import CardFacts, able
from unlearn.report.trackers import track
from unlearn.results import Membership, RunReport
from unlearn.score.scorer import Questions, Scorer, build_questions, unlikely_spaces
from unlearn.score.search import as_given
from unlearn.store import provenance
from unlearn.store.files import write_json_atomic, write_text_atomic
from unlearn.store.stages import Pool, RunFolder, Store
from unlearn.text import parameters
from unlearn.train.vectors import (
    Goal,
    check_trainable,
    clean_checkpoint,
    fit_vectors,
    given_vector,
    other_base,
    require_fit,
    save_edit,
    teach,
    training_logs,
    what_is_fitted,
)

_SCORING = "lower eval.batch_tokens (engine packed) or eval.batch_size (engine hf)"
_SHAPING = "shape the vector by fewer of vector.method's steps"


def run(recipe: Recipe, store: Store) -> RunReport | None:
    """Make a model forget, or find again what an earlier run of the recipe made of it.

    Of the report's provenance only the models are known yet; on every process but the main one there is no report.
    """
    if recipe.edited is not None:
        return evaluate(recipe, store)
    # the model, and what it is to forget and to keep
    given = given_vector(recipe, store)
    base = load_base(recipe, store)
    sets = load_data(recipe, base, store)
    questions = prepare_questions(recipe, base, sets, store)
    if given is not None:
        require_fit(base, given)
    models_used = {"model": recipe.model.path, "base": base.fingerprint}
    target = teach_target(recipe, base, sets, store)
    models_used["target"] = target.fingerprint
    doubts = [unlikely_spaces(target, sets)]
    if given is not None:
        models_used["vector"] = given.digest()
        doubts.append(other_base(given, recipe, target))
    doubts = list(filter(None, doubts))
    for said in doubts:
        say(f"    ! {said}", style="yellow")
    del base  # after a teaching nothing needs it any more, and it is as large as the target

    # what is subtracted
    with store.step("finetune", what_is_fitted(recipe), _SHAPING):
        vectors = fit_vectors(target, sets, recipe, store, given)
    scorer = Scorer(target, questions, store)
    weights: Mapping[Goal, float] = dict.fromkeys(vectors.parts, 1.0)
    if len(vectors.parts) > 1:
        with store.step("balance", f"coefficients of {len(vectors.parts)} vectors, on validation items", _SCORING):
            weights = scorer.balance(vectors.parts)
    with processes.told("finetune", _SHAPING):
        vector = save_edit(vectors.combined(weights), store)

    # how much of it: chosen on validation items, reported on test items
    foresight = None
    if recipe.vector.correlation is not None and recipe.forget is not None:
        less = "set vector.correlation to null, which leaves the foresight out"
        with store.step("foresee", "what the edit will cost, before it is made", less):
            foresight = foresee_cost(target, vector, vectors, sets, recipe, store)
    with store.step("sweep", _what_is_swept(recipe), _SCORING):
        points, chosen = scorer.sweep(vector)
    with store.step("test", "test items, before and after", _SCORING):
        before, after, examples = scorer.test(vector, chosen.coefficient)

    # is it really forgotten?
    found = gather(Subjects(target, vector, chosen.coefficient, None), questions, store)

    processes.wait()
    processes.leave()
    if not is_main_process():
        return None  # training and scoring are shared among processes; the rest is the main one's
    rows, exports = score_rows(before, after, found.beside), {}
    if names := exported(recipe, chosen.coefficient):
        less = "set export.merged to false: the adapter alone needs no whole weights"
        with store.step("export", " and ".join(names), less):
            exports = export(target, sets, vector, CardFacts(recipe, chosen, rows), store)
    return RunReport(
        name=recipe.name,
        description=recipe.description,
        chosen=chosen,
        scores=rows,
        sweep=points,
        examples=examples,
        data=tuple(data_line(s) for s in sets),
        vector=vector_line(recipe, vectors, vector, weights, chosen.coefficient),
        training=(training := training_logs(vectors, recipe, store)),
        exports=exports,
        seconds=store.seconds,
        provenance=models_used,
        warnings=(*doubts, *warnings(recipe, sets, chosen, points, before, found, training)),
        foresight=foresight,
        benchmark=found.benchmark,
        membership=found.membership,
        robustness=found.attacks,
    )


def evaluate(recipe: Recipe, store: Store) -> RunReport | None:
    """The report of a model that was edited elsewhere, beside the recipe's: the same scores, comparisons, attacks."""
    assert recipe.edited is not None  # the caller looked
    base = load_base(recipe, store)
    sets = load_data(recipe, base, store)
    questions = prepare_questions(recipe, base, sets, store)
    models_used = {"model": recipe.model.path, "base": base.fingerprint}
    target = teach_target(recipe, base, sets, store)
    del base
    with store.step("edited", f"the model {recipe.edited.words()}", "choose a smaller model"):
        given = load_edited(recipe, target, store.base)
    models_used |= {"target": target.fingerprint, "edited": given.fingerprint}
    with store.step("test", "test items, before and after", _SCORING):
        before, after, examples = Scorer(target, questions, store).compare(given)
    chosen = as_given(before, after, goal_metrics(recipe), kept_metrics(recipe), recipe.choose)
    found = gather(Subjects(target, None, chosen.coefficient, None, given), questions, store)

    processes.wait()
    processes.leave()
    if not is_main_process():
        return None
    return RunReport(
        name=recipe.name,
        description=recipe.description,
        chosen=chosen,
        scores=score_rows(before, after, found.beside),
        sweep=(),
        examples=examples,
        data=tuple(data_line(s) for s in sets),
        vector={"before": provenance.tidy(target.path), "after": provenance.tidy(recipe.edited.words())},
        training=training_logs(None, recipe, store),
        exports={},
        seconds=store.seconds,
        provenance=models_used,
        warnings=(
            *filter(None, [unlikely_spaces(target, sets)]),
            *warnings(recipe, sets, chosen, (), before, found, ()),
        ),
        benchmark=found.benchmark,
        membership=found.membership,
        robustness=found.attacks,
    )


def gather(subjects: Subjects, questions: Questions, store: Store) -> Evidence:
    """Every comparison and attack that the recipe asks for; the reference comes to the other models here."""
    recipe, benchmark, attacks = questions.recipe, None, None
    membership: tuple[Membership, ...] = ()
    if references.is_model(recipe):
        with store.step("reference", "a model that never saw the forget set", f"{_SCORING}, or leave reference out"):
            subjects = replace(subjects, reference=load_reference(recipe, questions.sets, store))
    with processes.told("reference", f"{_SCORING}, or leave reference out"):
        beside = score_reference(subjects, questions, store)
    if recipe.benchmark is not None:
        what = f"{recipe.benchmark.name} {recipe.benchmark.set}: {', '.join(subjects.who())}"
        with store.step("benchmark", what, f"{_SCORING}, or leave benchmark out"):
            benchmark = benchmarks.run_benchmark(subjects, questions, store)
    if recipe.holdout is not None:
        what = "forget items against those held out"
        with store.step("membership", what, "leave holdout out, and with it membership inference"):
            membership = infer_membership(subjects, questions, store)
    if recipe.robustness is not None and subjects.chosen > 0:
        forget, items = attacked_items(questions)
        what = f"attacks, scored on at most {len(items)} items of {forget.name}"
        with store.step("robustness", what, "set robustness to null"):
            attacks = run_attacks(subjects, questions, store)
    return Evidence(subjects, beside, benchmark, membership, attacks)


def prepare(recipe: Recipe, store: Store) -> None:
    """Make what runs of one grid share: the taught model and the trained reference."""
    base = load_base(recipe, store)
    if recipe.teach is None:
        return
    sets = load_data(recipe, base, store)
    teach_target(recipe, base, sets, store)
    if recipe.reference == "train":
        with store.step("reference", "a model that never saw the forget set", _SCORING):
            load_reference(recipe, sets, store)


def steps(recipe: Recipe) -> tuple[str, ...]:
    """The names of the steps that a run of the recipe has, in order."""
    made = recipe.edited is None  # here, and not elsewhere
    present = {
        "load": True,
        "data": True,
        "teach": recipe.teach is not None,
        "edited": not made,
        "finetune": made,
        "balance": made and len(recipe.goals()) > 1,
        "foresee": made and recipe.vector.correlation is not None and recipe.forget is not None,
        "sweep": made,
        "test": True,
        "reference": references.is_model(recipe),
        "benchmark": recipe.benchmark is not None,
        "membership": recipe.holdout is not None,
        "robustness": recipe.robustness is not None,
        "export": made,
    }
    return tuple(name for name, there in present.items() if there)


def open_store(recipe: Recipe, base: Path, folder: RunFolder, pool: Pool | None = None) -> Store:
    """The store of a recipe's run. ``base`` is where the recipe's relative paths begin."""
    versions = [provenance.surroundings(), models.numbers(models.place(recipe.model.device))]
    return Store(folder, versions, base, pool, recipe.reuse, steps(recipe))


def load_base(recipe: Recipe, store: Store) -> Loaded:
    """Fetch (and convert) the model, and bring it into memory."""
    # float32 is no TF32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or our caller has set
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with store.step("load", f"the model {recipe.model.path.partition('#')[0]}", "choose a smaller model"):
        models.place(recipe.model.device)  # before anything is downloaded
        loaded = models.load(recipe.model, locate.locate(recipe.model, store.base))
        size = sum(p.numel() for p in loaded.model.parameters())
        say(f"    {parameters(size)}, {loaded.dtype}, on {loaded.device}".replace("torch.", ""))
    return loaded


def load_data(recipe: Recipe, base: Loaded, store: Store) -> tuple[LoadedSet, ...]:
    """Read and split every set, and write the scored items where lm-eval (and anyone) can read them."""
    with store.step("data", "the forget, retain and utility sets", "lower limit of the largest sets"):
        sets = load_sets(recipe, store.base, base.tokenizer)
        if base.tokenizer.chat_template and (note := unused_template(recipe)):
            say(f"    ! {note}", style="yellow")
        if recipe.reference == "train":
            references.to_teach(sets)  # said before anything is trained
        for s in sets:
            counts = f"{len(s.train)} train, {len(s.validation)} validation, {len(s.test)} test"
            say(f"    {s.role:8}{s.name}: {', '.join([counts, *s.left_out()])}")

        def make(tmp: Path) -> None:
            asked = at_prefixes(asked_back(plainly(sets)), base.tokenizer)
            write_items(asked, base.tokenizer, tmp, ("validation", "test"))

        store.stage("items", [base.words, [[s.role, s.name, s.digest, s.spec.continuation] for s in sets]], make)
    return sets


def prepare_questions(recipe: Recipe, base: Loaded, sets: tuple[LoadedSet, ...], store: Store) -> Questions:
    """What is asked; and get hold of all that later steps need: what is missing is said before anything is trained."""
    check_trainable(recipe, base, sets, store.base)
    scoring = [references.pack_digest(), *map(references.content, references.task_files(recipe))]
    asks = recipe.benchmark is not None or recipe.eval.tasks
    chat = chat_of(recipe.model, store.base, base.tokenizer) if asks else None
    questions = build_questions(recipe, sets, base.tokenizer, store.path("items"), scoring, chat)
    if recipe.benchmark is not None and recipe.benchmark.name == "tofu":
        place = base.tokenizer.name_or_path  # MUSE's take long to cut into tokens, and its rows were read
        benchmarks.build(recipe.benchmark, store.base, place, recipe.seed, chat)
    references.require_same_tokens(recipe, store.base, base.tokenizer)
    if recipe.edited is None:
        clean_checkpoint(recipe, store.base)
    if recipe.holdout is not None:
        require_rows(sets, base)
    if recipe.export.push_to_hub is not None and recipe.edited is None:
        able(recipe.export.push_to_hub)
    return questions


def teach_target(recipe: Recipe, base: Loaded, sets: tuple[LoadedSet, ...], store: Store) -> Loaded:
    """The target model: the base taught forget and retain sets together, or the base as it is."""
    if recipe.teach is None:
        return base
    learned = [s for s in sets if s.role in ("forget", "retain") and s.train]
    with store.step("teach", "the base model the forget and retain sets", "choose a smaller model"):
        return models.load(recipe.model, str(teach("target", base, learned, recipe, store)))


def finish(report: RunReport, recipe: Recipe, key: str, source: Path, folder: RunFolder, store: Store) -> RunReport:
    """Write the report and its page, tell trackers, and seal them. Returns the report with all of its provenance.

    ``key`` is of all that the run depends on, by which it is found unchanged; ``source`` is the recipe's file.
    """
    found = provenance.collect(source, sys.argv, {"key": key, **report.provenance})
    report = replace(report, provenance=found)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    folder.check()
    page = render_html(report)
    save_figures(report, folder.path("figures"))
    write_text_atomic(folder.path("report.html"), page)
    write_text_atomic(folder.path("report.json"), text)
    track(recipe, report, folder)
    digests = {f"{n}_sha256": hashlib.sha256(t.encode()).hexdigest() for n, t in (("report", text), ("page", page))}
    write_json_atomic(folder.path("provenance.json"), {**found, **digests, "stages": store.keys})
    return report


def _what_is_swept(recipe: Recipe) -> str:
    count = len(recipe.sweep.grid())
    how = f"bisection of {count - 1}" if recipe.sweep.search == "bisect" else f"{count}"
    return f"{how} coefficients on validation items"
