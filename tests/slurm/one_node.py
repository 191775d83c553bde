"""A Slurm cluster of one node in one folder: own ports, own keys, nothing outside is touched, gone at the end.

    python tests/slurm/one_node.py FOLDER [-- COMMAND ...]

starts it, runs the command (or a shell) with SLURM_CONF set, and stops it. Needs Debian's ``slurm-wlm`` and ``munge``,
and root, as slurmd changes users.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
_PATIENCE = 60.0  # seconds until the node must be ready

CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
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
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str:
    """What is missing here to run it, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm node must be started by root, on Linux"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else ""


class OneNode:
    """The cluster, as a context manager. ``environment`` is what its clients need."""

    def __init__(self, root: Path, cpus: int = 2) -> None:
        self.root = root.absolute()
        self.cpus = cpus
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "PATH": _path()}

    def __enter__(self) -> OneNode:
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
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def _start(self) -> None:
        for name in ("", "state", "spool"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        # munge refuses folders that others may write to
        self.root.chmod(0o755)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().partition(".")[0]
        megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        controller, node = _free_ports()
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                root=self.root, host=host, controller=controller, node=node, cpus=self._cores(), memory=megabytes - 512
            )
        )
        self._daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge.socket"),
            *(f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log"),
            f"--seed-file={self.root}/munge.seed",
        )
        self._until(lambda: (self.root / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", str(self.root / "slurm.conf"))
        self._daemon("slurmd", "-D", "-f", str(self.root / "slurm.conf"))
        self._until(lambda: "idle" in self._node_state(), "slurmd")

    def _cores(self) -> int:
        # slurmd takes a node for broken that has fewer cores than the configuration says
        return min(self.cpus, os.cpu_count() or 1)

    def _node_state(self) -> str:
        answer = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env=self.environment, capture_output=True, text=True, timeout=30
        )
        return answer.stdout

    def _daemon(self, name: str, *options: str) -> None:
        log = (self.root / f"{name}.out").open("wb")
        with log:
            self.daemons.append(
                subprocess.Popen(
                    [shutil.which(name, path=_path()) or name, *options],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _until(self, ready: object, name: str) -> None:
        assert callable(ready)
        end = time.monotonic() + _PATIENCE
        while not ready():
            dead = [d.args[0] for d in self.daemons if d.poll() is not None]  # type: ignore[index]
            if dead or time.monotonic() > end:
                logs = "\n".join(
                    f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in sorted(self.root.glob("*.log"))
                )
                outs = "\n".join(p.read_text(errors="replace")[-1000:] for p in sorted(self.root.glob("*.out")))
                raise RuntimeError(f"{name} did not come up (ended: {dead}):\n{logs}\n{outs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs and daemons. Calling it again does nothing."""
        if len(self.daemons) > 2:
            subprocess.run(["scancel", "-f", "-u", "root"], env=self.environment, capture_output=True, timeout=30)
            end = time.monotonic() + 30
            while time.monotonic() < end and self._queue():
                time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()

    def _queue(self) -> str:
        return subprocess.run(
            ["squeue", "-h"], env=self.environment, capture_output=True, text=True, timeout=30
        ).stdout.strip()


def _free_ports() -> tuple[int, int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def main() -> int:
    """As a command."""
    if reason := why_not():
        print(f"skipped: {reason}", file=sys.stderr)
        return 0
    folder, _, *command = [*sys.argv[1:], "--"] if "--" not in sys.argv else sys.argv[1:]
    with OneNode(Path(folder)) as node:
        return subprocess.run(command or [os.environ.get("SHELL", "sh")], env=node.environment).returncode


if __name__ == "__main__":
    sys.exit(main())
