"""What some rows bring to a model's linear layers: second moments of inputs and of output gradients, and their use.

A change that answers little to what retain rows bring to a layer changes little of what the model says about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unlearn.data.encoding import Encoded
from unlearn.errors import VectorError
from unlearn.train.batches import Pad, labelled
from unlearn.train.losses import adapters, answer_logits, frozen, with_answers
from unlearn.train.trainer import range_for_gradients
from unlearn.vector.edit import shape_of
from unlearn.vector.methods import shrinker, times

AT_ONCE = 2**30  # bytes of the matrices that one pass over the rows fills
_BATCH = 16  # rows


def second_moments(
    model: nn.Module, rows: Sequence[Encoded], names: Sequence[str], pad_id: int, *, thin: bool = False
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The mean of x x^T over the rows' tokens but the first, on which models rest their attention.

    Args:
        names: Paths of linear modules.
        thin: Where there are fewer tokens than dimensions, give x / sqrt(N), (N, in), instead.

    Yields:
        Paths of modules that read the same input, and its (in, in), float32 on the model's device. No more than a
        gigabyte of them is held at a time (or one, if it is larger), for which the rows are read several times.
    """
    usable = [row for row in rows if len(row.input_ids) > 1]
    if not usable:
        raise VectorError("no retain row has more than one token: there are no activations to shrink by")
    alike = _by_input(model, usable[0], names, pad_id)
    groups = [(group, shape_of(model.get_submodule(group[0]))[1]) for group in alike]

    def read(batch: Mapping[str, Tensor], wanted: Sequence[str], seen: Seen) -> None:
        with torch.no_grad(), _watched(model, wanted, seen):
            _pass(model, batch)

    return _collected(model, usable, groups, pad_id, thin, lambda: read, "the activations that {} reads are")


