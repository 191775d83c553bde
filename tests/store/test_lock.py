"""Locks with real processes that are killed, stopped, forked and far away (another host's name)."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import running, start

from unlearn.errors import RunFolderError
from unlearn.store import lock as lock_module
from unlearn.store.lock import TIMEOUT, Lock, is_lock_file, seconds_of_silence

PRELUDE = """
from pathlib import Path
from unlearn.errors import RunFolderError
from unlearn.store.lock import Lock
path = Path(sys.argv[1])
"""
HOLD = f"{PRELUDE}lock = Lock.take(path)\nprint('ready', flush=True)\ntime.sleep(60)\n"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock_module, "_silent_hosts", set())
    return tmp_path / "lock"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


def test_taken_and_let_go(path: Path) -> None:
    with Lock.take(path) as lock:
        assert names(path) == ["lock"]
        lock.check()
        for wait in (0.0, 0.05):
            with pytest.raises(RunFolderError, match=rf"{path.parent} is in use by this very process since 20.*--out"):
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


def test_a_living_holder_is_named_and_waited_for(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(HOLD, path) as process:
        with pytest.raises(RunFolderError, match=rf"in use by process {process.pid} since 20.*: wait for it, stop it"):
            Lock.take(path, wait=0.1)
        assert Lock.attempt(path) is None
        timer = threading.Timer(4.0, process.kill)
        timer.start()
        Lock.take(path, wait=None, what="the cake").release()
        timer.join()
    assert f"the cake: waiting for process {process.pid}, at work since 20" in capsys.readouterr().err


def test_a_killed_holder_is_followed_at_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(HOLD, path) as process:
        process.kill()
        process.wait()
    began = time.monotonic()
    with Lock.take(path) as lock:
        lock.check()
    assert time.monotonic() - began < 1
    assert f"going on after process {process.pid}, which has ended without finishing" in capsys.readouterr().err
    assert names(path) == []


def test_a_process_id_that_another_program_has_by_now_is_not_the_holder(path: Path) -> None:
    """As after a restart of the machine."""
    with running(HOLD, path) as process:
        process.kill()
        process.wait()
    path.write_text(re.sub(rf"\b{process.pid}\b", f"{os.getppid()}", path.read_text()))
    assert f"{os.getppid()}" in path.read_text()
    with Lock.take(path) as lock:
        lock.check()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a link"])
def test_what_is_no_file_is_not_waited_for(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    assert Lock.attempt(path) is None


def test_of_eight_at_once_one_holds_it(path: Path) -> None:
    """Over and over, with holders that die and leave the lock to all the others at the same moment."""
    marks, rounds, count = path.parent / "marks", 4, 8
    marks.mkdir()
    code = f"""{PRELUDE}
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
    os.waitpid(child, 0)
    lock = Lock.take(path, wait=None)
    inside(f"lived-{{os.getpid()}}-{{turn}}")
    lock.check()
    lock.release()
