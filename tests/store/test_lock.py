"""Locks with real processes that are killed, stopped, forked and far away (another host's name, another namespace)."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import RunFolderError
from unlearn.store.lock import (
    TIMEOUT,
    Holder,
    Lock,
    Watch,
    chain_of,
    create,
    is_lock_file,
    seconds_of_silence,
    this_boot,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="process identities are Linux' here")

PRELUDE = """
import os, platform, sys, time
from pathlib import Path
path = Path(sys.argv[1])
from unlearn.store import lock as holder
from unlearn.errors import RunFolderError
from unlearn.store.lock import Lock
"""
FAR = "platform.node = lambda: 'node17'\n"
HOLD = "lock = Lock.take(path)\nprint('ready', flush=True)\ntime.sleep(60)\n"


def start(code: str, path: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **environment},
    )


@contextmanager
def running(code: str, path: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed ``ready`` and goes on."""
    process = start(code, path, **environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if line != "ready\n":
            process.kill()
            raise AssertionError(process.communicate())
        yield process
    finally:
        process.kill()
        process.communicate()


def killed(code: str, path: Path, **environment: str) -> int:
    """The id of a process that held the lock and was killed."""
    with running(code, path, **environment) as process:
        process.kill()
        process.wait()
    return process.pid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "1")


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def until(true: Any) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False


# one process


def test_taken_and_let_go(path: Path) -> None:
    assert Lock.alive(path) == "free"
    with Lock.take(path) as lock:
        said = json.loads(path.read_text())
        assert said["pid"] == os.getpid()
        assert said["host"] == platform.node()
        assert said["started"].split()[:2] == [this_boot(), f"{Path('/proc/self/ns/pid').stat().st_ino}"]
        assert re.fullmatch("[0-9a-f]{32}", said["nonce"])
        assert names(path) == ["lock"]
        assert Lock.alive(path) == "held"
        lock.check()
        for wait in (0.0, 0.05):
            with pytest.raises(RunFolderError, match=rf"{path.parent} is in use by this very process since 20"):
                Lock.take(path, wait=wait)
        assert Lock.attempt(path) is None
    assert names(path) == []
    assert lock.lost()
    lock.release()
    again = Lock.attempt(path)
    assert again is not None
    lock.release()  # of an earlier one
    again.check()
    again.release()
    assert names(path) == []


def test_signs_of_life_change_the_time_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "0.2")
    with Lock.take(path) as lock:
        before, text = path.stat(), path.read_bytes()
        assert until(lambda: path.stat().st_mtime_ns != before.st_mtime_ns)
        later = path.stat()
        assert until(lambda: path.stat().st_mtime_ns != later.st_mtime_ns)
        assert path.stat().st_ino == before.st_ino
        assert path.read_bytes() == text
        assert names(path) == ["lock"]
        lock.check()


def test_waiting_for_a_thread_of_ones_own(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unlearn.store.lock._SPEAK_AFTER", 0.0)
    first = Lock.take(path)
    got: list[Lock] = []
    waiting = threading.Thread(target=lambda: got.append(Lock.take(path, wait=None, what="the cake")))
    waiting.start()
    heard = ""
    while "waiting" not in heard:
        heard += capsys.readouterr().err
    assert f"the cake: waiting for this very process, at work since {first.holder.since}" in heard
    assert not got
    first.release()
    waiting.join(20)
    got[0].check()
    got[0].release()


def test_a_lock_that_is_removed_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "0.2")
    lock = Lock.take(path, what="the run")
    text = path.read_bytes()
    path.unlink()
    assert until(lock._pulse.lost.is_set)  # noticed without being asked
    path.write_bytes(text)
    with pytest.raises(RunFolderError, match=r"the run is not this process's any more: .* removed\. Nothing more"):
        lock.check()
    lock.release()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = Lock.take(tmp_path / "run" / "lock")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert lock.lost()
    lock.release()
    with pytest.raises(FileNotFoundError):
        Lock.take(tmp_path / "run" / "lock")
    assert Lock.alive(tmp_path / "run" / "lock") == "free"
    assert Lock.alive(tmp_path / "moved" / "lock") == "held"


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_timeout_that_is_none(path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", given)
    with pytest.raises(RunFolderError, match="UNLEARN_LOCK_TIMEOUT is a number of seconds"):
        Lock.take(path)
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "")
    assert seconds_of_silence() == TIMEOUT == 90


