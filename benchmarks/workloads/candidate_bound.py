"""What it costs that `horizon` weighs only so many of the most urgent requests against each other (`max_candidates`).

    python -m benchmarks.workloads.candidate_bound benchmarks/results/candidate-bound.json

Overloaded 8-device workloads with tight and with loose deadlines (the looser, the more requests are candidates at
once), each with the default bound and with none, on the same traces. Prints and writes attainment.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.entrypoints.bench.simulation import simulate
from tetrion.entrypoints.bench.workloads import Workload, base_slo_s, make_trace
from tetrion.entrypoints.record import make_record, write_record

NUM_DEVICES = 8
POINTS = ((60.0, 1.2), (60.0, 6.0), (120.0, 1.2), (120.0, 20.0))
"""Requests per minute, SLO scale."""
UNBOUNDED = 1_000_000


def run_point(
    profile: Profile, point: tuple[float, float], num_requests: int, seeds: list[int], max_candidates: int | None
) -> dict[str, Any]:
    """A row: attainment over all seeds."""
    rate_per_min, slo_scale = point
    workload = Workload(
        rate_per_min=rate_per_min, num_requests=num_requests, slo_scale=slo_scale, base_slo_s=base_slo_s(NUM_DEVICES)
    )
    config = PlannerConfig(max_candidates=max_candidates)
    shares = []
    for seed in seeds:
        run = simulate(
            make_trace(workload, seed),
            profile=profile,
            policy="horizon",
            num_devices=NUM_DEVICES,
            planner_config=config,
        )
        shares.append(statistics.fmean(bool(outcome.is_met) for outcome in run.outcomes))
    return {
        "rate_per_min": rate_per_min,
        "slo_scale": slo_scale,
        "bound": "default" if max_candidates is None else "none",
        "requests": num_requests * len(seeds),
        "attainment": statistics.fmean(shares),
        "attainment_by_seed": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--profile", type=Path, default=Path(__file__).parent / "prototype_profile.json")
    parser.add_argument("--num-requests", type=int, default=500)
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12])
    given = parser.parse_args()
    profile, rows = read_profile(given.profile), []
    for point in POINTS:
        for max_candidates in (None, UNBOUNDED):
            rows.append(run_point(profile, point, given.num_requests, given.seeds, max_candidates))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    command = f"python -m benchmarks.workloads.candidate_bound {shlex.join(sys.argv[1:])}"
    write_record(make_record(command, rows), given.output)


if __name__ == "__main__":
    main()
