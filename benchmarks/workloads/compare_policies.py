"""Simulated attainment of the policies at the points of a yardstick file, beside the values it records.

    python -m benchmarks.workloads.compare_policies POINTS.json --policies horizon tetriserve --seeds 11 12

The file holds `profile`, `overheads`, `trace` and `points` (as the one that the planner's design was measured with).
Every policy sees the same traces. Prints one line per point and policy: simulated, recorded, difference.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.planning.profile import Profile
from tetrion.engine.simulated import Disturbance
from tetrion.entrypoints.bench.simulation import simulate
from tetrion.entrypoints.bench.workloads import Workload, make_trace

TABLE = (
    (8, "uniform", 12.0, 1.0),
    (8, "uniform", 12.0, 1.5),
    (8, "uniform", 24.0, 1.2),
    (8, "uniform", 36.0, 1.2),
    (8, "uniform", 60.0, 1.2),
    (8, "skewed", 12.0, 1.2),
    (8, "skewed", 24.0, 1.2),
    (4, "uniform", 12.0, 1.2),
    (4, "uniform", 20.0, 1.2),
)
"""Devices, mix, requests per minute, SLO scale: the rows of the design's table."""
RECORDED_NAMES = {"tetriserve": "tetriserve-g5"}


def attainment(data: dict[str, Any], point: dict[str, Any], policy: str, seeds: list[int]) -> float:
    """Mean over seeds of the share of requests finished by their deadline."""
    workload = Workload(
        rate_per_min=point["rate_per_min"],
        num_requests=data["trace"]["num_requests"],
        num_steps=data["trace"]["num_steps"],
        mix=point["mix"],
        slo_scale=point["slo_scale"],
        base_slo_s=tuple(data["trace"]["base_slo_s"][str(point["devices"])]),
    )
    profile = msgspec.convert(data["profile"], Profile, strict=False)
    overheads = data["overheads"]
    shares = []
    for seed in seeds:
        run = simulate(
            make_trace(workload, seed),
            profile=profile,
            policy=policy,
            num_devices=point["devices"],
            duration=Disturbance(
                step_overhead_s=overheads["dispatch_ms_per_step"] / 1e3, regroup_s=overheads["regroup_ms"] / 1e3
            ),
        )
        shares.append(statistics.fmean(bool(outcome.is_met) for outcome in run.outcomes))
    return statistics.fmean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path)
    parser.add_argument("--policies", nargs="+", default=["horizon"])
    parser.add_argument("--seeds", nargs="+", type=int, help="Default: those of each point.")
    parser.add_argument("--all", action="store_true", help="Every point of the file, not only the design's table.")
    parser.add_argument("--output", type=Path, help="Write the rows there as JSON.")
    arguments = parser.parse_args()
    data = json.loads(arguments.points.read_text())
    rows = []
    for point in data["points"]:
        key = (point["devices"], point["mix"], point["rate_per_min"], point["slo_scale"])
        if not arguments.all and key not in TABLE:
            continue
        for policy in arguments.policies:
            simulated = attainment(data, point, policy, arguments.seeds or point["seeds"])
            recorded = point["attainment"].get(RECORDED_NAMES.get(policy, policy))
            rows.append({"point": key, "policy": policy, "simulated": simulated, "recorded": recorded})
            difference = "" if recorded is None else f"{recorded:8.3f} {simulated - recorded:+.3f}"
            print(f"{key!s:34} {policy:22} {simulated:.3f} {difference}", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