def test_names() -> None:
    nonce = "0123456789abcdef" * 2
    for name in ("lock", f"lock.{nonce}", f"lock.{nonce}.new"):
        assert is_lock_file(name, "lock")
    for name in ("lock2", "lock.txt", f"lock.{nonce}.old", f"lock{nonce}", "loc", f"lock.{nonce}0", "lock.new"):
        assert not is_lock_file(name, "lock")


# the same host


def test_a_killed_holder_is_followed_at_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = killed(HOLD, path)
    assert Lock.alive(path) == "free"
    with Lock.take(path) as lock:
        assert f"{path.parent}: going on after process {pid} on host" in capsys.readouterr().err
        assert len(names(path)) == 2  # nobody's file is replaced
        assert Lock.alive(path) == "held"
        lock.check()
    assert names(path) == []


def test_dead_after_dead(path: Path) -> None:
    for _ in range(3):
        killed(HOLD, path)
    assert len(chain_of(path)) == 3
    Lock.take(path).release()
    assert names(path) == []


def test_a_living_holder_is_named_and_waited_for(path: Path) -> None:
    with running(HOLD, path) as process:
        with pytest.raises(RunFolderError, match=rf"in use by process {process.pid} since 20.*: wait for it, stop it"):
            Lock.take(path, wait=0.1)
        assert Lock.attempt(path) is None
        assert Lock.alive(path) == "held"
        timer = threading.Timer(0.2, process.kill)
        timer.start()
        Lock.take(path, wait=None).release()
        timer.join()


def test_a_process_that_is_only_stopped_is_never_dead_on_its_own_host(path: Path, short: None) -> None:
    with running(HOLD, path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunFolderError, match="in use"):
            Lock.take(path, wait=1.5)


@pytest.mark.parametrize(
    "system",
    [
        "",
        "from unlearn.store import lock as lock_file; lock_file._fcntl = None",
        "os.link = lambda *a: (_ for _ in ()).throw(PermissionError(1, 'no links'))",
        "from unlearn.store import lock as lock_file; lock_file._fcntl = None\n"
        "os.link = lambda *a: (_ for _ in ()).throw(PermissionError(1, 'no links'))",
    ],
    ids=["flock and links", "no flock", "no links", "neither"],
)
def test_of_eight_at_once_one_holds_it(path: Path, system: str) -> None:
    """Over and over, with holders that die and leave the lock to all the others at the same moment."""
    marks, rounds, count = path.parent / "marks", 6, 8
    marks.mkdir()
    code = f"""
    {{system}}
    marks = path.parent / "marks"
    (marks / f"here-{{os.getpid()}}").touch()
    while len(list(marks.glob("here-*"))) < {count}:
        time.sleep(0.001)

    def inside(name):
        os.close(os.open(marks / "inside", os.O_CREAT | os.O_EXCL))  # fails when somebody else is inside
        (marks / name).touch()
        time.sleep(0.001)
        (marks / "inside").unlink()

    for turn in range({rounds}):
        child = os.fork()
        if child == 0:  # takes it and dies
            try:
                lock = Lock.take(path, wait=None)
                inside(f"died-{{os.getpid()}}-{{turn}}")
            except BaseException as e:
                print("violation", repr(e), flush=True)
            os._exit(0)
        lock = Lock.take(path, wait=None)
        inside(f"lived-{{os.getpid()}}-{{turn}}")
        lock.check()
        lock.release()
        os.waitpid(child, 0)
    print("fine")
    """
    code = textwrap.dedent(code).replace("{system}", system)
    rivals = [start(code, path) for _ in range(count)]
    said = [p.communicate(timeout=100) for p in rivals]
    assert [out for out, _ in said] == ["fine\n"] * count, said
    assert len(list(marks.glob("died-*"))) == len(list(marks.glob("lived-*"))) == rounds * count
    assert not (marks / "inside").exists()
    Lock.take(path).release()
    assert names(path) == ["marks"]


