"""Whether the other machines of a job are still there: one connection from each launcher to that of node 0.

A process that ends closes its connections, and the others hear of it at once. A machine that loses its power or its
network closes nothing: the others would wait for it in the next step of their training, for as long as the libraries
let them. So the launchers keep connections on which nothing is said but who they are and that they are done, and on
which the systems themselves make sure, every few seconds, that the other end answers.

It is a courtesy, nothing is decided by it but to stop: where the port (one above that of the processes) cannot be had
or reached, things are as they would be without it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from unlearn.console import say

_HELLO, _BYE = b"unlearn node ", b"done\n"
_IDLE, _EVERY, _TIMES = 20, 10, 6  # seconds of quiet, seconds between questions, questions without an answer
_PATIENCE, _PAUSE = 1800.0, 1.0  # seconds to wait for node 0, and between two tries
_LONGEST = 64  # bytes of a greeting


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What is known of the other machines. ``lost`` has the one that went without a word, once there is one."""

    lost: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _open: list[socket.socket] = field(default_factory=list)

    def _listen(self, server: socket.socket, nodes: int) -> None:
        """On node 0: everyone who says which node it is has a thread that waits for its last word."""
        while not self._over.is_set():
            try:
                connection, _ = server.accept()
            except OSError:  # closed at the end
                return
            threading.Thread(target=self._greet, args=(connection, nodes), daemon=True).start()

    def _greet(self, connection: socket.socket, nodes: int) -> None:
        known = {b"%s%d\n" % (_HELLO, n): f"node {n}" for n in range(1, nodes)}
        with connection, connection.makefile("rb") as words:
            try:
                connection.settimeout(_PATIENCE)
                name = known.get(words.readline(_LONGEST))
            except OSError:
                return
            if name is not None:  # or a stranger
                self._stay(connection, words, name)

    def _visit(self, host: str, port: int, rank: int) -> None:
        """On the others: find node 0, which may start later, and wait for its last word."""
        end = time.monotonic() + _PATIENCE
        while not self._over.is_set() and time.monotonic() < end:
            try:
                connection = socket.create_connection((host, port), timeout=10)
                with connection, connection.makefile("rb") as words:
                    connection.sendall(b"%s%d\n" % (_HELLO, rank))
                    self._stay(connection, words, "node 0")
                return
            except OSError:
                self._over.wait(_PAUSE)

    def _stay(self, connection: socket.socket, words: BinaryIO, name: str) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        self._open.append(connection)
        if self._over.is_set():  # between the look at it and this
            _part(connection)
        try:
            said = words.read(len(_BYE))
        except OSError:
            said = b""
        if said != _BYE and not self._over.is_set():
            self.lost.append(name)

    def _leave(self) -> None:
        self._over.set()
        for connection in self._open:
            _part(connection)


@contextmanager
def watched(nodes: int, rank: int, host: str, port: int) -> Iterator[Neighbours]:
    """Watch the other machines of a job from inside the ``with``, and tell them at its end that this one is done.

    Args:
        nodes: How many machines there are; with one there is nothing to watch.
        rank: Which this is.
        host: Node 0, as the others reach it.
        port: On node 0.
    """
    here = Neighbours()
    if nodes == 1:
        yield here
        return
    server = _server(port) if rank == 0 else None
    if server is not None:
        threading.Thread(target=here._listen, args=(server, nodes), daemon=True).start()
    elif rank:
        threading.Thread(target=here._visit, args=(host, port, rank), daemon=True).start()
    try:
        yield here
    finally:
        here._leave()
        if server is not None:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # or whoever waits in accept() would go on listening
            server.close()


def _server(port: int) -> socket.socket | None:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as e:
        say(f"port {port} cannot be had ({e.strerror}): that another machine is gone may be noticed late", "yellow")
        return None


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _IDLE), ("TCP_KEEPINTVL", _EVERY), ("TCP_KEEPCNT", _TIMES)):
        if hasattr(socket, name):  # elsewhere the system's own, of hours
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _part(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.sendall(_BYE)
        connection.shutdown(socket.SHUT_WR)
