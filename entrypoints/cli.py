"""The `tetrion` command: options, exit codes, and nothing else.

Imports nothing but click at module level, so that `--help` is quick; each command imports what it needs when it runs.
Exit codes: 0 done, 1 the engine or a request failed, 2 bad input, 130 Ctrl-C.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tetrion.entrypoints.session import EngineFactory, EngineOptions

Command = Callable[..., Any]


def engine_options(command: Command) -> Command:
    """The options of every command that starts an engine."""
    for option in (
        click.option(
            "--num-threads", type=click.IntRange(min=1), help="CPU threads per worker. Default: all, divided."
        ),
        click.option("--policy", metavar="NAME", help="Planner: horizon (default), fixed-1, fixed-2, …"),
        click.option("--devices", metavar="LIST", help="cpu:N starts N CPU workers. Default: cpu:2."),
        click.option("--model", metavar="PATH", help="A FLUX.1 folder in diffusers layout. Default: the embedded one."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="tetrion", prog_name="tetrion")
def cli() -> None:
    """Tetrion draws pictures from prompts, with as many devices a picture as pays off at each denoising step."""


@cli.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompts", "prompts_file", metavar="FILE", type=click.Path(path_type=Path), help="Prompts, one a line.")
@click.option("--size", metavar="WxH", help="Pixels, e.g. 256x256. Default: the model's.")
@click.option("--seed", type=int, help="Picture i of a prompt has seed SEED + i. Default: random, reported.")
@click.option("--num-steps", type=int, help="Denoising steps. Default: the model's.")
@click.option("-n", "num_per_prompt", type=int, default=1, show_default=True, help="Pictures per prompt.")
@click.option("--guidance", type=float, help="Guidance scale. Default: the model's.")
@click.option("--slo-ms", type=float, help="Deadline for each picture in milliseconds.")
@click.option("--force-degrees", metavar="N,N,…", help="The degree of each step; the last holds for the rest.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@engine_options
@click.pass_context
def generate(ctx: click.Context, **options: Any) -> int:
    """Draw pictures into DIR, with a contact sheet if there is more than one. No file is overwritten."""
    return _report_errors(lambda: _generate(_engine_options(options), ctx.obj, **options))


def _generate(
    engine: "EngineOptions",
    factory: "EngineFactory | None",
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    force_degrees: str | None,
    **options: Any,
) -> int:
    from tetrion.entrypoints import generate as command
    from tetrion.entrypoints.arguments import parse_degrees
    from tetrion.entrypoints.session import open_engine, run_async

    if prompts_file is not None:
        prompts += command.read_prompts(prompts_file)
    degrees = parse_degrees(force_degrees) if force_degrees else ()
    checked = command.GenerateOptions(prompts=prompts, force_degrees=degrees, **options)
    return run_async(command.generate(checked, open_engine(engine, factory)))


@cli.command()
@click.argument("requests", metavar="REQUESTS.JSONL", type=click.Path(path_type=Path))
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@engine_options
@click.pass_context
def batch(ctx: click.Context, requests: Path, output: Path, **options: Any) -> int:
    """Draw every line of REQUESTS.JSONL into DIR. Run it again to go on where it stopped.

    A line is a JSON object: prompt, and optionally size, seed, num_steps, guidance, slo_ms, priority, id. Pictures are
    named <id>.png (default: the line's number); manifest.jsonl has a line for each. Without a seed, a line's seed is
    made from its id.
    """

    def run() -> int:
        from tetrion.entrypoints.batch import batch as draw_batch
        from tetrion.entrypoints.session import open_engine, run_async

        return run_async(draw_batch(requests, output, open_engine(_engine_options(options), ctx.obj)))

    return _report_errors(run)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option(
    "--store-mb",
    type=click.IntRange(0, 1 << 20),
    default=1024,
    show_default=True,
    help="Memory for pictures that clients fetch by URL; each is kept for at least an hour.",
)
@click.option("--public-url", metavar="URL", help="How clients reach this server. Default: as their request says.")
@click.option("--access-log", is_flag=True, help="Log every HTTP request.")
@engine_options
@click.pass_context
def serve(ctx: click.Context, **options: Any) -> int:
    """Serve OpenAI's image API over HTTP."""
    engine = _engine_options(options)

    def run() -> int:
        from tetrion.entrypoints.http.server import ServeOptions
        from tetrion.entrypoints.http.server import serve as serve_http
        from tetrion.entrypoints.session import open_engine, run_async

        return run_async(serve_http(ServeOptions(**options), open_engine(engine, ctx.obj)))

    return _report_errors(run)


@cli.group()
def bench() -> None:
    """Measure parts of the engine on this machine."""


@bench.command("ring")
@click.option("--num-round-trips", type=click.IntRange(min=1), default=2000, show_default=True, help="Back to back.")
@click.option(
    "--num-after-silence", type=click.IntRange(min=1), default=500, show_default=True, help="After 5 ms each."
)
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the result there as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def bench_ring(**options: Any) -> int:
    """The time from engine to worker and back for a command that does nothing."""

    def run() -> int:
        from tetrion.entrypoints.bench.ring import command

        command(**options)
        return 0

    return _report_errors(run)


@bench.command("step")
@click.option("--devices", metavar="LIST", help="Workers for the degrees, e.g. cpu:2. Default: as for generate.")
@click.option("--model", metavar="PATH", help="A FLUX.1 folder in diffusers layout. Default: the embedded one.")
@click.option("--num-steps", type=click.IntRange(min=1), default=12, show_default=True, help="Denoising steps.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Pairs to compare.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the result there as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def bench_step(**options: Any) -> int:
    """A request beside diffusers' pipeline on the same weights, steps and threads, and the step time at each degree."""

    def run() -> int:
        from tetrion.entrypoints.bench.step import command
        from tetrion.entrypoints.session import EngineOptions, open_engine

        open_engine(EngineOptions(model=options["model"], devices=options["devices"]))  # says what is wrong with them
        command(**options)
        return 0

    return _report_errors(run)


@bench.command("slo")
@click.option("--profile", metavar="FILE", type=click.Path(path_type=Path), required=True, help="Cost table, JSON.")
@click.option("--trace", metavar="FILE", type=click.Path(path_type=Path), multiple=True, help="Arrivals, JSON lines.")
@click.option("--devices", type=click.IntRange(min=1), default=8, show_default=True, help="Simulated devices.")
@click.option("--policy", metavar="NAME", multiple=True, default=["horizon"], help="Planner; may be repeated.")
@click.option("--mix", metavar="NAME", multiple=True, help="Without a trace: uniform, skewed; may be repeated.")
@click.option("--rate", type=float, multiple=True, help="Without a trace: arrivals per minute; may be repeated.")
@click.option("--slo-scale", type=float, multiple=True, help="Factor on all deadlines; may be repeated.")
@click.option("--seed", type=int, multiple=True, help="Without a trace: seed of the arrivals; may be repeated.")
@click.option("--num-requests", type=click.IntRange(min=1), help="Without a trace: requests a point.")
@click.option("--simulate", is_flag=True, help="In virtual time, the only mode of this version.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the result there as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def bench_slo(**options: Any) -> int:
    """Attainment and latency of planners on the same arrivals, in virtual time."""

    def run() -> int:
        from tetrion.entrypoints.bench.slo import command

        command(**{name: value for name, value in options.items() if value not in (None, ())})
        return 0

    return _report_errors(run)


def _engine_options(options: dict[str, Any]) -> "EngineOptions":
    """Takes the engine's options out of `options`."""
    from tetrion.entrypoints.session import EngineOptions

    return EngineOptions(**{name: options.pop(name) for name in ("model", "devices", "num_threads", "policy")})


def _report_errors(command: Callable[[], int]) -> int:
    """Run `command`; what users or the machine caused becomes one line on stderr and an exit code."""
    from tetrion.entrypoints.errors import exit_code_and_line

    try:
        return command()
    except Exception as error:
        exit_code, line = exit_code_and_line(error)
        click.echo(f"tetrion: error: {line}", err=True)
        return exit_code


def run(arguments: list[str], factory: "EngineFactory | None" = None) -> int:
    """Run the command line `arguments` and return its exit code. `factory` makes the engine (default: the real one)."""
    try:
        return cli.main(arguments, prog_name="tetrion", standalone_mode=False, obj=factory) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("tetrion: interrupted", err=True)
        return 130


def main() -> None:
    """The console command `tetrion`."""
    sys.exit(run(sys.argv[1:]))