# the files between two steps


def test_killed_while_letting_go(path: Path) -> None:
    code = """
    from unlearn.store import lock
    held = Lock.take(path)
    lock.remove = lambda places: os.kill(os.getpid(), 9)
    print("ready", flush=True)
    held.release()
    """
    with running(code, path) as process:
        process.wait()
    assert [link.kind for link in chain_of(path)] == ["held", "released"]
    assert Lock.alive(path) == "free"
    Lock.take(path).release()
    assert names(path) == []


def test_a_holder_that_wakes_while_it_is_followed_does_not_remove_the_new_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both want to come after the same file, one to say that it lets go and one to take over: one of them can."""
    sleeper, takers, mine = Lock.take(path), [], Lock._mine

    def mine_and_then_no_more(lock: Lock) -> bool:
        answer = mine(lock)
        if lock is sleeper and not takers:
            takers.append(Lock._follow(path, chain_of(path), "it", 90.0))  # by somebody who took it for dead
        return answer

    monkeypatch.setattr(Lock, "_mine", mine_and_then_no_more)
    monkeypatch.setattr("unlearn.store.lock._LIMIT", 0.01)
    sleeper.release()
    taker = takers[0]
    assert taker is not None
    taker.check()
    with pytest.raises(RunFolderError, match=r"gave no sign of life for too long.*has taken over"):
        sleeper.check()
    taker.release()
    assert names(path) == []


def test_who_is_late_follows_nobody(path: Path) -> None:
    first = Lock.take(path)
    seen = chain_of(path)
    first.release()
    assert Lock._follow(path, seen, "it", 90.0) is None  # that chain is no more
    second = Lock.take(path)
    assert Lock._follow(path, seen, "it", 90.0) is None
    assert Lock._follow(path, [], "it", 90.0) is None
    second.check()
    second.release()
    assert names(path) == []


def test_leftovers_of_kills_go_with_the_next_holder(path: Path) -> None:
    for name in (f"lock.{'a' * 32}", f"lock.{'b' * 32}.new", "lock.txt", "locker"):
        path.with_name(name).write_text("x")
    with Lock.take(path):
        assert names(path) == ["lock", "lock.txt", "locker"]


def test_the_answer_to_a_link_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(*args: Any) -> None:
        link(*args)
        link(*args)  # asked for once more by the system, which then says that it exists

    monkeypatch.setattr(os, "link", twice)
    assert create(path, path, _content())
    monkeypatch.undo()
    assert not create(path, path, _content("b"))


def _content(letter: str = "a") -> dict[str, Any]:
    me = Holder.me()
    mine = {"pid": me.pid, "host": me.host, "started": me.started, "since": me.since}
    return {**mine, "nonce": letter * 32, "timeout": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        '{"pid": 1e999, "host": "", "started": "", "since": ""}',
        json.dumps({**_content(), "timeout": "long"}),
        json.dumps({**_content(), "inode": []} | {"timeout": None}),
    ],
)
def test_files_that_cannot_be_read_are_taken_over(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.store.lock._PATIENCE", 0.1)
    path.write_text(text, encoding="latin-1")
    assert Lock.alive(path) == "unknown"
    with Lock.take(path) as lock:
        lock.check()
    assert names(path) == []


def test_files_that_were_put_there_in_bad_faith(path: Path) -> None:
    dead = {**_content(), "pid": 4_000_000, "inode": 0}
    path.write_text(json.dumps({**dead, "nonce": "../../x"}))
    Lock.take(path).release()  # no such name is ever made
    assert names(path) == []
    path.write_text(json.dumps(dead))
    path.with_name(f"lock.{'a' * 32}").write_text(json.dumps(dead))
    with pytest.raises(RunFolderError, match="damaged"):
        Lock.take(path)
    assert Lock.alive(path) == "unknown"
    path.unlink()
    os.mkfifo(path)
    assert Lock.alive(path) == "unknown"  # and does not hang


# other hosts and containers


@pytest.mark.parametrize("future", [0, 10 * 365 * 86400], ids=["", "its clock is years ahead"])
def test_a_silent_holder_far_away_is_followed_after_the_timeout(
    path: Path, short: None, capsys: pytest.CaptureFixture[str], future: int
) -> None:
    pid = killed(FAR + HOLD, path)
    os.utime(path, (time.time() + future,) * 2)
    assert Lock.alive(path) == "unknown"
    assert Lock.attempt(path) is None
    began = time.monotonic()
    with Lock.take(path) as lock:
        assert time.monotonic() - began >= 1.0
        lock.check()
    said = capsys.readouterr().err
    assert f"going on after process {pid} on host node17, which has given no sign of life for 1 s" in said


def test_who_was_silent_at_one_lock_is_believed_dead_sooner_at_the_next(path: Path, tmp_path: Path) -> None:
    both = "other = Lock.take(path.with_name('other'))\n" + HOLD
    killed(FAR + both, path, UNLEARN_LOCK_TIMEOUT="2")

    def silence(place: Path) -> float:
        watch = Watch(place, "it", 0.0, 2.0)
        while not watch.over(chain_of(place)[-1]):
            pass
        return watch.silence

    assert silence(path) >= 2.0
    assert 0.75 <= silence(tmp_path / "other") < 2.0  # three signs of life


def test_who_was_silent_at_one_lock_and_lives_is_seen_at_the_next(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first lock is one that was copied with its folder, to which it gives no signs."""
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "2")
    copy = tmp_path / "copy"
    with running(FAR + HOLD, path):
        copy.write_bytes(path.read_bytes())
        Lock.take(copy).release()
        with pytest.raises(RunFolderError, match="in use by process"):
            Lock.take(path, wait=3)


