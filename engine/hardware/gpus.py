"""Which GPUs this machine offers, found without torch and without touching them: the engine process imports no CUDA.

Owns the ways to ask, in order: NVML, the driver's folder in /proc, `nvidia-smi -L`; and CUDA_VISIBLE_DEVICES.
"""

import contextlib
import functools
import importlib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

PROC_GPUS = Path("/proc/driver/nvidia/gpus")
ASK_TIMEOUT_S = 10.0


def visible_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Names of the GPUs that CUDA will see, by its index; empty if there is none."""
    names = installed_gpus()
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    return names if wanted is None else tuple(_chosen(wanted, names))


@functools.cache
def installed_gpus() -> tuple[str, ...]:
    """Names of all GPUs that the driver shows to this process."""
    for ask in (_ask_nvml, _ask_proc, _ask_smi):
        if names := ask():
            return names
    return ()


def _chosen(wanted: str, names: tuple[str, ...]) -> list[str]:
    """As CUDA reads its variable: numbers or UUIDs, up to the first that is not there."""
    chosen = []
    for entry in wanted.split(","):
        entry = entry.strip()
        if entry.isdecimal() and int(entry) < len(names):
            chosen.append(names[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")):
            chosen.append(names[0] if names else "GPU")
        else:
            break
    return chosen


def _ask_nvml() -> tuple[str, ...]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return ()
    names: tuple[str, ...] = ()
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        names = tuple(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles)
        nvml.nvmlShutdown()
    return names


def _ask_proc() -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(_model(folder / "information") for folder in sorted(PROC_GPUS.iterdir()))
    return ()


def _ask_smi() -> tuple[str, ...]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=True)
        return tuple(re.findall(r"^GPU \d+: (.*?) \(UUID", listed.stdout, re.MULTILINE))
    return ()


def _model(information: Path) -> str:
    match = re.search(r"^Model:\s*(.+)$", information.read_text(), re.MULTILINE)
    return match[1].strip() if match else "GPU"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
