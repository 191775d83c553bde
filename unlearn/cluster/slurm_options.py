"""A recipe's cluster block in sbatch's words. No submitit and no Slurm are needed for that."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

from unlearn.errors import GridError
from unlearn.recipe.evaluation import ClusterSpec

_TRUST = "UNLEARN_TRUST_SETUP"
_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
# ``extra`` may not take these: they are what makes the array, its restarts and its logs work
_OURS = (
    *("array", "begin", "chdir", "dependency", "error", "input", "job-name", "kill-on-invalid-dep", "no-requeue"),
    *("ntasks", "ntasks-per-node", "open-mode", "output", "requeue", "signal", "test-only", "wait", "wrap"),
)
_KEYS = {
    "partition": "partition", "account": "account", "qos": "qos", "nodes": "nodes", "time": "time", "mem": "memory",
    "gpus-per-node": "gpus", "cpus-per-task": "cpus",
}  # fmt: skip


def require_trust(spec: ClusterSpec, sets: Sequence[str]) -> None:
    """Refuse shell lines of a recipe (or of a grid's folder) that nobody has looked at: they would run as the user.

    Args:
        sets: ``--set`` of the command line; what is written there is the user's own.

    Raises:
        GridError: the lines, and what to do.
    """
    own = any(text.partition("=")[0] in ("cluster", "cluster.setup") for text in sets)
    if spec.setup and not own and os.environ.get(_TRUST, "").upper() not in {"1", "TRUE", "YES", "ON"}:
        lines = "".join(f"\n  {line}" for line in spec.setup)
        raise GridError(
            f"cluster.setup has shell lines, which run as you on the cluster:{lines}\n"
            f"If you trust whoever wrote the recipe, set {_TRUST}=1 in the environment"
        )


def minutes(text: str) -> int:
    """Slurm's own reading of a time limit, rounded up: ``M:S``, ``H:M:S``, ``D-H:M`` or ``D-H:M:S``."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) == 2:
        parts = [*parts, 0] if days else [0, *parts]
    hours, mins, seconds = parts
    return int(days or 0) * 24 * 60 + hours * 60 + mins + math.ceil(seconds / 60)


def megabytes(text: str) -> int:
    """``1.5GB`` in the units of 1024 that Slurm counts in, rounded up."""
    return math.ceil(float(text[:-2]) * 1024 ** _UNITS[text[-2]] / 1024**2)


def parameters(spec: ClusterSpec, name: str, cwd: str, tasks: int, dependency: str | None = None) -> dict[str, Any]:
    """What submitit's executor is given for one array.

    Args:
        spec: The cluster block.
        name: The array's name in the queue.
        cwd: Where its tasks start.
        tasks: How many it has.
        dependency: In Slurm's form (``afterok:12``).

    Raises:
        GridError: an ``extra`` option that has a key of its own, is ours, or is no option; too long a ``grace``.
    """
    _check_grace(spec)
    extra = _extra(spec)
    if dependency is not None:
        extra["kill-on-invalid-dep"] = "yes"  # or tasks that can never begin would stay in the queue for good
    found: dict[str, Any] = {
        "job_name": name,
        "partition": spec.partition,
        "account": spec.account,
        "qos": spec.qos,
        "nodes": spec.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": spec.cpus,
        "gpus_per_node": spec.gpus or None,
        "mem": f"{megabytes(spec.memory)}M" if spec.memory is not None else None,
        "signal_delay_s": spec.grace,
        "setup": list(spec.setup) or None,
        "dependency": dependency,
        "array_parallelism": min(spec.parallelism or tasks, tasks),
        # since Slurm 22.05 srun does not take this over from sbatch, and would put a task on one core
        "srun_args": [f"--cpus-per-task={spec.cpus}", "--kill-on-bad-exit=1"],  # else other nodes wait for a lost one
        "additional_parameters": {"requeue": True, "chdir": cwd, **extra},
    }
    # submitit's own limit, where none is given, would be five minutes: None leaves it to the cluster
    return {**{k: v for k, v in found.items() if v is not None}, "time": minutes(spec.time) if spec.time else None}


def _check_grace(spec: ClusterSpec) -> None:
    """submitit takes a stop for one at the limit only in the last fifth of the time, or the last ten minutes.

    An earlier one counts as pre-emption, after which a job begins again as often as it likes.
    """
    limit = 60 * minutes(spec.time) if spec.time else 0
    longest = max(0.2 * limit, min(600, 0.5 * limit))
    if limit and spec.grace > longest:
        raise GridError(f"cluster.grace: {spec.grace} s of {spec.time} leave too little: at most {longest:.0f} s")


def _extra(spec: ClusterSpec) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given, value in spec.extra.items():
        key = given.replace("_", "-").removeprefix("--")
        if re.fullmatch(r"[a-z][a-z0-9-]*", key) is None or "\n" in str(value):
            raise GridError(f"cluster.extra: {given!r} is no option of sbatch; write its long name: constraint: a100")
        if key in _KEYS or key in _OURS:
            instead = f"write cluster.{_KEYS[key]}" if key in _KEYS else "the grid itself needs it as it is"
            raise GridError(f"cluster.extra.{given}: {instead}; leave it out")
        if not spec.gpus and (key in ("gpus", "gpus-per-task") or (key == "gres" and str(value).startswith("gpu"))):
            raise GridError(f"cluster.extra.{given}: write cluster.gpus as well, or one process will use one of them")
        if value is not None and value is not False:
            found[key] = value
    for name in (spec.partition, spec.account, spec.qos):
        if name is not None and not name.isprintable():
            raise GridError(f"cluster: {name!r} has characters that no partition, account or qos has")
    return found


def resources(spec: ClusterSpec) -> list[str]:
    """What a job is given, in sbatch's options, for people to read."""
    shown = parameters(spec, "-", "-", 1)
    names = ("partition", "account", "qos", "nodes", "cpus_per_task", "gpus_per_node", "mem")
    found = [f"--{name.replace('_', '-')}={shown[name]}" for name in names if name in shown]
    found += [f"--time={spec.time}"] if spec.time else []
    found += [f"--signal=USR2@{spec.grace}", "--requeue"]
    found += [f"--{k}" if v is True else f"--{k}={v}" for k, v in _extra(spec).items()]
    return found
