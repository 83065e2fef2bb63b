"""How long one decision of each policy takes, by requests and devices; a JSON file and a plot.

    python -m benchmarks.research.decision_time benchmarks/results/decision-time.json

Two kinds of state. "mixed": random states of a busy server, sizes as in the uniform mix, requests at any step, SLOs
from tight to loose, most devices in a chunk and at least one idle. "late": states that a simulated engine was in under
`horizon` at 1.5 times what its devices can do, with as many requests in flight as the point has; four of five state an
SLO, which at least half of those have missed, and six tenants send them, one of them half.

Every state is decided `REPEATS` times and its fastest time counts (CPU time: what other processes take is not the
planner's); percentiles are over states. The plot lies beside the JSON file. The 99th percentiles that the project asks
of `horizon` are in `ASKED_MS`.
"""

import argparse
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.slo import turn, urgency
from tetrion.engine.planning.snapshot import DeviceView, Planner, RequestView, RoundPlan, Snapshot
from tetrion.engine.shape import cost_key_of_size
from tetrion.entrypoints.bench.compression import load_of
from tetrion.entrypoints.bench.recording import Recorder
from tetrion.entrypoints.bench.simulation import simulate
from tetrion.entrypoints.bench.workloads import SIZES, Trace, Workload, class_shares, make_trace
from tetrion.entrypoints.record import make_record, write_record

Row = dict[str, Any]
POLICIES = ("horizon", "edf", "tetriserve", "tetriserve-continuous", "edf-best-fit", "rssp", "fixed-2")
POINTS = ((20, 8), (100, 8), (160, 64), (1000, 64), (640, 256))
"""Requests, devices."""
ASKED_MS = {(20, 8): 0.3, (160, 64): 1.0, (640, 256): 15.0}
BASE_SLO_S = (1.5, 2.0, 3.0, 5.0)
SLO_SCALES = (1.0, 3.0, 10.0, 40.0)
REPEATS = 3
NUM_STEPS = 28
NOW_S = 10_000.0
OVERLOAD, SLO_SHARE = 1.5, 0.8
TENANTS = ("A", "A", "A", "A", "A", "B", "C", "D", "E", "F")
"""A request is one of these, each as likely."""
BETWEEN = 7
"""A state is kept of so many decisions."""


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
        backlog=tuple(sorted(backlog, key=lambda view: turn(view, tables[view.model, view.cost_key]))),
    )


class _EnoughError(BaseException):
    """Ends a simulation; no `Exception`, which the loop would take for a planner's failure."""


def late_snapshots(num_requests: int, num_devices: int, profile: Profile, num_snapshots: int) -> list[Snapshot]:
    """States of an engine that has been overloaded since it began, once all places in flight are taken and half of
    those that stated an SLO have missed it."""
    kept: list[Snapshot] = []
    seen = 0

    def planner(snapshot: Snapshot) -> RoundPlan:
        nonlocal seen
        if _is_late(snapshot, num_requests):
            seen += 1
            if seen % BETWEEN == 0:
                kept.append(snapshot)
            if len(kept) == num_snapshots:
                raise _EnoughError
        return horizon(snapshot)

    horizon, recorder = get_planner("horizon"), Recorder()
    recorder.planner = planner
    trace = _overload(num_requests, num_devices, profile)
    try:
        simulate(
            trace,
            profile=profile,
            policy="horizon",
            num_devices=num_devices,
            max_inflight=num_requests,
            recorder=recorder,
        )
    except _EnoughError:
        return kept
    raise RuntimeError(f"{num_requests} x {num_devices}: {len(kept)} late states in place of {num_snapshots}")


def _is_late(snapshot: Snapshot, num_requests: int) -> bool:
    requests = snapshot.all_requests
    deadlines = [request.deadline_s for request in requests if request.deadline_s is not None]
    num_late = sum(deadline_s < snapshot.now_s for deadline_s in deadlines)
    return len(requests) >= 0.9 * num_requests and 2 * num_late >= len(deadlines)


