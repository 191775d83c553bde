"""One target under atheris: ``python atheris_run.py TARGET CORPUS [libFuzzer options]``. 0: nothing is found."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

name, corpus = sys.argv[1], Path(sys.argv[2])
with atheris.instrument_imports(include=["unlearn"]):
    from targets import TARGETS

target = TARGETS[name]
for number, seed in enumerate(target.seeds):
    (corpus / f"seed{number}").write_bytes(seed)
words = corpus.with_suffix(".words")
words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word[:60]) + '"\n' for word in target.words))


def one(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target.read(raw, Path(folder))


atheris.Setup([sys.argv[0], f"-dict={words}", *sys.argv[3:], str(corpus)], one)
atheris.Fuzz()
