"""Facts about the machine, for cache keys and for the records of measurements."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_host() -> dict[str, Any]:
    """What stands in the `host` field of every result: processor, cores, load, versions."""
    return {
        "cpu": cpu_name(),
        "num_cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }
