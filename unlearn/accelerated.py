"""``accelerate launch --cpu --num_processes N``: what it was asked for and does not do by itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import PurePath
from typing import Any

from unlearn.launch import command, die_with

_UP = 4  # ancestors among which `accelerate launch` is looked for
_OTHERS_DECIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def asked_of_accelerate() -> list[str]:
    """What ``accelerate launch --cpu --num_processes N`` asked for and did not do, as :func:`command` has it.

    Without a GPU, accelerate starts one process whatever N is, and hands it an address and a port, but not N. So N is
    read where it was given: in the arguments of the ``accelerate launch`` that waits for this process, with
    accelerate's own parser, so that its configuration file counts too.

    Returns:
        Empty where one process is what was asked for, or where the others are there already.
    """
    here = os.environ
    on_cpu = here.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    if not on_cpu or "MASTER_PORT" not in here or any(name in here for name in _OTHERS_DECIDE):
        return []
    arguments = _launcher_arguments()
    if arguments is None:
        return []
    launch: Any = import_module("accelerate.commands.launch")
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)  # it has warned its user already
    given = launch.launch_command_parser().parse_args(arguments)
    if hasattr(launch, "_validate_launch_command"):  # which reads the configuration file
        given, *_ = launch._validate_launch_command(given)
    nodes = int(given.num_machines or 1)
    processes = max(1, int(given.num_processes or 1) // nodes)
    host, port = here.get("MASTER_ADDR", "127.0.0.1"), given.main_process_port
    return command(processes, nodes, int(given.machine_rank or 0), host, int(port) if port else None)


def start_the_others(module: str, arguments: Sequence[str]) -> None:
    """Become the launcher of as many processes as ``accelerate launch --cpu`` was asked for; return where it is one.

    To be called first thing by a command line's ``main``: this process is replaced.
    """
    if prefix := asked_of_accelerate():
        if die := die_with(os.getppid()):
            die()  # it dies of a signal without passing it on
        os.environ.pop("KMP_AFFINITY", None)  # meant for one process: several would be bound to the same cores
        os.execv(prefix[0], [*prefix, module, *arguments])  # the same process id, for which accelerate waits


def _launcher_arguments() -> list[str] | None:
    """What ``accelerate launch`` was given, read from the process of it that is above this one."""
    psutil: Any = import_module("psutil")  # comes with accelerate
    try:
        lines = [above.cmdline() for above in psutil.Process().parents()[:_UP]]
    except psutil.Error:
        return None
    return next((found for line in lines if (found := _after_launch(line)) is not None), None)


def _after_launch(line: Sequence[str]) -> list[str] | None:
    """The arguments of a command line of ``accelerate launch``, however it is spelt; None for any other."""
    for at, word in enumerate(line[:6]):
        name = PurePath(word).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(line[at + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and line[at + 1 : at + 2] == ["launch"]:
            return list(line[at + 2 :])
        if PurePath(word).parts[-3:] == ("accelerate", "commands", "launch.py"):
            return list(line[at + 1 :])
    return None
