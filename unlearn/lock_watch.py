"""Waiting for a lock: whether its holder is dead, told by looking at it again and again."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from unlearn.console import say
from unlearn.errors import RunFolderError
from unlearn.holder import Holder
from unlearn.lock_file import Link

TIMEOUT = 90.0  # seconds
BEATS = 8  # signs of life per timeout: every 11 s
_BEATS_OF_THE_DEAD = 3  # of a process that was silent for a whole timeout at another lock
_PATIENCE = 2.0  # seconds for another process between two neighbouring file operations
_SPEAK_AFTER, _SPEAK_EVERY = 2.0, 60.0  # seconds
_PAUSE = 1.0  # seconds at most between two looks
# Whom this process has found silent. A crashed machine leaves several locks of one process (the job's, its folder's,
# the cache's), and who goes on in its place comes to them one after the other.
_found_silent: set[tuple[int, str, str]] = set()


class Watch:
    """Decides about the holders of a lock by looking at them again and again."""

    def __init__(self, path: Path, what: str, wait: float | None, timeout: float) -> None:
        self.path, self.what, self.timeout = path, what, timeout
        self.last = time.monotonic()
        self.deadline = None if wait is None else self.last + wait
        self.next_word = self.last + _SPEAK_AFTER
        self.began = self.last
        self.pause = 0.01
        self.nonce = ""
        self.sign: tuple[int, int] | None = None
        self.silence = 0.0
        self.seen_alive = False

    def over(self, link: Link) -> bool:
        """True when the holder is dead, so that its lock may be taken over; else False, a moment later.

        Raises:
            RunFolderError: it lives, and the time to wait for it is over.
        """
        now = time.monotonic()
        if link.nonce != self.nonce:
            self.nonce, self.sign, self.silence, self.seen_alive = link.nonce, link.sign, 0.0, False
        elif link.sign != self.sign:
            self.sign, self.silence, self.seen_alive = link.sign, 0.0, True
        else:
            # a look that took long (a hanging file system, this process stopped) is no long look
            self.silence += min(now - self.last, 2 * self.pause)
        self.last = now
        verdict = link.verdict()
        if verdict == "gone" or (verdict == "unknown" and self._silent(link)):
            self._announce(link, verdict == "gone")
            return True
        if link.kind == "released":
            lives = self.silence >= _PATIENCE  # it is letting go right now
        else:
            lives = verdict == "there" or self.seen_alive or link.kind == "old"
        if lives and self.deadline is not None and now >= self.deadline:
            raise RunFolderError(self._taken(link))
        self._speak(link, now, lives)
        self.pause = min(self.pause * 1.5, _PAUSE, self.timeout / 16)
        time.sleep(self.pause)
        return False

    def _silent(self, link: Link) -> bool:
        if link.kind == "unreadable":
            return self.silence >= _PATIENCE  # made and never filled: its maker was killed in between
        return link.kind != "old" and self.silence >= self._enough(link)

    def _enough(self, link: Link) -> float:
        """Seconds without a sign of life that make its holder a dead one."""
        longest = max(self.timeout, link.timeout)
        return longest * _BEATS_OF_THE_DEAD / BEATS if link.holder and _who(link.holder) in _found_silent else longest

    def _announce(self, link: Link, certain: bool) -> None:
        if link.holder is not None and not certain:
            _found_silent.add(_who(link.holder))
        if link.holder is not None and link.kind != "released":
            why = "has ended without finishing" if certain else f"has given no sign of life for {self.silence:.0f} s"
            say(f"{self.what}: going on after {named(link.holder)}, which {why}", style="yellow")

    def _speak(self, link: Link, now: float, lives: bool) -> None:
        if link.holder is None or now < self.next_word:
            return
        self.next_word = now + _SPEAK_EVERY
        if lives:
            so_far = f", {now - self.began:.0f} s so far" if now - self.began > _SPEAK_EVERY else ""
            say(f"{self.what}: waiting for {named(link.holder)}, at work since {link.holder.since}{so_far}")
        else:
            enough = f"{self._enough(link):.3g} s"
            say(f"{self.what}: {named(link.holder)} may be at work here; looking for a sign of life for {enough}")

    def _taken(self, link: Link) -> str:
        if link.holder is None:
            return f"{self.what} is in use: wait, or use another --out"
        text = f"{self.what} is in use by {named(link.holder)} since {link.holder.since}: wait for it, "
        if link.kind == "old" and link.verdict() == "unknown":
            return f"{text}or use another --out; if it is certain that it runs no more, delete {self.path}"
        return f"{text}stop it, or use another --out"


def _who(holder: Holder) -> tuple[int, str, str]:
    return holder.pid, holder.host, holder.started


def named(holder: Holder) -> str:
    """A holder as messages name it."""
    if holder.verdict() == "there":
        return "this very process" if holder.pid == os.getpid() else f"process {holder.pid}"
    return f"process {holder.pid} on host {holder.host}"


def seconds_of_silence() -> float:
    """After how many seconds without a sign of life a holder is taken for dead.

    Raises:
        RunFolderError: ``UNLEARN_LOCK_TIMEOUT`` is no such number.
    """
    given = os.environ.get("UNLEARN_LOCK_TIMEOUT", "")
    try:
        seconds = float(given) if given.strip() else TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 24 * 3600:
        raise RunFolderError(f"UNLEARN_LOCK_TIMEOUT is a number of seconds up to a day ({TIMEOUT:g}), not {given!r}")
    return seconds
