"""Task vectors on a model in memory, step by step: fit, shape, sweep, evaluate, save. No recipe, no files.

Everything subtracts: a coefficient c means theta - c * tau. Models come back as they were, and nothing is printed
unless ``verbose``. Rows are a list of mappings (or of texts), a ``datasets.Dataset`` or a DataFrame.
Every function raises an :class:`~unlearn.errors.UnlearnError` that says what is wrong.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import simple_evaluate
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from unlearn.console import log, progress
from unlearn.data.encoding import Encoded
from unlearn.data.files import Row
from unlearn.data.items import FORMS
from unlearn.data.sets import training_sets
from unlearn.errors import DataError, EvaluationError, ModelError, RecipeError, VectorError
from unlearn.model.load import Loaded, check_tokenizer
from unlearn.recipe.data import ALSO, DataSet, SetRole
from unlearn.recipe.load import from_mapping, tasks_folder
from unlearn.recipe.methods import METHODS, TrainSpec, VectorSpec, registered, trainer_settings
from unlearn.recipe.schema import Recipe
from unlearn.report.charts import Point, Series, axis_of, chart, style
from unlearn.score.packed import PackedLM
from unlearn.score.tasks import random_state_kept, task_manager
from unlearn.store.stages import RunFolder, Store
from unlearn.text import did_you_mean, listing, number
from unlearn.train.learned import materials
from unlearn.train.trainer import check_passed_on
from unlearn.train.vectors import encoded, fit_vectors
from unlearn.vector import methods
from unlearn.vector.edit import Edit, check_in_memory, subtracted
from unlearn.vector.edit import fit as fitting
from unlearn.vector.interop import to_adapter
from unlearn.vector.task_vector import TaskVector

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# -- vectors


def fit(
    model: PreTrainedModel,
    tokenizer: Any,
    forget: Any,
    retain: Any = None,
    *,
    seed: int = 0,
    verbose: bool = False,
    **settings: Any,
) -> TaskVector:
    """What is to be subtracted to forget some rows: a LoRA is fitted on them, and its vector read off.

    Args:
        forget: Rows with question and answer, with messages, or with prompt and completion; with question, choices
            and answer; or with text.
        retain: Rows near them that must stay. The fitting then holds the model's answers there at both signs
            (``retain_kl="two_sided"``), unless ``retain_kl`` or a baseline as ``method`` says otherwise.
        settings: Keys of a recipe's ``vector`` (``method``, ``lora``, ``retain_kl``, ...), of its training (``steps``,
            ``learning_rate``, ``batch_size``, ...), of its data (``columns``, ``prompt``, ...), and ``chat_template``
            (``"auto"``) with ``system`` and ``date``.
    """
    recipe, sets = _asked({"forget": forget, "retain": retain}, seed, settings)
    loaded = _loaded(model, tokenizer)
    folder = tempfile.TemporaryDirectory(prefix="unlearn-")
    with _as_it_was(model, verbose), folder as work, RunFolder.open(Path(work), "", "", lambda *_: None) as run:
        loaded_sets = training_sets(recipe, sets, loaded.tokenizer)
        check_passed_on(recipe.vector.forget, model, "settings")
        vectors = fit_vectors(loaded, loaded_sets, recipe, Store(run, base=Path.cwd()))
    return next(iter(vectors.parts.values()))


def shape(
    vector: TaskVector,
    method: str | Sequence[str],
    *,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    forget: Any = None,
    retain: Any = None,
    retain_vector: TaskVector | None = None,
    seed: int = 0,
    verbose: bool = False,
    **settings: Any,
) -> TaskVector:
    """The vector as some shapers of a recipe's ``vector.method`` leave it, in order.

    Args:
        model: What the vector was fitted on, for methods that look at it.
        tokenizer: The model's; when not given, that of the name it was loaded by.
        forget, retain: Rows, for methods that look at them.
        retain_vector: Fitted on the retain rows, for methods that compare two vectors.
        settings: As of :func:`fit`; ``shrink={"mu": 100}`` holds a method's own.
    """
    steps = [method] if isinstance(method, str) else list(method)
    if source := next((s for s in steps if (name := registered(str(s))) and METHODS[name].role != "shaper"), None):
        raise VectorError(f"{source} makes a vector and shapes none: give it to fit() as method={source!r}")
    recipe, rows = _asked({"forget": forget, "retain": retain}, seed, {**settings, "method": steps}, shaping=True)
    spec = recipe.vector
    absent = {
        "model": model is None and (spec.needs("rows", "activations") or spec.uses("ethos")),
        "forget": forget is None
        and (spec.needs("rows") or (spec.uses("shrink") and spec.settings("shrink").forget > 0)),
        "retain": retain is None and spec.needs("rows", "activations"),
        "retain_vector": retain_vector is None and spec.needs("retain_vector"),
    }
    if missing := [name for name, is_absent in absent.items() if is_absent]:
        raise VectorError(f"shape: {listing(steps)} works with more than the vector: give {listing(missing)} as well")
    if model is not None:
        fitting(model, vector)
    pad, trained = 0, dict[SetRole, list[Encoded]]()
    with _as_it_was(model or nn.Module(), verbose):
        if rows and model is not None:
            loaded = _loaded(model, tokenizer)
            pad = loaded.tokenizer.pad_token_id
            for one in training_sets(recipe, rows, loaded.tokenizer):
                trained[one.role] = encoded([one], loaded.tokenizer, spec.forget)
        sides = (trained.get("forget", ()), trained.get("retain", ()))
        return methods.shape(vector, spec, materials(model or nn.Module(), pad, seed, vector, retain_vector, *sides))


def save_adapter(vector: TaskVector, coefficient: float, folder: str | Path, base: str) -> Path:
    """Write theta - coefficient * tau as a LoRA adapter for ``PeftModel.from_pretrained(base, folder)``.

    Args:
        base: What the adapter is to be put on: a hub id or a folder.
    """
    if not math.isfinite(coefficient) or coefficient == 0:
        raise VectorError(f"coefficient {coefficient}: subtracting that leaves no other model to be saved")
    try:
        to_adapter(-coefficient * vector, Path(folder), base)
    except OSError as e:
        raise VectorError(f"{folder}: the adapter cannot be written: {e.strerror or e}") from e
    return Path(folder)


# -- coefficients


@dataclass(frozen=True)
class Sweep:
    """What metrics say of theta - c * tau: ``values[name][i]`` belongs to ``coefficients[i]``, 0 among them."""

    coefficients: tuple[float, ...]
    values: Mapping[str, tuple[float, ...]]

    def at(self, coefficient: float) -> dict[str, float]:
        """Every metric at one of the coefficients."""
        if coefficient not in self.coefficients:
            raise EvaluationError(f"at: {coefficient} was not tried; {listing(map(str, self.coefficients))} were")
        return {name: row[self.coefficients.index(coefficient)] for name, row in self.values.items()}

    def choose(
        self, *, minimise: str | None = None, maximise: str | None = None, keep: Mapping[str, float] | None = None
    ) -> float:
        """The coefficient, not 0, at which one metric is best while others stay; the smaller one on a tie.

        Args:
            keep: Metric -> how much of its value at 0: .95 is at least 95 %, 1.05 at most 105 % (of a loss, say).

        Raises:
            EvaluationError: none is within these bounds and better than 0.
        """
        if (minimise is None) == (maximise is None):
            raise EvaluationError("choose: give minimise= or maximise=, the name of one metric")
        goal, sign = (minimise, 1.0) if minimise is not None else (str(maximise), -1.0)
        keep = dict(keep or {})
        for name in (goal, *keep):
            if name not in self.values:
                raise EvaluationError(
                    f"choose: no metric {name!r}{did_you_mean(name, self.values)}; there are {', '.join(self.values)}"
                )
        start = self.at(0.0)

        def stays(name: str, share: float, now: float) -> bool:
            if not share > 0:
                raise EvaluationError(f"choose: keep {name!r} is {share}: give a share above 0, .95 for instance")
            least = share <= 1  # a negative value keeps its share by not growing, or not shrinking, more than that
            bound = start[name] * share if start[name] >= 0 else start[name] / share
            slack = 1e-9 * max(abs(start[name]), 1.0)
            return math.isfinite(now) and (now >= bound - slack if least else now <= bound + slack)

        kept = [c for c in self.coefficients if all(stays(n, b, self.at(c)[n]) for n, b in keep.items()) and c]
        better = [c for c in kept if sign * self.at(c)[goal] < sign * start[goal]]
        if not better:
            why = f"none lowers {goal}" if sign > 0 else f"none raises {goal}"
            bounds = f" among the {len(kept)} that keep {listing(keep)}" if keep else ""
            raise EvaluationError(f"choose: of {len(self.coefficients) - 1} coefficients {why}{bounds}: try others")
        return min(better, key=lambda c: (sign * self.at(c)[goal], abs(c)))

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each coefficient and a column for each metric."""
        import pandas  # type: ignore[import-untyped]

        return pandas.DataFrame(dict(self.values), index=pandas.Index(self.coefficients, name="coefficient"))

    def plot(self) -> Figure:
        """Every metric in percent of its value at 0, over the coefficient."""
        lines = []
        for number_of, (name, row) in enumerate(self.values.items()):
            start = self.at(0.0)[name]
            points = [Point(c, 100 * y / start) for c, y in zip(self.coefficients, row, strict=True) if start]
            lines.append(Series(points, name=name, **style(number_of)))
        ys = [point.y for line in lines for point in line.points]
        x, y = axis_of(self.coefficients, "coefficient", unit=False), axis_of(ys, "% of the value at 0", unit=False)
        figure = chart(lines, x, y, size=(480, 300)).figure
        figure.axes[0].legend(frameon=False)
        return figure

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(float_format=number))


