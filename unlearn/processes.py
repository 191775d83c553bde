"""What several processes tell each other. A process that works alone is told what it knows itself.

They are started by ``torchrun`` or ``accelerate launch``, and must all call the same functions in the same order.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from unlearn.console import say
from unlearn.errors import UnlearnError
from unlearn.text import first_line, shorten

_PATIENCE = timedelta(minutes=30)  # a process that is not heard of for so long is taken for lost
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|gloo|nccl|socket", re.IGNORECASE)
_SPREAD = ("fsdp", "deepspeed", "megatron_lm", "parallelism_config")  # ways of accelerate to hold a part of a model
# of these a Trainer here hears nothing: trainer_arguments.recipe_decides
_UNHEEDED = ("mixed_precision", "dynamo_backend")


def join() -> None:
    """Join the others, and wait until all of them are there."""
    for way in _SPREAD:
        if switched_on(f"ACCELERATE_USE_{way.upper()}"):
            raise UnlearnError(
                f"every process holds the whole model: start without --use_{way} (it may be in the "
                "configuration file of accelerate)"
            )
    for flag in _UNHEEDED:
        if (value := os.environ.get(f"ACCELERATE_{flag.upper()}", "no").lower()) != "no":
            say(f"--{flag} {value} changes nothing: the recipe decides what is computed, and in which format", "yellow")
    if several():
        import torch
        from accelerate import PartialState

        # unless it is told, it takes processes without a GPU for strangers, each alone in the world
        on_cpus = cpus_only() or not torch.accelerator.is_available()
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
        if not on_cpus and here > gpus:
            raise UnlearnError(
                f"{here} processes were started on a machine with {gpus} GPUs: start one process for each GPU"
            )
        PartialState(cpu=on_cpus, timeout=_PATIENCE)
        wait()
    elif cpus_only() and "MASTER_PORT" in os.environ:
        say("accelerate launch --cpu starts one process. For several: torchrun --nproc_per_node N -m …", "yellow")


def leave() -> None:
    """Part from the others. Calling it again does nothing."""
    if count() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def cpus_only() -> bool:
    """Whether ``accelerate launch --cpu`` leaves this machine's GPUs alone."""
    return switched_on("ACCELERATE_USE_CPU")


def switched_on(name: str) -> bool:
    """Whether a variable of the environment says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def several() -> bool:
    """Whether there are other processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def count() -> int:
    """How many processes work together; 1 before :func:`join` and after :func:`leave`."""
    if several():
        import torch.distributed as dist

        if dist.is_initialized():
            return dist.get_world_size()
    return 1


def rank() -> int:
    """Which of the processes this is; 0 is the main one."""
    if count() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def wait() -> None:
    """Until every process is here."""
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
        if count() == 1 or not _LOST.search(str(e)):
            raise
        raise UnlearnError(
            "another process has ended early, or cannot be reached. Its message, if it left one, is above; without one "
            f"the system may have killed it, mostly for its memory. Here it shows as: {shorten(first_line(e), 300)}"
        ) from e


def alarm(message: str) -> None:
    """Say what has gone wrong in this process alone. The main one's errors are said by the command line anyway."""
    if rank():
        sys.stderr.write(f"error in process {rank()}: {message}\n")


def gathered(value: Any) -> list[Any]:
    """What every process has, by rank; values must be picklable."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    with all_there():
        return list(gather_object([value]))


def from_main(find: Callable[[], Any]) -> Any:
    """What the main process finds; the others do not look. What goes wrong there is raised in all."""
    return _shared_out(lambda: [find()] if rank() == 0 else [])[0][0]


def anyone(flag: bool) -> bool:
    """Whether it is true in any process."""
    return total(int(flag)) > 0


def total(number: int) -> int:
    """The sum over all processes."""
    if count() == 1:
        return number
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    with all_there():
        return int(reduce(torch.tensor(number, device=PartialState().device), "sum"))


def together(work: Sequence[Any], do: Callable[[Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """Deal out work among the processes (each P-th, so that parts weigh alike) and give all of them all results.

    ``work`` is the same in every process; ``do`` gives one result for each piece, which must not depend on the others,
    and is not called for nothing. The results are in the order of the work.
    """
    mine = work[rank() :: count()]
    parts = _shared_out(lambda: do(mine) if mine else [])
    return [parts[n % count()][n // count()] for n in range(len(work))]


def _shared_out(do: Callable[[], Sequence[Any]]) -> list[Sequence[Any]]:
    """What every process makes of it, by rank, in all of them; and so with what goes wrong in any of them."""
    if count() == 1:
        return [do()]
    found, failure, sent = [], None, None
    try:
        found = list(do())
    except Exception as e:
        failure = sent = e
        if type(e).__module__.partition(".")[0] not in ("builtins", "unlearn"):  # some cannot be sent
            sent = RuntimeError(f"{type(e).__name__} in another process: {e}")
    parts = gathered((found, sent))
    if wrong := failure or next((other for _, other in parts if other is not None), None):
        raise wrong
    return [found if r == rank() else part for r, (part, _) in enumerate(parts)]


# -- lm-eval's requests, shared out


_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
_GENERATION = 1000  # characters of prompt that take about as long as writing one answer


def share_requests(lm: Any) -> None:
    """Until :func:`leave` every process answers a part of what ``lm`` is asked, and all of them get all answers.

    They must ask the same things in the same order, and so have the same scores and decide the same. lm-eval's
    evaluator is not told of the others: where it deals out the items itself, each process draws other few-shot
    examples, tasks with fewer items than processes fail, and some requests are made twice.
    """
    if not several() or set(_KINDS) & set(vars(lm)):  # the second time there is nothing left to do
        return
    for name in _KINDS:
        setattr(lm, name, _shared(getattr(lm, name)))
    set_hook = lm.set_cache_hook

    def set_cache_hook(hook: Any) -> None:
        """lm-eval's cache is a file for each process, and what one knows it does not ask: all must know it."""
        set_hook(hook)  # first: it says which of the file's answers are this model's
        if count() > 1 and hook.dbdict is not None:
            for known in gathered(dict(hook.dbdict.items())):
                hook.dbdict.update(known)

    lm.set_cache_hook = set_cache_hook
    lm._rank, lm._world_size = 0, 1  # to lm-eval


