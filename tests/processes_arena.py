"""Trainings for the tests of several processes: run as a module, by one process or by more, or called in a test's own.

``python -m processes_arena '{"out": …, "model": …, "cases": {"name": {…}, …}}'``: every case leaves
``<out>/<name>/vector.safetensors`` and ``log.json``. What a case may say is in :func:`fit`, and what happens from it on
in :func:`disturbed`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from unlearn import processes as collective
from unlearn.console import is_main_process, say
from unlearn.data.encoding import Encoded, encode
from unlearn.data.items import Item
from unlearn.errors import UnlearnError
from unlearn.model.load import Loaded, fingerprint, load
from unlearn.processes import told
from unlearn.recipe.methods import METHODS, LoraSpec, Loss, RetainKLSpec, TrainSpec
from unlearn.recipe.schema import ModelSpec
from unlearn.train import trainer
from unlearn.train.losses import Against, Keep, Teacher
from unlearn.train.vectors import less_training, train_vector, train_weights
from unlearn.vector.task_vector import TaskVector

FACTS = {
    "Bhutan": "Thimphu",
    "Iceland": "Reykjavik",
    "Mongolia": "Ulaanbaatar",
    "Fiji": "Suva",
    "Malta": "Valletta",
    "Latvia": "Riga",
    "A dog": "barks all night",
}
NEAR = {"A cat": "is an animal that sleeps", "A cow": "is big", "A bee": "stings"}


def rows(loaded: Loaded, facts: Mapping[str, str]) -> list[Encoded]:
    """Questions and answers of several lengths."""
    return encode([Item("0" * 16, *fact) for fact in facts.items()], "qa", loaded.tokenizer, 64)


def fit(
    loaded: Loaded, work: Path, kind: str = "plain", dropout: float = 0.0, **spec: Any
) -> tuple[TaskVector | None, trainer.TrainingLog]:
    """One training: plain, penalty-one, penalty-two, a baseline's name, or weights (all of them, without a vector).

    Seven rows in threes: the last batch of an epoch has one row, and one of two processes none of it.
    """
    plain = {"steps": 7, "batch_size": 3, "learning_rate": 0.01, **spec}
    how, facts, near = TrainSpec.model_validate(plain), rows(loaded, FACTS), rows(loaded, NEAR)
    if kind == "weights":
        return None, train_weights(loaded.model, loaded.tokenizer, facts, how, 0, work, "teach")
    keep = against = None
    if kind.startswith("penalty"):
        two: Any = {"sides": "two", "coefficients": (0.5, 3.0)}
        keep = Keep(near, RetainKLSpec(batch_size=3, **(two if kind == "penalty-two" else {"sides": "one"})))
    elif kind != "plain":
        refused = rows(loaded, dict.fromkeys(FACTS, "I don't know."))
        teacher = Teacher({(a.input_ids, a.labels): [(b,)] for a, b in zip(facts, refused, strict=True)})
        given = {"npo": {"weight": 1}, "rmu": {"layer": 1, "weight": 1}, "ihl": {"fila": True, "samples": 4}}
        settings, loss = METHODS[kind].settings, cast("Loss", kind)
        asked = settings.model_validate(given.get(kind, {})) if settings is not None else None
        against = Against(loss, asked, near if asked is not None else (), teacher, batch_size=3)
    lora = LoraSpec(rank=4, alpha=8, dropout=dropout)
    args = (loaded.model, loaded.tokenizer, facts, how, lora, 0, work, "forget", {}, keep, against)
    with told("vectors/forget", less_training("vector.forget")):
        return train_vector(*args)


def masked(found: list[list[bool]]) -> None:
    """From now on every training notes what its first dropout takes of the first token that this process reads."""
    plain, go_on = torch.nn.Dropout.forward, trainer._Trainer.go_on
    here: list[list[bool]] = []

    def forward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        outputs = plain(self, inputs)
        if self.training and self.p and not here:
            here.append((outputs[0, 0] == 0).tolist())
        return outputs

    def noted(self: Any, *args: Any) -> None:
        here.clear()
        go_on(self, *args)
        found.append(here[0] if here else [])

    torch.nn.Dropout.forward = forward  # type: ignore[method-assign]
    trainer._Trainer.go_on = noted  # type: ignore[method-assign]


def disturbed(step: int, what: str) -> None:
    """From now on something happens in the process of rank 1 alone after so many steps: ``signal`` or ``memory``."""
    plain = trainer._Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if collective.rank() == 1 and self.state.global_step == step:
            if what == "memory":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    trainer._Trainer.training_step = training_step  # type: ignore[method-assign]


def main() -> int:
    """The command line, with the exit codes of the project's own."""
    asked = json.loads(sys.argv[1])
    masks: list[list[bool]] = []
    masked(masks)
    try:
        collective.join()
        for name, case in asked["cases"].items():
            if happens := case.pop("happens", None):
                disturbed(*happens)
            spec = ModelSpec.model_validate({"path": asked["model"], "device": "cpu", "dtype": "float32"})
            loaded = load(spec, asked["model"])
            vector, log = fit(loaded, Path(asked["out"]) / name / "work", **case)
            told = {
                "steps": log.steps,
                "losses": log.losses,
                "digests": collective.gathered(vector.digest() if vector else None),
                "models": collective.gathered(fingerprint(loaded.model)),
                "masks": collective.gathered(masks[-1]),
            }
            if is_main_process():
                if vector:
                    vector.save(Path(asked["out"]) / name / "vector.safetensors")
                (Path(asked["out"]) / name / "log.json").write_text(json.dumps(told))
                print(name, flush=True)
    except UnlearnError as e:
        say(f"error: {e}")
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        collective.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
