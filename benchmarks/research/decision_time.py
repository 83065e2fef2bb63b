"""How long one decision of each policy takes, by requests and devices; a JSON file and a plot.

    python -m benchmarks.research.decision_time benchmarks/results/decision-time.json

Snapshots are random states of a busy server: sizes as in the uniform mix, requests at any step, SLOs from tight to
loose, most devices in a chunk and at least one idle. Every snapshot is decided `REPEATS` times and its fastest time
counts (CPU time: what other processes take is not the planner's); percentiles are over snapshots. The plot lies beside
the JSON file. The 99th percentiles that the project asks of `horizon` are 1, 5 and 50 ms at the points in `ASKED_MS`.
"""

import argparse
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.slo import urgency
from tetrion.engine.planning.snapshot import DeviceView, Planner, RequestView, Snapshot
from tetrion.engine.shape import cost_key_of_size
from tetrion.entrypoints.bench.workloads import SIZES
from tetrion.entrypoints.record import make_record, write_record

Row = dict[str, Any]
POLICIES = ("horizon", "tetriserve", "tetriserve-continuous", "edf-best-fit", "rssp", "fixed-1", "fixed-2", "fixed-4")
DEVICES = (4, 8, 64)
REQUESTS = (5, 20, 100, 300, 1000)
ASKED_MS = {(20, 8): 1.0, (100, 8): 5.0, (1000, 64): 50.0}
BASE_SLO_S = (1.5, 2.0, 3.0, 5.0)
SLO_SCALES = (1.0, 3.0, 10.0, 40.0)
REPEATS = 3
NUM_STEPS = 28
NOW_S = 10_000.0


def make_snapshot(draw: random.Random, num_requests: int, num_devices: int, tables: DegreeTables) -> Snapshot:
    """A random state with so many requests. Those past their deadline are its backlog, as the engine has it."""
    config, heads = PlannerConfig(), tables.costs.profiles[""].heads
    legal = tuple(n for n in range(1, num_devices + 1) if heads % n == 0)
    free_s = dict.fromkeys(range(num_devices), NOW_S)
    unheld = list(range(draw.randint(1, max(1, num_devices // 4)), num_devices))
    requests, backlog = [], []
    for number in range(num_requests):
        (width, height), base_slo_s = draw.choice(list(zip(SIZES, BASE_SLO_S, strict=True)))
        slo_s = base_slo_s * draw.choice(SLO_SCALES)
        arrival_s = NOW_S - draw.uniform(0, slo_s) * draw.choice((0.3, 0.6, 1.5))
        stage = draw.choices(("encode", "denoise", "decode"), (1, 27, 1))[0]
        degree, members, ready_s = draw.choice(legal), (), arrival_s
        if stage == "denoise" and len(unheld) >= degree:
            members, unheld = tuple(unheld[:degree]), unheld[degree:]
            ready_s = NOW_S + draw.uniform(0.006, 0.150)
            free_s.update(dict.fromkeys(members, ready_s))
        elif stage != "encode":
            members = (draw.randrange(num_devices),)
        view = RequestView(
            request_id=f"{number:06d}",
            stage=stage,  # type: ignore[arg-type]
            model="",
            cost_key=cost_key_of_size((width, height)),
            step_index={"encode": 0, "decode": NUM_STEPS}.get(stage, draw.randrange(NUM_STEPS)),
            num_steps=NUM_STEPS,
            arrival_s=arrival_s,
            deadline_s=arrival_s + slo_s,
            ready_s=ready_s,
            members=members,
        )
        is_overdue = stage == "denoise" and ready_s <= NOW_S and arrival_s + slo_s < NOW_S
        (backlog if is_overdue else requests).append(view)
    return Snapshot(
        now_s=NOW_S,
        requests=tuple(sorted(requests, key=lambda view: urgency(view, config))),
        devices=tuple(DeviceView(device_id=device, free_s=time_s) for device, time_s in free_s.items()),
        tables=tables,
        config=config,
        backlog=tuple(sorted(backlog, key=lambda view: urgency(view, config))),
    )


def decision_ms(planner: Planner, snapshot: Snapshot) -> float:
    """The fastest of `REPEATS` decisions."""
    fastest_s = float("inf")
    for _ in range(REPEATS):
        start_s = time.thread_time()
        planner(snapshot)
        fastest_s = min(fastest_s, time.thread_time() - start_s)
    return fastest_s * 1e3


def measure(profile: Profile, policies: list[str], num_snapshots: int) -> list[Row]:
    """A row for every policy, number of devices and number of requests."""
    rows, costs = [], CostTables(profiles={"": profile})
    for num_devices in DEVICES:
        tables = DegreeTables(costs, num_devices)
        for num_requests in REQUESTS:
            draw = random.Random(f"{num_requests} requests, {num_devices} devices")
            snapshots = [make_snapshot(draw, num_requests, num_devices, tables) for _ in range(num_snapshots)]
            for policy in policies:
                planner = get_planner(policy)
                planner(snapshots[0])  # what is worked out once for a profile
                times_ms = np.array([decision_ms(planner, snapshot) for snapshot in snapshots])
                asked_ms = ASKED_MS.get((num_requests, num_devices)) if policy == "horizon" else None
                rows.append(
                    {
                        "policy": policy,
                        "requests": num_requests,
                        "devices": num_devices,
                        "snapshots": num_snapshots,
                        "mean_ms": float(times_ms.mean()),
                        "p50_ms": float(np.percentile(times_ms, 50)),
                        "p99_ms": float(np.percentile(times_ms, 99)),
                        "max_ms": float(times_ms.max()),
                        "asked_p99_ms": asked_ms,
                    }
                )
                asked = "" if asked_ms is None else f" (asked: {asked_ms:g})"
                print(
                    f"{policy:22} {num_requests:5} x {num_devices:2}: mean {rows[-1]['mean_ms']:7.3f}"
                    f"  p50 {rows[-1]['p50_ms']:7.3f}  p99 {rows[-1]['p99_ms']:7.3f} ms{asked}",
                    flush=True,
                )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """99th percentiles against requests, a panel for each number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(DEVICES), figsize=(4.2 * len(DEVICES), 4.2), sharey=True)
    for panel, num_devices in zip(panels, DEVICES, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = [row for row in rows if (row["policy"], row["devices"]) == (policy, num_devices)]
            width = 2.5 if policy == "horizon" else 1.2
            panel.loglog([p["requests"] for p in points], [p["p99_ms"] for p in points], "o-", lw=width, label=policy)
        asked = [(requests, ms) for (requests, devices), ms in ASKED_MS.items() if devices == num_devices]
        if asked:
            panel.plot(*zip(*asked, strict=True), "kv", label="asked of horizon")
        panel.set_title(f"{num_devices} devices")
        panel.set_xlabel("requests")
        panel.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("decision time, 99th percentile (ms)")
    labels = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--profile", type=Path, default=Path(__file__).parents[1] / "workloads" / "prototype_profile.json"
    )
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--snapshots", type=int, default=300)
    parser.add_argument("--commit", help="The commit to record. Default: what git says.")
    given = parser.parse_args()
    rows = measure(read_profile(given.profile), given.policies, given.snapshots)
    record = make_record(f"python -m benchmarks.research.decision_time {shlex.join(sys.argv[1:])}", rows)
    if given.commit is not None:
        record["commit"] = given.commit
    write_record(record, given.output)
    plot(rows, given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