def shares(requests: Sequence[Any], count: int) -> list[list[int]]:
    """Indices of lm-eval's requests for each process: those of one item stay together, and parts weigh alike."""
    items: dict[Hashable, list[int]] = {}
    for index, request in enumerate(requests):
        known = request.doc_id is not None
        items.setdefault((request.task_name, request.doc_id) if known else index, []).append(index)
    weights = {key: _weight([requests[i].args for i in indices]) for key, indices in items.items()}
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for key in sorted(items, key=lambda k: weights[k], reverse=True):
        lightest = loads.index(min(loads))
        parts[lightest] += items[key]
        loads[lightest] += weights[key]
    return [sorted(part) for part in parts]


def _weight(asked: Sequence[tuple[Any, ...]]) -> int:
    """About what an item's requests cost, in characters: the longest prompt once, and every answer."""
    rest = (len(a) if isinstance(a, str) else _GENERATION for arguments in asked for a in arguments[1:])
    return max(len(arguments[0]) for arguments in asked) + sum(rest)


def _shared(ask: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def ask_together(requests: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
        if count() == 1:
            return ask(requests, *args, **options)
        parts = shares(requests, count())
        mine = [requests[i] for i in parts[rank()]]
        # the checksum first: of processes that ask for different things none shall be waited for
        found = _shared_out(lambda: [_checksum(requests), *(ask(mine, *args, **options) if mine else [])])
        if len({checksum for checksum, *_ in found}) > 1:
            raise RuntimeError("the processes do not ask for the same: their requests differ")
        merged: list[Any] = [None] * len(requests)
        for part, (_, *answers) in zip(parts, found, strict=True):
            for index, answer in zip(part, answers, strict=True):
                merged[index] = answer
        return merged

    return ask_together


def _checksum(requests: Sequence[Any]) -> int:
    return zlib.crc32(repr([request.args for request in requests]).encode())


# -- a request to stop (sigterm, ctrl-c) that waits until the step at hand is done and kept


SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds: a batch system signals every process, and torchrun passes it on: heard twice


class Hold:
    """Signals that have arrived inside :func:`held`; called as their handler."""

    def __init__(self) -> None:
        self.requested = False
        self._since = float("-inf")

    def __call__(self, number: int, frame: Any) -> None:
        """Hold a first request; a second one, not an echo of the first, is not held."""
        now = time.monotonic()
        if now - self._since > _ECHO:
            if self.requested:
                raise KeyboardInterrupt
            self.requested, self._since = True, now


@contextmanager
def handled(handler: Callable[[int, Any], None], signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Inside the ``with``, these signals go to a handler; those that are ignored (``nohup``) stay ignored.

    Outside the main thread, which alone gets signals, nothing is handled.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in signals if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)


@contextmanager
def held() -> Iterator[Hold]:
    """Inside the ``with``, SIGTERM and SIGINT only set :attr:`Hold.requested`, to be looked at after each step.

    KeyboardInterrupt is raised on leaving, and at once by a second signal more than two seconds after the first.
    """
    hold = Hold()
    with handled(hold):
        yield hold
    if hold.requested:
        raise KeyboardInterrupt


# -- telling an exhausted memory from other errors, and saying so


# In lower case, with blanks for underscores. A library's handle that was not created (CUBLAS_STATUS_NOT_INITIALIZED)
# is none of them: it has other causes as well. The last one is accelerate's, after it has tried a single row.
_SIGNS = re.compile(
    "out of (device |host )?memory|out of resources|(can't|cannot) allocate memory|unable to allocate"
    "|(not enough|insufficient) memory|bad alloc|alloc failed|allocation fail|rocblas status memory error"
    "|invalid buffer size|no executable batch size found"
)
_ELSEWHERE = "in another process"
_LONGEST = 160  # characters of a library's own words
_LESS = "a smaller model.dtype or a device with more memory"


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch's devices, their libraries and the system raise when there is no more memory."""
    if isinstance(error, UnlearnError):  # it has been told
        return False
    # classes of other libraries by their names, so that commands which need no torch can ask
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower().replace("_", " ")
    # not of every kind: other errors may quote the user's own texts
    return (isinstance(error, RuntimeError | OSError) or kind == "SafetensorError") and bool(_SIGNS.search(said))


@contextmanager
def told(where: str, advice: str) -> Iterator[None]:
    """Make of an exhausted memory one message for the user (where, and what to do there); other errors pass."""
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        words = " ".join(str(e).split()).rstrip(".")
        said = f" ({shorten(words, _LONGEST)})" if words else ""
        message = f"{where}: out of memory{said}. To need less, {advice}; or choose {_LESS}"
        if _ELSEWHERE not in words:
            alarm(message)
        raise UnlearnError(message) from e
