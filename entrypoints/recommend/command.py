"""The option list of `tetrion recommend`. Imports nothing but click at module level, so that `--help` is quick."""

from pathlib import Path

import click

from tetrion.entrypoints.errors import report_errors
from tetrion.entrypoints.number_range import NumberRange


@click.command("recommend")
@click.argument("source", metavar="[RESULTS]", type=click.Path(path_type=Path), required=False)
@click.option("--deadline", metavar="S", required=True, help="Seconds for a picture: 5, 5s or 800ms.")
@click.option("--percentile", type=NumberRange(1, 100), help="Of latencies, to be in time. Default: the mean.")
@click.option("--max-gpus", type=click.IntRange(min=1), help="Use no more than that.")
@click.option("--model", metavar="NAME", help="Needed where the results have several, e.g. FLUX.1-dev.")
@click.option("--gpu", metavar="NAME", help="Needed where the results have several, e.g. H100.")
@click.option("--size", metavar="WxH", help="Needed where the results have several.")
@click.option("--num-steps", type=click.IntRange(min=1), help="Needed where the results have several.")
@click.option("--png", metavar="FILE", type=click.Path(path_type=Path), help="Draw time against energy there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def recommend(
    source: Path | None,
    deadline: str,
    percentile: float | None,
    max_gpus: int | None,
    model: str | None,
    gpu: str | None,
    size: str | None,
    num_steps: int | None,
    png: Path | None,
    as_json: bool,
) -> int:
    """The configuration that takes least energy and still meets a deadline.

    RESULTS is a folder or a file of `tetrion bench energy`, or a CSV; without it the table that ML.ENERGY published.
    Only what does not change the picture is varied: GPUs, degree, batch.
    """

    def run() -> int:
        import msgspec

        from tetrion.entrypoints.arguments import parse_size
        from tetrion.entrypoints.plotting import check_png
        from tetrion.entrypoints.recommend import picture as recommend_picture
        from tetrion.entrypoints.recommend import sources as recommend_sources
        from tetrion.entrypoints.recommend.choice import recommend as choose

        deadline_s = parse_seconds(deadline)
        if png is not None:
            check_png(png, "png")
        kind = {"model": model, "gpu": gpu, "num_steps": num_steps, "size": parse_size(size) if size else None}
        configurations = recommend_sources.select(recommend_sources.read_source(source), **kind)  # type: ignore[arg-type]
        try:
            advice = choose(configurations, deadline_s, percentile=percentile, max_gpus=max_gpus)
        except ValueError as error:
            raise _input_error(error) from None
        if png is not None:
            recommend_picture.draw(configurations, advice, png)
        click.echo(msgspec.json.encode(advice).decode() if as_json else recommend_picture.table(advice))
        return 0

    return report_errors(run)


def parse_seconds(text: str) -> float:
    """Seconds of "5", "5s" or "800ms". Raises InputError."""
    number, factor = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        seconds = float(number) * factor
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise _input_error(ValueError(f"deadline: expected seconds such as 5, 5s or 800ms, got {text!r}"))
    return seconds


def _input_error(error: ValueError) -> ValueError:
    from tetrion.entrypoints.errors import InputError

    return InputError(str(error))
