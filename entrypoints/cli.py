"""The `tetrion` command: options, exit codes, and nothing else.

Imports little but click at module level, so that `--help` is quick; each command imports what it needs when it runs.
Exit codes: 0 done, 1 the engine or a request failed, 2 bad input, 130 Ctrl-C, 141 nobody read the output to its end.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tetrion.entrypoints.bench.energy_command import energy_command
from tetrion.entrypoints.bench.serve_command import serve_command
from tetrion.entrypoints.bench.slo_commands import COMMANDS
from tetrion.entrypoints.config_file import ConfigurableCommand, config_options, effective, template
from tetrion.entrypoints.errors import EXIT_INTERRUPTED, report_errors
from tetrion.entrypoints.number_range import NumberRange
from tetrion.entrypoints.options import command_line, engine_options, take_config
from tetrion.entrypoints.recommend.command import recommend
from tetrion.entrypoints.serve_options import guard_options, with_server_defaults
from tetrion.entrypoints.terminal import EXIT_BROKEN_PIPE, flushed, hold_standard_streams, is_reader_gone, say

if TYPE_CHECKING:
    from tetrion.engine.config import EngineConfig
    from tetrion.entrypoints.session import EngineFactory


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
@click.option("--negative-prompt", metavar="TEXT", help="What to keep away from, for models that take one.")
@click.option("--true-cfg-scale", type=float, help="FLUX.1: how far away from --negative-prompt; above 1.")
@click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture to work from, for models that take one: PNG, JPEG or WebP. May be repeated.",
)
@click.option(
    "--mask",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where --image is drawn anew, for models that take one: where it is transparent or, if it is opaque, white.",
)
@click.option("--strength", type=float, help="How far the result goes from --image, up to 1. Default: the model's.")
@click.option("--slo-ms", type=float, help="Deadline for each picture in milliseconds.")
@click.option("--energy", metavar="MODE", help="fastest, balanced or least-energy. Default: the planner's.")
@click.option("--budget-j", type=float, help="Most joules for each picture; refused if no plan in time takes so few.")
@click.option("--force-degrees", metavar="N,N,…", help="The degree of each step; the last holds for the rest.")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@engine_options
@click.pass_context
def generate(ctx: click.Context, **options: Any) -> int:
    """Draw pictures into DIR, with a contact sheet if there is more than one. No file is overwritten."""
    return report_errors(lambda: _generate(take_config(options), ctx.obj, **options))


def _generate(
    engine: "EngineConfig",
    factory: "EngineFactory | None",
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    force_degrees: str | None,
    energy: Any,
    budget_j: float | None,
    **options: Any,
) -> int:
    from tetrion.engine.request import EnergyOptions
    from tetrion.entrypoints import generate as command
    from tetrion.entrypoints.arguments import parse_degrees
    from tetrion.entrypoints.session import open_engine, run_async

    if prompts_file is not None:
        prompts += command.read_prompts(prompts_file)
    degrees = parse_degrees(force_degrees) if force_degrees else ()
    wish = EnergyOptions(mode=energy, budget_j=budget_j)
    checked = command.GenerateOptions(prompts=prompts, force_degrees=degrees, energy=wish, **options)
    return run_async(command.generate(checked, open_engine(engine, factory)))


@cli.command()
@click.argument("requests", metavar="REQUESTS.JSONL", type=click.Path(path_type=Path))
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@engine_options
@click.pass_context
def batch(ctx: click.Context, requests: Path, output: Path, **options: Any) -> int:
    """Draw every line of REQUESTS.JSONL into DIR. Run it again to go on where it stopped.

    A line is a JSON object: prompt, and optionally size, seed, num_steps, guidance, negative_prompt,
    true_cfg_scale, image, mask, strength, slo_ms, priority, energy, id. Files that it names lie in the
    folder of REQUESTS.JSONL or below it.
    Pictures are named <id>.png (default: the line's number); manifest.jsonl has a line for each. Without a seed, a
    line's seed is made from its id.
    """

    def run() -> int:
        from tetrion.entrypoints.batch.run import batch as draw_batch
        from tetrion.entrypoints.session import open_engine, run_async

        return run_async(draw_batch(requests, output, open_engine(take_config(options), ctx.obj)))

    return report_errors(run)


@cli.command(cls=ConfigurableCommand)
@config_options
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address or name to listen on, with all its addresses. 0.0.0.0: all of IPv4; ::, all of IPv6 and IPv4.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option(
    "--store-mb",
    type=click.IntRange(0, 1 << 20),
    default=1024,
    show_default=True,
    help="Memory for pictures that clients fetch by URL; each is kept for at least an hour.",
)
@click.option("--public-url", metavar="URL", help="How clients reach this server. Default: as their request says.")
@click.option(
    "--allow-origin",
    "allow_origins",
    metavar="ORIGIN",
    multiple=True,
    help="Let browsers' pages of this origin ask, such as http://localhost:3000; * is any. Repeatable. Default: none.",
)
@click.option(
    "--keep-alive-s",
    type=NumberRange(0, 86_400),
    default=75,
    show_default=True,
    help="How long an idle connection is kept open: longer than a proxy in front keeps it, 60 s by default for most.",
)
@click.option("--access-log", is_flag=True, help="Log every HTTP request.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="info: a line for each picture, and what becomes of workers.",
)
@click.option(
    "--log-format",
    type=click.Choice(["plain", "json"]),
    default="plain",
    show_default=True,
    help="json: an object a line, with a picture's figures as fields.",
)
@guard_options
@engine_options
@click.pass_context
def serve(ctx: click.Context, print_config: bool, **options: Any) -> int:
    """Serve OpenAI's image API over HTTP.

    Every option may come from --config FILE or from the environment, as TETRION_ and its name: TETRION_PORT.
    """

    def run() -> int:
        if print_config:
            take_config(with_server_defaults(options))  # says what is wrong with them
            click.echo(effective(ctx))
            return 0
        from tetrion.entrypoints.http.server import ServeOptions
        from tetrion.entrypoints.http.server import serve as serve_http
        from tetrion.entrypoints.session import open_engine, run_async

        opened = open_engine(take_config(with_server_defaults(options)), ctx.obj)
        return run_async(serve_http(ServeOptions(**options), opened))

    return report_errors(run)


@cli.command("config")
def config_template() -> int:
    """Print a file for `tetrion serve --config FILE` with every key, what it means and what it may be."""
    click.echo(template(serve))
    return 0


@cli.command()
@click.option("--sizes", metavar="WxH,…", help="Default: 256² to 2048² and 1536x1024, as far as the model draws them.")
@click.option("--degrees", metavar="N,N,…", help="Default: all that the devices allow.")
@click.option("--steps", "num_steps", type=click.IntRange(min=1, max=300), default=8, show_default=True)
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Default: in the user's cache.")
@engine_options
@click.pass_context
def profile(ctx: click.Context, **options: Any) -> int:
    """Measure what steps, encode and decode cost on these devices in seconds and joules, for the planner.

    An engine on GPUs takes the table in the user's cache, else the one that ships for its GPUs and model, if it knows
    all degrees; --profile FILE names another.
    """

    def run() -> int:
        from tetrion.entrypoints.profile import command

        return command(take_config(options), command_line=command_line(ctx), **options)

    return report_errors(run)


@cli.command("check-model")
@click.argument("model", metavar="ID_OR_FOLDER")
@click.option("--device", metavar="NAME", help="cpu or cuda:N. Default: the first GPU, else cpu.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of diffusers' weights. Default: the engine's, float32 on a CPU and bfloat16 on a GPU.",
)
@click.option("--size", metavar="WxH", help="Pixels. Default: the model's.")
@click.option("--num-steps", type=click.IntRange(1, 1000), default=4, show_default=True)
@click.option("--prompt", metavar="TEXT", help="Default: one about shapes.")
@click.option("--seed", type=click.IntRange(min=0), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check_model(**options: Any) -> int:
    """Compare one picture of a checkpoint with what diffusers' own pipeline draws here.

    Text rows, embeddings, starting noise, noise levels and the picture are held against each other, each with its
    tolerance. Exit code 0: all are equal; 1: something differs.
    """

    def run() -> int:
        from tetrion.entrypoints.check_model import command

        return command(**{name: value for name, value in options.items() if value is not None})

    return report_errors(run)


@cli.group()
def bench() -> None:
    """Measure parts of the engine on this machine."""


@bench.command("step")
@click.option("--num-steps", type=click.IntRange(min=1), help="Default: 12; on GPUs (for exactness) the model's.")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="CPUs: pairs to compare.")
@click.option("--sizes", metavar="WxH,…", help="GPUs. Default: 256², 512², 1024², 2048².")
@click.option("--degrees", metavar="N,N,…", help="GPUs. Default: all that the devices allow.")
@click.option("--systems", metavar="NAME,…", help="GPUs: tetrion, floor, diffusers eager, … Default: all.")
@click.option("--sections", metavar="NAME,…", help="GPUs: steps, idle_gaps, resizing, exactness. Default: all.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="GPUs: how long each system is sustained.")
@click.option("--budget-s", type=float, default=3600.0, show_default=True, help="GPUs: nothing is begun after that.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the result there as JSON.")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="GPUs: draw the step times there, PNG.")
@click.option("--resume", is_flag=True, help="GPUs: go on with OUTPUT: measure only what it lacks.")
@click.option("--rehearse", is_flag=True, help="On CPUs do what is done on GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@engine_options
@click.pass_context
def bench_step(ctx: click.Context, **options: Any) -> int:
    """A denoising step at every degree, beside other systems on the same machine.

    On CPUs: whole requests beside diffusers' pipeline on the same weights, steps and threads, then each degree beside
    degree 1. On GPUs: each size and degree beside the library floor, diffusers and xfuser; then what resizing at every
    step adds, the gaps between chunks, and whether all degrees give the same latents.
    """

    def run() -> int:
        from tetrion.entrypoints.bench.step import command
        from tetrion.entrypoints.session import open_engine

        engine = take_config(options)
        open_engine(engine)  # says what is wrong with them
        command(engine, command_line=command_line(ctx), **options)
        return 0

    return report_errors(run)


for command in COMMANDS:
    bench.add_command(command)
bench.add_command(serve_command)
bench.add_command(energy_command(engine_options, take_config))
cli.add_command(recommend)


def run(
    arguments: list[str],
    factory: "EngineFactory | None" = None,
    program: click.Group = cli,
    name: str = "tetrion",
) -> int:
    """Run the command line `arguments` and return its exit code. `factory` makes the engine (default: the real one)."""
    try:
        return program.main(arguments, prog_name=name, standalone_mode=False, obj=factory) or 0
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("tetrion: interrupted")
        return EXIT_INTERRUPTED
    except SystemExit:  # click's way to end when it cannot print
        if is_reader_gone():
            return EXIT_BROKEN_PIPE
        raise


def _show(error: click.ClickException) -> None:
    """As click does, but for what it quotes of a command line at any length and with anything in it."""
    from tetrion.engine.errors import MAX_LINE_CHARS, one_line

    text = error.format_message()
    if all(len(line) <= MAX_LINE_CHARS and line.isprintable() for line in text.split("\n")):
        error.show()
    else:
        click.UsageError(one_line(text), getattr(error, "ctx", None)).show()


def main() -> None:
    """The console command `tetrion`."""
    hold_standard_streams()
    sys.exit(report_errors(lambda: flushed(lambda: run(sys.argv[1:]))))
