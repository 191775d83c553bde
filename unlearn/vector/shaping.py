"""From the fitted vector to the one that is subtracted: the recipe's shapers, one after another.

The formulas are in :mod:`unlearn.methods`; here each is given its settings and what it works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.console import say
from unlearn.data.encoding import Encoded
from unlearn.errors import VectorError
from unlearn.processes import told
from unlearn.recipe.methods import (
    EthosSpec,
    LearnedSpec,
    LinesSpec,
    Method,
    PertaSpec,
    ProjectSpec,
    PruneSpec,
    VectorSpec,
)
from unlearn.train.learned import LearnSpec, components, gradients, learn, weigh
from unlearn.vector.methods import contrast, ethos, ext_sub, lines, perta, project, rescale
from unlearn.vector.task_vector import TaskVector


@dataclass(frozen=True)
class Materials:
    """What shapers work on beside the vector.

    ``model`` is the target model; ``fitted`` the vector before any shaping; ``retain_vector`` is there when a method of
    the recipe needs one; ``forget`` and ``retain`` are training rows, and may be empty when no method needs them.
    """

    model: nn.Module
    pad_id: int
    seed: int
    fitted: TaskVector
    retain_vector: TaskVector | None = None
    forget: Sequence[Encoded] = ()
    retain: Sequence[Encoded] = ()

    def near(self) -> TaskVector:
        """The retain vector, of the same model as the fitted one.

        Raises:
            VectorError: there is none, or it was made from another model.
        """
        if self.retain_vector is None:
            raise VectorError("this method needs a vector fitted on the retain sets")
        bases = [v.meta.get("base") for v in (self.fitted, self.retain_vector)]
        if None not in bases and bases[0] != bases[1]:
            raise VectorError("the forget and the retain vector were fitted on different models; fit both on the same")
        return self.retain_vector


_LESS = {"learned": "lower vector.learned.batch_size and vector.learned.retain_batch_size"}


def shape(vector: TaskVector, steps: Iterable[Method], spec: VectorSpec, have: Materials) -> TaskVector:
    """Work off the shapers among ``steps``, in order; sources are passed over.

    Raises:
        VectorError: see the methods; the message begins with the method's name.
    """
    for step in steps:
        shaper = SHAPERS.get(step)
        if shaper is not None:
            before = vector.norm()
            with told(f"vector.method {step}", _LESS.get(step, f"leave {step} out of vector.method")):
                vector = shaper(vector, spec, have)
            say(f"    {step}: norm {before:.3g} to {vector.norm():.3g}")
    return vector


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of some linear modules as (out, in): views of what the model holds, in its number format."""
    found = {}
    for name in names:
        module: Any = model.get_submodule(name)
        weight = module.weight.detach()
        found[name] = weight.T if isinstance(module, Conv1D) else weight
    return found


def _contrast(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    return contrast(vector, have.near(), 1.0 if spec.mu is None else spec.mu)


def _ext_sub(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    return ext_sub(vector, have.near())


def _project(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    return project(vector, have.near(), (spec.project or ProjectSpec()).energy)


def _ethos(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    return ethos(vector, weights_of(have.model, vector.modules), (spec.ethos or EthosSpec()).threshold)


def _perta(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    one = spec.perta or PertaSpec()
    names = tuple(vector.modules)
    forget, retain = (
        gradients(have.model, rows, names, one.importance, one.samples, have.seed)
        for rows in (have.forget, have.retain)
    )
    return perta(vector, forget, retain, one.alpha)


def _lines(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    one = spec.lines or LinesSpec()
    return lines(vector, one.a, one.b, layers=getattr(getattr(have.model, "config", None), "num_hidden_layers", None))


def _learned(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    one = spec.learned or LearnedSpec()
    how = LearnSpec(
        steps=one.steps,
        rate=one.learning_rate,
        batch_size=one.batch_size,
        retain_batch_size=one.retain_batch_size,
        beta=one.beta,
        ceiling=one.ceiling,
        by=one.by,
        coefficients=(one.scale, one.scale),
    )
    parts = components(vector) if one.by == "component" else vector
    weights, log = learn(have.model, parts, have.forget, have.retain, how, have.seed, have.pad_id)
    say(f"    learned: retain divergence {log.retain[0]:.3g} to {log.retain[-1]:.3g} nats in {log.seconds:.0f} s")
    return weigh(parts, weights)


def _low_rank(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    assert spec.low_rank is not None  # the recipe is checked
    return vector.to_low_rank(rank=spec.low_rank.rank, energy=spec.low_rank.energy)


def _prune(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    one = spec.prune or PruneSpec()
    return vector.prune(one.keep, one.by)


def _rescale(vector: TaskVector, spec: VectorSpec, have: Materials) -> TaskVector:
    return rescale(vector, have.fitted)


SHAPERS: Mapping[Method, Callable[[TaskVector, VectorSpec, Materials], TaskVector]] = {
    "contrast": _contrast,
    "ext_sub": _ext_sub,
    "project": _project,
    "ethos": _ethos,
    "perta": _perta,
    "lines": _lines,
    "learned": _learned,
    "low_rank": _low_rank,
    "prune": _prune,
    "rescale": _rescale,
}
