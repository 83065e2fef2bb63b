"""`tetrion bench slo`: attainment of deadlines, policy by policy, on the same traces.

Points are policies × mixes × rates × SLO scales, each over all seeds; or policies × SLO scales on given trace files.
Run in virtual time on a profile (the real loop, simulated devices), on an engine in this process, or on a server.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.planning.cost.profile import Profile, read_profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.policies.registry import OPTIONS, NoOptions, get_planner, with_options
from tetrion.engine.roles import ALL
from tetrion.entrypoints.arguments import parse_size
from tetrion.entrypoints.bench.arrivals import SESSIONS
from tetrion.entrypoints.bench.attainment_plots import draw_attainment
from tetrion.entrypoints.bench.compression import offered_load
from tetrion.entrypoints.bench.extrapolation import extrapolated, read_floors
from tetrion.entrypoints.bench.live import EmbeddedSystem, HttpSystem
from tetrion.entrypoints.bench.recording import write_recordings
from tetrion.entrypoints.bench.simulation import MAX_INFLIGHT, Loss, SimulatedSystem
from tetrion.entrypoints.bench.slo_points import Grid, models_of, points, samples
from tetrion.entrypoints.bench.slo_run import Results, SloOptions, System, run, tables_of
from tetrion.entrypoints.bench.slo_table import table
from tetrion.entrypoints.bench.workloads import ONE_MODEL, Stream, read_trace
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import planner_settings
from tetrion.entrypoints.plotting import import_matplotlib
from tetrion.entrypoints.record import as_text, check_writable, make_record, write_record

DEFAULT_SIMULATED_DEVICES = 8
NO_FILES: Mapping[str, Path] = MappingProxyType({})
NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})
DEFAULT_PLANNER = PlannerConfig()
NO_OPTIONS: Mapping[str, Mapping[str, object]] = MappingProxyType({})


def command(
    *,
    simulate: bool = False,
    live: bool = False,
    url: str | None = None,
    engine: EngineConfig | None = None,
    profile: Mapping[str, Path] = NO_FILES,
    floors: Mapping[str, Path] = NO_FILES,
    share: Mapping[str, float] = NO_WEIGHTS,
    devices: int | None = None,
    policy: Sequence[str] = ("horizon",),
    bound: bool = False,
    record: Path | None = None,
    plots: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
    command_line: str = "tetrion bench slo",
    simulation: dict[str, Any] | None = None,
    planner: Sequence[str] = (),
    **workload: Any,
) -> dict[str, Any]:
    """What `tetrion bench slo` does: run, print the table (or one JSON object), write `output`, recordings and plots.

    `devices`: simulated ones. `profile`: cost tables by model; an only one's name may be empty. `floors`: of degrees to
    extrapolate (see `extrapolation.py`). `share`: of requests, see `models_of`. `engine`: how `live` starts one; a live
    run writes its files after every row, so that an interrupted one is not lost. The table is printed even
    where files cannot be written. `simulation`: noise, bias, … of `simulated_system`, whose planner has the settings
    `planner` (see `policy_settings`). `workload`: see `grid`.
    `command_line` goes into the record. Raises InputError for what the caller can put right.
    """
    if (simulate, live, url is not None).count(True) != 1:
        raise InputError("mode: give one of --simulate, --live and --url")
    if record is not None and url is not None:
        raise InputError("record: a server over HTTP does not tell what its devices do")
    if floors and (not simulate or not profile):
        raise InputError("floors: only with --simulate and --profile, whose degrees it extends")
    if any(profile) and not simulate:
        raise InputError("profile: models are named only with --simulate; an engine and a server here have one each")
    if any(profile) and record is not None:
        raise InputError("record: not with named models, which replay does not know (--profile FILE alone)")
    if planner and not simulate:
        raise InputError("planner: a server has its own settings; an engine here is given them by `engine`")
    if share and (not simulate or workload.get("trace")):
        raise InputError("share: only with --simulate and without a trace, which names the models itself")
    check_writable(output, "output")
    check_writable(record, "record")
    if plots is not None:
        import_matplotlib()  # says at once if it is missing
    with contextlib.ExitStack() as stack:
        with as_input_error():
            for name in policy:
                get_planner(name)
            tables = cost_tables(profile, floors) if profile else None
            models = models_of(tables, share) if simulate and tables else ONE_MODEL
            options = SloOptions(
                grid=grid(models=models, **workload),
                policies=tuple(policy),
                tables=tables,
                bound=bound,
                keep_chunks=record is not None,
            )
            system: System
            if simulate:
                settings = policy_settings(planner, options.policies)
                system = simulated_system(options, devices, **simulation or {}, **settings)
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
    step_share: Sequence[str] = (),
    beside: Sequence[str] = (),
    tiers: bool = False,
    **fields: Any,
) -> Grid:
    """The grid that options of the command line describe; `fields`: its other fields by their names."""
    if size:
        fields["sizes"] = tuple(parse_size(text) for text in size)
    for name, value in {"step_share": step_share, "beside": beside, **fields}.items():
        if trace and value not in (None, ()) and name in DRAWN_ONLY:
            raise InputError(f"{name}: not with a trace, whose requests are what they are")
    return Grid(
        traces=tuple((path.stem, read_trace(path)) for path in trace),
        mixes=tuple(mix),
        rates_per_min=tuple(rate),
        loads=tuple(load),
        slo_scales=tuple(slo_scale),
        seeds=tuple(seed),
        base_slo_s=tuple(base_slo),
        step_shares=tuple(parse_step_share(text) for text in step_share),
        beside=tuple(parse_stream(text) for text in beside),
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
    max_inflight: int | None = None,
    roles: str = ALL,
    planner: PlannerConfig = DEFAULT_PLANNER,
    policy_options: Mapping[str, Mapping[str, object]] = NO_OPTIONS,
) -> SimulatedSystem:
    """Checked simulated devices (None: the default number). `lose`: "SECONDS:DEVICE" each; `planner`, `policy_options`:
    see `policy_settings`. Raises ValueError."""
    if options.tables is None:
        raise InputError("profile: a simulation needs a cost table (--profile)")
    if options.bound and noise:
        raise InputError("bound: with noise, times differ from the profile's and no bound holds")
    system = SimulatedSystem(
        tables=options.tables,
        num_devices=DEFAULT_SIMULATED_DEVICES if num_devices is None else num_devices,
        noise=noise,
        bias=bias,
        step_overhead_s=step_overhead_ms / 1e3,
        regroup_s=regroup_ms / 1e3,
        losses=tuple(parse_loss(text) for text in lose),
        planner=planner,
        options=policy_options,
        max_inflight=MAX_INFLIGHT if max_inflight is None else max_inflight,
        roles=roles,
    )
    system.check()
    return system


def policy_settings(texts: Sequence[str], policies: Sequence[str]) -> dict[str, Any]:
    """`planner` and `policy_options` of `simulated_system` from "KEY=VALUE" each: the settings of every planner, and of
    each policy those options that it has. Raises ValueError for one that none of them has, and for bad values."""
    settings = planner_settings(texts)
    if "policy" in settings:
        raise InputError("planner: policy: name it with --policy")
    options = settings.pop("options")
    try:
        planner = msgspec.convert(settings, PlannerConfig)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise InputError(f"planner{path.rstrip('`')}: {message}") from None
    known = {name: OPTIONS.get(name, NoOptions).__struct_fields__ for name in policies}
    nobodys = {key: value for key, value in options.items() if not any(key in own for own in known.values())}
    by_policy = {name: {key: options[key] for key in options if key in own} | nobodys for name, own in known.items()}
    for name, own_options in by_policy.items():
        with_options(msgspec.structs.replace(planner, policy=name, options=own_options))
    return {"planner": planner, "policy_options": by_policy}


def parse_step_share(text: str) -> tuple[int, float]:
    """`50=0.3`: 50 steps for that share of the requests, in proportion to the others'. Raises ValueError."""
    steps_text, _, share_text = text.partition("=")
    try:
        steps, share = int(steps_text), float(share_text)
    except ValueError:
        raise ValueError(f"step_share: expected STEPS=SHARE such as 50=0.3, got {text!r}") from None
    return steps, share


