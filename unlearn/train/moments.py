"""What a model's linear layers read on some rows: the second moments of their inputs, and the shrinking they give.

A change that answers little to what retain rows bring to a layer changes little of what the model says about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from unlearn.data.encoding import Encoded
from unlearn.errors import VectorError
from unlearn.train.batches import Pad
from unlearn.train.losses import frozen
from unlearn.vector.edit import shape_of
from unlearn.vector.methods import shrinker

_AT_ONCE = 2**30  # bytes of the matrices that one pass over the rows fills
_BATCH = 16  # rows


def second_moments(
    model: nn.Module, rows: Sequence[Encoded], names: Sequence[str], pad_id: int
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The mean of x x^T over the rows' tokens but the first, on which models rest their attention.

    Args:
        names: Paths of linear modules.

    Yields:
        Paths of modules that read the same input, and its (in, in), float32 on the model's device. No more than a
        gigabyte of them is held at a time (or one, if it is larger), for which the rows are read several times.

    Raises:
        VectorError: the rows have no token that is read, or activations are not finite.
    """
    usable = [row for row in rows if len(row.input_ids) > 1]
    if not usable:
        raise VectorError("no retain row has more than one token: there are no activations to shrink by")
    waiting = _by_input(model, usable[0], names, pad_id)
    while waiting:
        sums: dict[tuple[str, ...], Tensor] = {}
        size = 0
        while waiting and (not sums or size + _bytes(model, waiting[0]) <= _AT_ONCE):
            size += _bytes(model, waiting[0])
            module = model.get_submodule(waiting[0][0])
            width = shape_of(module)[1]
            sums[waiting.pop(0)] = torch.zeros(width, width, device=module.get_parameter("weight").device)
        count = 0
        for start in range(0, len(usable), _BATCH):
            batch = Pad(pad_id)(usable[start : start + _BATCH])
            kept = batch["attention_mask"].bool()
            kept[:, 0] = False
            count += int(kept.sum())

            totals = {group[0]: total for group, total in sums.items()}
            _read(model, batch, totals, partial(_add, totals, kept))
        for group in list(sums):
            moment = sums.pop(group) / count
            if not bool(torch.isfinite(moment).all()):
                raise VectorError(f"the activations that {group[0]} reads are not finite: use dtype float32")
            yield group, moment


def shrinkers(
    model: nn.Module, rows: Sequence[Encoded], names: Sequence[str], pad_id: int, mu: float
) -> dict[str, Tensor]:
    """:func:`unlearn.vector.methods.shrinker` by module; modules that read the same input share one tensor."""
    found = {}
    for group, moment in second_moments(model, rows, names, pad_id):
        found.update(dict.fromkeys(group, shrinker(moment, mu)))
    return found


# -- a LoRA that is fitted inside the shrinking


class Inside(nn.Linear):
    """A LoRA's A that acts as A P; ``weight`` is A, and P is not saved with it."""

    shrinker: Tensor

    def __init__(self, plain: nn.Linear, p: Tensor) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight
        self.register_buffer("shrinker", p.to(plain.weight.device), persistent=False)

    def shrunk(self) -> Tensor:
        """A P, (r, in), float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight.float() @ self.shrinker

    def forward(self, x: Tensor) -> Tensor:
        """X P A^T."""
        return functional.linear(x, self.shrunk().to(x.dtype))


def put_inside(model: nn.Module, shrinkers: Mapping[str, Tensor]) -> None:
    """Let every LoRA of a PEFT model act as A P from now on; there is a P for each module's path."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            plain = layer.lora_A["default"]
            assert isinstance(plain, nn.Linear)
            layer.lora_A["default"] = Inside(plain, shrinkers[name.removeprefix("base_model.model.")])


# -- reading


def _add(totals: Mapping[str, Tensor], kept: Tensor, name: str, x: Tensor) -> None:
    read = x[kept.to(x.device)].float()
    totals[name].addmm_(read.T, read)


def _bytes(model: nn.Module, group: tuple[str, ...]) -> int:
    return 4 * shape_of(model.get_submodule(group[0]))[1] ** 2


def _by_input(model: nn.Module, row: Encoded, names: Sequence[str], pad_id: int) -> list[tuple[str, ...]]:
    """The modules grouped by the very tensor they read."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for other, group in seen:
            if other is x:
                group.append(name)
                return
        seen.append((x, [name]))

    _read(model, Pad(pad_id)([row]), dict.fromkeys(names), note)
    if unread := set(names) - {name for _, group in seen for name in group}:
        raise VectorError(
            f"{sorted(unread)[0]} reads nothing of a retain row, and so has no activations to shrink by: leave such "
            "modules out of vector.lora.targets"
        )
    return [tuple(group) for _, group in seen]


def _read(
    model: nn.Module, batch: Mapping[str, Tensor], names: Mapping[str, Any], seen: Callable[[str, Tensor], None]
) -> None:
    """One pass over a batch; ``seen`` gets what each module reads, (B, T, in)."""
    device = next(model.parameters()).device
    with frozen(model), torch.no_grad(), _watched(model, names, seen):
        body = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        body(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))


@contextmanager
def _watched(model: nn.Module, names: Mapping[str, Any], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
