"""`python -m benchmarks.soak`: see `commands.py`."""

import sys

from benchmarks.soak.commands import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
