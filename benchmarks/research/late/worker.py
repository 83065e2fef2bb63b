"""Simulates traces with whatever `tetrion` is importable, today's or an older one's: the process behind `runs.py`.

    python -P worker.py PROFILE.json < JOBS.jsonl

A job is {"trace", "devices", "policy", "options", "output"}; its output {"finished_s", "device_s", "refused", "cpu_s",
"decision_ms"}: of each request when it ended (null: never) and what device time it took, whether admission refused it;
of the run its CPU time and the planner's (mean, 99th percentile). A line of stdout for each that is done. Uses only
what commit c151ae8 has, too.
"""

import json
import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from tetrion.engine.config import PlannerConfig
from tetrion.entrypoints.bench import simulation
from tetrion.entrypoints.bench.workloads import read_trace

STEP_OVERHEAD_S, REGROUP_S = 0.0003, 0.0002
"""As `tetrion bench slo --simulate`."""


def main() -> None:
    profile = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=simulation.Profile)
    for line in sys.stdin:
        job = json.loads(line)
        config = PlannerConfig(policy=job["policy"], options=job["options"]) if job["options"] else PlannerConfig()
        started_s = time.process_time()
        run = simulation.simulate(
            read_trace(Path(job["trace"])),
            profile=profile,
            policy=job["policy"],
            num_devices=job["devices"],
            duration=simulation.Disturbance(step_overhead_s=STEP_OVERHEAD_S, regroup_s=REGROUP_S),
            planner_config=config,
        )
        decision_ms = 1e3 * np.array(run.decision_s)
        done = {
            "finished_s": [None if o.finished_s is None else round(o.finished_s, 4) for o in run.outcomes],
            "device_s": [round(o.gpu_s or 0.0, 4) for o in run.outcomes],
            "refused": [number for number, o in enumerate(run.outcomes) if getattr(o, "refused", False)],
            "cpu_s": round(time.process_time() - started_s, 2),
            "decision_ms": [round(float(decision_ms.mean()), 4), round(float(np.percentile(decision_ms, 99)), 4)],
        }
        output = Path(job["output"])
        temporary = output.with_suffix(".part")
        temporary.write_text(json.dumps(done, separators=(",", ":")))
        os.replace(temporary, output)
        print(job["output"], flush=True)


if __name__ == "__main__":
    main()
