"""The live proof: every policy on the same traces, back to back on one engine, in compressed time.

    python -m benchmarks.live_proof out/live --devices cuda:0,1 --model flux1-dev --load-format dummy --mix uniform
    python -m benchmarks.live_proof out/live --devices cpu:2 --size 128x128 --size 256x256 --base-slo 5 --base-slo 10 \
        --num-requests 8        # a rehearsal without GPUs

Time is compressed by 4: 7 steps of 28, times between arrivals and what SLOs leave for denoising divided by 4, encode
and decode whole. Base SLOs are the published ones times one factor, so that the largest size alone takes its SLO / 1.1
at the widest degree that the devices allow (four: 4; two: 2). Arrivals are a light and a heavy load, as shares of what
the devices can do at the narrowest degree. Policies are `horizon` first (the others are compared with it, request by
request) and those that are published; `fixed-K` as far as there are K devices.

Writes for each mix FOLDER/slo-live-N-MIX.json (the record of `tetrion bench slo`, with how well a simulation of each
run agrees), .jsonl (recordings), .png (the first seconds of `horizon` at the heavier load as a timeline). JSON and
recordings are written after every run, so that an interrupted proof keeps what it has.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from tetrion.engine.config import parse_devices
from tetrion.entrypoints.bench.record import write_record
from tetrion.entrypoints.bench.replay import command as replay
from tetrion.entrypoints.bench.slo import command as bench_slo
from tetrion.entrypoints.bench.timeline import command as timeline
from tetrion.entrypoints.bench.workloads import MIXES
from tetrion.entrypoints.session import EngineOptions

LOADS = (0.65, 0.2)
"""Heavy, light."""
COMPRESS, NUM_STEPS = 4, 28
FIXED = (1, 2, 4)
TIMELINE_S = 20.0


def policies_on(num_devices: int) -> list[str]:
    """`horizon`, then what is published, as far as it fits."""
    fixed = [f"fixed-{degree}" for degree in FIXED if degree <= num_devices]
    return ["horizon", *fixed, "rssp", "tetriserve"]


def prove(given: argparse.Namespace, mix: str) -> dict[str, Any]:
    """One mix: the record, which is written too."""
    num_devices = len(parse_devices(given.devices))
    base = given.folder / f"slo-live-{num_devices}-{mix}"
    output, record = base.with_suffix(".json"), base.with_suffix(".jsonl")
    made = bench_slo(
        live=True,
        engine=EngineOptions(
            devices=given.devices, model=given.model, load_format=given.load_format, profile=given.profile
        ),
        policy=given.policy or policies_on(num_devices),
        mix=[mix],
        load=given.load,
        slo_scale=given.slo_scale,
        seed=[given.seed],
        num_requests=given.num_requests,
        num_steps=NUM_STEPS,
        compress=COMPRESS,
        calibrate_slo=True,
        size=given.size,
        base_slo=given.base_slo,
        record=record,
        output=output,
        command_line=f"python -m benchmarks.live_proof {shlex.join(sys.argv[1:])}",
    )
    made["agreement"] = replay(recordings=record)["rows"]
    write_record(made, output)
    timeline(recordings=record, number=1, from_s=0.0, to_s=TIMELINE_S, png=base.with_suffix(".png"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", help="As for tetrion generate. Default: all GPUs, else cpu:2.")
    parser.add_argument("--model", help="Default: the embedded model.")
    parser.add_argument("--load-format", choices=["safetensors", "dummy"])
    parser.add_argument("--profile", help="Cost table. Default: the engine's own.")
    parser.add_argument("--policy", action="append", help="Instead of all; the first is what others are compared with.")
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--load", nargs="+", type=float, default=list(LOADS), help="Shares of what the devices can do.")
    parser.add_argument("--slo-scale", nargs="+", type=float, default=[1.0], help="Factors on the base SLOs.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--size", action="append", default=[], help="WxH. Default: the published four.")
    parser.add_argument("--base-slo", action="append", type=float, default=[], help="Seconds for each --size.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for mix in given.mix:
        prove(given, mix)


if __name__ == "__main__":
    main()