@pytest.mark.parametrize(
    "elsewhere",
    [
        FAR,
        "holder._place = lambda pid, real=holder._place: (real(pid)[0], '1')\n",
        "holder._place = lambda pid, real=holder._place: ('another-boot', real(pid)[1])\n",
        "holder._place = lambda pid, real=holder._place: ('-', real(pid)[1])\n",
        FAR + "frozen = time.time_ns()\ntime.time_ns = lambda: frozen\n",
        FAR + "real = time.time_ns\ntime.time_ns = lambda: 2 * 10**18 - real() // 10**7 * 10**9\n",
    ],
    ids=["host", "namespace", "boot", "nothing told", "its clock stands still", "its clock goes backwards"],
)
def test_a_living_holder_elsewhere_is_not_judged_by_process_id_or_clock(path: Path, elsewhere: str) -> None:
    """What is in the lock names a process that this host does not have. It is alive for all that."""
    code = elsewhere + "os.getpid = lambda: 4_000_000\nholder._start_of = lambda pid: '1'\n" + HOLD
    with running(code, path, UNLEARN_LOCK_TIMEOUT="2"):
        assert json.loads(path.read_text())["pid"] == 4_000_000
        assert Lock.alive(path) == "unknown"
        began = time.monotonic()
        with pytest.raises(RunFolderError, match=r"in use by process 4000000 on host .*: wait for it, stop it"):
            Lock.take(path, wait=2.3)
        assert time.monotonic() - began >= 2.3  # longer than its timeout, and still not dead