def gradient_moments(
    model: nn.Module, rows: Sequence[Encoded], names: Sequence[str], pad_id: int, seed: int
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The same of g, the gradient at each module's output of a row's loss, added up over its labelled tokens.

    The labels are drawn from what the model says (Fisher information, and not the empirical one): by ``seed``, alike
    whenever the rows are read. Thin where there are fewer tokens than dimensions.
    """
    usable = with_answers(rows)
    if not usable:
        raise VectorError("no retain row has a token to be predicted: there is no gradient to shrink by")
    groups = [((name,), shape_of(model.get_submodule(name))[0]) for name in names]

    def reading() -> Reader:
        draw = torch.Generator().manual_seed(seed)

        def read(batch: Mapping[str, Tensor], wanted: Sequence[str], seen: Seen) -> None:
            with torch.enable_grad(), _watched(model, wanted, seen, gradients=True):
                logits, _, _ = answer_logits(model, batch)
                said = logits.detach().softmax(-1).cpu()
                if not bool(torch.isfinite(said).all()):
                    raise VectorError("what the model says of retain rows is not finite: use dtype float32")
                drawn = torch.multinomial(said, 1, generator=draw)[:, 0].to(logits.device)
                torch.autograd.backward(functional.cross_entropy(logits, drawn, reduction="sum"))

        return read

    with range_for_gradients(model):
        yield from _collected(model, usable, groups, pad_id, True, reading, "the gradients at the output of {} are")


def shrinkers(
    model: nn.Module, rows: Sequence[Encoded], names: Sequence[str], pad_id: int, mu: float
) -> dict[str, Tensor]:
    """:func:`unlearn.vector.methods.shrinker` by module; modules that read the same input share one tensor."""
    found = {}
    for group, moment in second_moments(model, rows, names, pad_id):
        found.update(dict.fromkeys(group, shrinker(moment, mu)))
    return found


# -- the second order of what a LoRA does to retain rows


Factors = Mapping[str, tuple[Tensor, Tensor]]  # module path -> the moments of its inputs and of its output's gradients


def curvature(model: nn.Module, rows: Sequence[Encoded], names: Sequence[str], pad_id: int, seed: int) -> Factors:
    """The factors for :class:`SecondOrder`, in nats per labelled token of the rows."""
    usable = with_answers(rows)
    inputs = {n: c for group, c in second_moments(model, usable, names, pad_id, thin=True) for n in group}
    outputs = {n: g for group, g in gradient_moments(model, usable, names, pad_id, seed) for n in group}
    per_label = sum(len(row.input_ids) - 1 for row in usable) / labelled(usable)
    return {n: (inputs[n], g * (per_label**0.5 if len(g) < g.shape[1] else per_label)) for n, g in outputs.items()}


class SecondOrder:
    """The sum over a PEFT model's LoRAs of s^2 tr[(B^T G B)(A C A^T)] (TAK 2602.17385), differentiable in A and B.

    Half of it is, layer by layer and for small tau, the divergence of theta + tau, and of theta - tau, from theta.
    """

    def __init__(self, model: nn.Module, factors: Factors) -> None:
        self._layers = [(layer, layer.scaling["default"], *factors[name]) for name, layer in adapters(model)]

    def __call__(self) -> Tensor:
        """The sum as it is now, ()."""
        found = []
        for layer, scale, c, g in self._layers:
            inner: Any = layer.lora_A["default"]
            a = inner.shrunk() if isinstance(inner, Inside) else inner.weight.float()  # (r, in)
            b = layer.lora_B["default"].get_parameter("weight").float().T  # (r, out)
            # both (r, r) are symmetric: the sum of their entries' products is the trace of their product
            found.append(scale**2 * ((times(g, b) @ b.T) * (times(c, a) @ a.T)).sum())
        return torch.stack(found).sum()


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
    for name, layer in adapters(model):
        layer.lora_A["default"] = Inside(layer.lora_A["default"], shrinkers[name])


# -- reading

Seen = Callable[[str, Tensor], None]  # gets what each module reads, or its output's gradient, (B, T, width)
Reader = Callable[[Mapping[str, Tensor], Sequence[str], Seen], None]  # one pass over a batch, watching some modules


def _collected(
    model: nn.Module,
    rows: Sequence[Encoded],
    groups: Sequence[tuple[tuple[str, ...], int]],
    pad_id: int,
    thin: bool,
    reading: Callable[[], Reader],
    what: str,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Second moments by group of modules, each of a width, of what one of the group shows."""
    count = sum(len(row.input_ids) - 1 for row in rows)
    waiting = list(groups)
    while waiting:
        found: dict[str, tuple[tuple[str, ...], _Sum]] = {}
        size = 0
        while waiting and (not found or size + _bytes(waiting[0][1], count, thin) <= AT_ONCE):
            group, width = waiting.pop(0)
            size += _bytes(width, count, thin)
            device = model.get_submodule(group[0]).get_parameter("weight").device
            found[group[0]] = group, _Sum(width, thin and count < width, device)
        read = reading()
        for start in range(0, len(rows), _BATCH):
            batch = Pad(pad_id)(rows[start : start + _BATCH])
            kept = batch["attention_mask"].bool()
            kept[:, 0] = False
            with frozen(model):
                read(batch, list(found), partial(_add, found, kept))
        for first in list(found):
            group, total = found.pop(first)
            moment = total.mean(count)
            if not bool(torch.isfinite(moment).all()):
                raise VectorError(f"{what.format(first)} not finite: use dtype float32")
            yield group, moment


def _add(found: Mapping[str, tuple[tuple[str, ...], _Sum]], kept: Tensor, name: str, x: Tensor) -> None:
    found[name][1].add(x[kept.to(x.device)].float())


def _bytes(width: int, count: int, thin: bool) -> int:
    return 4 * width * (min(count, width) if thin else width)


class _Sum:
    """The sum of x x^T over vectors x, or the vectors themselves."""

    def __init__(self, width: int, thin: bool, device: torch.device) -> None:
        self.vectors: list[Tensor] | None = [] if thin else None
        self.total = torch.zeros(0 if thin else width, width, device=device)

    def add(self, x: Tensor) -> None:
        """Some more of them, (n, width)."""
        if self.vectors is None:
            self.total.addmm_(x.T, x)
        else:
            self.vectors.append(x)

    def mean(self, count: int) -> Tensor:
        """The second moments of all of them."""
        return self.total / count if self.vectors is None else torch.cat(self.vectors) / count**0.5


def _by_input(model: nn.Module, row: Encoded, names: Sequence[str], pad_id: int) -> list[tuple[str, ...]]:
    """The modules grouped by the very tensor they read."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        for other, group in seen:
            if other is x:
                group.append(name)
                return
        seen.append((x, [name]))

    with frozen(model), torch.no_grad(), _watched(model, names, note):
        _pass(model, Pad(pad_id)([row]))
    if unread := set(names) - {name for _, group in seen for name in group}:
        raise VectorError(
            f"{sorted(unread)[0]} reads nothing of a retain row, and so has no activations to shrink by: leave such "
            "modules out of vector.lora.targets"
        )
    return [tuple(group) for _, group in seen]


def _pass(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """One pass over a batch, without the head."""
    device = next(model.parameters()).device
    body = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    body(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], seen: Seen, gradients: bool = False) -> Iterator[None]:
    """Inside the ``with``, ``seen`` gets what the modules read, or, of a pass with a backward one, their gradients."""

    def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen(name, args[0])

    def answered(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(partial(seen, name))  # type: ignore[no-untyped-call]

    with ExitStack() as hooks:
        if gradients:
            embedded = model.get_input_embeddings()  # type: ignore[operator]
            # where the graph begins: nothing learns
            hooks.enter_context(embedded.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        for name in names:
            module = model.get_submodule(name)
            if gradients:
                hooks.enter_context(module.register_forward_hook(partial(answered, name)))
            else:
                hooks.enter_context(module.register_forward_pre_hook(partial(read, name)))
        yield
