"""A Slurm cluster in a folder: own ports, own keys, nothing outside is touched, gone at the end.

Needs Debian's ``slurm-wlm`` and ``munge``, and root, as slurmd changes users. With :mod:`machines` each is a node.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from machines import Machine, Machines, system_path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
_PATIENCE = 60.0  # seconds until the node must be ready

CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={controller_host}({controller_address})
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={sockets}/munge
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={sockets}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
KillWait=10
MinJobAge=300
UnkillableStepTimeout=30
SlurmdTimeout={silence}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str:
    """What is missing here to run it, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm node must be started by root, on Linux"
    absent = [name for name in PROGRAMS if shutil.which(name, path=system_path()) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else ""


class Throwaway:
    """The cluster, as a context manager. ``environment`` is what its clients need.

    Args:
        root: A folder on a local disk, for everything it writes.
        cpus: Of each node.
        machines: Each is a node, the first has the controller, too. None: this machine is the only node.
    """

    def __init__(self, root: Path, cpus: int = 2, machines: Machines | None = None) -> None:
        self.root = root.absolute()
        self.cpus = cpus
        self.machines: tuple[Machine | None, ...] = (None,) if machines is None else tuple(machines.all)
        self.daemons: list[subprocess.Popen[bytes]] = []
        self._sockets = Path(tempfile.mkdtemp(prefix="slurm"))  # their names have 107 characters at most
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "PATH": system_path()}

    def __enter__(self) -> Throwaway:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def run(self, *command: str) -> str:
        """A Slurm command's output; raises when it fails."""
        return self.ask(*command, check=True).stdout

    def ask(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command with this cluster as its Slurm, on the controller's machine."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60, **options}
        return subprocess.run(_on(self.machines[0], command), **options)

    def _start(self) -> None:
        names = [socket.gethostname().partition(".")[0] if m is None else m.name for m in self.machines]
        addresses = ["127.0.0.1" if m is None else m.address for m in self.machines]
        for folder in (self.root, self.root / "state", *(self._sockets / name for name in names)):
            folder.mkdir(parents=True, exist_ok=True)
        # munge refuses folders that others may write to, and wants to be found
        self.root.chmod(0o755)
        self._sockets.chmod(0o755)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller, node = _free_ports()
        has = f"CPUs={self._cores()} RealMemory={self._megabytes()} State=UNKNOWN"
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                root=self.root,
                sockets=self._sockets,
                controller_host=names[0],
                controller_address=addresses[0],
                controller=controller,
                node=node,
                silence=300 if self.machines == (None,) else 15,  # seconds until a node is down
                nodes="\n".join(f"NodeName={n} NodeAddr={a} {has}" for n, a in zip(names, addresses, strict=True)),
            )
        )
        self.daemon(
            self.machines[0],
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self._sockets}/munge"),
            *(f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log"),
            f"--seed-file={self.root}/munge.seed",
        )
        self._until(lambda: (self._sockets / "munge").exists(), "munged")
        self.daemon(self.machines[0], "slurmctld", "-D", "-f", str(self.root / "slurm.conf"))
        for machine in self.machines:
            self.daemon(machine, "slurmd", "-D", "-f", str(self.root / "slurm.conf"))
        self._until(lambda: self.states() == ["idle"] * len(names), "slurmd")

    def _cores(self) -> int:
        # slurmd takes a node for broken that has fewer cores than the configuration says
        return min(self.cpus, os.cpu_count() or 1)

    def _megabytes(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 512

    def states(self) -> list[str]:
        """Of the nodes, in Slurm's words."""
        return self.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%t").stdout.split()

    def daemon(self, machine: Machine | None, name: str, *options: str) -> None:
        """Start one; what it prints goes to a file."""
        program = shutil.which(name, path=system_path()) or name
        with (self.root / f"{name}-{len(self.daemons)}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen(
                    _on(machine, (program, *options)),
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def logs(self) -> list[Path]:
        """What the daemons had to say."""
        return [p for kind in ("*.log", "*.out") for p in sorted(self.root.glob(kind))]

    def _until(self, ready: Callable[[], bool], name: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not ready():
            dead = [d.args for d in self.daemons if d.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in self.logs())
                raise RuntimeError(f"{name} did not come up (ended: {dead}):\n{logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs and daemons. Calling it again does nothing."""
        if len(self.daemons) > 2:
            with suppress(subprocess.TimeoutExpired):
                self.ask("scancel", "-f", "-u", "root")
            end = time.monotonic() + 30
            while time.monotonic() < end and self.ask("squeue", "-h").stdout.strip():
                time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        shutil.rmtree(self._sockets, ignore_errors=True)


def _on(machine: Machine | None, command: Sequence[str]) -> list[str]:
    return list(command) if machine is None else machine.line(*command)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1]
