"""CPU time of one submit beside so many queued requests, with and without a deadline; a JSON file.

    python -m benchmarks.research.submit_time out/submit-time.json

A loop on simulated devices, whose slots are full, under `admission=reject-hopeless`. What is queued has no deadline, or
one that can be met; the newcomers have none, one that is met before all of these, or one in the midst of them. Every
newcomer is cancelled before the next one comes. Medians of single submits.
"""

import argparse
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.errors import DeadlineUnmeetable
from tetrion.engine.executors.simulated import SimulatedExecutor
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.params import Params
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.request import ImageRequest, ResolvedRequest
from tetrion.engine.shape import StepShape
from tetrion.entrypoints.bench.workloads import SIZES
from tetrion.entrypoints.record import make_record, write_record

QUEUED = (0, 250, 1000, 4000)
DEVICES = (2, 8)
MAX_INFLIGHT = 64
NUM_SUBMITS = 400
NUM_STEPS = 28
SLOWEST_S = 60.0
"""More than a picture takes on one device; so much time has the first in the queue, and more those behind it."""
NEWCOMERS: dict[str, float | None] = {"none": None, "short": 20.0, "long": 0.5}
"""Deadlines in seconds; that of "long" is a share of the last one of all."""


class Filled:
    """A loop with `num_queued` requests in its queue."""

    def __init__(self, profile: Profile, num_devices: int, num_queued: int, have_deadlines: bool) -> None:
        costs = CostTables(profiles={"": profile})
        self.loop = EngineLoop(
            executor=SimulatedExecutor(costs, num_devices),
            planner=get_planner("horizon"),
            cost_models=CostModels(costs.profiles),
            config=EngineConfig(
                max_inflight=MAX_INFLIGHT, max_queued=5000, planner=PlannerConfig(admission="reject-hopeless")
            ),
            outputs=lambda output: None,
        )
        self._draw = random.Random(num_queued)
        self._num_requests = 0
        for number in range(num_queued + MAX_INFLIGHT):
            self.last_s = SLOWEST_S * (1 + number / num_devices)
            self.loop.submit(self.newcomer(self.last_s if have_deadlines else None))
            if number < MAX_INFLIGHT:
                self.loop.admit()
        assert self.loop.table.num_queued == num_queued

    def newcomer(self, slo_s: float | None) -> ResolvedRequest:
        self._num_requests += 1
        width, height = self._draw.choice(SIZES)
        asked = ImageRequest(
            prompt="x", request_id=f"{self._num_requests:06d}", slo_ms=None if slo_s is None else slo_s * 1e3
        )
        shape = StepShape(width=width, height=height, image=width * height // 256, text=(512,))
        return ResolvedRequest(
            asked=asked, params=Params(model="", shape=shape, num_steps=NUM_STEPS, guidance=0.0, seed=1)
        )

    def submit_us(self, slo_s: float | None) -> float:
        """CPU time of a submit."""
        resolved = self.newcomer(slo_s)
        begun_s = time.thread_time()
        try:
            self.loop.submit(resolved)
        except DeadlineUnmeetable:
            return (time.thread_time() - begun_s) * 1e6
        took_s = time.thread_time() - begun_s
        self.loop.cancel(resolved.asked.request_id)
        self.loop.admit()
        return took_s * 1e6


def measure(profile: Profile) -> list[dict[str, Any]]:
    rows = []
    for num_devices in DEVICES:
        for have_deadlines in (False, True):
            for num_queued in QUEUED:
                filled = Filled(profile, num_devices, num_queued, have_deadlines)
                for name, slo_s in NEWCOMERS.items():
                    slo_s = filled.last_s * slo_s if name == "long" and slo_s else slo_s
                    times_us = [filled.submit_us(slo_s) for _ in range(NUM_SUBMITS)]
                    rows.append(
                        {
                            "devices": num_devices,
                            "queued": num_queued,
                            "queued_have_deadlines": have_deadlines,
                            "newcomers_deadline": name,
                            "p50_us": round(statistics.median(times_us), 1),
                            "p95_us": round(statistics.quantiles(times_us, n=20)[-1], 1),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--profile", type=Path, default=Path(__file__).parents[1] / "workloads" / "prototype_profile.json"
    )
    given = parser.parse_args()
    rows = measure(read_profile(given.profile))
    write_record(
        make_record(f"python -m benchmarks.research.submit_time {shlex.join(sys.argv[1:])}", rows), given.output
    )


if __name__ == "__main__":
    main()
