"""``python -m unlearn`` is the command ``unlearn``."""

import sys

from unlearn.cli import main

if __name__ == "__main__":
    sys.exit(main())
