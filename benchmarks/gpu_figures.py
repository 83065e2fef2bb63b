"""Every figure of a machine with GPUs, one command after the other, in as many calls as it takes.

    python -m benchmarks.gpu_figures out/figures --devices cuda --model flux1-dev --load-format dummy
    python -m benchmarks.gpu_figures out/figures --dry-run                      what is left, and how long it may take
    python -m benchmarks.gpu_figures out/rehearsal --devices cpu:2 --model shapes --only profile    without GPUs

Stages, in this order: `profile` (the planner's table, with joules; later stages run on it), `step` (beside the library
floor and diffusers; exactness; resizing), `energy-N` (joules a picture on the first N GPUs, at degree N), `links`,
`gemms`, `decode`, `encode`, `meter`, `bf16` (latents beside diffusers'), `served` and `served-embedded` (requests
through `tetrion serve`, of this model and of the embedded one), `live` (`benchmarks.live_proof`: every policy),
`saving` (mode `least-energy` beside `fastest`) and, from eight devices on, `paper`: TetriServe's own point, Uniform at
24 a minute, SLO ×1.0.

Each stage writes its files and what it said (NAME.log) into FOLDER; `stages.json` says which are whole. The same
command again does what is left. `--budget-s` begins no stage that may not fit in what is left of so many seconds;
`step` and `live` stop in time and go on in another call. A stage that fails does not keep others from being done.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.live_proof import policies_on
from benchmarks.proof_folder import Budget, ProofFolder
from tetrion.engine.config import DeviceSpec, parse_devices
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.locate import resolve_model
from tetrion.entrypoints.bench.workloads import MIXES
from tetrion.entrypoints.record import write_whole

PROGRAMS = {"tetrion": (sys.executable, "-m", "tetrion.entrypoints"), "python": (sys.executable,)}
WIDE_PROFILE = str(Path(__file__).with_name("workloads") / "wide_profile.json")
ENERGY_STEPS, ENERGY_SIZES = "28,50", "512x512,1024x1024"
EMBEDDED = ("--size", "256x256", "--size", "512x512", "--rate", "1500", "--slo-s", "0.15", "--profile", WIDE_PROFILE)
"""Requests of the embedded model that come so close together, under such a table, that they are resized."""
MARGIN_S = 20.0
"""What a stage that stops in time may be late."""
Line = tuple[str, ...]


class Stage(NamedTuple):
    """`seconds`: what it may take; of one that `goes_on`, what it needs at least: it gets what is left as `--budget-s`.
    `is_whole`: whether what such a one wrote lacks nothing."""

    name: str
    line: Line
    seconds: float
    goes_on: bool = False
    is_whole: Callable[[Path], bool] = lambda folder: True


def stages(folder: Path, devices: str, engine: Line, degrees: Sequence[int], num_devices: int) -> Iterator[Stage]:
    """`engine`: options of model and weights. `degrees`: those the model allows on the devices."""
    given = parse_devices(devices)
    table, step = folder / "profile.json", folder / "step.json"
    bench = ("tetrion", "bench")
    here = (*engine, "--devices", devices)
    on_table = ("--profile", str(table))
    yield Stage("profile", ("tetrion", "profile", *here, "--output", str(table)), 120.0 + 60.0 * len(degrees))
    plot = ("--plot", str(folder / "step.png"))
    line = (*bench, "step", *here, "--systems", "tetrion,floor,diffusers eager,diffusers compiled,xfuser eager")
    resume = ("--resume",) if step.exists() else ()
    yield Stage("step", (*line, "--output", str(step), *plot, *resume), 180.0, True, _is_whole_step)
    for degree in degrees:
        line = (
            *bench,
            "energy",
            *engine,
            "--devices",
            _first(given, degree),
            "--degrees",
            str(degree),
            "--budget-s",
            "90",
        )
        line += ("--sizes", ENERGY_SIZES, "--steps", ENERGY_STEPS, "--export", str(folder / "ml-energy"))
        yield Stage(f"energy-{degree}", (*line, "--output", str(folder / f"energy-{degree}.json")), 180.0)
    for name, module, seconds in (
        ("links", "links", 90.0),
        ("gemms", "gemms", 90.0),
        ("decode", "decode", 60.0),
        ("encode", "encode", 60.0),
        ("meter", "meter_cost", 40.0),
        ("bf16", "bf16_distance", 90.0),
    ):
        yield Stage(name, ("python", "-m", f"benchmarks.{module}", str(folder / f"{name}.json")), seconds)
    embedded = ("--devices", devices, *EMBEDDED)
    for name, options in (("served", here), ("served-embedded", embedded)):
        yield Stage(name, ("python", "-m", "benchmarks.served", str(folder / f"{name}.json"), *options), 120.0)
    line = ("python", "-m", "benchmarks.live_proof", str(folder / "live"), *here, *on_table)
    yield Stage("live", (*line, "--slo-scale", "1.2"), 200.0, True, _is_whole_live)
    line = (*bench, "energy-saving", "--live", *here, *on_table, "--rate", "2", "--slo-scale", "1.5", "--compress", "4")
    line += ("--num-requests", "24", "--seed", "1", "--output", str(folder / "energy-saving.json"))
    yield Stage("saving", line, 460.0)
    if num_devices >= 8:
        line = (*bench, "slo", "--live", *here, *on_table, "--rate", "24", "--num-requests", "60", "--compress", "4")
        for policy in ("horizon", "tetriserve", "tetriserve-g1", "rssp"):
            line += ("--policy", policy)
        files = ("--seed", "1", "--record", str(folder / "paper.jsonl"), "--output", str(folder / "paper.json"))
        yield Stage("paper", (*line, *files), 360.0)


def _first(devices: Sequence[DeviceSpec], number: int) -> str:
    """The first ones, as `--devices` names them."""
    if devices[0].kind == "cpu":
        return f"cpu:{number}"
    return "cuda:" + ",".join(device.name.removeprefix("cuda:") for device in devices[:number])


def _is_whole_step(folder: Path) -> bool:
    return "cut_short" not in json.loads((folder / "step.json").read_bytes())


def _is_whole_live(folder: Path) -> bool:
    proof = ProofFolder(folder / "live")
    return proof.setup is not None and not any(proof.left(MIXES, policies_on(proof.setup.num_devices)))


class Done:
    """`stages.json`: name → {"whole", "code", "seconds", "command"} of the latest try."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "stages.json"
        self.tries: dict[str, Any] = json.loads(self._path.read_bytes()) if self._path.exists() else {}

    def is_whole(self, name: str) -> bool:
        return bool(self.tries.get(name, {}).get("whole"))

    def add(self, name: str, **what: object) -> None:
        self.tries[name] = what
        write_whole(self._path, json.dumps(self.tries, indent=1).encode() + b"\n")


