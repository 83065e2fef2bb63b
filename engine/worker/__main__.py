"""A worker in an interpreter of its own: `python -m tetrion.engine.worker SPEC`, a `WorkerSpec` as JSON."""

import sys

import msgspec

from tetrion.engine.worker.entry import run
from tetrion.engine.worker.spec import WorkerSpec

if __name__ == "__main__":
    run(msgspec.json.decode(sys.argv[1], type=WorkerSpec))
