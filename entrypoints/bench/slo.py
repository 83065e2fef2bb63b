"""`tetrion bench slo`: attainment of deadlines, policy by policy, on the same traces.

Points are policies × mixes × rates × SLO scales, each over all seeds; or policies × SLO scales on given trace files.
Run in virtual time on a profile (the real loop, simulated devices), on an engine in this process, or on a server.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tetrion.engine.config import EngineConfig
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.entrypoints.arguments import parse_size
from tetrion.entrypoints.bench.attainment_plots import draw_attainment
from tetrion.entrypoints.bench.extrapolation import extrapolated, read_floors
from tetrion.entrypoints.bench.live import EmbeddedSystem, HttpSystem
from tetrion.entrypoints.bench.recording import write_recordings
from tetrion.entrypoints.bench.simulation import Loss, SimulatedSystem
from tetrion.entrypoints.bench.slo_points import Grid, points, samples
from tetrion.entrypoints.bench.slo_run import Results, SloOptions, System, profile_of, run
from tetrion.entrypoints.bench.slo_table import table
from tetrion.entrypoints.bench.workloads import read_trace
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.plotting import import_matplotlib
from tetrion.entrypoints.record import as_text, check_writable, make_record, write_record

DEFAULT_SIMULATED_DEVICES = 8


def command(
    *,
    simulate: bool = False,
    live: bool = False,
    url: str | None = None,
    engine: EngineConfig | None = None,
    profile: Path | None = None,
    floors: Path | None = None,
    devices: int | None = None,
    policy: Sequence[str] = ("horizon",),
    bound: bool = False,
    record: Path | None = None,
    plots: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "tetrion bench slo",
    simulation: dict[str, Any] | None = None,
    **workload: Any,
) -> dict[str, Any]:
    """What `tetrion bench slo` does: run, print the table (or one JSON object), write `output`, recordings and plots.

    `devices`: simulated ones. `floors`: of degrees to extrapolate (see `extrapolation.py`). `engine`: how `live` starts
    one; a live run writes its files after every row, so that an interrupted one is not lost. The table is printed even
    where files cannot be written. `simulation`: noise, bias, … of `simulated_system`. `workload`: see `grid`.
    `command_line` goes into the record. Raises InputError for what the caller can put right.
    """
    if (simulate, live, url is not None).count(True) != 1:
        raise InputError("mode: give one of --simulate, --live and --url")
    if record is not None and url is not None:
        raise InputError("record: a server over HTTP does not tell what its devices do")
    if floors is not None and (not simulate or profile is None):
        raise InputError("floors: only with --simulate and --profile, whose degrees it extends")
    check_writable(output, "output")
    check_writable(record, "record")
    if plots is not None:
        import_matplotlib()  # says at once if it is missing
    with contextlib.ExitStack() as stack:
        with as_input_error():
            for name in policy:
                get_planner(name)
            options = SloOptions(
                grid=grid(**workload),
                policies=tuple(policy),
                profile=_cost_table(profile, floors),
                bound=bound,
                keep_chunks=record is not None,
            )
            system: System
            if simulate:
                system = simulated_system(options, devices, **simulation or {})
            elif url is not None:
                system = HttpSystem(url)
            else:
                embedded = EmbeddedSystem(engine or EngineConfig())
                embedded.check(samples(options.grid))
                system = stack.enter_context(embedded)
            _prepare(options, system)

        def record_of(results: Results) -> dict[str, Any]:
            return make_record(command_line, results.rows) | beside_rows(options, system, results)

        def save_so_far(results: Results) -> None:
            try:
                _save(results, record_of(results), output, record)
            except OSError as error:
                _to_stderr(f"not saved so far: {error}")

        results = run(options, system, _to_stderr, save_so_far if system.mode == "live" else lambda _: None)
        made = record_of(results)
    try:
        _save(results, made, output, record)
        if plots is not None:
            draw_attainment(results.rows, plots)
    finally:
        print(as_text(made) if as_json else table(results.rows, results.diagnostics))
    return made


def grid(
    *,
    trace: Sequence[Path] = (),
    mix: Sequence[str] = ("uniform",),
    rate: Sequence[float] = (12.0,),
    load: Sequence[float] = (),
    slo_scale: Sequence[float] = (1.0,),
    seed: Sequence[int] = (11, 12, 13),
    size: Sequence[str] = (),
    base_slo: Sequence[float] = (),
    tiers: bool = False,
    **fields: Any,
) -> Grid:
    """The grid that options of the command line describe; `fields`: its other fields by their names."""
    if size:
        fields["sizes"] = tuple(parse_size(text) for text in size)
    return Grid(
        traces=tuple((path.stem, read_trace(path)) for path in trace),
        mixes=tuple(mix),
        rates_per_min=tuple(rate),
        loads=tuple(load),
        slo_scales=tuple(slo_scale),
        seeds=tuple(seed),
        base_slo_s=tuple(base_slo),
        with_tiers=tiers,
        **fields,
    )


def simulated_system(
    options: SloOptions,
    num_devices: int | None,
    *,
    noise: float = 0.0,
    bias: float = 0.0,
    step_overhead_ms: float = 0.3,
    regroup_ms: float = 0.2,
    lose: Sequence[str] = (),
) -> SimulatedSystem:
    """Checked simulated devices (None: the default number). `lose`: "SECONDS:DEVICE" each. Raises ValueError."""
    if options.profile is None:
        raise InputError("profile: a simulation needs a cost table (--profile)")
    if options.bound and noise:
        raise InputError("bound: with noise, times differ from the profile's and no bound holds")
    system = SimulatedSystem(
        profile=options.profile,
        num_devices=DEFAULT_SIMULATED_DEVICES if num_devices is None else num_devices,
        noise=noise,
        bias=bias,
        step_overhead_s=step_overhead_ms / 1e3,
        regroup_s=regroup_ms / 1e3,
        losses=tuple(parse_loss(text) for text in lose),
    )
    system.check()
    return system


def parse_loss(text: str) -> Loss:
    """`12.5:3`: device 3 dies 12.5 seconds after the start. Raises ValueError."""
    time_text, _, device_text = text.partition(":")
    try:
        loss = Loss(time_s=float(time_text), device_id=int(device_text))
    except ValueError:
        raise ValueError(f"lose: expected SECONDS:DEVICE such as 12.5:3, got {text!r}") from None
    if not 0 <= loss.time_s < float("inf"):
        raise ValueError(f"lose: the time must be at least 0 and finite, got {text!r}")
    return loss


def _save(results: Results, made: dict[str, Any], output: Path | None, recordings: Path | None) -> None:
    """The record `made` of these results, and what their devices did."""
    if recordings is not None:
        write_recordings(recordings, results.recordings)
    write_record(made, output)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _cost_table(profile: Path | None, floors: Path | None) -> Profile | None:
    if profile is None:
        return None
    table = read_profile(profile)
    return table if floors is None else extrapolated(table, read_floors(floors))


def _prepare(options: SloOptions, system: System) -> None:
    """Raises ValueError for a workload that is not possible, before any runs. Warms an embedded engine up, and says how
    long arrivals in real time will take."""
    sizes, span_s = set(), 0.0
    for point in points(options.grid, system.num_devices, lambda: profile_of(system, options)):
        for _, trace in point.traces:
            sizes |= {(request.width, request.height) for request in trace}
            span_s += trace[-1].arrival_s
    if isinstance(system, EmbeddedSystem):
        system.warm_up(sorted(sizes))
    if system.mode == "live":
        _to_stderr(f"arrivals take {span_s * len(options.policies):.0f} s in all")


def beside_rows(options: SloOptions, system: System, results: Results) -> dict[str, Any]:
    """What the record says besides its rows."""
    workload = options.grid
    return {
        "diagnostics": results.diagnostics,
        "workload": {
            "num_steps": workload.num_steps,
            "compress": workload.compress,
            "compressed": None
            if workload.compress == 1
            else f"arrival times, steps and what an SLO leaves for denoising ÷ {workload.compress}; rates and SLO"
            " scales are those before; encode and decode are whole and inside the SLO",
            "calibrate_slo": workload.calibrate_slo,
            "base_slo_s": results.base_slo_s,
            "loads": workload.loads or None,
            "arrivals": workload.arrivals,
            "tiers": workload.with_tiers,
        },
        "system": getattr(system, "facts", {}),
        "profile": _about_profile(system, options),
    }


def _about_profile(system: System, options: SloOptions) -> dict[str, Any] | None:
    """Where the cost table comes from; None where it is not known."""
    table = options.profile or getattr(system, "profile", None)
    if table is None:
        return None
    about = {name: getattr(table, name) or None for name in ("gpu", "model", "commit", "command")}
    return about | {"extrapolated": table.meta.get("extrapolated")}


@contextlib.contextmanager
def as_input_error() -> Iterator[None]:
    """A ValueError inside is something that the caller can put right."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
