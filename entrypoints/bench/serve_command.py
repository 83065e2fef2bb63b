"""The options of `tetrion bench serve`. Imports nothing but click at module level, so that `--help` is quick."""

from pathlib import Path
from typing import Any

import click

from tetrion.entrypoints.errors import report_errors
from tetrion.entrypoints.number_range import NumberRange
from tetrion.entrypoints.options import command_line

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
WEEK_S = 7 * 86_400


@click.command("serve")
@click.option("--url", required=True, metavar="URL", help="Where the server is, such as http://127.0.0.1:8000.")
@click.option("--api-key", metavar="KEY", envvar="TETRION_API_KEY", help="Or TETRION_API_KEY. Is not recorded.")
@click.option("--model", metavar="NAME", help="Default: the first that the server names.")
@click.option("--num-requests", type=COUNT, default=20, show_default=True)
@click.option("--warm-up", type=click.IntRange(min=0), default=1, show_default=True, help="Of each size, not counted.")
@click.option("--concurrency", type=COUNT, help="Closed loop: clients, each with one request at a time. Default: 1.")
@click.option("--rate", type=NumberRange(0, 1_000_000, min_open=True), help="Open loop: arrivals a minute.")
@click.option("--arrivals", type=click.Choice(["poisson", "gamma", "production"]), help="Open loop. Default: poisson.")
@click.option("--burstiness", type=NumberRange(0, 100, min_open=True), help="Of gamma arrivals. Default: 2.")
@click.option("--seed", type=click.IntRange(min=0), default=11, show_default=True, help="Of the arrivals.")
@click.option("--size", "sizes", metavar="WxH", multiple=True, help="May be repeated: taken in turn.")
@click.option("--num-steps", type=COUNT, help="Default: the model's.")
@click.option("--n", type=COUNT, help="Pictures of each request.")
@click.option("--format", "output_format", type=click.Choice(["png", "jpeg", "webp"]), help="Default: the server's.")
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="Taken in turn. Default: each its own.")
@click.option("--image", "images", metavar="FILE", type=FILE, multiple=True, help="Edit it; may be repeated.")
@click.option("--stream", is_flag=True, help="Ask for events: adds the time to the first preview.")
@click.option("--partial-images", type=click.IntRange(0, 3), help="Previews of a stream.")
@click.option(
    "--field", "more", metavar="KEY=VALUE", multiple=True, help="Any further field of the body; JSON or text."
)
@click.option("--slo", "slo_s", metavar="S", type=NumberRange(0, WEEK_S, min_open=True), help="Count answers in time.")
@click.option("--timeout", "timeout_s", metavar="S", type=NumberRange(0, WEEK_S, min_open=True), default=600.0)
@click.option("--output", metavar="FILE", type=FILE, help="Write the result there as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def serve_command(ctx: click.Context, **options: Any) -> int:
    """Latency and throughput of any server with OpenAI's image API, as its clients see it.

    One client after another by default (closed loop), or arrivals at a rate (open loop). Beside the latency: when the
    first byte came and the first preview, and where the time went, if the server says it.

    \b
    tetrion bench serve --url http://127.0.0.1:8000 --size 1024x1024 --format jpeg
    tetrion bench serve --url http://127.0.0.1:8000 --rate 60 --num-requests 300 --slo 5
    """
    return report_errors(lambda: _run(command_line(ctx), **options))


def _run(
    spelled: str,
    *,
    url: str,
    api_key: str | None,
    concurrency: int | None,
    rate: float | None,
    arrivals: str | None,
    burstiness: float | None,
    more: tuple[str, ...],
    **options: Any,
) -> int:
    from tetrion.entrypoints.arguments import parse_fields, parse_size
    from tetrion.entrypoints.bench.serve import Load, command
    from tetrion.entrypoints.errors import InputError

    if rate is not None and concurrency is not None:
        raise InputError("concurrency: of a closed loop; with --rate requests come at their times")
    if rate is None and (arrivals or burstiness):
        raise InputError(f"{'arrivals' if arrivals else 'burstiness'}: of an open loop: give --rate too")
    if burstiness is not None and arrivals != "gamma":
        raise InputError("burstiness: only with --arrivals gamma")
    if options["partial_images"] is not None and not options["stream"]:
        raise InputError("partial_images: only with --stream")
    for size in options["sizes"]:
        parse_size(size)
    fields = {
        "model": options.pop("model"),
        "num_inference_steps": options.pop("num_steps"),
        "n": options.pop("n"),
        "output_format": options.pop("output_format"),
        "stream": options.pop("stream") or None,
        "partial_images": options.pop("partial_images"),
    }
    further = parse_fields(more, "field")
    load = {name: options.pop(name) for name in ("num_requests", "seed", "sizes", "warm_up")}
    load |= {"concurrency": concurrency, "rate_per_min": rate, "process": arrivals, "burstiness": burstiness}
    command(
        url=url,
        api_key=api_key,
        load=Load(**{name: value for name, value in load.items() if value is not None}),
        fields={name: value for name, value in fields.items() if value is not None} | further,
        command_line=spelled,
        **options,
    )
    return 0
