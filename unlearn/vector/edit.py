"""Put a task vector on a model and take it off again, bit for bit.

theta - c * tau (Ilharco et al. 2212.04089, "negation"). Every coefficient starts from the pristine weights. In
float32 the difference goes into the weights; in any other format it would be rounded away where it is small, so there
the change acts beside the weight, in float32, and only its output is rounded.
"""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.errors import ModelError, VectorError
from unlearn.vector.change import Change, edited
from unlearn.vector.task_vector import TaskVector


class Edit:
    """A model less a vector: ``subtract(c)`` as often as you like, everything as before on leaving the ``with``.

    Args:
        model: A transformers model. Its weights are changed in place between enter and exit only.
        vector: The change. It is moved to each module's device once.
    """

    def __init__(self, model: nn.Module, vector: TaskVector) -> None:
        self._model = model
        self._vector = vector
        self._parts: list[_Merged | _Beside] = []

    def __enter__(self) -> Edit:
        for module, change in fit(self._model, self._vector).values():
            in_weights = type(module) in (nn.Linear, Conv1D) and module.weight.dtype == torch.float32
            self._parts.append(_Merged(module, change) if in_weights else _Beside(module, change))
        return self

    def subtract(self, coefficient: float) -> None:
        """Make the model theta - coefficient * tau, from the pristine theta."""
        if not math.isfinite(coefficient):
            raise VectorError(f"coefficient {coefficient}: give a finite number")
        with torch.no_grad():
            for part in self._parts:
                part.set(-coefficient)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with torch.no_grad():
            for part in self._parts:
                part.restore()
        self._parts = []


@contextmanager
def subtracted(model: nn.Module, vector: TaskVector, coefficient: float) -> Iterator[None]:
    """The model is theta - coefficient * tau inside the ``with``, and bit-identical to before outside it."""
    with Edit(model, vector) as edit:
        edit.subtract(coefficient)
        yield


class _Merged:
    """The change is added into a float32 weight; one pristine copy is kept."""

    def __init__(self, module: nn.Module, change: Change) -> None:
        self.weight: Tensor = module.get_parameter("weight").data
        self.pristine = self.weight.clone()
        self.change = change.to(self.weight.device)
        self.transposed = isinstance(module, Conv1D)

    def set(self, coefficient: float) -> None:
        if coefficient == 0.0:
            self.restore()  # not + 0 * delta: -0.0 must stay -0.0
        else:
            edited(self.pristine, self.change, coefficient, self.transposed, out=self.weight)

    def restore(self) -> None:
        self.weight.copy_(self.pristine)


class _Beside:
    """The change acts on the module's input beside it: y = W x + c * delta x, the second term in float32."""

    def __init__(self, module: nn.Module, change: Change) -> None:
        self.change = change.to(next(module.parameters()).device)
        self.set(0.0)
        self.restore = module.register_forward_hook(self._add).remove

    def set(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.coefficient == 0.0:
            return output
        change = self.change.act(args[0].float())  # (..., out)
        return (output.float() + self.coefficient * change).to(output.dtype)


def check_in_memory(model: Any) -> None:
    """Refuse a name or a path where a model is wanted."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{reprlib.repr(model)} is a {type(model).__name__}, and no model in memory: "
            "AutoModelForCausalLM.from_pretrained(...) of transformers gives one"
        )


def fit(model: nn.Module, vector: TaskVector) -> dict[str, tuple[nn.Module, Change]]:
    """Pair every module of the vector with the model's, or raise one error that names all misfits."""
    check_in_memory(model)
    found = dict(model.named_modules())
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in found.items():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    fit: dict[str, tuple[nn.Module, Change]] = {}
    wrong: list[str] = []
    for name, change in vector.modules.items():
        module = found.get(name)
        if module is None:
            wrong.append(f"{name}: the model has no such module")
        elif not isinstance(module, nn.Linear | Conv1D):
            wrong.append(f"{name}: {type(module).__name__} is not a linear layer")
        elif (shape := shape_of(module)) != change.shape:
            wrong.append(f"{name}: the vector changes {change.shape}, the model has {shape}")
        elif len(shared := owners[id(module.weight)]) > 1:
            wrong.append(f"{name}: its weight is shared by {', '.join(shared)} and would change twice")
        else:
            fit[name] = (module, change)
    if wrong:
        raise VectorError("the vector does not fit this model; was it made from another one?\n  " + "\n  ".join(wrong))
    return fit


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, also of one whose stored weight is transposed or packed (4 bits)."""
    if isinstance(module, Conv1D):
        return module.nf, module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of some linear modules as (out, in): views of what the model holds, in its number format."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    return {n: m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach() for n, m in modules.items()}
