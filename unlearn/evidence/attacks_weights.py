"""Copies of a model: with an edit merged into the weights, with those weights in 4 or 8 bits, and trained again.

An edit is a small change of many weights, and rounding to a coarse grid may undo it: at 4 bits most of what had been
unlearned was there again (2410.16454).
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn.console import progress, quietly
from unlearn.data.encoding import Encoded, encode
from unlearn.data.items import Item, digest
from unlearn.data.sets import LoadedSet
from unlearn.errors import ModelError, TrainingError, VectorError
from unlearn.evidence.attacks import Judge, Judged, Scene, attack
from unlearn.recipe.evaluation import Quantised, RelearnSpec
from unlearn.results import AttackScore, quantisation, relearning
from unlearn.score.tasks import errors_only, random_state_kept
from unlearn.train.batches import Pad
from unlearn.vector.change import edited
from unlearn.vector.edit import fit
from unlearn.vector.task_vector import TaskVector


@torch.no_grad()
def edited_copy(model: PreTrainedModel, vector: TaskVector | None, coefficient: float) -> PreTrainedModel:
    """A copy of a model that is under no edit, with theta - coefficient * tau as weights; coefficient 0: a plain copy.

    Each edited weight is the float32 sum, cast once to the weight's dtype: what a merged export holds. Under
    :class:`unlearn.vector.edit.Edit` a 16-bit model has the change beside its weights, where neither quantisation nor
    further training would see it.
    """
    twin = copy.deepcopy(model)
    twin.eval()
    if vector is None or coefficient == 0:
        return twin
    fitted = fit(twin, vector)
    packed = [n for n, (module, _) in fitted.items() if not module.get_parameter("weight").is_floating_point()]
    if packed:
        raise VectorError(f"an edit cannot be merged into quantised weights: {', '.join(packed)}")
    with progress("merging the edit", len(fitted)) as advance:
        for module, change in fitted.values():
            weight = module.get_parameter("weight")
            there = change.to(weight.device)
            weight.copy_(edited(weight.float(), there, -coefficient, isinstance(module, Conv1D)))
            advance(1)
    return twin


# -- in fewer bits


def _rounding(kind: Quantised, scene: Scene) -> list[Any] | None:
    return [] if kind in scene.spec.quantize else None


def rounded(kind: Quantised, scene: Scene) -> list[AttackScore]:
    """The weights in 4 or 8 bits."""
    with quantised(scene.model, kind) as small:
        return [scene.judge.score(small, f"{scene.who} in {kind}").entry(scene.who, quantisation(kind), "quantise")]


for _kind in get_args(Quantised):
    less = "leave it out of robustness.quantize"
    attack(_kind, partial(_rounding, _kind), changes_weights=True, less=less)(partial(rounded, _kind))


@contextmanager
def quantised(model: PreTrainedModel, kind: Quantised) -> Iterator[PreTrainedModel]:
    """A quantised copy of a model (:func:`edited_copy`); gone, with its temporary files, after the ``with``.

    ``nf4`` is 4-bit NormalFloat in blocks of 64 (2305.14314), ``int8`` LLM.int8() (2208.07339). The head and the
    embeddings stay as they are.
    """
    with tempfile.TemporaryDirectory(prefix="quantise-") as folder:
        with progress(quantisation(kind), 2) as advance, quietly():
            _save(model, Path(folder))
            advance(1)
            small = _read(model, Path(folder), kind)
            advance(1)
        # bitsandbytes says at every layer of every pass that 8-bit products are taken in 16 bits; and our scoring, that
        # 8-bit models are not scored in packed rows: what is an outlier there depends on the rows beside it
        with errors_only("bitsandbytes", "unlearn.score.packed"):
            yield small


def _save(model: PreTrainedModel, folder: Path) -> None:
    before = model.config
    model.config = copy.deepcopy(before)  # saving writes into it
    # of several processes transformers has only the first one write, and here each has a copy and a folder of its own
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: True
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise ModelError(f"robustness.quantize: cannot write a copy of the weights to {folder}: {error}") from error
    finally:
        model.config = before
        del vars(model)["should_save_on_this_rank"]


def _read(model: PreTrainedModel, folder: Path, kind: Quantised) -> PreTrainedModel:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": model.dtype}
    small, report = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        quantization_config=BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True})),
        device_map=getattr(model, "hf_device_map", {"": model.device}),
        use_safetensors=True,
        output_loading_info=True,
    )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ModelError(
            f"robustness.quantize: the quantised copy has other weights than the model: {', '.join(wrong)}"
        )
    for module in small.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # some CPUs would take products in bfloat16: what is to be seen is the rounding of the weights, everywhere
            module.support_avx512bf16_for_cpu = False
    small.eval()
    return small


# -- trained again


def parted(
    loaded: LoadedSet, scored: Sequence[Item], count: int, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """At most ``count`` forget items to relearn, and those that are then still scored: none is both, where that can be.

    First come training items that are not scored. Where those are too few (``train: all``) some are taken out of the
    scored ones, up to half of them. Only a set of one item in all is relearned and scored on the same.
    """
    ids = {item.id for item in scored}
    pool = {item.id: item for item in reversed(loaded.train) if item.id not in ids}  # of several prompts the first
    chosen = _shuffled(tuple(pool.values()), seed)[:count]
    if len(chosen) < count:
        chosen += _shuffled(scored, seed)[: min(count - len(chosen), len(scored) // 2)]
    if not chosen:
        return tuple(scored), tuple(scored)
    taken = {item.id for item in chosen}
    return chosen, tuple(item for item in scored if item.id not in taken)


def _shuffled(items: Sequence[Item], seed: int) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: digest(seed, item.id)))


def unrelated_rows(sets: Sequence[LoadedSet], count: int, seed: int, tokenizer: Any, length: int) -> list[Encoded]:
    """``count`` rows of the utility sets, of any split, drawn by the seed among the items whose answer fits.

    Of a passage that does not fit it is the first piece; none where there is no utility set.
    """
    pool: dict[tuple[str, str], tuple[LoadedSet, Item]] = {}
    for loaded in sets:
        if loaded.role == "utility":
            for item in (*loaded.train, *loaded.validation, *loaded.test):
                pool.setdefault((loaded.name, item.id), (loaded, item))
    rows: list[Encoded] = []
    for name in sorted(pool, key=lambda name: digest(seed, *name)):
        loaded, item = pool[name]
        with suppress(TrainingError):  # too long: another one will do
            rows.append(encode([item], loaded.spec.kind, tokenizer, length)[0])
        if len(rows) == count:
            break
    return rows


def _rows(unrelated: bool, scene: Scene) -> list[Encoded]:
    """The rows to train on; none where that is not asked for."""
    how, judge = scene.spec.relearn, scene.judge
    length = judge.recipe.vector.forget.max_length
    if how is None or (unrelated and not how.unrelated):
        return []
    if unrelated:
        return unrelated_rows(scene.sets, how.items, judge.recipe.seed, judge.tokenizer, length)
    return encode(scene.again, judge.kind, judge.tokenizer, length)


def _training(unrelated: bool, scene: Scene) -> list[Any] | None:
    rows, how = _rows(unrelated, scene), scene.spec.relearn
    if not rows or how is None:
        return None
    return [how.model_dump(mode="json"), [asdict(row) for row in rows], scene.judge.recipe.seed]


def relearned(unrelated: bool, scene: Scene) -> list[AttackScore]:
    """A curve of fine-tuning on a few forgotten items, or on texts that have nothing to do with them."""
    rows, how, judge = _rows(unrelated, scene), scene.spec.relearn, scene.judge
    assert how is not None
    name = relearning(len(rows) if unrelated else len(scene.again), unrelated)
    curve = relearn(scene.model, judge.tokenizer, rows, how, judge.recipe.seed, judge, f"{scene.who}: {name}")
    return [score.entry(scene.who, name, "relearn", steps=steps) for steps, score in curve]


for _name, _unrelated in (("relearn", False), ("relearn-unrelated", True)):
    less = "lower robustness.relearn.batch_size, or set robustness.relearn to null"
    attack(_name, partial(_training, _unrelated), changes_weights=True, less=less)(partial(relearned, _unrelated))


def relearn(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Encoded],
    spec: RelearnSpec,
    seed: int,
    judge: Judge,
    label: str = "relearning",
) -> list[tuple[int, Judged]]:
    """Fine-tune all weights (AdamW, constant rate, gradients cut at norm 1): (steps, score) for each of ``spec.steps``.

    ``model`` is a copy to be used up (:func:`edited_copy`), trained in float32: in 16 bits small steps are rounded
    away, and the attack would look weaker than it is. The seed decides the order in which the rows come over and over.
    Several processes take the same steps, each on a copy of its own.
    """
    size, steps = min(spec.batch_size, len(rows)), sorted(set(spec.steps))
    draw, order = random.Random(f"{seed} relearning"), list[Encoded]()
    while len(order) < size * steps[-1]:
        order += draw.sample(rows, len(rows))
    pad, found = Pad(tokenizer.pad_token_id), list[tuple[int, Judged]]()
    model.float().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.0)
    try:
        with random_state_kept():
            torch.manual_seed(seed)  # of dropout
            for start, end in pairwise((0, *steps)):
                model.train()
                with progress(f"{label}, to step {end}", end - start) as advance:
                    for step in range(start, end):
                        batch = pad(order[step * size : (step + 1) * size])
                        loss = model(**{name: values.to(model.device) for name, values in batch.items()}).loss
                        if not loss.isfinite():
                            raise TrainingError(
                                f"{label}: the loss became {loss.item()} at step {step + 1}; lower "
                                "robustness.relearn.learning_rate"
                            )
                        loss.backward()
                        clip_grad_norm_(model.parameters(), 1.0)
                        optimiser.step()
                        optimiser.zero_grad()
                        advance(1)
                model.eval()
                found.append((end, judge.score(model, f"{label}, step {end}")))
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
        model.eval()
    return found
