"""The options of `tetrion serve` that guard the server: admission, limits, keys, hosts, TLS, stopping.

Imports nothing but click, so that `--help` is quick. Their defaults are those of `http/server.py: ServeOptions`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tetrion.entrypoints.number_range import NumberRange

Command = Callable[..., Any]

ADMISSION = "reject-hopeless"
QUEUE_TIMEOUT_S = 600.0
"""What a server does where nothing else is asked of it; an embedded engine takes all, and lets them wait."""

_COUNT, _SECONDS, _FILE = click.IntRange(min=1), NumberRange(0, 86_400, min_open=True), click.Path(path_type=Path)
_GUARDS = (
    click.option(
        "--admission",
        type=click.Choice(["reject-hopeless", "all"]),
        help="What becomes of a request whose deadline cannot be met: 429 at once, with the earliest one that can"
        f" (reject-hopeless), or a late picture (all). Default: {ADMISSION}.",
    ),
    click.option("--max-n", type=click.IntRange(1, 10), help="Most pictures a request. Default: 10."),
    click.option("--max-steps", type=_COUNT, help="Most denoising steps a picture. Default: 1000."),
    click.option("--max-pixels", type=_COUNT, help="Most pixels a picture. Default: what the model draws."),
    click.option(
        "--max-waiting-mb",
        type=click.IntRange(4, 1 << 20),
        default=256,
        show_default=True,
        help="Memory for bodies and prompts of all requests that wait; what would need more gets 503.",
    ),
    click.option(
        "--limit-concurrency",
        type=_COUNT,
        metavar="N",
        help="Most requests for pictures at once; others get 503. Default, and at most: 7/8 of the connections that the"
        " limit of descriptors (ulimit -n) leaves room for.",
    ),
    click.option(
        "--head-timeout-s",
        type=_SECONDS,
        default=10.0,
        show_default=True,
        help="A connection that sends no whole request head for so long is closed.",
    ),
    click.option(
        "--body-timeout-s", type=_SECONDS, default=30.0, show_default=True, help="The same for a body; it gets 408."
    ),
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        metavar="[NAME:]KEY",
        help="Only requests with this key are served, /health and /ready excepted; may be repeated. NAME is the tenant"
        " it stands for, among whom the engine is shared. Other users of the machine see options: better put keys,"
        " separated by spaces, into the environment variable TETRION_API_KEY.",
    ),
    click.option(
        "--allowed-host",
        "allowed_hosts",
        multiple=True,
        metavar="NAME",
        help="A host name (or *.domain; * for any) that requests may be for; may be repeated. Default: on a loopback"
        " address loopback names and that of --public-url, else any.",
    ),
    click.option(
        "--trusted-proxy",
        "trusted_proxies",
        multiple=True,
        metavar="ADDRESS",
        help="An address or network (10.0.0.0/8) whose X-Forwarded-For and X-Forwarded-Proto are believed; may be"
        " repeated. Clients without a named key share the engine by address. Default: none.",
    ),
    click.option("--ssl-certfile", metavar="FILE", type=_FILE, help="Serve HTTPS with this certificate chain (PEM)."),
    click.option("--ssl-keyfile", metavar="FILE", type=_FILE, help="Its private key, if it is not in the same file."),
    click.option(
        "--drain-s",
        type=NumberRange(0, 86_400),
        default=0.0,
        show_default=True,
        help="How long requests are still taken after SIGTERM, while /ready is 503 already. Behind a balancer: longer"
        " than it takes to see that.",
    ),
    click.option(
        "--shutdown-timeout-s",
        type=NumberRange(0, 86_400),
        default=30.0,
        show_default=True,
        help="How long requests that run may take when the server stops; then they get 503.",
    ),
)


def guard_options(command: Command) -> Command:
    for option in reversed(_GUARDS):
        command = option(command)
    return command


def with_server_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """`options` with a server's own defaults in place of an engine's, and `--admission` among the planner's settings,
    of which it counts most; changes them."""
    own = options.pop("admission")
    asked = () if own is None else (f"admission={own}",)
    options["planner"] = (f"admission={ADMISSION}", *options["planner"], *asked)
    options["queue_timeout_s"] = options["queue_timeout_s"] or QUEUE_TIMEOUT_S
    return options
