"""``unlearn plan --memory``: bytes that a run's stages hold, from its model laid out without weights.

A model of any architecture is built of arrays without content (on the meta device). The largest batch of every training
goes through it and back while the bytes of the arrays that are alive are counted. They are bounds: under a
GPU's autocast activations take half of them, and rows are seldom all as long as the longest.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from unlearn.console import quietly
from unlearn.data.encoding import IGNORE, encode
from unlearn.data.items import refusals
from unlearn.data.sets import load_sets
from unlearn.errors import ModelError
from unlearn.model.load import linear_modules, number_format, place, resolve_targets
from unlearn.model.locate import at_hand
from unlearn.plan.words import block, local_part, on_hub
from unlearn.recipe.data import SetRole
from unlearn.recipe.load import LoadedRecipe
from unlearn.recipe.methods import METHODS, LoraSpec, TrainSpec
from unlearn.recipe.schema import Recipe
from unlearn.text import file_size
from unlearn.train.losses import penalty
from unlearn.train.moments import AT_ONCE
from unlearn.vector.edit import shape_of

Build = Callable[[torch.dtype], Any]
_Parts = dict[str, int]  # bytes
_QUANTISED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes of a weight; NF4 has a float32 for 64 of them
_PASS, _LOGITS = 1024, 64 * 2**20  # tokens of a scoring pass, and bytes of logits at a time (unlearn.score.forward)


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts a model's arrays and those that are made inside the ``with``: bytes ``now`` alive, and the ``peak``."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self.hold(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map_only(Tensor, self.hold, func(*args, **(kwargs or {})))

    def hold(self, tensor: Tensor) -> Tensor:
        """Count an array's storage, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)
        return tensor

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def weights(build: Build, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters and buffers."""
    return Tally(build(dtype)).peak


def training(
    build: Build, dtype: torch.dtype, spec: TrainSpec, lora: LoraSpec | None, tokens: int, labels: int, sets: int = 0
) -> tuple[int, int]:
    """Bytes of a fine-tuning: all that lies there between two batches, and the most there is within one.

    Args:
        spec: Its ``batch_size`` counts the rows that an objective puts beside the batch, too.
        lora: The adapter; None: all weights learn, in float32.
        tokens, labels: Of a row.
        sets: Of logits that an objective's divergences are between; 0: plain cross-entropy.
    """
    model = build(dtype if lora is not None else torch.float32).requires_grad_(lora is None)
    if spec.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if lora is not None:
        names = list(resolve_targets(model, lora.targets, lora.depth))
        turned = isinstance(model.get_submodule(names[0]), Conv1D)
        model = get_peft_model(model, LoraConfig(r=lora.rank, target_modules=names, fan_in_fan_out=turned))
    mode = FakeTensorMode()
    tally = Tally(_faked(model.train(), mode))
    with mode:
        learned = [p for p in model.parameters() if p.requires_grad]
        moments = [tally.hold(torch.empty_like(p)) for p in learned for _ in range(2)]  # AdamW's
        for parameter in learned if spec.accumulation > 1 else ():
            parameter.grad = tally.hold(torch.empty_like(parameter))  # of the batch before
        between = tally.now
        with tally:
            ids = torch.zeros(spec.batch_size, tokens, dtype=torch.long)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            if sets:
                _head_at(model, math.ceil(spec.batch_size * labels / sets) * sets)
                *sides, untouched = model(**given).logits.chunk(sets)
                loss = penalty(untouched, sides)
            else:
                loss = model(**given, labels=ids).loss
            loss.backward()  # type: ignore[no-untyped-call]
        del moments  # alive up to here
        return between, tally.peak


def scoring(build: Build, dtype: torch.dtype, recipe: Recipe) -> tuple[int, int]:
    """Bytes of the vector on a model (in float32, and of a float32 model its weights as they were), and of a pass."""
    vector = recipe.vector
    model = build(dtype).eval()
    sizes = [shape_of(model.get_submodule(n)) for n in resolve_targets(model, vector.lora.targets, vector.lora.depth)]
    dense, thin = 4 * sum(a * b for a, b in sizes), 4 * vector.lora.rank * sum(a + b for a, b in sizes)
    several = max(len(recipe.goals()), 3 if recipe.analogy else 1) * (2 if vector.needs("retain_vector") else 1)
    brought = vector.given()
    whole = any(METHODS[m].dense for m in vector.steps()) or (brought is not None and brought.finetuned is not None)
    change = dense if whole else thin * several
    mode = FakeTensorMode()
    tally = Tally(_faked(model, mode))
    with mode, torch.no_grad():
        held = tally.now
        _head_at(model, max(1, _LOGITS // (4 * model.get_output_embeddings().weight.shape[0])))
        with tally:
            ids = torch.zeros(1, recipe.eval.batch_tokens or _PASS, dtype=torch.long)
            torch.logsumexp(model(input_ids=ids, use_cache=False).logits.float(), -1)
    return change + dense * (dtype == torch.float32), tally.peak - held


def _faked(model: Any, mode: FakeTensorMode) -> Any:
    """The model's arrays, which are on the meta device, as if they were in memory: with what CPUs do to them."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in found:
                    fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    learns = tensor.requires_grad
                    found[id(tensor)] = nn.Parameter(fake, learns) if isinstance(tensor, nn.Parameter) else fake
                own[name] = found.get(id(tensor))
    return model


def _head_at(model: Any, places: int) -> None:
    """From now on the model's head runs at so many places of a batch only."""
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].reshape(-1, args[0].shape[-1])[:places],)
    )


