"""The stages of a run on paper, in order: what each holds, computes and leaves on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from unlearn.estimates import memory
from unlearn.estimates.evidence import evidence
from unlearn.estimates.passes import training
from unlearn.estimates.run import AGAIN, ITEM_BYTES, Run, StageEstimate
from unlearn.estimates.work import Work, total
from unlearn.recipe import LoraSpec, SetRole, TrainSpec
from unlearn.recipe_vector import BASELINES, NEED_RETAIN_VECTOR, ConsensusSpec, LearnedSpec, PertaSpec

_FORESEEN = 3  # passes of a correlation: the model and the two fine-tuned ones
_COMPARED = 9  # float32 arrays of a weight while it is exported, measured
_WEIGHED = 2860  # float32 operations' worth of time for each element of an exported weight: 43 ns on one core, measured
_REPORT = 2.0  # seconds for the report and its provenance, at the end
_MERGED = 12  # bytes moved per element when a taught LoRA goes into the weights
_ETHOS = 20.0  # operations of a singular value decomposition per rows x columns x the smaller of them


def stages(run: Run) -> tuple[StageEstimate, ...]:
    """Every stage that the recipe has."""
    found = (*_before(run), *_sweep_and_test(run), *evidence(run), *_export(run))
    return tuple(_process_keeps(run, found)) if run.machine.kind == "cpu" else found


def _process_keeps(run: Run, found: Iterable[StageEstimate]) -> Iterator[StageEstimate]:
    """In main memory a process keeps what an earlier stage took: small arrays that were given back stay in its heap."""
    most = 0
    for one in found:
        own = {name: n for name, n in one.held.items() if name not in {*run.resident(one.name), AGAIN}}
        here = sum(own.values())
        yield replace(one, held={**one.held, **({"kept from before": most - here} if most > here else {})})
        most = max(most, here - own.get(memory.GIVEN_BACK, 0)) if one.name != "load" else 0


def _before(run: Run) -> Iterator[StageEstimate]:
    recipe = run.recipe
    yield StageEstimate(
        "load",
        f"{run.shape.parameters / 1e6:,.0f} M parameters",
        {**run.resident("load"), **({"file being read": _mapped(run)} if run.size != run.stored else {})},
        Work(0.0, run.machine.start) + run.reading(),
        kept=0 if run.own else run.shape.parameters * run.stored,
        unknown=() if run.own else ("the download and the conversion, the first time",),
    )
    if recipe.teach is not None:
        rows = run.rows("forget", "retain")
        found = training(rows, recipe.teach)
        work, held, passing = run.trained(found, recipe.teach, recipe.teach.lora)
        again = {AGAIN: run.weights}
        resident = run.resident("teach")
        # on a GPU what the training took is free again when the taught model comes; in main memory it is not
        both = {**resident, **held, **again} if run.machine.kind == "cpu" else {}
        yield StageEstimate(
            "teach",
            f"{found.steps:,} steps, {found.tokens:,.0f} tokens",
            both or max({**resident, **held}, {**resident, **again}, key=lambda one: sum(one.values())),
            work + kept_model(run, recipe.teach.lora),
            kept=run.weights,
            passing=passing,
        )
    yield _finetune(run)
    if len(recipe.goals()) > 1:
        yield _balance(run)
    if recipe.forget is not None and recipe.vector.correlation is not None:
        yield _foresee(run)


def kept_model(run: Run, lora: LoraSpec | None) -> Work:
    """Merge what was taught, write the model, seal it by SHA-256, and read it again."""
    merged = Work()
    if lora is not None:
        elements = sum(one.weight for one in run.shape.adapted(lora.targets, lora.depth))
        merged = Work(2.0 * lora.rank * elements, elements * _MERGED / run.machine.bandwidth)
    return merged + run.saving(run.weights) + run.reading() + Work(0.0, run.weights / run.machine.hashed)


def _mapped(run: Run) -> int:
    return run.shape.parameters * run.stored if run.machine.kind == "cpu" else 0


def _finetune(run: Run) -> StageEstimate:
    """Every fine-tuning that the methods need, and the shaping of what comes of it."""
    recipe, vector = run.recipe, run.recipe.vector
    source, steps = vector.steps()[0], vector.steps()
    fits = []
    if vector.uses(*NEED_RETAIN_VECTOR):
        spec = vector.retain or vector.forget
        fits.append((run.fit(run.rows("retain"), spec), spec))
    if source != "retain_only":
        times = (vector.consensus or ConsensusSpec()).runs if source == "consensus" else 1
        roles = ("forget", "learn", "term")
        for one in (s for s in run.sets if s.role in roles and s.train):
            penalised = "penalised" if one.role == "forget" and source not in BASELINES else source
            fits += [(run.fit(one.train, vector.forget, penalised), vector.forget)] * times
    done = [run.trained(found, spec, vector.lora) for found, spec in fits]
    work, unknown = total(d[0] for d in done), []
    if vector.uses("learned"):
        learned = vector.learned or LearnedSpec()
        sizes = TrainSpec(steps=learned.steps, batch_size=learned.batch_size + 2 * learned.retain_batch_size)
        work += run.trained(run.fit((*run.rows("forget"), *run.rows("retain")), sizes), sizes, vector.lora, kept=False)[
            0
        ]
    if vector.uses("perta"):
        count = (vector.perta or PertaSpec()).samples
        sizes = TrainSpec(steps=2 * count, batch_size=1)
        work += run.trained(run.fit((*run.rows("forget"), *run.rows("retain")), sizes), sizes, vector.lora, kept=False)[
            0
        ]
    if vector.uses("ethos"):
        unknown.append("singular values of every weight (ethos), some " + _spelled(run))
    held = max((d[1] for d in done), key=lambda h: sum(h.values()))
    beside: dict[str, int] = {}
    if vector.uses("msa"):
        beside["the clean checkpoint"] = run.weights
    if recipe.model.quantize != "none":
        beside[f"the copy in {recipe.model.quantize}"] = memory.quantised(run.shape, recipe.model.quantize, run.size)
    return StageEstimate(
        "finetune",
        f"{' + '.join(f'{f.steps:,}' for f, _ in fits)} steps, {sum(f.tokens for f, _ in fits):,.0f} tokens",
        {**run.resident("finetune"), **beside, **held},
        work + (run.reading() if beside else Work()),
        kept=sum(run.vector_bytes(vector.lora.rank) for _ in fits) + run.vector_bytes(run.rank),
        passing=max(d[2] for d in done),
        unknown=(*unknown, *(["the shaping"] if len(steps) > 1 and not unknown else [])),
    )


def _spelled(run: Run) -> str:
    work = sum(_ETHOS * one.out * one.inputs * min(one.out, one.inputs) for one in run.adapted)
    return f"{work / 1e15:,.1g} PFLOP that run badly in parallel"


def _balance(run: Run) -> StageEstimate:
    """Coefficients together: the grid for all at once, then each moved along it until nothing is gained."""
    points = len(run.recipe.sweep.grid()) + 2 * len(run.recipe.goals()) - 1
    return StageEstimate(
        "balance",
        f"about {points} combinations",
        _scoring(run, "balance", "validation", run.recipe.eval.generate == "sweep"),
        total([run.score("validation", True)] * points),
        kept=points * ITEM_BYTES * len(run.items("validation")),
    )


def _foresee(run: Run) -> StageEstimate:
    """Short fine-tunings on retain sets, a slope for every set, and the correlations."""
    recipe, spec, vector = run.recipe, run.recipe.vector.correlation, run.recipe.vector
    assert spec is not None  # else there is no such stage
    held, passing, kept, fitted = [run.resident("foresee")], 0, 0, []
    near = [s for s in run.sets if s.role == "retain" and s.train]
    own = vector.uses(*NEED_RETAIN_VECTOR) and len(near) == 1 and not vector.uses("msa")
    how = vector.retain or vector.forget
    if spec.steps is not None and (how.steps is None or how.steps > spec.steps):
        how = how.model_copy(update={"steps": spec.steps, "epochs": None})
    if vector.steps()[0] in BASELINES:
        near = []
    for one in near if not own else ():
        work, more, checkpoints = run.trained(run.fit(one.train, how), how, vector.lora)
        fitted.append(work)
        held.append({**run.resident("foresee"), **more})
        passing, kept = max(passing, checkpoints), kept + run.vector_bytes(vector.lora.rank)
    looked = {
        (s.role, s.name): s.scored["validation"][: spec.items] for s in run.sets if s.role not in ("term", "holdout")
    }
    tokens = {key: sum(i.prompt + i.heads for i in items) for key, items in looked.items()}
    heads = {key: sum(i.heads for i in items) for key, items in looked.items()}
    forgotten = [key for key in looked if key[0] == "forget"]
    compared: list[tuple[SetRole, str]] = [("retain", s.name) for s in near if looked["retain", s.name]]
    read = sum(tokens.values()) * 3.0 + sum(
        _FORESEEN * (tokens[key] + sum(tokens[f] for f in forgotten)) for key in compared
    )
    at = sum(heads.values()) * 2.0 + sum(
        _FORESEEN * (heads[key] + sum(heads[f] for f in forgotten)) for key in compared
    )
    longest = max((i.prompt + i.heads for items in looked.values() for i in items), default=1)
    vectors = memory.edit(run.adapted, vector.lora.rank, run.size)
    outputs = memory.correlating(run.shape, max(heads.values(), default=0))
    held.append({**run.resident("foresee"), "the edit": vectors, "outputs of three models": outputs})
    back = memory.slope(run.shape, run.adapted, run.rank or run.shape.hidden, run.size, longest)
    held.append({**run.resident("foresee"), "the edit": vectors, "activations of a slope": back})
    steps = f"{how.steps or 'some'} steps on {len(fitted)} sets, " if fitted else ""
    return StageEstimate(
        "foresee",
        f"{steps}{sum(map(len, looked.values())):,} items",
        max(held, key=lambda one: sum(one.values())),
        total(fitted) + run.bench.forward(read, at, longest / 2, run.edited),
        kept=kept,
        passing=passing,
        unknown=("the quantised copy, read again",) if recipe.model.quantize != "none" and fitted else (),
    )


def _scoring(run: Run, stage: str, split: str, write: bool) -> dict[str, int]:
    held = {
        **run.resident(stage),
        "the edit": memory.edit(run.adapted, run.rank, run.size),
        **run.scoring(run.items("test" if split == "test" else "validation")),
    }
    if write:
        held["keys and values of texts"] = run.writing("test" if split == "test" else "validation")
    return held


def _sweep_and_test(run: Run) -> Iterator[StageEstimate]:
    recipe = run.recipe
    generate = recipe.eval.generate
    _, *grid = recipe.sweep.grid()
    points = len(grid) + 1
    if recipe.sweep.search == "bisect":
        points = 1 + max(len(grid) // 2, (len(grid)).bit_length())
    each = [run.score("validation", c > 0) for c in range(points)]
    if generate == "sweep":
        each += [run.write("validation", c > 0) for c in range(points)]
    items = run.items("validation")
    most = "at most " if recipe.sweep.search == "bisect" else ""
    unknown = ["lm-eval's own tasks"] if recipe.eval.tasks else []
    if len(recipe.goals()) > 1:  # what the balance has scored is not scored again
        each, unknown = [], [*unknown, "coefficients that the balance did not come by"]
    yield StageEstimate(
        "sweep",
        f"{most}{points} coefficients on {len(items):,} items",
        _scoring(run, "sweep", "validation", generate == "sweep"),
        total(each),
        kept=points * ITEM_BYTES * len(items),
        unknown=tuple(unknown),
    )
    items = run.items("test")
    each = [run.score("test", edited) for edited in (False, True)]
    if generate != "none":
        each += [run.write("test", edited) for edited in (False, True)]
    each += [_shown(run, edited) for edited in (False, True)]
    yield StageEstimate(
        "test",
        f"{len(items):,} items, before and after" + (", with texts" if generate != "none" else ""),
        _scoring(run, "test", "test", generate != "none"),
        total(each),
        kept=2 * ITEM_BYTES * len(items),
        unknown=("lm-eval's own tasks",) if recipe.eval.tasks else (),
    )


def _shown(run: Run, edited: bool) -> Work:
    """The few answers that the report shows (unlearn.samples)."""
    count = run.recipe.eval.examples
    found = Work()
    for length, kinds in ((10, ("mcq",)), (40, ("qa", "text"))):
        prompts = [i.prompt for s in run.sets if s.kind in kinds for i in s.scored["test"][:count]]
        found += run.bench.write(prompts, length, run.edited * edited)
    return found


def _export(run: Run) -> Iterator[StageEstimate]:
    spec, adapter = run.recipe.export, run.vector_bytes(run.rank)
    if not spec.adapter and not spec.merged:
        return
    size = {"auto": run.size, "float32": 4}.get(spec.dtype, 2)
    kept = adapter * spec.adapter + run.shape.parameters * size * spec.merged
    edited = sum(one.weight for one in run.adapted) * spec.merged
    # the edited weight, the pristine one, the intended and the realised change, and what compares them
    largest = max(one.weight for one in run.adapted) * 4 * _COMPARED if spec.merged else 0
    changes, moved = 4.0 * edited * (run.rank or 1), edited * _WEIGHED / run.machine.rate(4, "score")
    what = " and ".join(n for n, on in (("the adapter", spec.adapter), ("merged weights", spec.merged)) if on)
    held = {**run.resident("export"), **({"one weight, in float32": largest} if largest else {})}
    yield StageEstimate("export", what, held, Work(changes, moved + _REPORT) + run.saving(kept), kept=kept)
