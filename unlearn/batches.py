"""The order in which rows are trained on, and how some of them become one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.trainer_pt_utils import LengthGroupedSampler

IGNORE = -100  # label of tokens without loss


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids and, per token, the label or :data:`IGNORE`.

    ``cut`` counts the tokens at the beginning of the prompt that there was no room for; ``piece`` is the row's number,
    from 0, among those of a passage that has several.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int = 0
    piece: int = 0


class ByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that ``seed`` and ``epoch`` alone decide.

    transformers' own draws from the global random state, which a resumed training cannot wind back to the start of
    its epoch: from the second epoch on it would go on with other batches than the training that was interrupted.

    Args:
        rows: What is trained on.
        size: Rows that should be of like length: batch size times accumulation.
        seed: The recipe's.
    """

    def __init__(self, rows: Sequence[Encoded], size: int, seed: int) -> None:
        super().__init__(size, lengths=[len(row.input_ids) for row in rows])
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: Iterator[int] = super().__iter__()
        return order


@dataclass(frozen=True)
class Pad:
    """Right-pad a batch; returns input_ids, attention_mask, labels, each (B, T)."""

    pad_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        width = max(len(row.input_ids) for row in rows)

        def fill(values: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*v, *[value] * (width - len(v))] for v in values])

        return {
            "input_ids": fill([row.input_ids for row in rows], self.pad_id),
            "attention_mask": fill([[1] * len(row.input_ids) for row in rows], 0),
            "labels": fill([row.labels for row in rows], IGNORE),
        }


def answers(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the labelled tokens of a batch are predicted, and what they are.

    Args:
        labels: (B, T), :data:`IGNORE` where a token carries no loss. The first token has nothing before it.

    Returns:
        Booleans (B, T), true where the next token has a label; those labels (N,); the row each of them is in (N,).
    """
    predicts = functional.pad(labels[:, 1:] != IGNORE, (0, 1))
    return predicts, labels[:, 1:][predicts[:, :-1]], predicts.nonzero()[:, 0]


def beside(forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], copies: int, pad_id: int) -> dict[str, Tensor]:
    """One batch of the forget rows and ``copies`` times the retain rows, whose labels stay apart.

    Args:
        forget: input_ids, attention_mask, labels, each (F, T).
        retain: The same, each (K, T').

    Returns:
        ``input_ids``, ``attention_mask`` (F + copies * K, W), ``labels`` (F, W), ``retain_labels`` (K, W); W is
        the larger width.
    """
    width = max(forget["input_ids"].shape[1], retain["input_ids"].shape[1])
    device = forget["input_ids"].device

    def wide(rows: Tensor, value: int) -> Tensor:
        return functional.pad(rows.to(device), (0, width - rows.shape[1]), value=value)

    fills = {"input_ids": pad_id, "attention_mask": 0}
    both = {k: torch.cat([wide(forget[k], v), *[wide(retain[k], v)] * copies]) for k, v in fills.items()}
    return {**both, "labels": wide(forget["labels"], IGNORE), "retain_labels": wide(retain["labels"], IGNORE)}
