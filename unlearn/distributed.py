"""Several processes, under ``torchrun`` or ``accelerate launch``: they train and score together; the main one writes.

Alone, from the start, all of this does nothing and imports nothing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any

from unlearn.collective import count, gathered, portable, several, wait
from unlearn.console import say
from unlearn.errors import UnlearnError

__all__ = ["count", "join", "leave", "several", "share_requests", "shares", "wait"]

_PATIENCE = timedelta(minutes=30)  # a process that is not heard of for so long is taken for lost
_SPREAD = {
    f"ACCELERATE_USE_{way.upper()}": f"--use_{way}"
    for way in ("fsdp", "deepspeed", "megatron_lm", "parallelism_config")
}
# of these a Trainer here hears nothing: trainer_arguments.recipe_decides
_UNHEEDED = {"ACCELERATE_MIXED_PRECISION": "--mixed_precision", "ACCELERATE_DYNAMO_BACKEND": "--dynamo_backend"}
_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
_GENERATION = 1000  # characters of prompt that take about as long as writing one answer


def join() -> None:
    """Join the others, and wait until all of them are there.

    Raises:
        UnlearnError: more processes on this machine than it has GPUs, or weights that are to be spread over them.
    """
    for name, flag in _SPREAD.items():
        if _asked(name):
            raise UnlearnError(
                f"every process holds the whole model: start without {flag} (it may be in the "
                "configuration file of accelerate)"
            )
    for name, flag in _UNHEEDED.items():
        value = os.environ.get(name, "no").lower()
        if value != "no":
            say(f"{flag} {value} changes nothing: the recipe decides what is computed, and in which format", "yellow")
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


def cpus_only() -> bool:
    """Whether ``accelerate launch --cpu`` leaves this machine's GPUs alone."""
    return _asked("ACCELERATE_USE_CPU")


def _asked(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def leave() -> None:
    """Part from the others. Calling it again does nothing."""
    if several():
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def share_requests(lm: Any) -> None:
    """From now on every process answers a part of what ``lm`` is asked, and all of them get all answers.

    So all processes have the same scores and decide the same. They must ask the same things in the same order. What
    goes wrong in one is raised in all, so that nobody waits for it.

    lm-eval's evaluator is left unaware of the others. Where it deals out the items itself (as it does for several GPUs)
    each process draws other few-shot examples than one process would, tasks with fewer items than processes fail, and
    some requests are made twice.

    Args:
        lm: An lm-eval model, the same in every process. Its request methods are replaced; it answers by itself again
            after :func:`leave`.
    """
    if several() and not set(_KINDS) & set(vars(lm)):  # the second time there is nothing left to do
        for name in _KINDS:
            setattr(lm, name, _shared(getattr(lm, name)))
        lm.set_cache_hook = _cache_for_all(lm.set_cache_hook)
        lm._rank, lm._world_size = 0, 1  # to lm-eval


def shares(requests: Sequence[Any], count: int) -> list[list[int]]:
    """Deal out lm-eval's requests: those of one item stay together, because they share text, and parts weigh alike.

    Returns:
        ``count`` lists of indices, ascending; together every index once. Some are empty when there are few items.
    """
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
        import torch.distributed as dist

        if not dist.is_initialized():
            return ask(requests, *args, **options)
        parts = shares(requests, dist.get_world_size())
        mine = [requests[i] for i in parts[dist.get_rank()]]
        answers: list[Any] = []
        failure: Exception | None = None
        try:
            answers = ask(mine, *args, **options) if mine else []
        except Exception as e:
            failure = e
        told = gathered((_checksum(requests), answers, portable(failure)))
        if failure is not None:
            raise failure
        for _, _, other in told:
            if other is not None:
                raise other
        if len({checksum for checksum, _, _ in told}) > 1:
            raise RuntimeError("the processes do not ask for the same: their requests differ")
        merged: list[Any] = [None] * len(requests)
        for part, (_, found, _) in zip(parts, told, strict=True):
            for index, answer in zip(part, found, strict=True):
                merged[index] = answer
        return merged

    return ask_together


def _cache_for_all(set_hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """lm-eval's cache of answers is a file for each process, and what one knows it does not ask: all must know it."""

    def set_cache_hook(hook: Any) -> None:
        import torch.distributed as dist

        set_hook(hook)  # first: it says which of the file's answers are this model's
        if dist.is_initialized() and hook.dbdict is not None:
            for known in gathered(dict(hook.dbdict.items())):
                hook.dbdict.update(known)

    return set_cache_hook


def _checksum(requests: Sequence[Any]) -> int:
    value = len(requests)
    for request in requests:
        for argument in request.args:
            text = argument if isinstance(argument, str) else repr(argument)
            value = zlib.crc32(text.encode("utf-8", "surrogatepass"), value)
    return value
