"""What is minimised where it is more than cross-entropy: a retain penalty on top of it, or a baseline's loss.

Each is computed from one pass over one batch, in which every row has its own multiple of the adapter: 1 for the model
that is trained, 0 for the model as it was. So a reference needs neither a second model nor a second pass.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import TrainingError
from unlearn.model.load import layer_at
from unlearn.recipe.methods import METHODS, Loss, RetainKLSpec
from unlearn.train.batches import Pad, Part, answers, labelled, together

# -- the formulas: logits (N, V) at the positions that predict a label, and these labels (N,)


def retain_only(logits: Tensor, targets: Tensor, tokens: float | None = None) -> Tensor:
    """Mean negative log-likelihood of a labelled token, in nats; the mean is over ``tokens``, N when not given."""
    return _nll(logits, targets).sum() / (len(targets) if tokens is None else tokens)


def gradient_ascent(logits: Tensor, targets: Tensor, tokens: float | None = None) -> Tensor:
    """Minus that of the forget set's tokens (2210.01504). It has no lower bound: stop early."""
    return -retain_only(logits, targets, tokens)


def npo(
    logits: Tensor, reference: Tensor, targets: Tensor, rows: Tensor, beta: float, count: float | None = None
) -> Tensor:
    """Negative preference optimisation (2404.05868, eq. 3): ascent that slows where an answer is already unlikely.

    2/beta * mean log(1 + (p_theta / p_ref)^beta), bounded below by 0.

    Args:
        reference: What the model as it was says, (N, V). No gradient flows into it.
        rows: The answer each target belongs to, (N,).
        count: Answers that the mean is over; as many as there are rows when not given.
    """
    with torch.no_grad():
        before = answer_log_probability(reference, targets, rows)  # (B,)
    ratio = answer_log_probability(logits, targets, rows) - before  # (B,), log of p_theta / p_ref
    return 2 / beta * functional.softplus(beta * ratio).sum() / (len(ratio) if count is None else count)


def simnpo(
    logits: Tensor, targets: Tensor, rows: Tensor, beta: float, margin: float = 0.0, count: float | None = None
) -> Tensor:
    """SimNPO (2410.07163): ascent that slows where an answer's mean token is already unlikely, whatever it was before.

    -2/beta * mean log sigma(-beta/|y| log p(y|x) - margin), bounded below by 0; ``rows``, ``count`` as :func:`npo`'s.
    """
    sums, lengths = _by_row(_nll(logits, targets), rows)
    each = functional.softplus(margin - beta * sums / lengths)
    return 2 / beta * each.sum() / (len(each) if count is None else count)


def dpo(preferred: Tensor, rejected: Tensor, beta: float, count: float | None = None) -> Tensor:
    """Direct preference optimisation (2305.18290, eq. 7) times 2/beta, as the tables of unlearning have it.

    Args:
        preferred, rejected: log p_theta(y|x) - log p_ref(y|x) of a question's two answers, (B,).
    """
    each = functional.softplus(-beta * (preferred - rejected))
    return 2 / beta * each.sum() / (len(each) if count is None else count)


def ihl(logits: Tensor, targets: Tensor, tokens: float | None = None) -> Tensor:
    """The inverted hinge loss (2408.06621), 1 + p(x_t) - max over v != x_t of p(v), from 0 to 2; its mean."""
    p = logits.float().softmax(-1)  # (N, V)
    at = targets[:, None]
    each = 1 + p.gather(-1, at)[:, 0] - p.scatter(-1, at, -1.0).amax(-1)
    return each.sum() / (len(each) if tokens is None else tokens)


def distance(read: Tensor, wanted: Tensor, rows: Tensor, count: float | None = None) -> Tensor:
    """RMU's two terms (2403.03218): mean over rows of the mean over a row's tokens of |h - wanted|^2 / d.

    Args:
        read: What a layer puts out, h, (N, d).
        wanted: (d,) or (N, d). No gradient flows into it.
    """
    sums, lengths = _by_row((read.float() - wanted.detach().float()).square().mean(-1), rows)
    return (sums / lengths).sum() / (len(sums) if count is None else count)