DRAWN_ONLY = ("slo_share", "step_share", "tenant", "beside", "burstiness")
STREAM_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "rate": ("rate_per_min", float),
    "number": ("num_requests", int),
    "steps": ("num_steps", int),
    "slo": ("slo_s", float),
    "weight": ("weight", float),
    "tenant": ("tenant", str),
    "size": ("size", parse_size),
}
"""Key of `parse_stream` -> field of a `Stream`, and what reads it."""


def parse_stream(text: str) -> Stream:
    """`size=2048x2048,rate=1.5,steps=50,slo=12,tenant=B`. Raises ValueError naming the key."""
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in STREAM_FIELDS:
            raise ValueError(f"beside: expected KEY=VALUE,… with keys {', '.join(STREAM_FIELDS)}, got {part!r}")
        field, read = STREAM_FIELDS[key]
        try:
            fields[field] = read(value)
        except ValueError as error:
            raise ValueError(f"beside.{key}: got {value!r}: {error}") from None
    if "size" not in fields:
        raise ValueError(f"beside: size is missing in {text!r}")
    return Stream(**fields)


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


def cost_tables(profiles: Mapping[str, Path], floors: Mapping[str, Path] = NO_FILES) -> CostTables:
    """The tables in these files by model, those with floors extrapolated. Raises ValueError, OSError."""
    if unknown := set(floors) - set(profiles):
        raise ValueError(f"floors: {min(unknown)!r} is none of the profiles' models")
    tables = {model: read_profile(path) for model, path in profiles.items()}
    return CostTables(profiles=tables | {m: extrapolated(tables[m], read_floors(path)) for m, path in floors.items()})