def sweep(
    model: PreTrainedModel,
    vector: TaskVector,
    coefficients: Sequence[float],
    metrics: Mapping[str, Callable[[Any], float]],
    *,
    verbose: bool = False,
) -> Sweep:
    """Metrics of theta - c * tau for each coefficient c, and for 0.

    Args:
        metrics: Name -> a function of the model that gives a number.
    """
    if not isinstance(metrics, Mapping) or not metrics:
        raise EvaluationError("sweep: metrics is empty, or no mapping; give {'forget': a function of the model, ...}")
    try:
        grid = sorted({0.0, *(float(c) for c in coefficients)})
    except (TypeError, ValueError) as e:
        raise EvaluationError(f"sweep: coefficients {coefficients!r}: give a list of numbers") from e
    if not all(math.isfinite(c) for c in grid) or len(grid) < 2:
        raise EvaluationError(f"sweep: coefficients {list(coefficients)}: give at least one number that is not 0")
    values: dict[str, list[float]] = {name: [] for name in metrics}
    with _as_it_was(model, verbose), Edit(model, vector) as edit, progress("sweep", len(grid)) as advance:
        for c in grid:
            edit.subtract(c)
            for name, metric in metrics.items():
                value = metric(model)
                try:
                    values[name].append(float(value))
                except (TypeError, ValueError, RuntimeError) as e:
                    raise EvaluationError(f"sweep: {name} gave a {type(value).__name__}, and no number") from e
                if c == 0 and not math.isfinite(values[name][-1]):
                    raise EvaluationError(f"sweep: {name} of the model as it is is {values[name][-1]}, and no number")
            advance(1)
    return Sweep(tuple(grid), {name: tuple(row) for name, row in values.items()})


