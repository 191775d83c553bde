"""Runs the command line under Python's audit hooks and writes down what it did: ``python watch.py LOG ARGUMENT...``.

One JSON list per line: ``["write", path]``, ``["network", call, address]``, ``["unpickle", module, name]``,
``["process", program, arguments]``. What compiled code does by itself (safetensors and tokenizers writing their files)
is not seen here; the tests look at the folders for that.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir": 0, "os.rmdir": 0, "os.remove": 0, "os.truncate": 0, "os.rename": 1, "os.link": 1}
CHANGES |= {"os.symlink": 1, "shutil.rmtree": 0, "shutil.copyfile": 1, "shutil.copytree": 1, "shutil.move": 1}
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
PROCESS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def install(log: Any) -> None:
    """Add the hook. It cannot be taken off again."""
    busy = False

    def note(*event: Any) -> None:
        log.write(json.dumps(event, default=repr) + "\n")
        log.flush()

    def path_of(value: Any) -> str | None:
        if isinstance(value, int) or value is None:
            return None
        return os.path.abspath(os.fsdecode(value))  # noqa: PTH100 - pathlib's would ask the file system

    def hook(name: str, given: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            if name == "open":
                file, mode, flags = given
                writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITING)
                if writes and (path := path_of(file)) is not None:
                    note("write", path)
            elif name in CHANGES and not (
                name in ("os.remove", "os.rmdir") and given[1] != -1
            ):  # beside an open folder
                places = given[:2] if name == "os.rename" else given[CHANGES[name] : CHANGES[name] + 1]
                for place in places:
                    if (path := path_of(place)) is not None:
                        note("write", path)
            elif name in NETWORK:
                note("network", name, repr(given[1:] if name == "socket.connect" else given))
            elif name == "pickle.find_class":
                note("unpickle", *given)
            elif name in PROCESS:
                note("process", repr(given[0]), repr(given[1:2]))
        finally:
            busy = False

    sys.addaudithook(hook)


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:  # noqa: PTH123 - nothing is imported before the hook
        install(file)
        from unlearn.cli import main

        code = main(sys.argv[2:])
        file.flush()
        os._exit(code)  # what other libraries do at the end of a process is not the run's
