"""What the tests of vectors share: random vectors, weights and logits to compare, tensors of a folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.model.load import Loaded, linear_modules
from unlearn.vector.change import Change, Dense, LowRank
from unlearn.vector.edit import shape_of
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
LAMBDA = 0.75
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def factors(out: int, width: int, rank: int, generator: torch.Generator, scale: float = 1.0) -> LowRank:
    return LowRank(torch.randn(rank, width, generator=generator), scale * torch.randn(out, rank, generator=generator))


def model_vector(
    model: nn.Module,
    scale: float = 0.05,
    ranks: tuple[int, ...] = (1, 2, 3, 4),
    only: str = "",
    seed: int = 1,
    dense: bool = False,
) -> TaskVector:
    """Random factors in every linear module (but a tied head) whose name matches ``only``; every second one dense."""
    generator = torch.Generator().manual_seed(seed)
    names = [n for n in linear_modules(model) if re.search(only, n)]
    modules: dict[str, Change] = {}
    for number, name in enumerate(names):
        change = factors(*shape_of(model.get_submodule(name)), ranks[number % len(ranks)], generator, scale)
        modules[name] = Dense(change.delta()) if dense and number % 2 == 0 else change
    return TaskVector(modules, {"set": "forget"})


def trained(model: Any, seed: int = 0, **options: Any) -> PeftModel:
    """PEFT's own LoRA, on every linear layer if not told otherwise, its B filled so that it does something."""
    linear = linear_modules(model)
    conv = any(isinstance(m, Conv1D) for m in linear.values())
    settings = {"r": 3, "lora_alpha": 7, "target_modules": list(linear), "fan_in_fan_out": conv} | options
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model.eval()


def exact(change: Change) -> Tensor:
    """The change in float64, from what it is stored as."""
    return change.B.double() @ change.A.double() if isinstance(change, LowRank) else change.values.double()


def edited_weights(model: nn.Module, vector: TaskVector, c: float) -> dict[str, Tensor]:
    """W + c * B A of every module, product and sum taken in float64."""
    weights = {}
    for name, change in vector.modules.items():
        weight, delta = model.get_parameter(f"{name}.weight").detach().double(), c * exact(change)
        weights[f"{name}.weight"] = weight + (delta.T if isinstance(model.get_submodule(name), Conv1D) else delta)
    return weights


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(2))
    found: Tensor = model(input_ids=ids).logits
    return found.clone()


@torch.no_grad()
def edited_logits(model: nn.Module, vector: TaskVector, c: float) -> Tensor:
    """Logits of a copy in float32 that has :func:`edited_weights`."""
    twin = copy.deepcopy(model).float()
    for name, weight in edited_weights(model, vector, c).items():
        twin.get_parameter(name).copy_(weight.float())
    return logits(twin)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Bit for bit, also of zeros with a sign."""

    def bits(tensor: Tensor) -> Any:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.keys() == two.keys() and all(
        (t.dtype, t.shape) == (two[n].dtype, two[n].shape) and torch.equal(bits(t), bits(two[n]))
        for n, t in one.items()
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing more than so many bytes to one file fails, as on a disk that fills up."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


THREE = pytest.mark.parametrize("folder", ["phi", "llama", "gpt2"], indirect=True)
FIVE = pytest.mark.parametrize("folder", ["phi", "llama", "gpt2", "qwen2", "gpt_neox"], indirect=True)
