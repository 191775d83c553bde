"""What ``unlearn plan`` prints: the run that a recipe asks for, with its data read and its model looked up.

Everything that costs no download and no torch is done for real, so a recipe whose plan is printed has readable data,
a model that is there (or can be asked for), and stages of known length.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from unlearn.data.files import HUB
from unlearn.data.sets import LoadedSet, load_sets
from unlearn.errors import absent
from unlearn.evidence import reference as references
from unlearn.model.locate import model_place
from unlearn.plan import checks
from unlearn.recipe.data import DataSet, SetRole
from unlearn.recipe.evaluation import ExportSpec, RobustnessSpec
from unlearn.recipe.load import LoadedRecipe
from unlearn.recipe.methods import LoraSpec, TrainSpec, formula, penalty, phrases
from unlearn.recipe.schema import Recipe, goal_metrics, kept_metrics
from unlearn.score.search import rule
from unlearn.text import counted, listing, shown

_Sets = Mapping[tuple[SetRole, str], LoadedSet]
_INDENT = 13
_WIDTH = 110


def plan(loaded: LoadedRecipe) -> str:
    """Check what can be checked without torch and the network, and describe the run."""
    with loaded.telling_where():
        return _plan(loaded)


def _plan(loaded: LoadedRecipe) -> str:
    recipe, base = loaded.recipe, loaded.source.parent
    place = model_place(recipe.model, base)
    checks.check(recipe, base)
    checks.read_local([(role, spec) for role, spec in recipe.sets() if on_hub(spec)], base)
    goals = goal_metrics(recipe)
    sets = {(s.role, s.name): s for s in load_sets(local_part(recipe), base)}
    unscored = {key for key, one in sets.items() if not one.validation}
    scored = {key[:2] for key in kept_metrics(recipe)} - unscored
    chosen = rule(recipe.choose, goals, () if recipe.edited is not None else kept_metrics(recipe, scored))
    blocks = {
        "recipe": [f"{recipe.name}  ({loaded.source})", *recipe.description.strip().splitlines()[:1]],
        "model": [recipe.model.path, place, _held(recipe), *_conversing(recipe)],
        "data": _data(recipe, sets),
        "stages": [f"{i}. {stage}" for i, stage in enumerate(_stages(recipe, sets, chosen), 1)],
        "absent": list(_absent(recipe)),
    }
    return shown("\n".join(block(title, lines) for title, lines in blocks.items() if lines))


class _LocalPart(Recipe):
    """A recipe that shows only its sets on this machine, so that reading them asks the hub for nothing."""

    def sets(self) -> tuple[tuple[SetRole, DataSet], ...]:
        return tuple((role, spec) for role, spec in super().sets() if not on_hub(spec))


def local_part(recipe: Recipe) -> Recipe:
    """The recipe with only those sets that can be read without asking the hub."""
    return _LocalPart.model_construct(**{name: getattr(recipe, name) for name in Recipe.model_fields})


def on_hub(spec: DataSet) -> list[str]:
    """The parts of a set that are on the hub."""
    return [s.path for s in (spec, spec.validation, spec.test) if s is not None and s.path.startswith(HUB)]


def _held(recipe: Recipe) -> str:
    model = recipe.model
    dtype = "bfloat16 where the hardware has it, else float32" if model.dtype == "auto" else model.dtype
    device = "the best device found" if model.device == "auto" else model.device
    if model.device_map is not None:
        parts = model.device_map if isinstance(model.device_map, str) else counted(len(model.device_map), "part")
        device = f"several devices ({parts})"
    copy = "" if model.quantize == "none" else f"; the LoRA is trained on a copy quantised to {model.quantize}"
    code = "; RUNS PYTHON CODE THAT COMES WITH IT" if model.trust_remote_code else ""
    return f"held as {dtype}, on {device}{copy}{code}"


def _conversing(recipe: Recipe) -> list[str]:
    model = recipe.model
    asked = [role for role, spec in recipe.sets() if spec.kind != "text"]
    if model.chat_template is None or not (asked or recipe.benchmark is not None):
        return []
    where = "its tokenizer's chat template" if model.chat_template == "auto" else f"the template {model.chat_template}"
    system = f", after the system message {model.system!r}" if model.system else ""
    beside = "; test items of forget sets outside it too" if "forget" in asked else ""
    return [f"asked in {where}{system}{beside}"]


def _data(recipe: Recipe, sets: _Sets) -> list[str]:
    specs = recipe.sets()
    width = max(len(spec.label()) for _, spec in specs)
    lines = [f"{'':8} {'':{width}} kind  train  validation  test"]
    for role, spec in specs:
        head = f"{role:8} {spec.label():{width}} {spec.kind:4}"
        if there := on_hub(spec):
            lines.append(f"{head}  not checked: on the hub ({', '.join(there)})")
            continue
        one = sets[role, spec.label()]
        notes, prompts = one.left_out(), len(spec.prompts("train"))
        if prompts > 1 and one.train:
            notes.append(f"each trained on in {prompts} phrasings")
        if spec.shares.train == "all":
            notes.append("scored on what is trained on")
        if role == "utility" and one.train:
            read = recipe.edited is None and recipe.vector.reads_kept()
            notes.append(f"training items {'stand beside those of the retain sets' if read else 'are read by nothing'}")
        row = f"{head}  {len(one.train):5}  {len(one.validation):10}  {len(one.test):4}"
        noted = f" ({', '.join(notes)})" if notes else ""
        lines.append(f"{row}  of {counted(one.counts['rows'], 'row')} in {spec.path}{noted}")
    if any(spec.kind == "text" and not on_hub(spec) for _, spec in specs):
        lines.append("(passages of text are estimated here; the model's tokenizer cuts them)")
    return lines


def _stages(recipe: Recipe, sets: _Sets, chosen: str) -> Iterator[str]:
    yield "load the model and the data"
    if recipe.teach is not None:
        how = "all weights" if recipe.teach.lora is None else _lora(recipe.teach.lora)
        taught = _training(recipe.teach, recipe, sets, ("forget", "retain"))
        yield f"teach the model forget and retain sets first: {how}; {taught}"
    writes = recipe.eval.generate != "none" and any(spec.kind != "mcq" for _, spec in recipe.sets())
    if recipe.edited is not None:
        yield f"load the model that was edited elsewhere: {recipe.edited.words()}; nothing is fitted or chosen"
    else:
        yield from _edit(recipe, sets, chosen, writes)
    whole = [t.task for t in recipe.eval.tasks if t.whole]
    rouge = ", with ROUGE-L of written answers" if writes else ""
    beside = f", and {', '.join(whole)} on all items" if whole else ""
    told = f"; tell {listing(recipe.report_to)}" if recipe.report_to else ""
    yield f"score test items before and after{rouge}{beside}; write report.json and report.html{told}"
    yield from _evidence(recipe)
    if recipe.edited is None:
        yield f"export: {_export(recipe.export)}"


def _edit(recipe: Recipe, sets: _Sets, chosen: str, writes: bool) -> Iterator[str]:
    """What is subtracted, and how much of it."""
    vector, goals = recipe.vector, recipe.goals()
    yield from _fits(recipe, sets)
    if words := phrases(vector):
        yield f"make of {'each vector' if len(goals) > 1 else 'it'} what is subtracted. {'; '.join(words)}"
    if len(goals) > 1:
        yield (
            f"balance: relative weights w of the {len(goals)} vectors, on validation items: from the best coefficient "
            "for all of them on, one at a time is moved along the grid"
        )
    if recipe.forget is not None and (measured := vector.correlation) is not None:
        length = "as many steps as for the forget set" if measured.steps is None else counted(measured.steps, "step")
        short = f"; for that {length} of fine-tuning on each retain set with train items" if recipe.retain else ""
        yield f"foresee, on at most {counted(measured.items, 'item')} of each set, what the edit will cost{short}"
    grid = ", ".join(f"{c:g}" for c in recipe.sweep.grid())
    searched = [t.task for t in recipe.eval.tasks if not t.whole]
    tasks = f", and lm-eval's {', '.join(searched)}" if searched else ""
    written = " (and ROUGE-L of written answers)" if recipe.eval.generate == "sweep" and writes else ""
    needed = ", as many of them as the choice needs" if recipe.sweep.search == "bisect" else ""
    edit = "add" if recipe.forget is None else "negate and add" if recipe.learn else "negate"
    edit = "add by analogy" if recipe.analogy is not None else edit
    yield f"{edit}: {formula(recipe)}, scored on validation items{tasks}{written} at c = {grid}{needed}"
    yield f"choose c: {chosen}"


def _fits(recipe: Recipe, sets: _Sets) -> Iterator[str]:
    """Every fine-tuning that the methods need; the first says what is trained, the others that it is the same."""
    vector, source, kept = recipe.vector, recipe.vector.source(), recipe.penalty()
    against = {"npo": "NPO", "simnpo": "SimNPO", "idk_dpo": "DPO toward refusals", "rmu": "RMU"}
    against |= {"ihl": "the inverted hinge loss", "ignorance": "the divergence from ignorance"}
    against |= {"gradient_ascent": "gradient ascent", "gradient_difference": "gradient difference"}
    how = f"train by {against[source]} on" if source in against else "fine-tune on"
    lora, clean, more = f": {_lora(vector.lora)}; ", "", ""
    if (never := vector.clean()) is not None:
        how_used = "from" if source == "msa" else "toward"
        clean = f", {how_used} the " + (f"clean checkpoint {never[1]}" if never[1] else "model before the teaching")
    if source == "consensus":
        more = f"; {counted(vector.settings(source).runs, 'time')}, with different seeds"
    if kept is not None:
        drawn = "" if kept.estimate == "kfac" else f", {counted(kept.batch_size, 'retain example')} in every step"
        more += f"; with {penalty(kept, source)}{drawn}"
    if vector.inside is not None:
        more += f"; inside the shrinking by what layers read on retain items ({vector.inside:g})"
    roles = ("forget", "term") if recipe.analogy is not None else ("forget", "learn")
    trained = [(role, data) for role, data in recipe.sets() if role in roles and source != "retain_only"]
    if (given := vector.given()) is not None:
        yield f"take the vector of the {trained[0][0]} set from {given.words()}; nothing is trained for it"
        trained = []
    for role, data in trained:
        what = f"the {role} set" if len(trained) == 1 else f"the {role} set {data.label()}"
        yield f"{how} {what}{clean}{lora}{_training(vector.forget, recipe, sets, (role,), data.label())}{more}"
        lora = ", the same LoRA; "
    if vector.needs("retain_vector"):
        retain = _training(vector.retain or vector.forget, recipe, sets, ("retain",))
        start = clean if source == "msa" else ""
        yield f"fine-tune on the retain sets{start}{lora}{retain}"


def _evidence(recipe: Recipe) -> Iterator[str]:
    """What stands beside the result, in order of the stages."""
    given = recipe.reference
    models = 2 + references.is_model(recipe)
    if given == "train":
        yield "reference: teach the base model the retain sets alone, in the same way; score it on the same test items"
    elif models == 3:
        yield f"reference: {given}, a model that never saw the forget set, scored on the same test items"
    if (spec := recipe.benchmark) is not None:
        items = f"the first {spec.items} items of every set" if spec.items else "all items"
        beside = f", compared with {given}" if given is not None and models == 2 else ""
        yield f"benchmark: {spec.name} {spec.set} on {counted(models, 'model')}, {items}{beside}"
    if recipe.holdout is not None:
        yield f"membership: can the forget set be told from {recipe.holdout.label()}, which no model has seen?"
    if recipe.robustness is not None:
        attacks = listing(_attacks(recipe, recipe.robustness)) or "no attack is switched on"
        yield f"attack {counted(models, 'model')}: {attacks}"


def _absent(recipe: Recipe) -> Iterator[str]:
    """Scores of forgetting that the recipe does not ask for, or that cannot be had here, and what they would take."""
    spec, given = recipe.benchmark, recipe.reference
    if recipe.forget is not None:
        never = "a model that never saw the forget set"
        if spec is not None and given is None:
            figure, or_else = ("forget quality", "") if spec.name == "tofu" else ("PrivLeak", ", or published")
            yield f"{figure}: no reference ({never}, its log{or_else})"
        elif not references.is_model(recipe):
            why = "reference is no model" if given else f"no reference ({never})"
            yield f"a reference's scores beside all others: {why}"
        if recipe.holdout is None:
            yield "membership inference (AUC): no holdout, items that no model has seen"
        elif not references.is_model(recipe):
            yield "membership inference by the difference to a reference: no reference that is a model"
        if recipe.robustness is None:
            yield "attacks: no robustness"
    if recipe.eval.generate == "none" and any(data.kind != "mcq" for _, data in recipe.sets()):
        yield "ROUGE-L of written answers: eval.generate is none"
    for task in recipe.eval.tasks:
        judge = str(task.metadata.get("classifier", "detoxify:"))
        if task.task == "unlearn_toxicity" and judge.startswith("detoxify:") and (cure := absent("detoxify")):
            yield f"{task.task}: the package detoxify is not installed, and the run would stop at it: {cure}"


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


def _training(spec: TrainSpec, recipe: Recipe, sets: _Sets, roles: Sequence[SetRole], name: str | None = None) -> str:
    """Examples, steps and rate in words. Steps are counted as the Trainer does, on one device."""
    wanted = [(role, one) for role, one in recipe.sets() if role in roles and name in (None, one.label())]
    known = not any(on_hub(one) for _, one in wanted)
    total = sum(len(sets[role, one.label()].train) for role, one in wanted) if known else 0
    about = "about " if any(one.kind == "text" for _, one in wanted) else ""
    epochs, steps = spec.duration()
    batch = f"{spec.batch_size}" + (f" x {spec.accumulation}" if spec.accumulation > 1 else "")
    if steps > 0:
        length = f"{counted(steps, 'step')} of {batch}"
    elif known:
        per_epoch = math.ceil(math.ceil(total / spec.batch_size) / spec.accumulation)
        length = f"{counted(epochs, 'epoch')} = {about}{counted(math.ceil(per_epoch * epochs), 'step')} of {batch}"
    else:
        length = f"{counted(epochs, 'epoch')} in steps of {batch}"
    examples = f"{about}{counted(total, 'example')}" if known else "examples not counted (on the hub)"
    more = "".join(f", {name} {value}" for name, value in spec.trainer.items())
    return f"{examples}, {length}, learning rate {spec.learning_rate:g}{more}"


def _lora(spec: LoraSpec) -> str:
    on = "every linear layer but the head" if spec.targets == "all-linear" else ", ".join(spec.targets)
    kind = "rank-stabilised LoRA" if spec.rslora else "LoRA"
    return f"{kind} of rank {spec.rank} (alpha {spec.alpha:g}) on {on}"


def _export(spec: ExportSpec) -> str:
    parts = ["the edit as a PEFT adapter"] if spec.adapter else []
    if spec.merged:
        dtype = "the model's dtype" if spec.dtype == "auto" else spec.dtype
        parts.append(f"merged weights in {dtype}{', rounded stochastically' if spec.stochastic_rounding else ''}")
    if (push := spec.push_to_hub) is not None:
        parts.append(f"{'what would go' if push.dry_run else 'the push'} to the hub as {push.repo}")
    return " and ".join(parts) or "nothing (export.adapter and export.merged are both false)"


def block(title: str, lines: Sequence[str]) -> str:
    """A title in the margin and wrapped lines beside it."""
    wrapped: list[str] = []
    for line in lines:
        table = line.startswith(" ") or "  " in line
        hang = 3 if line[:1].isdigit() else 2
        wrapped += [line] if table else textwrap.wrap(line, _WIDTH - _INDENT, subsequent_indent=" " * hang) or [""]
    margin = " " * _INDENT
    return "\n".join((f"{title:{_INDENT}}" if i == 0 else margin) + line for i, line in enumerate(wrapped))