print("fine")
"""
    said = [p.communicate(timeout=200) for p in [start(code, path) for _ in range(count)]]
    assert [out for out, _ in said] == ["fine\n"] * count, said
    assert len(list(marks.glob("died-*"))) == len(list(marks.glob("lived-*"))) == rounds * count
    assert names(path) == ["marks"]


@pytest.mark.parametrize("exchanges", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_silent_holder_far_away_is_followed_after_the_timeout(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exchanges: bool
) -> None:
    """On file systems that cannot exchange two names (NFS) filelock leaves the file of a silent holder.

    Another lock of that host is then taken over sooner, but not where its holder gives a sign of life.
    """
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "3")
    if not exchanges:
        monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)
    second, third = path.with_name("second"), path.with_name("third")
    with running(HOLD, second, FAR="1", UNLEARN_LOCK_TIMEOUT="3") as other:
        other.kill()
    with running(HOLD, third, FAR="1", UNLEARN_LOCK_TIMEOUT="3"):
        with running(HOLD, path, FAR="1", UNLEARN_LOCK_TIMEOUT="3") as process:
            with pytest.raises(RunFolderError, match=rf"in use by process {process.pid} on host node17 since 20"):
                Lock.take(path, wait=4)  # longer than the timeout, and it is alive for all that
            process.kill()
        os.utime(path, (time.time() + 10 * 365 * 86400,) * 2)  # by whatever clock
        began = time.monotonic()
        with Lock.take(path) as lock:
            assert time.monotonic() - began >= 2.9
            lock.check()
        said = capsys.readouterr().err
        assert f"going on after process {process.pid} on host node17, which has given no sign of life for" in said
        began = time.monotonic()
        Lock.take(second).release()
        assert 1.4 <= time.monotonic() - began < 2.9
        with pytest.raises(RunFolderError, match=r"in use by .* on host node17"):
            Lock.take(third)


def test_the_holder_s_timeout_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a hurry does not bury a holder that only promised to be heard now and then."""
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "0.1")
    with running(HOLD, path, FAR="1", UNLEARN_LOCK_TIMEOUT="3"), pytest.raises(RunFolderError, match="on host node17"):
        Lock.take(path)


def test_a_process_that_is_only_stopped_keeps_its_lock_from_who_does_not_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "0.5")
    with running(HOLD, path) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.2)
        with pytest.raises(RunFolderError, match=f"in use by process {process.pid}"):
            Lock.take(path)
        assert Lock.attempt(path) is None


def test_time_in_which_nothing_could_be_seen_is_no_silence(path: Path) -> None:
    """What stops both for longer than the timeout, as a batch system that suspends jobs: afterwards nobody is dead."""
    wait = f"""{PRELUDE}
sign, looks = Lock._sign, []
def look(self):
    looks.append(self)
    if len(looks) == 20:
        print("ready", flush=True)
    return sign(self)
Lock._sign = look
try:
    Lock.take(path, wait=7)
    print("took it")
except RunFolderError as e:
    print("in use" in str(e))
"""
    far = {"FAR": "1", "UNLEARN_LOCK_TIMEOUT": "2"}
    with running(HOLD, path, **far) as holder, running(wait, path, UNLEARN_LOCK_TIMEOUT="2") as waiter:
        for process in (holder, waiter):
            process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        for process in (waiter, holder):
            process.send_signal(signal.SIGCONT)
        assert waiter.communicate(timeout=60)[0] == "True\n"


def test_a_lock_that_was_removed_or_is_out_of_reach(path: Path) -> None:
    lock = Lock.take(path)
    path.unlink()
    with pytest.raises(RunFolderError, match=r"its lock .* was removed"):
        lock.check()
    path.parent.rename(path.parent.with_name("gone"))
    path.parent.write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot be reached any more"):
        lock.check()
    lock.release()


def test_a_forked_child_has_no_part_in_it(path: Path) -> None:
    code = f"""{PRELUDE}
lock = Lock.take(path)
child = os.fork()
if child == 0:
    try:
        lock.check()
    except RunFolderError as e:
        print(e, flush=True)
    lock.release()
    print("lock" in [p.name for p in path.parent.iterdir()], flush=True)
    os._exit(0)
os.waitpid(child, 0)
lock.check()
"""
    process = start(code, path)
    out, trouble = process.communicate(timeout=60)
    assert not trouble
    assert re.match(rf".*belongs to process {process.pid}, from which this one was forked\nTrue\n", out)


@pytest.mark.parametrize("given", ["x", "0", "-1", "nan", "1e9"])
def test_a_timeout_that_is_none(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", given)
    with pytest.raises(RunFolderError, match="UNLEARN_LOCK_TIMEOUT is a number of seconds"):
        seconds_of_silence()
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "")
    assert seconds_of_silence() == TIMEOUT


def test_names_that_belong_to_a_lock() -> None:
    found = [is_lock_file(name, ".l") for name in (".l", f".l.break.1.{'a' * 32}", ".lx", "x.l")]
    assert found == [True, True, False, False]
