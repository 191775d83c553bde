"""What a model folder's weights are, told from its configuration alone: no weight is read, no memory is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from unlearn.errors import VectorError
from unlearn.quiet import quietly


@dataclass(frozen=True)
class Architecture:
    """The weights of a causal language model by name.

    Attributes:
        kind: The model's class.
        linear: Names of the weights of linear layers that stand alone -> whether stored as (in, out), as Conv1D does.
        others: Names of all other tensors -> what they are, in words.
        prefix: What the model's names begin with where those of its body, saved alone, do not (``transformer.``).
        tied: Second names of weights, which need not be stored -> the first.
    """

    kind: str
    linear: Mapping[str, bool]
    others: Mapping[str, str]
    prefix: str
    tied: Mapping[str, str]

    def canonical(self, name: str) -> str:
        """A stored tensor's name as the model has it: some checkpoints are of the body alone, without the prefix."""
        longer = self.prefix + name
        known = name in self.linear or name in self.others
        return longer if not known and (longer in self.linear or longer in self.others) else name

    def why_not(self, name: str) -> str:
        """Why a weight is not one a task vector can change."""
        return self.others.get(name, f"a {self.kind} has no such weight")


def architecture_of(folder: Path) -> Architecture:
    """Read ``config.json`` and lay the model out without memory.

    Raises:
        VectorError: no configuration, or none of a causal language model that transformers itself knows.
    """
    return lay_out(model_of(folder))


def config_of(folder: Path) -> PretrainedConfig:
    """A folder's ``config.json`` as transformers reads it.

    Raises:
        VectorError: none, or none that transformers itself knows.
    """
    if not (folder / "config.json").is_file():
        raise VectorError(f"{folder}: no folder of a model: it has no config.json")
    with _understood(folder):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config


def model_of(folder: Path) -> nn.Module:
    """The model of a folder's ``config.json`` without memory for its weights.

    Raises:
        VectorError: no configuration, or none of a causal language model that transformers itself knows.
    """
    config = config_of(folder)
    with _understood(folder), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    try:
        with quietly():
            yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RuntimeError) as e:
        said = str(e).strip().split("\n")[0][:200]
        raise VectorError(
            f"{folder}: transformers cannot tell from its config.json what the weights are ({said})"
        ) from e


def lay_out(model: nn.Module) -> Architecture:
    """The weights of a model by name, whatever device it is on."""
    linear, others = {}, {}
    # of tied weights every name counts, hence all of them and not each tensor once
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for short, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{short}" if path else short
            if tensor is None:
                continue
            if short != "weight" or not isinstance(module, nn.Linear | Conv1D):
                others[name] = f"{type(module).__name__}'s {short}, not a linear layer's weight"
            elif owners[id(tensor)] > 1:
                others[name] = "a weight that several layers share, so that it would change twice"
            else:
                linear[name] = isinstance(module, Conv1D)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return Architecture(type(model).__name__, linear, others, prefix if len(prefix) > 1 else "", tied)
