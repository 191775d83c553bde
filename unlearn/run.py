"""``python -m unlearn.run --recipe R``: the same as ``unlearn run R``, for good."""

from __future__ import annotations

import sys

if __name__ != "__main__":
    # imported, this module would take the place of the function of its name
    raise ImportError("unlearn.run is a command; from Python: `from unlearn import run`")

from unlearn.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
