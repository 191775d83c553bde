"""What ``unlearn plan`` prints: the run that a recipe asks for, with its data read and its model looked up.

Everything that costs no download and no torch is done for real, so a recipe whose plan is printed has readable data,
a model that is there (or can be asked for), and stages of known length.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from unlearn.data.files import HUB
from unlearn.data.items import CHARACTERS_PER_TOKEN
from unlearn.data.sets import LoadedSet, load_sets
from unlearn.evidence import reference as references
from unlearn.model.locate import model_place
from unlearn.plan import checks
from unlearn.recipe.data import DataSet, SetRole
from unlearn.recipe.evaluation import RobustnessSpec
from unlearn.recipe.load import LoadedRecipe
from unlearn.recipe.methods import LoraSpec, TeachSpec, TrainSpec, formula, penalty, phrases
from unlearn.recipe.schema import Recipe, goal_metrics, kept_metrics
from unlearn.score.search import rule
from unlearn.text import counted, listing, shown

_Sets = Mapping[tuple[SetRole, str], LoadedSet]
_INDENT = 13
_WIDTH = 110


def plan(loaded: LoadedRecipe) -> str:
    """Check what can be checked without torch and the network, and describe the run."""
    recipe, base = loaded.recipe, loaded.source.parent
    place = model_place(recipe.model, base)
    checks.check(recipe, base)
    checks.read_local([(role, spec) for role, spec in recipe.sets() if on_hub(spec)], base)
    goals = goal_metrics(recipe)
    sets = {(s.role, s.name): s for s in load_sets(local_part(recipe), base)}
    unscored = {key for key, one in sets.items() if not one.validation}
    kept = [key for key in kept_metrics(recipe) if (key[0], key[1]) not in unscored]
    chosen = rule(recipe.choose, goals, kept)
    stages = [f"{i}. {stage}" for i, stage in enumerate(_stages(recipe, sets, chosen), 1)]
    blocks = [
        ("recipe", [f"{recipe.name}  ({loaded.source})", *recipe.description.strip().splitlines()[:1]]),
        ("model", [recipe.model.path, place, _held(recipe)]),
        ("data", _data(recipe, sets)),
        ("stages", stages),
    ]
    return shown("\n".join(block(title, lines) for title, lines in blocks))


class _LocalPart(Recipe):
    """A recipe that shows only its sets on this machine, so that reading them asks the hub for nothing."""

    def sets(self) -> tuple[tuple[SetRole, DataSet], ...]:
        """The sets with no part on the hub."""
        return tuple((role, spec) for role, spec in super().sets() if not on_hub(spec))


def local_part(recipe: Recipe) -> Recipe:
    """The recipe with only those sets that can be read without asking the hub."""
    return _LocalPart.model_construct(**{name: getattr(recipe, name) for name in Recipe.model_fields})


def on_hub(spec: DataSet) -> bool:
    """Whether any part of a set is on the hub."""
    return any(source is not None and source.path.startswith(HUB) for source in (spec, spec.validation, spec.test))


class _Examples(NamedTuple):
    """The training examples of some sets."""

    total: int | None  # None where some are on the hub
    words: str
    exact: bool  # passages are only estimated here
    here: Sequence[LoadedSet]  # the sets that are not on the hub


def _examples(recipe: Recipe, sets: _Sets, roles: Sequence[SetRole], name: str | None = None) -> _Examples:
    wanted = [(role, spec) for role, spec in recipe.sets() if role in roles and name in (None, spec.label())]
    here = [sets[role, spec.label()] for role, spec in wanted if not on_hub(spec)]
    exact, count = all(spec.kind != "text" for _, spec in wanted), sum(len(one.train) for one in here)
    known = f"{'' if exact else 'about '}{_several(count, 'example')}"
    words = known if len(here) == len(wanted) else "examples not counted (on the hub)"
    return _Examples(count if len(here) == len(wanted) else None, words, exact, here)


def _held(recipe: Recipe) -> str:
    model = recipe.model
    dtype = {"auto": "bfloat16 where the hardware has it, else float32"}.get(model.dtype, model.dtype)
    device = {"auto": "the best device found"}.get(model.device, model.device)
    copy = "" if model.quantize == "none" else f"; the LoRA is trained on a copy quantised to {model.quantize}"
    code = "; RUNS PYTHON CODE THAT COMES WITH IT" if model.trust_remote_code else ""
    return f"held as {dtype}, on {device}{copy}{code}"


def _data(recipe: Recipe, sets: _Sets) -> list[str]:
    specs = recipe.sets()
    width = max(len(spec.label()) for _, spec in specs)
    lines = [f"{'':8} {'':{width}} kind  train  validation  test"]
    for role, spec in specs:
        head = f"{role:8} {spec.label():{width}} {spec.kind:4}"
        if there := [s.path for s in (spec, spec.validation, spec.test) if s is not None and s.path.startswith(HUB)]:
            lines.append(f"{head}  not checked: on the hub ({', '.join(there)})")
            continue
        one = sets[role, spec.label()]
        notes, prompts = one.left_out(), len(spec.prompts("train"))
        if prompts > 1 and one.train:
            notes.append(f"each trained on in {prompts} phrasings")
        if spec.shares.train == "all":
            notes.append("scored on what is trained on")
        row = f"{head}  {len(one.train):5}  {len(one.validation):10}  {len(one.test):4}"
        noted = f" ({', '.join(notes)})" if notes else ""
        lines.append(f"{row}  of {_several(one.counts['rows'], 'row')} in {spec.path}{noted}")
    if any(spec.kind == "text" and not on_hub(spec) for _, spec in specs):
        lines.append("(passages of text are estimated here; the model's tokenizer cuts them)")
    return lines


def _stages(recipe: Recipe, sets: _Sets, chosen: str) -> Iterator[str]:
    vector = recipe.vector
    yield "load the model and the data"
    if recipe.teach is not None:
        how = "all weights" if recipe.teach.lora is None else _lora(recipe.teach.lora)
        examples = _examples(recipe, sets, ("forget", "retain"))
        yield f"teach the model forget and retain sets first: {how}; {_training(recipe.teach, examples)}"
    yield from _fits(recipe, sets)
    if words := phrases(vector):
        yield f"make of {'each vector' if len(recipe.goals()) > 1 else 'it'} what is subtracted. {'; '.join(words)}"
    if len(recipe.goals()) > 1:
        yield (
            f"balance: relative weights w of the {len(recipe.goals())} vectors, on validation items: from the best "
            "coefficient for all of them on, one at a time is moved along the grid"
        )
    if recipe.forget is not None and vector.correlation is not None:
        measured = vector.correlation
        length = "as many steps as for the forget set" if measured.steps is None else _several(measured.steps, "step")
        short = f"; for that {length} of fine-tuning on each retain set with train items" if recipe.retain else ""
        yield f"foresee, on at most {_several(measured.items, 'item')} of each set, what the edit will cost{short}"
    grid = ", ".join(f"{c:g}" for c in recipe.sweep.grid())
    searched, whole = ([t.task for t in recipe.eval.tasks if t.whole is side] for side in (False, True))
    tasks = f", and lm-eval's {', '.join(searched)}" if searched else ""
    writes = any(spec.kind in ("qa", "text") for _, spec in recipe.sets())
    written = " (and ROUGE-L of written answers)" if recipe.eval.generate == "sweep" and writes else ""
    needed = ", as many of them as the choice needs" if recipe.sweep.search == "bisect" else ""
    edit = "add" if recipe.forget is None else "negate and add" if recipe.learn else "negate"
    edit = "add by analogy" if recipe.analogy is not None else edit
    where = f"scored on validation items{tasks}{written} at c = {grid}{needed}"
    yield f"{edit}: {formula(recipe)}, {where}"
    yield f"choose c: {chosen}"
    rouge = ", with ROUGE-L of written answers" if recipe.eval.generate != "none" and writes else ""
    beside = f", and {', '.join(whole)} on all items" if whole else ""
    yield f"score test items before and after{rouge}{beside}; write report.json and report.html"
    yield from _evidence(recipe)
    yield f"export: {_export(recipe)}"


def _fits(recipe: Recipe, sets: _Sets) -> Iterator[str]:
    """Every fine-tuning that the methods need; the first says what is trained, the others that it is the same."""
    vector, source, kept = recipe.vector, recipe.vector.steps()[0], recipe.penalty()
    against = {"gradient_ascent": "gradient ascent", "gradient_difference": "gradient difference", "npo": "NPO"}
    against["ignorance"] = "the divergence from ignorance"
    how = f"train by {against[source]} on" if source in against else "fine-tune on"
    lora, clean, more = f": {_lora(vector.lora)}; ", "", ""
    if (never := vector.clean()) is not None:
        how_used = "from" if source == "msa" else "toward"
        clean = f", {how_used} the " + (f"clean checkpoint {never[1]}" if never[1] else "model before the teaching")
    if vector.uses("consensus"):
        runs = vector.settings("consensus").runs
        more += f"; {_several(runs, 'time')}, with different seeds"
    if kept is not None:
        more += f"; with {penalty(kept, source)}, {_several(kept.batch_size, 'retain example')} in every step"
    if source != "retain_only":
        trained = [(r, d) for r, d in recipe.sets() if r in ("forget", "term") or (r == "learn" and not recipe.analogy)]
        for role, data in trained:
            examples = _examples(recipe, sets, (role,), data.label())
            what = f"the {role} set" if len(trained) == 1 else f"the {role} set {data.label()}"
            yield f"{how} {what}{clean}{lora}{_training(vector.forget, examples)}{more}"
            lora = ", the same LoRA; "
    if vector.needs("retain_vector"):
        retain = _training(vector.retain or vector.forget, _examples(recipe, sets, ("retain",)))
        yield f"fine-tune on the retain sets{clean}{lora}{retain}"


def _evidence(recipe: Recipe) -> Iterator[str]:
    """What stands beside the result, in order of the stages."""
    given = recipe.reference
    models = 2 + references.is_model(recipe)
    if given == "train":
        yield "reference: teach the base model the retain sets alone, in the same way; score it on the same test items"
    elif models == 3:
        yield f"reference: {given}, a model that never saw the forget set, scored on the same test items"
    if recipe.benchmark is not None:
        spec = recipe.benchmark
        some = f"the first {spec.items} items of every set" if spec.items else "all items"
        beside = f", compared with {given}" if given is not None and models == 2 else ""
        yield f"benchmark: {spec.name} {spec.set} on {counted(models, 'model')}, {some}{beside}"
    if recipe.holdout is not None:
        yield f"membership: can the forget set be told from {recipe.holdout.label()}, which no model has seen?"
    if recipe.robustness is not None:
        attacks = listing(_attacks(recipe, recipe.robustness)) or "no attack is switched on"
        yield f"attack {counted(models, 'model')}: {attacks}"


def _attacks(recipe: Recipe, spec: RobustnessSpec) -> Iterator[str]:
    """Those that apply to the recipe's data."""
    questions = recipe.forget is not None and recipe.forget.kind != "text"
    solved = any(data.kind != "text" for data in recipe.retain)
    probes = [p for p in spec.probes if p == "prefix" or (questions and (p != "few_shot" or solved))]
    if spec.quantize:
        yield f"copies in {' and '.join(spec.quantize)}"
    if spec.relearn is not None:
        steps = counted(max(spec.relearn.steps), "step")
        unrelated = " and on unrelated texts" if spec.relearn.unrelated and recipe.utility else ""
        yield f"{steps} of relearning on {counted(spec.relearn.items, 'forget item')}{unrelated}"
    if probes:
        yield f"other prompts ({', '.join(probes).replace('_', '-')})"
    if spec.contrast and questions:
        yield "a choice beside other prompts"
    if spec.samples:
        yield f"the best of {counted(spec.samples, 'sample')}"
    if spec.lens:
        yield "the logit lens"