def direction(width: int, seed: int) -> Tensor:
    """RMU's u: entries even in [0, 1), then of length 1, (d,)."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def answer_log_probability(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """log p(y|x) of every answer: the sum over its tokens, (B,), float32; B is one more than the highest row number."""
    return -_by_row(_nll(logits, targets), rows)[0]


def _by_row(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of values (N,) by the row (N,) they belong to, (B,), and how many each is of."""
    # not index_add, whose order of summation a GPU does not fix: a resumed training must equal an uninterrupted one
    belongs = rows == torch.arange(int(rows.max()) + 1, device=rows.device)[:, None]  # (B, N)
    if not bool(belongs.any(dim=1).all()):
        raise TrainingError("a row has no token with a label: there is nothing to forget or to keep in it")
    return torch.where(belongs, values, 0.0).sum(dim=1), belongs.sum(dim=1)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Every target's negative log-likelihood, (N,), float32."""
    if not len(targets):
        raise TrainingError("no token has a label: there is nothing to forget or to keep")
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def kl(reference: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(p || q) in nats over positions; p is the untouched model, q the one under the vector.

    At a temperature T it is T^2 KL of both at logits / T (Hinton et al. 1503.02531, 2.1), which for a large T is half
    the variance over the vocabulary of what the logits changed by.
    """
    p, q = (functional.log_softmax(x.float() / temperature, dim=-1) for x in (reference, logits))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def ignorance(logits: Tensor, ignorant: Tensor, tokens: float | None = None) -> Tensor:
    """KL(q || p) in nats, its mean over ``tokens``, N when not given; q are the ignorant's probabilities, (N, V)."""
    each = functional.kl_div(functional.log_softmax(logits.float(), dim=-1), ignorant, reduction="none").sum(-1)
    return each.sum() / (len(each) if tokens is None else tokens)


def penalty(untouched: Tensor, sides: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """The divergences of every side from the untouched model, each (N, V), added up. No gradient flows into it."""
    return torch.stack([kl(untouched.detach(), side, temperature) for side in sides]).sum()


# -- a model at some positions, under multiples of its adapter, or frozen


@contextmanager
def only_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the ``with``, the model's head runs at some positions (B, T) only, and its logits are (N, V)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_pre_hook(lambda module, args: (args[0][positions.to(args[0].device)],)):
        yield


@contextmanager
def reading(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """Inside the ``with``, what a layer puts out, (B, T, d), goes into the list; the head runs nowhere.

    Nothing is computed in the layer's hook, which gradient checkpointing does not run again. Nor is the rest of the
    model cut off: several processes take a parameter that the model's own output does not depend on for unused.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    head = model.get_output_embeddings()  # type: ignore[operator]
    nowhere = head.register_forward_pre_hook(lambda module, args: (args[0][:, :0],))
    with nowhere, layer_at(model, layer).register_forward_hook(keep):
        yield found


def adapters(model: nn.Module) -> list[tuple[str, Any]]:
    """The LoRA layers of a PEFT model, by the paths that their modules have without it."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.lora_A]
    return [(name.removeprefix("base_model.model."), layer) for name, layer in layers]


@contextmanager
def scaled_rows(model: nn.Module, factors: Sequence[float]) -> Iterator[None]:
    """Inside the ``with``, row b of a batch sees ``factors[b]`` times the adapter's change.

    The backward pass belongs inside too: with gradient checkpointing it runs the model again.
    """
    layers = [layer for _, layer in adapters(model)]
    before = [layer.scaling["default"] for layer in layers]
    rows = torch.tensor(factors)[:, None, None]  # (B, 1, 1), against outputs (B, T, out)
    for layer, scale in zip(layers, before, strict=True):
        layer.scaling["default"] = scale * rows.to(layer.lora_A["default"].weight.device)
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling["default"] = scale


@contextmanager
def frozen(model: nn.Module, but: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Inside the ``with``, nothing is dropped out and gradients reach only ``but``; afterwards all is as found."""
    learns = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for parameter, _ in learns:
            parameter.requires_grad_(False)
        for parameter in but:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in learns:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


def with_answers(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows that have a token to be predicted; the first one has nothing before it."""
    return [row for row in rows if any(label != IGNORE for label in row.labels[1:])]


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the model says of the labelled tokens of a batch (B, T): logits (N, V), the tokens and their rows (N,)."""
    device = next(model.parameters()).device
    ids, mask, labels = (batch[k].to(device) for k in ("input_ids", "attention_mask", "labels"))
    positions, targets, rows = answers(labels)
    with only_at(model, positions):
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits.float(), targets, rows


# -- what the trainer minimises


@dataclass(frozen=True)
class Keep:
    """Retain rows, and the penalty that holds the model's predictions on them.

    With ``curvature``, twice the divergence's second order (:class:`unlearn.train.moments.SecondOrder`), no row is put
    beside a batch.
    """

    rows: Sequence[Encoded]
    spec: RetainKLSpec
    curvature: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.spec.sides == "two" and self.spec.coefficients is None:
            raise ValueError("the two-sided penalty needs a range of coefficients: fill in the sweep's")

    def estimated(self) -> Tensor:
        """The mean over the range of c of the divergences' second order, from the curvature."""
        assert self.curvature is not None
        low, high = self.spec.coefficients or (0.0, 0.0)
        square = (low**2 + low * high + high**2) / 3 if self.spec.sides == "two" else 0.0  # E c^2, c uniform
        return (1 + square) / 2 * self.curvature()


@dataclass(frozen=True)
class Against:
    """Another loss in place of the forget set's cross-entropy, a baseline's or that of a fit toward ignorance.

    ``how`` are its settings in a recipe, if it has any. Of ``retain`` rows ``batch_size`` stand beside each batch, for
    a term with their weight. ignorance has a ``teacher``, and idk_dpo one that is asked for refusals; by ``seed`` the
    direction of rmu is drawn.
    """

    loss: Loss | Literal["ignorance"]
    how: Any
    retain: Sequence[Encoded] = ()
    teacher: Teacher | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if "retain" in METHODS[self.loss].needs and not with_answers(self.retain):
            raise TrainingError(
                f"{self.loss} needs retain rows with an answer to learn, and there is none: "
                "give it a retain set with items to train on"
            )

    @property
    def advice(self) -> str:
        """What to do about a loss that is no number."""
        if self.loss in ("gradient_ascent", "gradient_difference"):
            return f"lower learning_rate or steps, since {self.loss} has no lower bound"
        return ADVICE


ADVICE = "lower learning_rate, or use dtype: float32"
BESIDE = "beside"  # where a batch has its Share.beside
TEACHER = "teacher"  # where it has the rows that the ignorant are asked
SIZES = "sizes"  # how many rows of it belong together, one after another
Row = tuple[tuple[int, ...], tuple[int, ...]]  # its tokens and its labels


@dataclass(frozen=True)
class Teacher:
    """Who does not know the forget rows' answers.

    Attributes:
        rows: By the tokens and labels of a forget row what can be asked instead: rows which, one after another, have
            that row's labels after something else than its prompt.
        each: How many of these are drawn for a row, of whose answers the mean is taken.
        model: Who is asked; None: the model that is trained, as it was.
    """

    rows: Mapping[Row, Sequence[tuple[Encoded, ...]]]
    each: int = 1
    model: nn.Module | None = None

    def draw(self, forget: Mapping[str, Tensor], seed: int) -> list[Encoded]:
        """What is asked beside a batch: each time for all its rows, in their order. A row's own share of the draw
        depends on nothing but the seed and the row, so that several processes ask what one would.
        """
        chosen = []
        for ids, mask, labels in zip(*(forget[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
            if bool((labels[1:] != IGNORE).any()):
                row = tuple(ids[mask.bool()].tolist()), tuple(labels[mask.bool()].tolist())
                known, draw = self.rows[row], random.Random(f"{seed} {row}")
                enough = len(known) >= self.each
                chosen.append(draw.sample(known, self.each) if enough else draw.choices(known, k=self.each))
        return [row for time in range(self.each) for pick in chosen for row in pick[time]]


@dataclass(frozen=True)
class Share:
    """What the means of a batch are over, where the batch is one of several of an optimiser step.

    Args:
        tokens: Labelled forget tokens of the step; None: those of the batch.
        answers: Forget rows of the step; None: those of the batch.
        batches: Batches of the step, by which terms that are drawn for each batch are divided.
        beside: By what a mean over the rows drawn beside a batch is multiplied, where several processes share them:
            this one's share of their labelled tokens, times the number of processes, over which gradients are averaged.
    """

    tokens: float | None = None
    answers: float | None = None
    batches: int = 1
    beside: float = 1.0


class Objective:
    """The loss of ``keep`` or ``against``, of which one is given; both only where that is ignorance.

    A batch is made of blocks: the forget rows, then these or others under further multiples of the adapter, the retain
    rows last. What is drawn for it is drawn alike by all processes, and ``part`` is this one's.
    """

    def __init__(self, keep: Keep | None, against: Against | None, part: Part) -> None:
        self._teacher = against.teacher if against is not None and against.loss == "ignorance" else None
        if (keep is None) == (against is None) and self._teacher is None:
            raise ValueError("keep adds to the cross-entropy that a baseline replaces: give one of them")
        self._keep, self._against, self._part = keep, against, part
        self._retain: Sequence[Encoded] = ()
        self._range: tuple[float, float] | None = None  # of c, whose side is one block more
        compared = True
        if keep is not None and keep.curvature is None:
            self._retain, self._size = keep.rows, keep.spec.batch_size
            self._range = keep.spec.coefficients if keep.spec.sides == "two" else None
        elif against is not None and self._teacher is None:
            self._retain, self._size = with_answers(against.retain), against.batch_size
            compared = against.loss == "rmu" or (against.how is not None and against.how.retain_loss == "kl")
        # blocks of retain rows, the last one of the untouched model where they are compared with it
        self._compared, self._copies = compared, 1 + compared + (self._range is not None)

    def batch(self, forget: Mapping[str, Tensor], pad: Pad, draw: random.Random) -> tuple[dict[str, Any], list[float]]:
        """One batch, the forget rows first in it, and the adapter's multiple in every row.

        Args:
            forget: input_ids, attention_mask, labels, each (F, T).
            draw: Of this batch of this step alone; nothing else may decide what is drawn.
        """
        against, weight, more = self._against, 1.0, dict[str, Any]()
        blocks: list[tuple[float, Mapping[str, Tensor]]] = [(1.0, forget)]
        if against is not None and against.loss == "npo":
            blocks.append((0.0, forget))
        if against is not None and against.loss == "idk_dpo":
            assert against.teacher is not None
            refused = against.teacher.draw(forget, draw.getrandbits(63))
            refusals = pad(refused) if refused else forget
            blocks += [(1.0, refusals), (0.0, forget), (0.0, refusals)]
        if against is not None and self._teacher is not None:
            if against.how.grow:  # the forget rows once more under the adapter's negation, where they shall grow
                blocks.append((-1.0, forget))
            if asked := self._teacher.draw(forget, draw.getrandbits(63)):
                more[TEACHER] = pad(asked)
        if self._retain:
            by_rows = against is not None and against.loss == "rmu"
            retain, weight = _drawn(self._retain, self._size, pad, draw, self._part, by_rows=by_rows)
            other = [-draw.uniform(*self._range)] if self._range is not None else []
            blocks += [(side, retain) for side in (1.0, *other, *[0.0] * self._compared)]
        factors = [side for side, block in blocks for _ in block["input_ids"]]
        batch = together([block for _, block in blocks], pad.pad_id)
        return {**batch, **more, BESIDE: weight, SIZES: [len(block["input_ids"]) for _, block in blocks]}, factors

    @torch.no_grad()
    def reference(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
        """What the ignorant say of the labelled forget tokens of a batch: probabilities (N, V), or None."""
        if self._teacher is None or TEACHER not in batch:
            return None
        asked = batch[TEACHER]
        if self._teacher.model is not None:
            logits, *_ = answer_logits(self._teacher.model, asked)
        else:
            with frozen(model), model.disable_adapter():  # type: ignore[operator]
                logits, *_ = answer_logits(model, asked)
        return logits.float().softmax(-1).reshape(self._teacher.each, -1, logits.shape[-1]).mean(0)

    @property
    def layer(self) -> int | None:
        """The layer whose output :meth:`loss` takes in place of logits."""
        return self._against.how.layer if self._against is not None and self._against.loss == "rmu" else None

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor,
        sizes: Sequence[int],
        share: Share,
        reference: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (N, V) at the labelled tokens (N,), which are in rows (N,) of the batch.
            sizes: Rows of every block, those of the forget set first.
            reference: Of :meth:`reference`.
        """
        blocks, keep, against = _blocks(logits, targets, rows, sizes), self._keep, self._against
        ours = blocks[0][0]
        # 0, of the same graph, for a process that has none of the rows
        loss = self._forgotten(blocks, share, reference) if len(ours) else ours.sum()
        if keep is not None and keep.curvature is not None:
            return loss + keep.spec.weight / share.batches * keep.estimated()
        if not self._retain:
            return loss
        *sides, last = blocks[-self._copies :]
        if keep is not None:
            spec = keep.spec
            extra = spec.weight * share.beside * penalty(last[0], [side for side, *_ in sides], spec.temperature)
            return loss + extra / share.batches
        assert against is not None
        weight = against.how.weight * share.beside / share.batches
        if not self._compared:
            return loss + weight * retain_only(last[0], last[1])
        kept, _, kept_rows = sides[0]
        if against.loss == "rmu":
            return loss + weight * distance(kept, last[0], kept_rows)
        return loss + weight * kl(last[0].detach(), kept)

    def _forgotten(self, blocks: Sequence[_Block], share: Share, reference: Tensor | None) -> Tensor:
        """The term on the forget rows."""
        (ours, targets, rows), against = blocks[0], self._against
        if against is None:
            return retain_only(ours, targets, share.tokens)
        loss, how = against.loss, against.how
        if loss == "ignorance":
            assert reference is not None
            learned = ignorance(ours, reference.to(ours.device), share.tokens)
            grown = how.grow * retain_only(*blocks[1][:2], share.tokens) if how.grow else 0.0
            return learned + grown
        if loss == "npo":
            return npo(ours, blocks[1][0], targets, rows, how.beta, share.answers)
        if loss == "simnpo":
            return simnpo(ours, targets, rows, how.beta, how.margin, share.answers)
        if loss == "idk_dpo":
            rejected, preferred, *before = (answer_log_probability(*block) for block in blocks[:4])
            return dpo(preferred - before[1].detach(), rejected - before[0].detach(), how.beta, share.answers)
        if loss == "rmu":
            wanted = how.scale * direction(ours.shape[-1], against.seed)
            return distance(ours, wanted.to(ours.device), rows, share.answers)
        if loss == "ihl":
            return ihl(ours, targets, share.tokens)
        return gradient_ascent(ours, targets, share.tokens)


_Block = tuple[Tensor, Tensor, Tensor]  # logits, tokens and rows, counted from 0, of rows that belong together


def _blocks(logits: Tensor, targets: Tensor, rows: Tensor, sizes: Sequence[int]) -> list[_Block]:
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    at = [0, *(int((rows < end).sum()) for end in ends)]
    pairs = zip(itertools.pairwise(at), (0, *ends), strict=False)
    return [(logits[a:b], targets[a:b], rows[a:b] - first) for (a, b), first in pairs]


def _drawn(
    rows: Sequence[Encoded], count: int, pad: Pad, draw: random.Random, part: Part, by_rows: bool = False
) -> tuple[dict[str, Tensor], float]:
    """Rows that are drawn beside a batch, this process's part of them, and :attr:`Share.beside`, of tokens or rows."""
    drawn = draw.sample(rows, min(count, len(rows)))
    ours = part.of(drawn)
    if part.count == 1 or not ours:
        return pad(drawn[:1] if not ours else drawn), float(bool(ours))
    size = len if by_rows else labelled
    return pad(ours), part.count * size(ours) / max(1, size(drawn))
