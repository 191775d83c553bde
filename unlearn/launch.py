"""Start one module in several processes, on this machine or as one node's share of many.

``python -m unlearn.launch --processes 4 -m unlearn.run --recipe R`` does what ``torchrun --nproc_per_node 4 -m …``
does, and what a batch job needs besides: the exit code is the command's own (2 for a mistake, 130 for a stop), without
a traceback of the launcher's; a signal to stop is passed on once, and the main process has as long as it needs to write
the checkpoint, or until somebody asks again; a process that fails takes the others with it, so that nobody waits for
it; if the launcher is killed, its processes are told to stop; and if another machine dies, those here do not wait for
it. The environment is that of torch's ``env://``, so ``torchrun`` and ``accelerate launch`` may be used in its place.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unlearn.console import say
from unlearn.errors import UnlearnError
from unlearn.neighbours import Neighbours, watched
from unlearn.stopping import Requests, handled

EXIT_LOST, EXIT_MISTAKE, EXIT_STOPPED = 1, 2, 130
_GRACE = 30.0  # seconds for the others to end by themselves after one has failed or the main one was stopped
_TICK = 0.05  # seconds between looks
_PORTS = range(20_000, 32_000)  # below those that systems give to outgoing connections
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of Linux's prctl


def command(
    processes: int, nodes: int = 1, node_rank: int = 0, main_host: str = "127.0.0.1", port: int | None = None
) -> list[str]:
    """What to put before a module's name and arguments to start it in several processes.

    Every node runs its own command, with its own ``node_rank`` and all else alike; they find each other by themselves,
    within half an hour. The module must end up with one folder for all, on a disk that all nodes share.

    Args:
        processes: On each node; one per GPU.
        nodes: How many nodes take part.
        node_rank: Which of them this is, from 0; number 0 has the main process.
        main_host: Name or address of node 0, as the others reach it.
        port: Of node 0. None: on one node a free one, found when the command runs; on several nodes one that follows
            from Slurm's job id, so that two jobs on a node have different ones (29500 without Slurm). There the one
            above it is used, too (:mod:`unlearn.neighbours`).

    Returns:
        ``[python, "-m", "unlearn.launch", …, "-m"]``; empty for one process on one node, which is started as
        ``[python, "-m", module]`` as ever.

    Raises:
        UnlearnError: numbers that make no sense.
    """
    if processes < 1 or nodes < 1 or not 0 <= node_rank < nodes:
        raise UnlearnError(f"{processes} processes on node {node_rank} of {nodes}: there is no such share of a job")
    if processes * nodes == 1:
        return []
    found = [sys.executable, "-m", "unlearn.launch", "--processes", str(processes)]
    if nodes > 1:
        place = ["--main-host", main_host, "--port", str(port or _agreed_port())]
        found += ["--nodes", str(nodes), "--node-rank", str(node_rank), *place]
    elif port is not None:
        found += ["--port", str(port)]
    return [*found, "-m"]


def start(
    module: str,
    arguments: Sequence[str],
    processes: int,
    nodes: int = 1,
    node_rank: int = 0,
    main_host: str = "127.0.0.1",
    port: int | None = None,
) -> int:
    """Start a module in ``processes`` processes and wait for all of them.

    Returns:
        0 if all ended with 0; the code of the one that failed first (128 + the signal's number if it was killed); 130
        if they were stopped.
    """
    port = port or (_agreed_port() if nodes > 1 else _free_port())
    whole = {
        "MASTER_ADDR": main_host,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes * nodes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": str(node_rank),
        # its remarks about names it cannot look up and parameters that were all used, once per process
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    # the same share of the machine for each, or they would get in each other's way
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    children: list[subprocess.Popen[bytes]] = []
    stop = _Stop(children)
    with handled(stop), watched(nodes, node_rank, main_host, port + 1) as neighbours:
        try:
            for local in range(processes):
                own = {"LOCAL_RANK": str(local), "RANK": str(node_rank * processes + local), "OMP_NUM_THREADS": threads}
                children.append(_child([sys.executable, "-m", module, *arguments], {**os.environ, **whole, **own}))
                if stop.passed is not None:
                    children[-1].send_signal(stop.passed)
            return _wait(children, stop, neighbours)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()


class _Stop(Requests):
    """Passes a request to stop on to all processes, once: they need not hear it twice. Another one ends them.

    ``passed`` is the signal that they were sent last.
    """

    def __init__(self, children: list[subprocess.Popen[bytes]]) -> None:
        super().__init__()
        self._children = children
        self.passed: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        super().__call__(number, frame)
        if self.times > 1:
            self.kill()
        else:
            self.pass_on(number)

    def pass_on(self, number: int = signal.SIGTERM) -> None:
        if self.passed is None:
            self._send(number)

    def kill(self) -> None:
        self._send(getattr(signal, "SIGKILL", signal.SIGTERM))

    def _send(self, number: int) -> None:
        self.passed = number
        for child in self._children:
            child.send_signal(number)

    def failed(self, codes: Sequence[int | None]) -> int:
        """The code of the first process that failed; 0 if none has."""
        fine = {None, 0, EXIT_STOPPED}
        if self.passed is not None:  # some may not have been up yet, and died of it
            fine |= {-signal.SIGTERM, -signal.SIGINT, -self.passed}
        return next((code for code in codes if code not in fine), None) or 0


def _wait(children: Sequence[subprocess.Popen[bytes]], stop: _Stop, neighbours: Neighbours) -> int:
    """Until all have ended. Once one has ended badly the others are asked to stop, and after a while made to.

    So they are once another machine is gone: they would wait for its processes.

    One that was stopped has the others stopped too. They may be through before the first of them, which seals the
    checkpoint of all; once that has ended there is nothing left to wait for.
    """
    code, deadline = 0, float("inf")
    while None in (codes := [child.poll() for child in children]):
        if not code and (code := stop.failed(codes)):
            deadline = time.monotonic() + _GRACE
            if code < 0:  # it could not say anything itself
                say(f"process {codes.index(code)} was killed by signal {-code}: the others are stopped")
        if not code and neighbours.lost:
            code, deadline = EXIT_LOST, time.monotonic() + _GRACE
            say(f"{neighbours.lost[0]} cannot be reached any more, or was killed: the processes here are stopped")
        if code or EXIT_STOPPED in codes:
            stop.pass_on()
        if stop.passed is not None and codes[0] is not None:
            deadline = min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            stop.kill()
        time.sleep(_TICK)
    if code := code or stop.failed(codes):
        return code if code > 0 else 128 - code
    return EXIT_STOPPED if any(codes) else 0


def _child(line: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # a session of its own, so that Ctrl-C reaches it once: from here
    return subprocess.Popen(line, env=dict(environment), start_new_session=True, preexec_fn=die_with(os.getpid()))


def die_with(parent: int) -> Callable[[], None] | None:
    """For a new process: to be told to stop when its parent dies, however that dies. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    control = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        control(_PARENT_DIED, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os._exit(128 + signal.SIGTERM)

    return ask


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    """A port nobody listens on. It is free again until the main process takes it; two launchers seldom draw one."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _agreed_port() -> int:
    """The port that all nodes of a job come to without asking each other."""
    job = os.environ.get("SLURM_JOB_ID", "")
    pairs = _PORTS[::2]  # one for the processes, one for the launchers
    return pairs[int(job) % len(pairs)] if job.isdecimal() else 29_500


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.launch",
        description="Start a module in several processes that train and score together.",
        epilog="Example: python -m unlearn.launch --processes 4 -m unlearn.run --recipe quickstart.yaml. On several "
        "nodes: the same command on each with --nodes 2 --node-rank 0 (or 1) --main-host NAME_OF_NODE_0. "
        "Exit code: the module's.",
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="on this node; one per GPU")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="how many nodes take part (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="N", help="which of them this is, from 0")
    parser.add_argument("--main-host", default="127.0.0.1", metavar="HOST", help="node 0, as the others reach it")
    parser.add_argument("--port", type=int, metavar="N", help="of node 0 (default: free, or by Slurm's job id)")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="and its arguments")
    given = parser.parse_args(argv)
    if not given.module:
        parser.error("which module? End with -m MODULE and its arguments")
    name, *arguments = given.module
    shares = (given.processes, given.nodes, given.node_rank)
    try:
        command(*shares)
        return start(name, arguments, *shares, given.main_host, given.port)
    except UnlearnError as e:
        sys.stderr.write(f"error: {e}\n")
        return EXIT_MISTAKE


if __name__ == "__main__":
    sys.exit(main())