def evaluate(
    model: PreTrainedModel,
    vector: TaskVector,
    coefficient: float,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """lm-eval's results for theta - coefficient * tau, by the packed engine.

    Args:
        tasks: Names of lm-eval's tasks and of those in this program's pack, or YAML files.
        tokenizer: The model's; when not given, that of the name it was loaded by.
        options: Of ``lm_eval.simple_evaluate``: ``limit``, ``num_fewshot``, ``log_samples``, ``metadata``, ...

    Returns:
        What ``lm_eval.simple_evaluate`` returns.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise EvaluationError("evaluate: tasks is empty; name one at least")
    known = inspect.signature(simple_evaluate).parameters.keys() - {"model", "tasks", "task_manager"}
    if odd := next((key for key in options if key not in known), None):
        raise EvaluationError(f"evaluate: lm-eval's simple_evaluate has no option {odd!r}{did_you_mean(odd, known)}")
    index = task_manager(names, [tasks_folder()], options.pop("metadata", None))
    for name in names:
        if not index.match_tasks([name]) and not Path(name).exists():
            raise EvaluationError(f"evaluate: lm-eval knows no task {name!r}{did_you_mean(name, index.all_tasks)}")
    with random_state_kept(), _as_it_was(model, True), subtracted(model, vector, coefficient):
        lm = PackedLM(model, _loaded(model, tokenizer).tokenizer)
        try:
            found: dict[str, Any] = simple_evaluate(model=lm, tasks=names, task_manager=index, **options)
        except (OSError, ValueError) as e:
            raise EvaluationError(f"evaluate: {listing(names)} cannot be loaded or scored: {e}") from e
    return found


# -- a model, rows and settings as the pipeline takes them

_ARGUMENTS = ("forget", "retain", "seed", "verbose", "chat_template", "system", "date")  # beside keys of a recipe


def _asked(
    rows: Mapping[SetRole, Any], seed: int, settings: Mapping[str, Any], *, shaping: bool = False
) -> tuple[Recipe, dict[SetRole, list[Row]]]:
    """The recipe that asks the same, and the rows that were given."""
    given = {role: _rows(role, data) for role, data in rows.items() if data is not None}
    data = {key: value for key, value in settings.items() if key in DataSet.model_fields}
    vector = {key: value for key, value in settings.items() if key in VectorSpec.model_fields or key in METHODS}
    template = {key: settings[key] for key in ("chat_template", "system", "date") if key in settings}
    training = {key: value for key, value in settings.items() if not any(key in d for d in (data, vector, template))}
    known = {*_ARGUMENTS, *DataSet.model_fields, *VectorSpec.model_fields, *TrainSpec.model_fields, *ALSO}
    for key in training:
        if key not in known and key not in trainer_settings() and (guess := did_you_mean(key, known)):
            raise RecipeError(f"{key}: there is no such argument{guess}")
    if "retain" in given and "retain_kl" not in vector and not shaping:
        method = vector.get("method", "negate")
        first = method[0] if isinstance(method, list | tuple) and method else method
        if METHODS[registered(str(first)) or "negate"].role != "baseline":
            vector["retain_kl"] = "two_sided"

    def described(role: SetRole) -> dict[str, Any]:
        return {"kind": _kind(role, given[role], data) if role in given else "qa", "path": role, **data}

    asked = {
        "name": "fit",
        "seed": seed,
        "model": {"path": "memory", **template},
        "forget": described("forget"),
        "retain": [described("retain")] if "retain" in given or shaping else [],
        "vector": {**vector, "forget": training},
    }
    return from_mapping(asked), given


def _rows(role: SetRole, data: Any) -> list[Row]:
    """Rows of whatever holds them."""
    if isinstance(data, str | Mapping):
        raise DataError(
            f"{role}: give a list of rows, a datasets.Dataset or a DataFrame, not one {type(data).__name__}"
        )
    listed = data.to_dict("records") if hasattr(data, "iloc") else list(data)
    rows = []
    for number_of, row in enumerate(listed, 1):
        values = {"text": row} if isinstance(row, str) else row
        if not isinstance(values, Mapping):
            raise DataError(f"{role}, row {number_of}: {type(row).__name__} is neither a mapping of columns nor a text")
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}
        rows.append(Row(f"row {number_of}", plain))
    if not rows:
        raise DataError(f"{role}: there are no rows in it")
    return rows


def _kind(role: SetRole, rows: Sequence[Row], data: Mapping[str, Any]) -> str:
    """mcq, qa or text, by the columns of the first row."""
    there = {*rows[0].values, *data.get("columns", {})}
    kind = next((kind for kind, forms in FORMS.items() if any(set(form) <= there for form in forms)), None)
    if kind is None and "kind" not in data:
        raise DataError(
            f"{role}: the columns {listing(map(str, rows[0].values))} are neither question and answer, nor question, "
            "choices and answer, nor text: say with columns={'question': 'q', ...} which is which"
        )
    return kind or "qa"


def _loaded(model: PreTrainedModel, tokenizer: Any) -> Loaded:
    """A model in memory as the pipeline has it. Its tokenizer is a copy, which may get a padding token."""
    check_in_memory(model)
    if isinstance(model, PeftModel):
        raise ModelError("the model has an adapter on it: give the base (model.unload() returns it), or merge it first")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError("the model is quantised: give it in full precision; a recipe trains with model.quantize")
    name = str(model.config.name_or_path)
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as e:
            raise ModelError(f"no tokenizer is found under the model's name, {name!r}: give tokenizer=") from e
    tokenizer = copy.deepcopy(tokenizer)
    check_tokenizer(name or "memory", tokenizer, model)
    return Loaded(model, tokenizer, "memory", model.dtype, model.device, path=name)


@contextmanager
def _as_it_was(model: PreTrainedModel, verbose: bool) -> Iterator[None]:
    """The model evaluates inside the ``with``; its flags, random numbers and the logger are as before outside it."""
    check_in_memory(model)
    training = {module: module.training for module in model.modules()}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    level = log.level
    if not verbose:
        log.setLevel(max(level, logging.WARNING))
    model.eval()
    try:
        with random_state_kept(), warnings.catch_warnings():
            # what transformers says of arguments that peft gives it
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
            yield
    finally:
        log.setLevel(level)
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in learning.items():
            parameter.requires_grad_(flag)
