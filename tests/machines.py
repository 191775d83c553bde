"""Several machines in one: names, networks and processes of their own, and a disk that they reach over SFTP.

Made of Linux namespaces and of ``sshfs`` (whose server is a program at the other end of a pipe, so no daemon is
started and no port is opened). What such a machine has of its own is what programs tell machines apart by: its name,
its process ids, its addresses, and what it remembers of the disk. There is no flock between two of them, hard links
have inodes of their own, a file's times are whole seconds, and what one writes another may see 20 seconds late: no
better than NFS. Needs root, and Debian's ``sshfs`` and ``iproute2``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

_PROGRAMS = ("unshare", "nsenter", "mount", "ip", "sshfs")
_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/lib/sftp-server")


def why_not() -> str:
    """What is missing here to make them, or nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "machines are made of namespaces by root, on Linux"
    absent = [name for name in _PROGRAMS if shutil.which(name, path=system_path()) is None]
    if _server() is None:
        absent.append("sftp-server")
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: sshfs, openssh-sftp-server, iproute2)"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    tried = subprocess.run(
        ["unshare", "--uts", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Machine:
    """One of them. The others reach it by its name or its ``address``."""

    def __init__(self, name: str, address: str, prepare: str) -> None:
        self.name, self.address = name, address
        space = ("--uts", "--net", "--pid", "--mount", "--ipc", "--mount-proc", "--fork", "--kill-child=KILL")
        # the shell is the machine's first process, and takes in those whose parents are gone
        script = f"hostname {name} && {prepare} && ip link set lo up && echo up && while :; do sleep 9; done"
        self._outer = subprocess.Popen(
            ["unshare", *space, "sh", "-c", script],
            env={**os.environ, "PATH": system_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self._outer.stdout is not None
        if (said := self._outer.stdout.readline()) != "up\n":
            raise RuntimeError(f"{name} did not come up: {said}{self._outer.stdout.read()}")
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.first = int(children[0])

    def line(self, *command: str) -> list[str]:
        """A command on this machine, as it is started from outside."""
        enter = ("--uts", "--net", "--pid", "--mount", "--ipc", f"--wd={Path.cwd()}")
        return ["nsenter", "-t", str(self.first), *enter, *command]

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command; errors go where its output goes."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        return subprocess.Popen(self.line(*command), **options)

    def crash(self) -> None:
        """As if the power were cut: everything in it is gone at once."""
        if self._outer.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.first, signal.SIGKILL)
            self._outer.wait(30)
            assert self._outer.stdout is not None
            self._outer.stdout.close()


class Machines:
    """Machines that reach each other and share ``disk``; gone at the end.

    ``stored`` is what the disk holds, as this machine sees it: at once, without a network.
    """

    def __init__(self, root: Path, names: Sequence[str] = ("node1", "node2")) -> None:
        self.root = root.absolute()
        self.names = tuple(names)
        self.disk, self.stored = self.root / "disk", self.root / "stored"
        self.all: list[Machine] = []

    def __enter__(self) -> Machines:
        self.disk.mkdir(parents=True)
        self.stored.mkdir()
        hosts, server = self.root / "hosts", self.root / "server"
        addresses = [f"10.83.0.{i + 1}" for i in range(len(self.names))]
        known = "".join(f"{a} {n}\n" for a, n in zip(addresses, self.names, strict=True))
        hosts.write_text(f"127.0.0.1 localhost\n{known}")
        server.write_text(f"#!/bin/sh\nexec {_server()}\n")
        server.chmod(0o755)
        hosts_, server_, stored, disk = (shlex.quote(str(p)) for p in (hosts, server, self.stored, self.disk))
        prepare = (
            f"mount --make-rprivate / && mount --bind {hosts_} /etc/hosts && "
            f"sshfs -o ssh_command={server_} disk:{stored} {disk}"
        )
        try:
            # a switch between them, so that one that crashes leaves the others their network
            self.switch = Machine("switch", "", "ip link add bridge type bridge && ip link set bridge up")
            for name, address in zip(self.names, addresses, strict=True):
                self.all.append(Machine(name, address, prepare))
                self._connect(self.all[-1])
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _connect(self, one: Machine) -> None:
        switch = self.switch
        _ip(switch, "link", "add", one.name, "type", "veth", "peer", "name", "eth0", "netns", str(one.first))
        _ip(switch, "link", "set", one.name, "master", "bridge", "up")
        _ip(one, "address", "add", f"{one.address}/24", "dev", "eth0")
        _ip(one, "link", "set", "eth0", "up")

    def stop(self) -> None:
        """Turn all of them off. Calling it again does nothing."""
        for one in (*self.all, *([self.switch] if hasattr(self, "switch") else [])):
            one.crash()


def _ip(one: Machine, *words: str) -> None:
    enter = ["nsenter", "-t", str(one.first), "--net", "ip", *words]
    subprocess.run(enter, env={**os.environ, "PATH": system_path()}, check=True, capture_output=True)


def _server() -> str | None:
    return next((path for path in _SERVERS if Path(path).exists()), None)


def system_path() -> str:
    """Where programs are looked for, those of administrators too."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
