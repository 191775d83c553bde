"""Weights spread over several processes while a LoRA is trained on them: torch's FSDP2, layer by layer.

Of a LoRA's training the frozen weights are by far the largest part, so they are what is sharded: each process keeps
1/P of every layer and gathers the rest when its turn comes. The adapter, its gradients and the optimiser's state stay
whole in every process, and with them checkpoints and the vector are those of an ordinary training. Embeddings, head and
final norm stay whole too. After training the weights are put back, the same bits: scoring needs all of them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unlearn import collective
from unlearn.distributed import sharded
from unlearn.errors import TrainingError


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` has been applied to a model."""
    if not sharded():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def trainee(model: Any) -> Iterator[Any]:
    """The model to put an adapter on: the given one, or where weights are sharded a twin of it over the same weights.

    The twin takes the weights with it: inside the ``with`` the model is empty wherever :func:`shard` took a weight.
    They are put back at the end, but not after an exception, which a process may have met alone: the model is then
    not to be used again.

    Raises:
        TrainingError: quantised weights, which cannot be sharded.
    """
    if not sharded():
        yield model
        return
    if getattr(model, "is_quantized", False):
        raise TrainingError(
            "quantised weights cannot be sharded: set model.quantize to none, or start without --use_fsdp"
        )
    weights = dict(model.named_parameters(remove_duplicate=False))
    # FSDP leaves its marks on the modules it is applied to, and nothing takes them off: they are the twin's
    twin = copy.deepcopy(model, {id(t): t for t in (*weights.values(), *model.buffers())})
    with warnings.catch_warnings():
        # it warns of logits that are a view, in case somebody writes into them; nobody does
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield twin
    _give_back(model, twin)


def shard(model: Any) -> None:
    """Spread the frozen weights of a twin's layers, under its adapter, over the processes; nothing for other models.

    Raises:
        TrainingError: no layers are found, or this torch is too old.
    """
    if not sharded():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = _layers(model)
    if not layers:
        raise TrainingError("the weights cannot be sharded: this model has no list of layers. Start without --use_fsdp")
    first = next(model.parameters())
    mesh = init_device_mesh(first.device.type, (collective.count(),))
    learned = {p for p in model.parameters() if p.requires_grad}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = {p for p in model.parameters() if id(p) not in inside}
    try:
        for layer in layers:
            before = [p for p in layer.parameters() if not p.requires_grad]
            fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
            for parameter in before:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        fully_shard(model, mesh=mesh, ignored_params=learned | rest)
    except TypeError as e:
        raise TrainingError("sharding weights under a LoRA needs torch 2.7 or newer: start without --use_fsdp") from e


def _layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules that is not itself inside a list, as a layer's experts are."""
    lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return max(outer, key=len, default=[])


def _give_back(model: nn.Module, twin: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    held = {name.replace(".base_layer.", "."): p for name, p in twin.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shards = held[name]
        if isinstance(shards.data, DTensor):
            with collective.all_there():
                parameter.data = shards.data.full_tensor()
