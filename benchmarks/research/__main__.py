"""`python -m benchmarks.research`: see `commands.py`."""

import sys

from benchmarks.research.commands import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
