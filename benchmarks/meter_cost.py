"""What one question to NVML costs, in wall and CPU time: how often the sampler of joules may ask.

    python -m benchmarks.meter_cost OUTPUT.json      on a GPU, some seconds

Every question is asked of every GPU in turn, at the sampler's own pace and back to back. `moved_s`: how often the
answer changed. A question that the driver does not answer is a row with null and the reason.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml

from tetrion.engine.energy.meters.nvml import POWER_INSTANT
from tetrion.entrypoints.record import make_record, write_record

TOTAL_ENERGY = 83
"""NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION"""
POWER_SAMPLES = 0
"""NVML_TOTAL_POWER_SAMPLES"""
PACES_S = (0.0, 0.1)
SECONDS = 2.0
Row = dict[str, Any]


def questions() -> dict[str, Callable[[Any], Any]]:
    def fields(*ids: int) -> Callable[[Any], Any]:
        return lambda handle: tuple(f.value.ullVal for f in pynvml.nvmlDeviceGetFieldValues(handle, list(ids)))

    return {
        "energy counter": pynvml.nvmlDeviceGetTotalEnergyConsumption,
        "power, a second's mean": pynvml.nvmlDeviceGetPowerUsage,
        "power now, as a field": fields(POWER_INSTANT),
        "energy counter, as a field": fields(TOTAL_ENERGY),
        "both fields at once": fields(TOTAL_ENERGY, POWER_INSTANT),
        "the driver's power samples": _samples,
    }


def _samples(handle: Any) -> tuple[int, int]:
    """How many the driver holds, and the microseconds that they span."""
    _, samples = pynvml.nvmlDeviceGetSamples(handle, POWER_SAMPLES, 0)
    return len(samples), samples[-1].timeStamp - samples[0].timeStamp


def ask(name: str, question: Callable[[Any], Any], handles: list[Any], pace_s: float) -> Row:
    row: Row = {"question": name, "num_gpus": len(handles), "pace_s": pace_s}
    wall_ms, cpu_ms, changes, last = [], [], 0, None
    until_s = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until_s:
            began_s, began_cpu_s = time.monotonic(), time.thread_time()
            answers = [question(handle) for handle in handles]
            wall_ms.append(1e3 * (time.monotonic() - began_s) / len(handles))
            cpu_ms.append(1e3 * (time.thread_time() - began_cpu_s) / len(handles))
            changes += answers[0] != last
            last = answers[0]
            time.sleep(pace_s)
    except (pynvml.NVMLError, AttributeError, IndexError) as error:
        return row | {"wall_ms": None, "cpu_ms": None, "reason": repr(error)}
    return row | {
        "wall_ms": statistics.median(wall_ms),
        "cpu_ms": statistics.mean(cpu_ms),
        "slowest_wall_ms": max(wall_ms),
        "moved_s": SECONDS / changes,
        "last": str(last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    rows = []
    for name, question in questions().items():
        for pace_s in PACES_S:
            rows.append(ask(name, question, handles, pace_s))
            print(rows[-1], flush=True)
    write_record(make_record(f"python -m benchmarks.meter_cost {shlex.join(sys.argv[1:])}", rows), arguments.output)


if __name__ == "__main__":
    main()