def _overload(num_requests: int, num_devices: int, profile: Profile) -> Trace:
    """As many requests at once as may be in flight, most of which have no time, and then more than can be done."""
    of_one = load_of(1.0, profile, SIZES, class_shares("uniform").tolist(), NUM_STEPS, num_devices)
    workload = Workload(
        rate_per_min=OVERLOAD / of_one,
        num_requests=12 * num_requests,
        num_steps=NUM_STEPS,
        base_slo_s=BASE_SLO_S,
        slo_share=SLO_SHARE,
    )
    draw = random.Random(f"tenants of {num_requests} requests")
    trace = make_trace(workload, num_requests)
    begin_s = trace[num_requests].arrival_s
    return tuple(
        msgspec.structs.replace(
            request,
            arrival_s=max(0.0, request.arrival_s - begin_s),
            slo_s=request.slo_s and request.slo_s * (0.1 if number < num_requests and draw.random() < 0.7 else 1.0),
            tenant=draw.choice(TENANTS),
        )
        for number, request in enumerate(trace)
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
    """A row for every policy, point and kind of state."""
    rows, costs = [], CostTables(profiles={"": profile})
    for num_requests, num_devices in POINTS:
        tables = DegreeTables(costs, num_devices)
        draw = random.Random(f"{num_requests} requests, {num_devices} devices")
        states = {
            "mixed": [make_snapshot(draw, num_requests, num_devices, tables) for _ in range(num_snapshots)],
            "late": late_snapshots(num_requests, num_devices, profile, num_snapshots),
        }
        for kind, snapshots in states.items():
            for policy in policies:
                row = _row(policy, snapshots) | {"state": kind, "requests": num_requests, "devices": num_devices}
                row["asked_p99_ms"] = ASKED_MS.get((num_requests, num_devices)) if policy == "horizon" else None
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _row(policy: str, snapshots: list[Snapshot]) -> Row:
    planner = get_planner(policy)
    planner(snapshots[0])  # what is worked out once for a profile
    times_ms = np.array([decision_ms(planner, snapshot) for snapshot in snapshots])
    return {
        "policy": policy,
        "states": len(snapshots),
        "mean_ms": round(float(times_ms.mean()), 4),
        "p50_ms": round(float(np.percentile(times_ms, 50)), 4),
        "p99_ms": round(float(np.percentile(times_ms, 99)), 4),
        "max_ms": round(float(times_ms.max()), 4),
    }


def _line(row: Row) -> str:
    asked = "" if row["asked_p99_ms"] is None else f" (asked: {row['asked_p99_ms']:g})"
    return (
        f"{row['policy']:22} {row['requests']:5} x {row['devices']:3} {row['state']:5}: mean {row['mean_ms']:7.3f}"
        f"  p50 {row['p50_ms']:7.3f}  p99 {row['p99_ms']:7.3f} ms{asked}"
    )


def plot(rows: list[Row], path: Path) -> None:
    """99th percentiles at each point, a panel for each kind of state."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["state"] for row in rows))
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 3.8), sharey=True, squeeze=False)
    places = {point: place for place, point in enumerate(POINTS)}
    for panel, kind in zip(panels[0], kinds, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            found = [row for row in rows if (row["policy"], row["state"]) == (policy, kind)]
            at = [places[row["requests"], row["devices"]] for row in found]
            width = 2.5 if policy == "horizon" else 1.2
            panel.semilogy(at, [row["p99_ms"] for row in found], "o-", lw=width, label=policy)
        panel.plot([places[point] for point in ASKED_MS], list(ASKED_MS.values()), "kv", label="asked of horizon")
        panel.set_title(f"{kind} states")
        panel.set_xticks(range(len(POINTS)), [f"{requests} × {devices}" for requests, devices in POINTS], fontsize=8)
        panel.set_xlabel("requests × devices")
        panel.grid(True, axis="y", alpha=0.25)
    panels[0][0].set_ylabel("decision time, 99th percentile (ms)")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--profile", type=Path, default=Path(__file__).parents[1] / "workloads" / "prototype_profile.json"
    )
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--snapshots", type=int, default=300, help="States of each point and kind.")
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
