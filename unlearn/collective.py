"""What several processes tell each other. A process that works alone is told what it knows itself.

Every process must call the same functions in the same order.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from unlearn.errors import UnlearnError

_MOST = 300  # characters of a library's complaint
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|gloo|nccl|socket", re.IGNORECASE)


def several() -> bool:
    """Whether there are other processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def count() -> int:
    """How many processes work together; 1 before :func:`unlearn.distributed.join`."""
    if several():
        import torch.distributed as dist

        if dist.is_initialized():
            return dist.get_world_size()
    return 1


def rank() -> int:
    """Which of the processes this is; 0 is the main one."""
    if count() > 1:
        import torch.distributed as dist

        return dist.get_rank()
    return 0


def wait() -> None:
    """Until every process is here. After :func:`unlearn.distributed.leave` there is nobody to wait for."""
    if count() > 1:
        import torch.distributed as dist

        with all_there():
            dist.barrier()


@contextmanager
def all_there() -> Iterator[None]:
    """Inside the ``with``, that another process is gone is an UnlearnError, with the library's complaint in it."""
    try:
        yield
    except RuntimeError as e:
        if count() > 1 and _LOST.search(str(e)):
            raise UnlearnError(
                "another process has ended early, or cannot be reached. Its message, if it left one, is above; without "
                f"one the system may have killed it, mostly for its memory. Here it shows as: {_first_line(str(e))}"
            ) from e
        raise


def _first_line(text: str) -> str:
    """What a library complains of, without the places in its sources that follow."""
    return text.strip().partition("\n")[0][:_MOST]


def alarm(message: str) -> None:
    """Say what has gone wrong in this process alone. The main one's errors are said by the command line anyway."""
    if rank():
        sys.stderr.write(f"error in process {rank()}: {message}\n")


def gathered(value: Any) -> list[Any]:
    """What every process has, by rank; values must be picklable."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    told: list[Any] = [None] * count()
    with all_there():
        dist.all_gather_object(told, value)
    return told


def from_main(find: Callable[[], Any]) -> Any:
    """What the main process finds; the others do not look. What goes wrong there is raised in all."""
    found: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            found = find()
        except Exception as e:
            failure = e
    said, wrong = gathered((found, portable(failure)))[0]
    if failure is not None or wrong is not None:
        raise failure or wrong
    return found if rank() == 0 else said


def anyone(flag: bool) -> bool:
    """Whether it is true in any process."""
    return total(int(flag)) > 0


def total(number: int) -> int:
    """The sum over all processes."""
    if count() == 1:
        return number
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    value = torch.tensor(number, device=PartialState().device)
    with all_there():
        dist.all_reduce(value)
    return int(value)


def together(work: Sequence[Any], do: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """Deal out work among the processes and give all of them all results, in the order of the work.

    Args:
        work: The same in every process. Every process gets each P-th, so that parts weigh alike.
        do: One result for each piece, which must not depend on the other pieces. It is not called for nothing.

    Raises:
        Exception: what went wrong in any of the processes.
    """
    if count() == 1:
        return list(do(work)) if work else []
    mine, failure = work[rank() :: count()], None
    results: list[Any] = []
    try:
        results = list(do(mine)) if mine else []
    except Exception as e:
        failure = e
    told = gathered((results, portable(failure)))
    if wrong := failure or next((other for _, other in told if other is not None), None):
        raise wrong
    return [told[n % count()][0][n // count()] for n in range(len(work))]


def portable(failure: Exception | None) -> Exception | None:
    """An exception as it is sent to the other processes. Of other libraries' exceptions some cannot be sent."""
    if failure is None or type(failure).__module__.partition(".")[0] in ("builtins", "unlearn"):
        return failure
    return RuntimeError(f"{type(failure).__name__} in another process: {failure}")
