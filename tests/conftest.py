"""For all tests: without a GPU, Triton interprets its kernels. It decides that when it is imported: before all else."""

import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")