def _prepare(options: SloOptions, system: System) -> None:
    """Raises ValueError for a workload that is not possible, before any runs. Warms an embedded engine up, and says how
    long arrivals in real time will take and what load they are."""
    sizes, span_s = set(), 0.0
    workloads = list(points(options.grid, system.num_devices, lambda: tables_of(system, options)))
    for point in workloads:
        for _, trace in point.traces:
            sizes |= {(request.width, request.height) for request in trace}
            span_s += trace[-1].arrival_s
    if isinstance(system, EmbeddedSystem):
        system.warm_up(sorted(sizes))
        for point in workloads:
            unnamed = [[msgspec.structs.replace(request, model="") for request in trace] for _, trace in point.traces]
            load = max(offered_load(trace, system.tables, system.num_devices) for trace in unnamed)
            _to_stderr(f"{point.mix}: {_load_text(load)}")
    if system.mode == "live":
        _to_stderr(f"arrivals take {span_s * len(options.policies):.0f} s in all")


def _load_text(load: float) -> str:
    """`load`: see `offered_load`."""
    text = f"a load of {load:.2f} by the engine's own measurement"
    return text if load < 1 else f"{text}: more than its devices can draw, so that deadlines are missed by any policy"


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
            "burstiness": workload.burstiness if workload.arrivals == "gamma" else None,
            "sessions": msgspec.structs.asdict(SESSIONS) if workload.arrivals == "production" else None,
            "slo_share": workload.slo_share,
            "step_shares": workload.step_shares or None,
            "tenant": workload.tenant or None,
            "beside": list(map(msgspec.structs.asdict, workload.beside)) or None,
            "tiers": workload.with_tiers,
            "models": None if workload.models == ONE_MODEL else list(map(msgspec.structs.asdict, workload.models)),
        },
        "system": getattr(system, "facts", {}),
        "profile": about_profiles(options.tables or getattr(system, "tables", None)),
        "planner": _about_planner(system),
    }


def _about_planner(system: System) -> dict[str, Any] | None:
    """The settings of simulated planners that are not the defaults."""
    if not isinstance(system, SimulatedSystem):
        return None
    options = {name: dict(own) for name, own in system.options.items() if own}
    return msgspec.to_builtins(system.planner, builtin_types=()) | {
        "options": options,
        "max_inflight": system.max_inflight,
    }


def about_profiles(tables: CostTables | None) -> dict[str, Any] | None:
    """Where the only cost table comes from, or each of several by model; None where that is not known."""
    if tables is None:
        return None
    about = {model: _about_profile(profile) for model, profile in tables.profiles.items()}
    return about.get("", about)


def _about_profile(profile: Profile) -> dict[str, Any]:
    about = {name: getattr(profile, name) or None for name in ("gpu", "model", "commit", "command")}
    return about | {"extrapolated": profile.meta.get("extrapolated")}


@contextlib.contextmanager
def as_input_error() -> Iterator[None]:
    """A ValueError inside is something that the caller can put right."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