def run(folder: Path, todo: Sequence[Stage], budget: Budget) -> list[str]:
    """Do what is left and fits. Returns the names of stages that failed in this call."""
    done, failed = Done(folder), []
    for stage in todo:
        if done.is_whole(stage.name):
            continue
        if stage.seconds > budget.left_s:
            _say(f"{stage.name}: may take {stage.seconds:.0f} s, {max(0.0, budget.left_s):.0f} s are left")
            continue
        line = stage.line
        if stage.goes_on and budget.left_s < float("inf"):
            line += ("--budget-s", f"{budget.left_s - MARGIN_S:.0f}")
        _say(f"{stage.name}: {shlex.join(line)}")
        begun_s = time.monotonic()
        with (folder / f"{stage.name}.log").open("w") as log:
            code = subprocess.run(
                (*PROGRAMS[line[0]], *line[1:]), stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        seconds = time.monotonic() - begun_s
        whole = code == 0 and stage.is_whole(folder)
        done.add(stage.name, whole=whole, code=code, seconds=round(seconds, 1), command=shlex.join(line))
        _say(f"{stage.name}: {'whole' if whole else 'not whole' if code == 0 else f'failed ({code})'}, {seconds:.0f} s")
        if code:
            failed.append(stage.name)
    return failed


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", default="cuda")
    parser.add_argument("--model", default="flux1-dev")
    parser.add_argument("--load-format", default="dummy", choices=("dummy", "safetensors"))
    parser.add_argument("--budget-s", type=float, help="no stage is begun that may not fit")
    parser.add_argument("--only", action="append", metavar="STAGE", help="only this one; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="say what is left and run nothing")
    given = parser.parse_args()
    try:
        num_devices = len(parse_devices(given.devices))
        spec = read_model_spec(resolve_model(given.model), given.load_format)
    except (ValueError, CheckpointError) as error:
        sys.exit(str(error))
    engine = ("--model", given.model, "--load-format", given.load_format)
    degrees = spec.legal_degrees(num_devices)
    every = list(stages(given.folder, given.devices, engine, degrees, num_devices))
    if unknown := set(given.only or ()) - {stage.name for stage in every}:
        sys.exit(
            f"--only: no stage {', '.join(sorted(unknown))} (there are {', '.join(stage.name for stage in every)})"
        )
    todo = [stage for stage in every if not given.only or stage.name in given.only]
    if given.dry_run:
        left = [stage for stage in todo if not Done(given.folder).is_whole(stage.name)]
        for stage in left:
            _say(f"{stage.name:10s} {stage.seconds:5.0f} s  {shlex.join(stage.line)}")
        _say(f"{len(left)} of {len(todo)} stages are left, {sum(stage.seconds for stage in left):.0f} s and more")
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if failed := run(given.folder, todo, Budget(given.budget_s)):
        sys.exit(f"failed: {', '.join(failed)}; see their .log files in {given.folder}")


if __name__ == "__main__":
    main()
