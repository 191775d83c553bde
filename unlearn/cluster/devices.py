"""The GPUs of this machine, dealt out among the jobs that ``--local`` runs at the same time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from unlearn.console import say
from unlearn.errors import GridError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(slots=True)
class Gpus:
    """Which are free, by what CUDA calls them.

    ``per_job`` 0: jobs are given none, and those at work at the same time share what is there.
    """

    per_job: int = 0
    free: list[str] = field(default_factory=list)

    @classmethod
    def here(cls, per_job: int) -> Gpus:
        """All that this process may use, for jobs of ``per_job`` each.

        Raises:
            GridError: there are some, but fewer than one job is to have.
        """
        found = _visible() if per_job else ()
        if per_job and not found:
            say(f"cluster.gpus is {per_job}, and there is no GPU here: the jobs run on the CPU", style="yellow")
            return cls()
        if len(found) < per_job:
            raise GridError(f"cluster.gpus is {per_job}, and {len(found)} here: add --set cluster.gpus={len(found)}")
        return cls(per_job, list(found))

    @property
    def room(self) -> int:
        """For how many more jobs the free ones suffice; 1 where jobs are given none."""
        return len(self.free) // self.per_job if self.per_job else 1

    def take(self) -> tuple[str, ...]:
        """Those of one job, which are not free from now on."""
        taken = tuple(self.free[: self.per_job])
        del self.free[: self.per_job]
        return taken

    def give_back(self, taken: tuple[str, ...]) -> None:
        """They are free again."""
        self.free.extend(taken)


def environment(taken: tuple[str, ...]) -> Mapping[str, str]:
    """What has a job see these and no others."""
    return {VISIBLE: ",".join(taken)} if taken else {}


def _visible() -> tuple[str, ...]:
    named = os.environ.get(VISIBLE)
    if named is not None:  # numbers, or UUIDs of GPUs or of their slices; none from the first that is empty or -1
        return tuple(takewhile(lambda one: one not in ("", "-1"), (one.strip() for one in named.split(","))))
    import torch

    return tuple(str(number) for number in range(torch.cuda.device_count()))
