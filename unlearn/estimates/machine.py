"""The machines that an estimate can be for: what each can do, and where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GB = 10**9
_TERA = 1e12


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine can do.

    Attributes:
        words: It in words, with where its figures come from.
        memory: Bytes of one device; of main memory where there is none.
        peak: Operations per second in matrix products (a multiply-add is two) by bytes of a number: 4 float32, 2
            bfloat16.
        train, score: Shares of that peak which training and scoring reach, by bytes of a number.
        bandwidth: Bytes of memory read in a second by steps of one token per text.
        pass_layer: Seconds of a layer in a forward pass that have nothing to do with its tokens.
        disk: Bytes read or written in a second.
        hashed: Bytes checked by SHA-256 in a second.
        runtime: Bytes held before any model is there: interpreter and libraries, or the device's own.
        start: Seconds until the first stage.
    """

    name: str
    words: str
    memory: int
    peak: Mapping[int, float]
    train: Mapping[int, float]
    score: Mapping[int, float]
    bandwidth: float
    pass_layer: float
    disk: float
    hashed: float
    runtime: int
    start: float

    @property
    def kind(self) -> Literal["cpu", "gpu"]:
        """Whether a model is held in main memory or on a GPU."""
        return "cpu" if self.name.startswith("cpu") else "gpu"

    def rate(self, size: int, what: Literal["train", "score"]) -> float:
        """Operations per second that are reached with numbers of ``size`` bytes."""
        return self.peak[size] * (self.train if what == "train" else self.score)[size]


_CPU_TRAIN, _CPU_SCORE = {4: 0.65, 2: 0.65}, {4: 0.70, 2: 0.62}  # of the quickstart, and of Phi-1.5


def _cpu(cores: int) -> Machine:
    return Machine(
        name=f"cpu{cores}",
        words=f"{cores} core{'s' * (cores > 1)} of an AMD EPYC (Zen 4); all figures measured with this program",
        memory=24 * GB,
        peak={4: 0.095 * _TERA * cores, 2: 0.205 * _TERA * cores},
        train=_CPU_TRAIN,
        score=_CPU_SCORE,
        bandwidth=8e9,  # a second core adds nothing
        pass_layer=1e-3,
        disk=1e9,
        hashed=1.3e9 * cores,
        runtime=640 * 10**6,
        start=10.0,
    )


def _gpu(name: str, model: str, tera: float, bandwidth: float, share: float) -> Machine:
    return Machine(
        name=name,
        words=f"{model}, {tera:g} TFLOP/s in bfloat16 and {bandwidth:g} TB/s as published; {share:.0%} of either "
        "and 2 GB/s of disk are assumed to be reached, nothing was measured",
        memory=80 * GB,
        # float32 matrix products run as TF32 only where they are told to: the plain units do a sixteenth
        peak={2: tera * _TERA, 4: tera * _TERA / 16},
        train={2: share, 4: 0.6},
        score={2: share, 4: 0.6},
        bandwidth=bandwidth * _TERA * share,
        pass_layer=0.4e-3,
        disk=2e9,
        hashed=4e9,
        runtime=1 * GB,
        start=20.0,
    )


MACHINES: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        _cpu(1),
        _cpu(2),
        _gpu("a100-80", "one NVIDIA A100 SXM of 80 GB", 312, 2.0, 0.4),
        _gpu("h100-80", "one NVIDIA H100 SXM of 80 GB", 989, 3.35, 0.35),
    )
}
