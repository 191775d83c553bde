"""One pair and seed of the methods' benchmark: the vectors are fitted once, then every method is scored with them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from measure import without_others
from methods_pairs import KNOWN, NATS, PMI
from methods_pairs import recipe as recipe_of

from unlearn.console import quiet_libraries
from unlearn.data.encoding import encode
from unlearn.data.sets import LoadedSet, load_sets
from unlearn.errors import EvaluationError
from unlearn.model import load as models
from unlearn.model.load import Loaded
from unlearn.model.locate import locate
from unlearn.recipe.data import Split
from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.methods import LoraSpec, RetainKLSpec, TrainSpec, VectorSpec
from unlearn.recipe.schema import Recipe
from unlearn.results import Score, SweepPoint, TaskScore
from unlearn.score import tasks
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import PackedLM
from unlearn.score.search import choose, judge
from unlearn.train import vectors as finetune
from unlearn.train.learned import materials
from unlearn.train.losses import Against, Keep
from unlearn.vector.edit import Edit
from unlearn.vector.methods import shape
from unlearn.vector.task_vector import TaskVector

BATCHES = 36  # that every method trains on, of batch_size rows each
GRID = (0.25, 0.5, 1.0, 1.5, 2.5, 4.0, 7.0, 12.0)
SMALLER = (0.1, 0.04)
BOUND = 0.95
AREA = tuple(0.8 + 0.02 * i for i in range(11))  # bounds that the area under the frontier is the mean over
LEAST = 0.05  # nats; a smaller loss is not told from none
HOPELESS = 0.8  # of a kept score: where two coefficients in a row are below it, larger ones are not looked at
Scores = dict[tuple[str, str, str], float]  # (set, name, metric) -> value


@dataclass
class Cell:
    """What the methods of one pair and seed share. Vectors are fitted when they are first asked for, and kept on disk.

    ``clean`` is the model before it was taught, where the pair teaches; ``used`` the fittings a method found made,
    with the seconds they took, of one processor, for the machine may have other work.
    """

    recipe: Recipe
    base: Path
    target: Loaded
    work: Path
    clean: Callable[[], Loaded] | None = None
    used: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base_scores: dict[str, Scores] = {}
        self.sets = load_sets(self.recipe, self.base, self.target.tokenizer)
        self.lm: LM = PackedLM(self.target.model, self.target.tokenizer)
        self.near = [s for s in self.sets if s.role == "retain" and s.train]
        self.beside = max(2, self.recipe.vector.forget.batch_size // 2)  # retain rows per step
        self.tasks = {split: self._tasks(split) for split in ("validation", "test")}

    def _tasks(self, split: Split) -> tasks.TaskSet:
        items = Path(tempfile.mkdtemp())
        made = tasks.build_tasks(self.sets, split, self.recipe, self.target.tokenizer, items, generate=False)
        return without_others(made) if split == "validation" else made  # pmi takes four fifths of the requests

    @contextlib.contextmanager
    def general(self) -> Iterator[None]:
        """The general statements that are not scored stand beside the retain sets' training rows."""
        (scored,) = (s for s in self.sets if s.role == "utility")
        whole = self.recipe.model_copy(update={"utility": (scored.spec.model_copy(update={"limit": None}),)})
        (every,) = (s for s in load_sets(whole, self.base, self.target.tokenizer) if s.role == "utility")
        seen = {item.prompt for item in (*scored.validation, *scored.test)}
        rest = tuple(item for item in (*every.validation, *every.test) if item.prompt not in seen)
        self.near.append(dataclasses.replace(scored, train=rest))
        yield
        self.near.pop()

    def steps(self, batches: float = 1.0, share: float = 1.0) -> int:
        """Of a training that gets a share of what a method may train on and reads so many batches at each step."""
        return round(share * BATCHES / batches)

    def rows(self, sets: Sequence[LoadedSet]) -> list[Any]:
        """Training rows of some sets."""
        length = self.recipe.vector.forget.max_length
        return [r for s in sets for r in encode(s.train, s.spec.kind, self.target.tokenizer, length)]

    def once(self, split: Split) -> Scores:
        """Scores of the untouched model, taken once."""
        if split not in self.base_scores:
            self.base_scores[split] = self.score(split)
        return self.base_scores[split]

    def score(self, split: Split) -> Scores:
        """Every metric of the model as it is now."""
        found = evaluate(self.lm, self.tasks[split], model_name="bench", bootstrap=0)
        return {s.key: s.score.value for s in found.scores}

    def fitted(self, name: str, fit: Callable[[Path], tuple[TaskVector, Any]]) -> TaskVector:
        """A fitted vector, from disk if it was fitted before."""
        place = self.work / f"{name}.safetensors"
        if not place.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch:
                started = time.process_time()
                vector, log = fit(Path(scratch))
                took = time.process_time() - started
            print(f"    {name}: loss {log.losses[0]:.2f} to {log.losses[-1]:.2f}, {took:.0f} s", flush=True)
            (self.work / f"{name}.seconds").write_text(f"{took:.1f}")
            vector.save(place)
        else:
            self.used[name] = float((self.work / f"{name}.seconds").read_text())
        return TaskVector.load(place)

    def fit(
        self,
        name: str,
        sets: Sequence[LoadedSet],
        keep: RetainKLSpec | None = None,
        against: Against | None = None,
        training: TrainSpec | None = None,
        inside: float | None = None,
        share: float = 1.0,
        lora: LoraSpec | None = None,
    ) -> TaskVector:
        """LoRA on some sets, of the recipe's or other settings, for a share of what a method may train on."""
        spec = training or self.recipe.vector.forget
        near = self.rows(self.near)
        also = keep is not None or (against is not None and bool(against.retain))
        steps = self.steps(1 + also * self.beside / spec.batch_size, share)
        return self.fitted(
            name,
            lambda scratch: finetune.train_vector(
                self.target.model,
                self.target.tokenizer,
                self.rows(sets),
                spec.model_copy(update={"steps": steps}),
                lora or self.recipe.vector.lora,
                self.recipe.seed,
                scratch,
                name,
                {},
                Keep(near, keep) if keep else None,
                against,
                (near, inside) if inside else None,
            ),
        )

    def retain(self) -> TaskVector:
        """The plain retain vector, for methods that fit two."""
        return self.fit("retain_half", self.near, share=0.5)

    def shaped(self, vector: TaskVector, retain: TaskVector | None = None, **how: Any) -> TaskVector:
        """A vector shaped by methods, with their settings as in a recipe's ``vector`` block."""
        spec = VectorSpec.model_validate(how)
        if retain is None and spec.needs("retain_vector"):
            retain = self.retain()
        have = materials(
            self.target.model,
            self.target.tokenizer.pad_token_id,
            self.recipe.seed,
            vector,
            retain,
            self.rows(self.sets[:1]),
            self.rows(self.near),
        )
        return shape(vector, spec, have)

    def keys(self, roles: Sequence[str], metrics: Mapping[str, str]) -> list[tuple[str, str, str]]:
        """Score keys of the sets of some roles, by a metric for each kind of data."""
        return [(s.role, s.name, metrics[s.spec.kind]) for s in self.sets if s.role in roles]