def test_the_longer_timeout_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter that is in a hurry does not bury a holder that only promised to be heard now and then."""
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "0.1")
    with (
        running(FAR + HOLD, path, UNLEARN_LOCK_TIMEOUT="3"),
        pytest.raises(RunFolderError, match="on host node17"),
    ):
        Lock.take(path)


def test_time_in_which_nothing_could_be_seen_is_no_silence(path: Path) -> None:
    """A file system that hangs for longer than the timeout stops both; when it comes back, nobody is dead."""
    wait = """
    from unlearn.store.lock import Watch
    over, looks = Watch.over, []
    def look(self, link):
        looks.append(link)
        if len(looks) == 10:
            print("ready", flush=True)
        return over(self, link)
    Watch.over = look
    try:
        Lock.take(path, wait=4)
        print("took it")
    except RunFolderError as e:
        print("in use" in str(e))
    """
    with (
        running(FAR + HOLD, path, UNLEARN_LOCK_TIMEOUT="2") as holder,
        running(wait, path, UNLEARN_LOCK_TIMEOUT="2") as waiter,
    ):
        for process in (holder, waiter):
            process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        for process in (waiter, holder):
            process.send_signal(signal.SIGCONT)
        assert waiter.communicate(timeout=60)[0] == "True\n"


def test_a_copied_lock_is_not_the_lock_of_the_copy(path: Path, tmp_path: Path, short: None) -> None:
    """``cp -r`` of a folder in use: its holder is alive, and works in the other folder."""
    copy = tmp_path / "copy"
    copy.mkdir()
    with running(HOLD, path) as process:
        (copy / "lock").write_bytes(path.read_bytes())
        assert Lock.alive(copy / "lock") == "unknown"
        Lock.take(copy / "lock").release()
        assert process.poll() is None
        assert Lock.alive(path) == "held"


def test_locks_of_older_versions(path: Path) -> None:
    """They give no sign of life: far away nothing is known of them; here it is as it was."""
    old = {"pid": 4_000_000, "host": "node17", "started": "x", "since": "2024-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(old))
    with pytest.raises(RunFolderError, match=r"host node17 .* if it is certain that it runs no more, delete .*lock"):
        Lock.take(path)
    path.write_text(json.dumps({**old, "host": platform.node()}))
    Lock.take(path).release()
    ticks = Holder.me().started.split()[2]
    path.write_text(
        json.dumps({**old, "host": platform.node(), "pid": os.getpid(), "started": f"{this_boot()} {ticks}"})
    )
    with pytest.raises(RunFolderError, match="this very process"):
        Lock.take(path)


# stopped, and forked


def test_a_holder_that_wakes_after_it_was_followed_knows_it(path: Path, short: None) -> None:
    code = """
    lock = Lock.take(path, what="the run")
    print("ready", flush=True)
    while not lock._pulse.lost.is_set():
        time.sleep(0.01)
    try:
        lock.check()
    except RunFolderError as e:
        print(e, flush=True)
    lock.release()
    """
    with running(FAR + textwrap.dedent(code), path) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        with Lock.take(path, wait=None) as lock:
            sleeper.send_signal(signal.SIGCONT)
            said, trouble = sleeper.communicate(timeout=60)
            assert not trouble
            assert "the run is not this process's any more" in said
            assert f"process {os.getpid()} on host {platform.node()} has taken over since" in said
            lock.check()
        assert names(path) == []


def test_a_forked_child_has_no_part_in_it(path: Path, short: None) -> None:
    code = """
    import threading
    lock = Lock.take(path)
    child = os.fork()
    if child == 0:
        try:
            lock.check()
        except RunFolderError as e:
            print(e, flush=True)
        lock.release()
        print(threading.active_count(), "lock" in [p.name for p in path.parent.iterdir()], flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    lock.check()
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print("child", child, flush=True)
    os.kill(os.getpid(), 9)
    """
    process = start(code, path)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert re.match(rf".*belongs to process {process.pid}, from which this one was forked\n", lines[0])
    assert lines[1] == "1 True\n"
    child = int(lines[2].split()[1])
    process.wait()
    try:
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns == before  # no sign of life from the child
        Lock.take(path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()
