"""The stages that set a result beside others and attack it, on paper."""

from __future__ import annotations

from collections.abc import Iterator

from unlearn.estimates import memory
from unlearn.estimates.passes import training
from unlearn.estimates.run import AGAIN, ITEM_BYTES, Run, StageEstimate
from unlearn.estimates.tokens import ScoredItem
from unlearn.estimates.work import Work, total
from unlearn.recipe import TrainSpec

# Of a benchmark: items of its sets, mean tokens of prompt and answer, answers scored per item, tokens written.
_TOFU = {"forget01": 40, "forget05": 200, "forget10": 400}
_TOFU_OTHERS = (400, 100, 117)  # retain, real authors, world facts
_TOFU_ITEM = (22, 35, 7, 200)
_MUSE = {"news": (100 + 2 * 100 + 3 * 100, 1024, 128), "books": (100 + 2 * 100 + 3 * 100, 1024, 128)}


def evidence(run: Run) -> Iterator[StageEstimate]:
    """Reference, benchmark, membership and robustness, as the recipe has them."""
    recipe = run.recipe
    if run.has_reference:
        yield _reference(run)
    if recipe.benchmark is not None:
        yield _benchmark(run)
    if recipe.holdout is not None:
        yield _membership(run)
    if recipe.robustness is not None:
        yield _robustness(run)


def _reference(run: Run) -> StageEstimate:
    recipe = run.recipe
    work, held, kept, passing, what = run.reading(), run.resident("reference"), 0, 0, "read and scored"
    if recipe.reference == "train" and recipe.teach is not None:
        found = training(run.rows("retain"), recipe.teach)
        done, more, passing = run.trained(found, recipe.teach, recipe.teach.lora)
        # the model that is taught stands where the reference will be, until that is read
        trained, again = {**held, **more}, {**held, AGAIN: run.weights}
        both = {**trained, **again} if run.machine.kind == "cpu" else {}
        held = both or max(trained, again, key=lambda one: sum(one.values()))
        work += done + run.reading() + run.saving(run.weights)
        kept, what = run.weights, f"{found.steps:,} steps, {found.tokens:,.0f} tokens; then scored"
    work += run.score("test", False)
    if recipe.eval.generate != "none":
        work += run.write("test", False)
    return StageEstimate("reference", what, held, work, kept=kept, passing=passing)


def _benchmark(run: Run) -> StageEstimate:
    spec = run.recipe.benchmark
    assert spec is not None  # else there is no such stage
    if spec.name == "tofu":
        counts = [min(n, spec.items or n) for n in (_TOFU[spec.set], *_TOFU_OTHERS)]
        prompt, answer, answers, new = _TOFU_ITEM
        each = ScoredItem(
            *(prompt + answers * (answer - 1), 1 + answers * (answer - 1), prompt),
            *(answers * (prompt + answer), prompt + answer, answers),
        )
        items, prompts, new = [each] * sum(counts), [prompt] * sum(counts), spec.max_tokens or new
    else:
        count, length, new = _MUSE[spec.set]
        count = min(count, 6 * spec.items) if spec.items else count
        items = [ScoredItem(length, length, length // 2, length, length)] * count
        prompts, new = [length // 2] * (count // 2), spec.max_tokens or new
    packed = run.recipe.eval.engine == "packed"
    one = [run.bench.score(items, packed), run.bench.write(prompts, new)]
    gpu = run.machine.kind == "gpu"
    held = {
        **run.resident("benchmark"),
        "the edit": memory.edit(run.adapted, run.rank, run.size),
        **run.scoring(items),
        "keys and values of texts": memory.writing(run.shape, run.size, len(prompts), max(prompts) + new, gpu),
    }
    return StageEstimate(
        "benchmark",
        f"{spec.name} {spec.set}, {len(items):,} items, {run.subjects} models",
        held,
        total(one * run.subjects),
        kept=run.subjects * ITEM_BYTES * len(items),
        unknown=("the exact sizes of its files: means are used",),
    )


def _membership(run: Run) -> StageEstimate:
    rows = [*run.rows("forget"), *run.rows("holdout")]
    held_out = [i for s in run.sets if s.role == "holdout" for i in s.scored["test"]]
    tokens = sum(r.tokens for r in rows) + sum(i.prompt + i.heads for i in held_out)
    work = run.bench.forward(tokens, tokens, tokens / max(len(rows) + len(held_out), 1) / 2, run.edited)
    held = {
        **run.resident("membership"),
        "the edit": memory.edit(run.adapted, run.rank, run.size),
        "a pass": 2 * memory.scoring(run.shape, run.size, True),
    }
    return StageEstimate("membership", f"{run.subjects} models", held, total([work] * run.subjects))


def _robustness(run: Run) -> StageEstimate:
    """Copies in fewer bits, relearning of all weights, other prompts, samples, and the lens."""
    spec, forget = run.recipe.robustness, next(s for s in run.sets if s.role == "forget")
    assert spec is not None  # else there is no such stage
    packed = run.recipe.eval.engine == "packed"
    items = forget.scored["test"][: spec.items]
    once = run.bench.score(items, packed)
    scored = 1 + len(spec.quantize) + 3 * len(spec.probes) + spec.lens * run.shape.layers * 0.2
    work = [Work(once.operations * scored, once.seconds * scored)]
    copy = {**run.resident("robustness"), "a copy": run.weights}
    held = [{**run.resident("robustness"), "the edit": memory.edit(run.adapted, run.rank, run.size)}]
    held += [
        {
            **copy,
            f"in {kind}": memory.quantised(run.shape, kind, run.size),
            **run.scoring(items, 4),
        }
        for kind in spec.quantize
    ]
    if spec.samples:
        work.append(run.bench.write([i.prompt for i in items] * spec.samples, forget.continuation))
    if spec.relearn is not None:
        how = spec.relearn
        sizes = TrainSpec(steps=max(how.steps), batch_size=how.batch_size)
        found = training(forget.train[: how.items], sizes)
        curves = 1 + how.unrelated
        done, more, _ = run.trained(found, sizes, None, kept=False)
        work += [Work(done.operations, done.seconds), total([once] * (len(how.steps) + 1))] * curves
        held.append({**copy, **more})
    return StageEstimate(
        "robustness",
        f"{len(items)} items, {run.subjects} models",
        max(held, key=lambda one: sum(one.values())),
        total(work * run.subjects),
        passing=run.weights if spec.quantize else 0,
        unknown=("quantising",) if spec.quantize else (),
    )