def memory(loaded: LoadedRecipe) -> str:
    """The block that ``--memory`` adds to a plan. Nothing is fetched."""
    recipe, spec, vector = loaded.recipe, loaded.recipe.model, loaded.recipe.vector
    where, options = at_hand(spec, loaded.source.parent), {"trust_remote_code": spec.trust_remote_code}
    try:
        with quietly():
            config = AutoConfig.from_pretrained(where, revision=spec.revision, local_files_only=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(where, revision=spec.revision, local_files_only=True, **options)
    except (OSError, ValueError) as e:
        raise ModelError(
            f"model.path: the configuration or the tokenizer of {where} is not on this machine, and a plan fetches "
            f"nothing: hf download {where} --include '*.json' brings both"
        ) from e

    def build(dtype: torch.dtype) -> Any:
        with quietly(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)

    dtype = number_format(spec.dtype, place("auto") if spec.dtype == "auto" else torch.device("cpu"))
    held, sets = weights(build, dtype), load_sets(local_part(recipe), loaded.source.parent, tokenizer)

    def fit(
        what: TrainSpec,
        lora: LoraSpec | None,
        *roles: SetRole,
        beside: int = 0,
        logits: int = 0,
        said: Sequence[str] = (),
    ) -> _Parts:
        here = [s for s in sets if s.role in roles and s.train]
        items = [[*s.train, *(replace(item, target=text) for text in said for item in s.train)] for s in here]
        rows = [
            r
            for s, each in zip(here, items, strict=True)
            for r in encode(each, s.spec.kind, tokenizer, what.max_length)
        ]
        tokens = max((len(row.input_ids) for row in rows), default=1)
        labels = max((sum(x != IGNORE for x in row.labels) for row in rows), default=1)
        if any(on_hub(data) for role, data in recipe.sets() if role in roles):  # their rows are not known
            tokens = labels = what.max_length
        what = what.model_copy(update={"batch_size": what.batch_size + beside})
        between, peak = training(build, dtype, what, lora, tokens, labels, logits)
        batch = f"{what.batch_size} rows of {tokens} tokens"
        return {"weights": held, "what learns": between - held, batch: peak - between}

    stages: dict[str, _Parts] = {"load": {"weights": held}}
    if recipe.teach is not None:
        stages["teach"] = fit(recipe.teach, recipe.teach.lora, "forget", "retain")
    bare = build(dtype)
    names = resolve_targets(bare, vector.lora.targets, vector.lora.depth)
    # at most: layers that read the same share a matrix, and few retain tokens need none
    squares = [tuple(4 * width**2 for width in shape_of(bare.get_submodule(n))) for n in names]
    outputs, inputs = map(sum, zip(*squares, strict=True))
    kept, source, size = recipe.penalty(), vector.source(), vector.forget.batch_size
    logits = 2 if vector.loss() else 0
    beside = size * {"npo": 1, "idk_dpo": 3}.get(source, 0)  # what the loss compares the forget rows with
    if vector.holds():
        beside += size * (1 + (source == "rmu" or vector.settings(source).retain_loss == "kl"))
    curved = kept is not None and kept.estimate == "kfac"
    if kept is not None and not curved:
        logits = 3 if kept.sides == "two" else 2
        beside = kept.batch_size * logits
    if source == "ignorance":
        how = vector.settings(source)
        logits, beside = max(logits, 2), beside + size * (how.others + (how.grow > 0))
    if recipe.edited is not None:
        stages["edited"] = {"the edited model": held}
    elif source != "retain_only" and vector.from_ is None:
        said = refusals(vector.settings(source).refusals, loaded.source.parent) if source == "idk_dpo" else ()
        roles: tuple[SetRole, ...] = ("forget", "learn", "term")
        stages["finetune"] = fit(vector.forget, vector.lora, *roles, beside=beside, logits=logits, said=said)
        if source == "ignorance" and how.teacher == "clean":
            stages["finetune"] |= {"the clean model": held}
        if source == "ihl" and vector.settings(source).fila:
            bare = build(dtype)
            linear = (bare.get_submodule(n) for n in resolve_targets(bare, vector.lora.targets, vector.lora.depth))
            stages["finetune"] |= {"FILA's importances": 2 * 4 * sum(math.prod(shape_of(m)) for m in linear)}
        if vector.inside is not None or curved:
            more = {"the shrinking": inputs * (vector.inside is not None), "the curvature": (inputs + outputs) * curved}
            stages["finetune"] |= {part: size for part, size in more.items() if size}
    if vector.needs("retain_vector") and recipe.edited is None:
        stages["finetune, retain"] = fit(vector.retain or vector.forget, vector.lora, "retain")
    if vector.needs("activations"):
        widest = max(map(max, squares))  # in float32; equations are solved in float64
        parts = {"second moments": min(max(inputs, outputs), max(widest, AT_ONCE)), "what is solved": 4 * widest}
        stages["shape"] = {"weights": held, **parts}
    change, passing = scoring(build, dtype, recipe)
    stages["sweep, test"] = {"weights": held, "the edit": change, "a pass": passing}
    if spec.quantize != "none":
        linear = (math.prod(shape_of(m)) for m in linear_modules(build(dtype)).values())
        packed = sum(linear) * _QUANTISED[spec.quantize]
        for name in stages.keys() & {"finetune", "finetune, retain"}:
            stages[name] = {**stages[name], f"a copy in {spec.quantize}, at least": int(packed)}
    lines = [
        f"at most, in {str(dtype).removeprefix('torch.')}; what learns is counted with AdamW's moments",
        "not counted: the libraries' own, texts that are written, a reference, attacks",
    ]
    for name, parts in stages.items():
        told = ", ".join(f"{part} {file_size(count)}" for part, count in parts.items())
        lines.append(f"{name:16}  {file_size(sum(parts.values())):>9}  {told}")
    return block("memory", lines)
