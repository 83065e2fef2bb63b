"""The live proof: every policy on the same traces, in compressed time, in as many calls as it takes.

    python -m benchmarks.proof.live out/live --devices cuda:0,1 --model flux1-dev --load-format dummy --budget-s 540
    python -m benchmarks.proof.live out/rehearsal --devices cpu:2 --size 128x128 --size 256x256 --base-slo 5 \
        --base-slo 10 --num-requests 8        # without GPUs

Time is compressed by 4: 7 steps of 28, times between arrivals and what SLOs leave for denoising divided by 4, encode
and decode whole. Base SLOs are the published ones times one factor, so that the largest size alone takes its SLO / 1.1
at the widest degree that the devices allow (four: 4; two: 2). Arrivals are a light and a heavy load, as shares of what
the devices can do at the narrowest degree. Policies are `horizon` first (the others are compared with it, request by
request) and those that are published; `fixed-K` as far as there are K devices. TetriServe's rounds of 5 steps are long
beside requests of 7, so that it also runs with rounds of 1 step, compressed like the rest: `tetriserve-g1`.

The first call fixes cost table, SLOs and traces in FOLDER (see `folder.py`); the same command again does the runs
that are left, and refuses if devices, model, commit or options have changed. `--budget-s` begins no run that would not
fit in what is left of so many seconds since the start; results come on top. A call that is cut loses the run under way.

Writes for each mix FOLDER/slo-live-N-MIX.jsonl (recordings, after every run) and at the end of each call, from those,
.json (the record of `tetrion bench slo`, with how well a simulation of each run agrees) and .png (the first seconds of
`horizon` at the heavier load as a timeline). With nothing left, or `--budget-s 0`, it only does the latter.
"""

import argparse
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.proof.folder import Budget, ProofFolder, Setup, refuse_to_mix, run_s
from benchmarks.proof.results import write_results
from tetrion.engine.config import DeviceSpec, EngineConfig, parse_devices
from tetrion.engine.hardware.gpus import visible_gpus
from tetrion.engine.hardware.host import cpu_name
from tetrion.engine.planning.cost.tables import only_table
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.entrypoints.bench.live import EmbeddedSystem
from tetrion.entrypoints.bench.slo import as_input_error, grid
from tetrion.entrypoints.bench.slo_points import Grid, points, samples, slos_of
from tetrion.entrypoints.bench.slo_run import Results, SloOptions, run_points
from tetrion.entrypoints.bench.workloads import MIXES
from tetrion.entrypoints.errors import InputError, exit_code_and_line
from tetrion.entrypoints.record import commit, host_facts

LOADS = (0.65, 0.15)
"""Heavy, light."""
COMPRESS, NUM_STEPS = 4, 28
FIXED = (1, 2, 4)
OPTIONS = ("load_format", "profile", "load", "slo_scale", "seed", "num_requests", "size", "base_slo")
"""Those that must be the same in every call. Devices and model are compared by what they turn out to be."""


def policies_on(num_devices: int) -> list[str]:
    """`horizon`, then what is published, as far as it fits."""
    fixed = [f"fixed-{degree}" for degree in FIXED if degree <= num_devices]
    return ["horizon", *fixed, "rssp", "tetriserve", "tetriserve-g1"]


def prove(given: argparse.Namespace, command_line: str) -> None:
    """One call: the runs that are left and fit, then the results of all that are there. Raises InputError."""
    budget, folder = Budget(given.budget_s), ProofFolder(given.folder)
    options = {name: getattr(given, name) for name in OPTIONS}
    if folder.setup is not None:
        refuse_to_mix(folder.path, folder.setup.options, options)
    with as_input_error():
        num_devices = folder.setup.num_devices if folder.setup else len(parse_devices(given.devices))
        policies = given.policy or policies_on(num_devices)
        for name in policies:
            get_planner(name)
        workload = grid(
            mix=MIXES,
            load=given.load,
            slo_scale=given.slo_scale,
            seed=[given.seed],
            num_requests=given.num_requests,
            num_steps=NUM_STEPS,
            compress=COMPRESS,
            calibrate_slo=True,
            size=given.size,
            base_slo=given.base_slo,
        )
    if folder.setup is None or (budget.left_s > 0 and any(folder.left(given.mix, policies))):
        run_what_is_left(given, folder, workload, policies, budget)
    for mix in given.mix:
        if folder.recordings(mix):
            write_results(folder, workload, mix, command_line)


def run_what_is_left(
    given: argparse.Namespace, folder: ProofFolder, workload: Grid, policies: list[str], budget: Budget
) -> None:
    """On one engine, which starts with the folder's cost table if there is one."""
    profile = given.profile if folder.setup is None else str(folder.profile_path)
    model = given.model or EngineConfig().models[0]
    embedded = EmbeddedSystem(
        EngineConfig(
            devices=given.devices,
            models=(model,),
            load_format=given.load_format or "safetensors",
            profiles={} if profile is None else {model: profile},
        )
    )
    machine = embedded.facts | {"device_names": device_names(parse_devices(given.devices)), "commit": commit()}
    if folder.setup is not None:
        refuse_to_mix(folder.path, folder.setup.machine, machine)
    embedded.check(samples(workload))
    with embedded as system:
        system.warm_up(workload.sizes)
        if folder.setup is None:
            begin(given, folder, workload, machine, system)
        call = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        for point, policy in list(folder.left(given.mix, policies)):
            needed_s = run_s(folder, point, policy)
            what = f"{policy}: {point.mix}, {point.rate_per_min:.3g}/min, SLO ×{point.slo_scale:g}: {needed_s:.0f} s"
            if needed_s > budget.left_s:
                _to_stderr(f"{what}, but {max(0.0, budget.left_s):.0f} s are left: for another call")
                return
            _to_stderr(what)
            results = Results(rows=[], diagnostics=[], recordings=[])
            run_points(SloOptions(grid=workload, policies=(policy,), keep_chunks=True), [point], system, results)
            facts = {"call": call, "ledger": system.ledger}
            made = [msgspec.structs.replace(one, facts=one.facts | facts) for one in results.recordings]
            folder.add(point.mix, made)


def begin(
    given: argparse.Namespace, folder: ProofFolder, workload: Grid, machine: dict[str, Any], system: EmbeddedSystem
) -> None:
    """Fix what every later call keeps to."""
    profile = system.profile
    with as_input_error():
        tables = only_table(profile)
        setup = Setup(
            options={name: getattr(given, name) for name in OPTIONS},
            machine=machine,
            host=host_facts(),
            num_devices=system.num_devices,
            base_slo_s=slos_of(workload, system.num_devices, lambda: tables),
            points=tuple(points(workload, system.num_devices, lambda: tables)),
        )
    folder.begin(setup, profile)


def device_names(devices: tuple[DeviceSpec, ...]) -> list[str]:
    """What each device is: the name of its GPU or of the processor."""
    gpus = visible_gpus()
    return [cpu_name() if device.kind == "cpu" else gpus[device.index] for device in devices]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    parser.add_argument("--budget-s", type=float, help="Seconds since the start that runs may take. Default: no limit.")
    try:
        prove(parser.parse_args(), f"python -m benchmarks.proof.live {shlex.join(sys.argv[1:])}")
    except InputError as error:
        code, line = exit_code_and_line(error)
        _to_stderr(f"live_proof: error: {line}")
        sys.exit(code)


if __name__ == "__main__":
    main()