def _training(spec: TrainSpec | TeachSpec, examples: _Examples) -> str:
    """``examples``, steps and rate in words. Steps are counted as the Trainer does, on one device."""
    epochs, steps = spec.duration()
    batch = f"{spec.batch_size}" + (f" x {spec.accumulation}" if spec.accumulation > 1 else "")
    if steps > 0:
        length = f"{_several(steps, 'step')} of {batch}"
    elif examples.total is not None:
        per_epoch = math.ceil(math.ceil(examples.total / spec.batch_size) / spec.accumulation)
        total = _several(math.ceil(per_epoch * epochs), "step")
        length = f"{_several(epochs, 'epoch')} = {'' if examples.exact else 'about '}{total} of {batch}"
    else:
        length = f"{_several(epochs, 'epoch')} in steps of {batch}"
    return f"{examples.words}, {length}, learning rate {spec.learning_rate:g}{_cut(spec.max_length, examples.here)}"


def _cut(limit: int, sets: Sequence[LoadedSet]) -> str:
    """What will not fit into ``max_length``, by four characters to a token: the exact counts need the tokenizer."""
    room = limit * CHARACTERS_PER_TOKEN
    asked = [item for one in sets if one.spec.kind != "text" for item in one.train]
    answers = sum(len(item.target) >= room for item in asked)
    prompts = sum(len(item.prompt) + len(item.target) >= room for item in asked) - answers
    passages = max((one.spec.length for one in sets if one.spec.kind == "text"), default=0)
    found = ""
    if answers:
        found += f"; about {_several(answers, 'answer')} too long for max_length ({limit} tokens), which is an error"
    if prompts:
        found += f"; about {_several(prompts, 'prompt')} will lose the beginning to max_length ({limit} tokens)"
    if passages > limit:
        found += f"; passages of {passages} tokens become several rows of at most max_length ({limit})"
    exact = ", as the model's tokenizer will tell" if answers or prompts else ""
    return found + exact


