"""Pictures through `tetrion serve` on the machine at hand: are all requests answered, in time, and at which degrees?

    python -m benchmarks.proof.served OUTPUT.json --devices cuda --model flux1-dev --load-format dummy
    python -m benchmarks.proof.served OUTPUT.json --devices cpu:2 --size 128x128 --num-requests 6 --num-steps 4
    python -m benchmarks.proof.served OUTPUT.json --devices cuda --size 256x256 --size 512x512 --rate 1500 \
        --slo-s 0.15 --profile benchmarks/workloads/wide_profile.json    # the embedded model, resized although it gains
        nothing

Starts a server of its own on a free port, waits until it is ready, sends the requests at their times whatever has
become of those before, and ends the server. A row for each size; `resized`: so many had steps at more than one degree.
`loop`: what the server's own metrics say of its loop.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving import server
from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.families.served import read_model
from tetrion.entrypoints.arguments import parse_size
from tetrion.entrypoints.bench.live import HttpSystem, check_trace
from tetrion.entrypoints.bench.outcomes import Outcome
from tetrion.entrypoints.bench.workloads import Size, Workload, make_trace
from tetrion.entrypoints.record import make_record, write_record

DEFAULT_SIZES = ("512x512", "1024x1024")


def row_of(size: Size, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What became of the requests of one size."""
    mine = [outcome for outcome in outcomes if (outcome.request.width, outcome.request.height) == size]
    drawn = [outcome for outcome in mine if outcome.finished_s is not None]
    latencies_s = [outcome.latency_s for outcome in drawn if outcome.latency_s is not None]
    return {
        "px": f"{size[0]}x{size[1]}",
        "requests": len(mine),
        "answered": len(drawn),
        "in_time": sum(outcome.is_met is True for outcome in mine),
        "resized": sum(len(set(outcome.degrees)) > 1 for outcome in drawn),
        "degrees": sorted({degree for outcome in drawn for degree in outcome.degrees}),
        "mean_s": statistics.fmean(latencies_s) if latencies_s else None,
    }


def loop_figures(metrics: str) -> dict[str, float | None]:
    """Of Prometheus' text: CPU milliseconds of the loop for each command, and the share of device time that was idle
    beside a request that could run (not on purpose). None before the first command."""
    told = {
        sample.name: sample.value for family in text_string_to_metric_families(metrics) for sample in family.samples
    }
    commands, device_s = told["tetrion_commands_total"], told["tetrion_device_seconds_total"]
    lost_s = told["tetrion_device_lost_seconds_total"] - told["tetrion_device_held_seconds_total"]
    return {
        "cpu_ms_per_command": 1e3 * told["tetrion_loop_cpu_seconds_total"] / commands if commands else None,
        "lost_share": lost_s / device_s if device_s else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--devices", default="cuda")
    parser.add_argument("--model", default=EngineConfig().models[0], help="folder or id; default: the embedded one")
    parser.add_argument("--load-format", default="safetensors", choices=("dummy", "safetensors"))
    parser.add_argument("--profile", help="the server's cost table; default: the engine's own")
    parser.add_argument("--size", action="append", type=parse_size, metavar="WxH", help="may be repeated")
    parser.add_argument("--num-steps", type=int, default=12)
    parser.add_argument("--num-requests", type=int, default=20)
    parser.add_argument("--rate", type=float, default=60.0, help="a minute")
    parser.add_argument("--slo-s", type=float, default=3.0)
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    given = parser.parse_args()
    sizes = tuple(given.size or map(parse_size, DEFAULT_SIZES))
    try:
        workload = Workload(
            rate_per_min=given.rate,
            num_requests=given.num_requests,
            num_steps=given.num_steps,
            sizes=sizes,
            base_slo_s=(given.slo_s,) * len(sizes),
        )
        engine = ("--devices", given.devices, "--model", given.model, "--load-format", given.load_format)
        engine += ("--profile", given.profile) if given.profile else ()
        trace = make_trace(workload, seed=1)
        spec = read_model(given.model, given.load_format)
        check_trace(trace, spec, len(parse_devices(given.devices)))
        begun_s = time.monotonic()
        with server(engine, given.start_timeout_s) as (url, _):
            ready_s = time.monotonic() - begun_s
            system = HttpSystem(url)
            run, _ = system.run(trace, "horizon", seed=1)
            loop = loop_figures(httpx.get(f"{url}/metrics").raise_for_status().text)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"served: error: {error}")
    rows = [row_of(size, run.outcomes) for size in sizes]
    record = make_record(f"python -m benchmarks.proof.served {shlex.join(sys.argv[1:])}", rows)
    known_j = [joules for joules in run.joules or () if joules is not None]
    record |= {
        "system": system.facts | {"num_devices": system.num_devices, "ready_s": ready_s, "url": "of its own"},
        "loop": loop,
        "mean_joules": statistics.fmean(known_j) if known_j else None,
    }
    write_record(record, given.output)
    for row in (*rows, loop):
        print(row)


if __name__ == "__main__":
    main()
