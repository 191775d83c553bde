"""Launchers of two machines, which are one here: a word at the end, none at the end, and strangers at the door."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import connected, until

from unlearn import launch, neighbours

SLEEPS = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(float(sys.argv[2]))\n"


@pytest.fixture
def port() -> int:
    """Of the processes; the one above it is the launchers'."""
    while True:
        found = random.SystemRandom().randrange(20_000, 32_000, 2)
        with socket.socket() as a, socket.socket() as b:
            if a.connect_ex(("127.0.0.1", found)) and b.connect_ex(("127.0.0.1", found + 1)):
                return found


def node(rank: int, folder: Path, port: int, seconds: float) -> subprocess.Popen[str]:
    (folder / "sleeps.py").write_text(SLEEPS)
    line = launch.command(1, nodes=2, node_rank=rank, port=port)
    return subprocess.Popen(
        [*line, "sleeps", str(folder / f"up{rank}"), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def both_up(folder: Path) -> None:
    until(lambda: (folder / "up0").exists() and (folder / "up1").exists())


def test_one_that_is_done_is_not_lost(tmp_path: Path, port: int) -> None:
    nodes = [node(0, tmp_path, port, 4), node(1, tmp_path, port, 2)]
    said = [one.communicate(timeout=60)[0] for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], said
    assert said == ["", ""]


@pytest.mark.parametrize("killed", [0, 1])
def test_who_goes_without_a_word_is_missed(tmp_path: Path, port: int, killed: int) -> None:
    nodes = [node(n, tmp_path, port, 600) for n in (0, 1)]
    both_up(tmp_path)
    other = nodes[1 - killed]
    if sys.platform == "linux":  # until they have found each other
        until(lambda: connected(other.pid, port + 1))
    nodes[killed].kill()
    nodes[killed].communicate(timeout=60)
    said = other.communicate(timeout=60)[0]
    assert other.returncode == 1
    assert f"node {killed} cannot be reached any more, or was killed: the processes here are stopped" in said


def test_strangers_and_a_port_that_is_taken_end_nothing(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with neighbours.watched(2, 0, "127.0.0.1", port) as here:
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"unlearn node 2\n", b"unlearn node 0\n", b"x" * 100):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as visitor:
                visitor.sendall(words)
        with neighbours.watched(2, 0, "127.0.0.1", port) as second:
            assert f"port {port} cannot be had" in capsys.readouterr().err
            with neighbours.watched(2, 1, "127.0.0.1", port):
                until(lambda: here._open)
        assert (here.lost, second.lost) == ([], [])
    with socket.socket() as visitor:
        until(lambda: visitor.connect_ex(("127.0.0.1", port)) != 0)  # nobody is at the door any more