def _lora(spec: LoraSpec) -> str:
    on = "every linear layer but the head" if spec.targets == "all-linear" else ", ".join(spec.targets)
    kind = "rank-stabilised LoRA" if spec.rslora else "LoRA"
    return f"{kind} of rank {spec.rank} (alpha {spec.alpha:g}) on {on}"


def _export(recipe: Recipe) -> str:
    parts = []
    if recipe.export.adapter:
        parts.append("the edit as a PEFT adapter")
    if recipe.export.merged:
        dtype = "the model's dtype" if recipe.export.dtype == "auto" else recipe.export.dtype
        rounding = ", rounded stochastically" if recipe.export.stochastic_rounding else ""
        parts.append(f"merged weights in {dtype}{rounding}")
    if recipe.export.push_to_hub is not None:
        push = recipe.export.push_to_hub
        parts.append(f"{'what would go' if push.dry_run else 'the push'} to the hub as {push.repo}")
    return " and ".join(parts) or "nothing (export.adapter and export.merged are both false)"


def _several(count: float, word: str) -> str:
    return f"{count:,g} {word}" if count == 1 else f"{count:,{'d' if isinstance(count, int) else 'g'}} {word}s"


def block(title: str, lines: Sequence[str]) -> str:
    """A title in the margin and wrapped lines beside it."""
    wrapped: list[str] = []
    for line in lines:
        table = line.startswith(" ") or "  " in line
        hang = 3 if line[:1].isdigit() else 2
        wrapped += [line] if table else textwrap.wrap(line, _WIDTH - _INDENT, subsequent_indent=" " * hang) or [""]
    margin = " " * _INDENT
    return "\n".join((f"{title:{_INDENT}}" if i == 0 else margin) + line for i, line in enumerate(wrapped))
