"""The table of faults: runs the fault tests and prints, per kind of fault, its points and what became of them.

python tests/faults/table.py              what CI runs
python tests/faults/table.py -m 'slow or not slow'    everything; other arguments go to pytest as well
python tests/faults/table.py --read FILE  a ledger written before ($UNLEARN_FAULT_LEDGER)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def main(argv: Sequence[str]) -> int:
    """Print the table; the exit code is pytest's."""
    from fault_arena import table

    if list(argv[:1]) == ["--read"]:
        print(table(Path(argv[1]).read_text(encoding="utf-8").splitlines()))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.jsonl"
        ledger.touch()
        command = [sys.executable, "-m", "pytest", str(HERE), *argv]
        done = subprocess.run(command, check=False, env={**os.environ, "UNLEARN_FAULT_LEDGER": str(ledger)})
        print(table(ledger.read_text(encoding="utf-8").splitlines()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