def teach(pair: str, work: Path) -> None:
    """Teach the model the passages, once for all cells; other pairs need nothing."""
    place = work / pair / "target"
    if pair != "passages" or (place / "config.json").is_file():
        return
    plain, base = recipe_of(pair, 0, work / pair)
    recipe = Recipe.model_validate_json(json.dumps(plain))
    loaded = models.load(recipe.model, locate(recipe.model, base))
    sets = load_sets(recipe, base, loaded.tokenizer)
    learned = [s for s in sets if s.role in ("forget", "retain")]
    everything = [
        row
        for s in learned
        for items in (s.train, s.validation, s.test)
        for row in encode(items, "text", loaded.tokenizer, 96)
    ]
    distinct = list(dict.fromkeys(everything))
    spec = TrainSpec(epochs=12, batch_size=12, learning_rate=1e-4, max_length=96)
    print(f"    teaching {len(distinct)} passages", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        log = finetune.train_weights(loaded.model, loaded.tokenizer, distinct, spec, 0, Path(scratch), "teaching")
    print(f"    taught: loss {log.losses[0]:.2f} to {log.losses[-1]:.2f}, {log.seconds:.0f} s", flush=True)
    loaded.tokenizer.save_pretrained(place)
    loaded.model.save_pretrained(place)


def make_cell(pair: str, seed: int, work: Path) -> Cell:
    """One pair and seed, whose passages were taught before."""
    quiet_libraries()
    plain, base = recipe_of(pair, seed, work / pair)
    recipe = Recipe.model_validate_json(json.dumps(plain))
    where = locate(recipe.model, base)
    target = models.load(recipe.model, str(work / pair / "target") if pair == "passages" else where)
    clean = (lambda: models.load(recipe.model, where)) if pair == "passages" else None
    return Cell(recipe, base, target, work / pair / str(seed), clean)


def run_cell(pair: str, seed: int, work: Path, only: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """Every method on one pair and seed: a row for each. In a process of its own."""
    torch.set_num_threads(threads)
    cell = make_cell(pair, seed, work)
    return [row for name in _names(only) for row in _method(cell, name)]


def _names(only: Sequence[str]) -> list[str]:
    from methods_tried import METHODS

    unknown = [name for name in only if name not in METHODS]
    if unknown:
        raise EvaluationError(f"no method {unknown[0]!r} here; there are {', '.join(METHODS)}")
    return [name for name in METHODS if not only or name in only]


def _method(cell: Cell, name: str) -> list[dict[str, Any]]:
    """Rows of one method, from disk if it was run before."""
    from methods_tried import METHODS

    place = cell.work / f"method-{name}.json"
    if not place.is_file():
        print(f"  {cell.recipe.name} {cell.recipe.seed} {name}", flush=True)
        cell.used = {}
        started = time.process_time()
        vector = METHODS[name](cell)
        seconds = time.process_time() - started + sum(cell.used.values())
        place.write_text(json.dumps(_rows(cell, name, vector, round(seconds, 1)), indent=1), encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(place.read_text(encoding="utf-8"))
    return found


def _rows(cell: Cell, name: str, vector: TaskVector, seconds: float) -> list[dict[str, Any]]:
    before = cell.once("test")  # first of all: below, the model is under the vector
    known = cell.keys(("forget",), KNOWN)[0]
    kept = cell.keys(("retain", "utility"), KNOWN)
    with Edit(cell.target.model, vector) as edit:
        path = _path(cell, edit, kept)
        points = [_point(c, scores, path[0.0], kept) for c, scores in path.items()]
        chosen = choose(points, (known,), kept, ChooseSpec(keep=BOUND)).coefficient
        after = before
        if chosen:
            edit.subtract(chosen)
            after = cell.score("test")
    row = {"pair": cell.recipe.name, "method": name, "seed": cell.recipe.seed, "kept_bound": BOUND}
    row |= {"coefficient": chosen, "seconds": seconds, "area": _area(path, known, kept)}
    for what, role in (("forget", "forget"), ("kept", "retain"), ("general", "utility")):
        for when, scores in (("before", before), ("after", after)):
            row[f"{what}_{when}"] = _mean(scores, cell.keys((role,), KNOWN))
            row[f"{what}_pmi_{when}".removeprefix("forget_")] = _mean(scores, cell.keys((role,), PMI))
        nats = cell.keys((role,), NATS)
        row[f"{what}_nats"] = sum(_lost(before, after, key) for key in nats) / len(nats)
    beside = (*known[:2], "acc_pmi")  # which passages have not
    row |= {f"acc_pmi_{when}": scores.get(beside) for when, scores in (("before", before), ("after", after))}
    row["selectivity"] = row["forget_nats"] / max(row["kept_nats"], LEAST)
    row["validation"] = {str(c): {"/".join(k): v for k, v in scores.items()} for c, scores in path.items()}
    return [row]


def _mean(scores: Scores, keys: Sequence[tuple[str, str, str]]) -> float:
    return sum(scores[key] for key in keys) / len(keys)


def _path(cell: Cell, edit: Edit, kept: Sequence[tuple[str, str, str]]) -> dict[float, Scores]:
    """Validation scores along the grid, as far as something may still be kept, and once more where the bound lies."""
    found = {0.0: cell.once("validation")}  # nothing is set yet

    def holds(c: float, bound: float = BOUND) -> bool:
        if c not in found:
            edit.subtract(c)
            found[c] = cell.score("validation")
        return all(found[c][k] >= bound * found[0.0][k] for k in kept)

    # where the smallest is too much already, smaller ones: a baseline is not to fail for the grid's sake
    if not holds(GRID[0]):
        next((c for c in SMALLER if holds(c)), None)
    below = 0
    for c in GRID[1:]:
        below = 0 if holds(c, HOPELESS) else below + 1
        if below == 2:
            break
    last = max(c for c in found if holds(c))
    if last and (beyond := [c for c in found if c > last]):
        holds(round((last * min(beyond)) ** 0.5, 2))
    return dict(sorted(found.items()))


def _point(c: float, scores: Scores, base: Scores, kept: Sequence[Any]) -> SweepPoint:
    here, there = ([_score(k, v) for k, v in s.items()] for s in (scores, base))
    return judge(c, here, there, kept, ChooseSpec(keep=BOUND))


def _score(key: tuple[str, str, str], value: float) -> TaskScore:
    role: Any = key[0]
    return TaskScore(role, key[1], "validation", key[2], key[2] not in ("loss", "perplexity"), Score(value, None, 1))


def _lost(before: Scores, after: Scores, key: tuple[str, str, str]) -> float:
    """Nats lost; ``logprob`` falls where ``loss`` rises."""
    return after[key] - before[key] if key[2] == "loss" else before[key] - after[key]


def _area(path: Mapping[float, Scores], forget: tuple[str, str, str], kept: Sequence[Any]) -> float:
    """Mean over bounds from 80 to 100 % of the largest share of the forget score that goes within the bound."""
    base = path[0.0]
    gone = []
    for bound in AREA:
        within = [s for s in path.values() if all(s[k] >= bound * base[k] - 1e-9 for k in kept)]
        gone.append(max(1 - s[forget] / base[forget] for s in within))
    return sum(gone) / len(gone)
