"""Where a fitted vector forgets: parts of it alone, and what the layers still tell once it is subtracted.

    python tests/bench/methods_layers.py --work WORK [--pair capitals] [--seed 0]

Takes the vectors of ``ignorance+kfac`` and ``late+kfac`` (tests/bench/methods_tried.py), fitted if WORK has none. First
table: parts of the former, each at one coefficient. Second: pointwise information (pmi) read off every second layer
from the 20th by the logit lens (final norm and head). Validation items in one wording, two counterparts each; pmi as
the share that is left, of the forget set and the neighbours; general in nats of log-probability lost.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measure import command_line, console
from methods_cell import Cell, make_cell
from methods_tried import METHODS
from rich.table import Table

from unlearn.data.encoding import Encoded, encode
from unlearn.data.items import normalise
from unlearn.train.batches import Pad
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector

MOST, OTHERS, ROWS = 36, 2, 32  # items of a set, counterparts of an item, rows of a batch
PARTS: dict[str, tuple[float, Callable[[int, str], bool]]] = {
    "all": (4, lambda layer, name: True),
    "the MLPs": (4, lambda layer, name: "mlp" in name),
    "layers 0-2": (8, lambda layer, name: layer < 3),
    "layers 3-5": (8, lambda layer, name: 3 <= layer < 6),
    "layers 6-9": (8, lambda layer, name: 6 <= layer < 10),
    "layers 10-14": (8, lambda layer, name: 10 <= layer < 15),
    "layers 15-19": (8, lambda layer, name: 15 <= layer < 20),
    "layers 20-29": (8, lambda layer, name: layer >= 20),
    "attention of 0-5": (8, lambda layer, name: layer < 6 and "attn" in name),
}
DEPLOYED = {"ignorance+kfac": 4.0, "late+kfac": 10.0}
Answer = tuple[float, float]  # log-probability and pmi, in nats


@dataclass
class Questions:
    """Every item under its own prompt and under those of others: (set, item, 0 or counterpart) -> row."""

    cell: Cell
    rows: dict[tuple[str, int, int], Encoded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = self.cell.target.tokenizer
        for one in self.cell.sets:
            items = one.validation[:: len(one.spec.prompts("validation"))]
            items = items[:: max(1, len(items) // MOST)][:MOST]
            for number, item in enumerate(items):
                rest = (*items[number + 1 :], *items[:number])
                others = [o.prompt for o in rest if normalise(o.target) != normalise(item.target)]
                asked = (item.prompt, *others[:: max(1, len(others) // OTHERS)][:OTHERS])
                for k, row in enumerate(encode([replace(item, prompt=p) for p in asked], one.spec.kind, tokenizer, 96)):
                    self.rows[f"{one.role} {one.name}", number, k] = row

    @torch.no_grad()
    def ask(self, layers: tuple[int, ...] = (-1,)) -> list[dict[str, Answer]]:
        """By set the mean log-probability and pmi, as the state after each of some layers has them."""
        model: Any = self.cell.target.model
        found: list[dict[tuple[str, int, int], float]] = [{} for _ in layers]
        keys = sorted(self.rows, key=lambda key: len(self.rows[key].input_ids))
        for keys_here in (keys[i : i + ROWS] for i in range(0, len(keys), ROWS)):
            batch = Pad(self.cell.target.tokenizer.pad_token_id)([self.rows[key] for key in keys_here])
            wanted = batch["labels"][:, 1:]
            row, place = (wanted != -100).nonzero(as_tuple=True)
            known = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            states = model.get_decoder()(**known, output_hidden_states=True).hidden_states
            for into, layer in zip(found, layers, strict=True):
                state = states[layer][row, place]  # the last one is behind the norm
                state = state if layer in (-1, len(states) - 1) else model.get_decoder().norm(state)
                said = model.get_output_embeddings()(state).float().log_softmax(-1)
                said = said.gather(1, wanted[row, place][:, None])[:, 0]
                sums = torch.zeros(len(keys_here)).index_add(0, row, said)
                into.update(zip(keys_here, sums.tolist(), strict=True))
        return [self._means(one) for one in found]

    def _means(self, found: Mapping[tuple[str, int, int], float]) -> dict[str, Answer]:
        by_set: dict[str, list[Answer]] = {}
        for (name, number, k), own in found.items():
            if not k:
                others = [found[name, number, o] for o in range(1, OTHERS + 1) if (name, number, o) in found]
                by_set.setdefault(name, []).append((own, own - statistics.mean(others)))
        return {n: (statistics.mean(a for a, _ in v), statistics.mean(b for _, b in v)) for n, v in by_set.items()}


def part(vector: TaskVector, taken: Callable[[int, str], bool]) -> TaskVector:
    """Some modules of a vector."""
    layer = {name: int(found[1]) for name in vector.modules if (found := re.search(r"\.(\d+)\.", name))}
    return TaskVector({n: c for n, c in vector.modules.items() if taken(layer[n], n)}, vector.meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where methods.py keeps its vectors")
    parser.add_argument("--pair", default="capitals")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cell = make_cell(options.pair, options.seed, options.work)
    vectors = {name: METHODS[name](cell) for name in DEPLOYED}
    questions = Questions(cell)
    (before,) = questions.ask()
    parts = Table(
        "part of ignorance+kfac", "λ", *(f"{n}, nats" if "utility" in n else f"{n}, pmi left" for n in before)
    )
    for name, (coefficient, taken) in PARTS.items():
        with Edit(cell.target.model, part(vectors["ignorance+kfac"], taken)) as edit:
            edit.subtract(coefficient)
            (after,) = questions.ask()
        told = (
            f"{before[n][0] - a:+.2f}" if "utility" in n else f"{b / before[n][1]:.2f}" for n, (a, b) in after.items()
        )
        parts.add_row(name, f"{coefficient:g}", *told)
    console.print(parts)
    layers = (20, 22, 24, 26, 28, 30)
    lens = Table("forget pmi, nats", *(f"layer {layer}" for layer in layers))
    lens.add_row("before", *_forget(questions.ask(layers)))
    for name, coefficient in DEPLOYED.items():
        with Edit(cell.target.model, vectors[name]) as edit:
            edit.subtract(coefficient)
            lens.add_row(f"{name}, λ = {coefficient:g}", *_forget(questions.ask(layers)))
    console.print(lens)


def _forget(found: list[dict[str, Answer]]) -> list[str]:
    return [f"{next(pmi for name, (_, pmi) in one.items() if name.startswith('forget')):.1f}" for one in found]


if __name__ == "__main__":
    command_line(main)
