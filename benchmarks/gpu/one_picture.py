"""Where the time of one picture goes: whole requests through `tetrion serve`, one after another, by model.

    python -m benchmarks.gpu.one_picture OUTPUT.json --devices cuda:0 \\
        --models z-image-turbo:8,z-image-turbo:9,flux2-klein-4b,qwen-image-2.1,krea-2-turbo,flux2-dev
    python -m benchmarks.gpu.one_picture OUTPUT.json --devices cpu:1 --models shapes:4 --size 256x256      a rehearsal

Each model has random weights of the published sizes (`--load-format dummy`) and a server of its own; a number behind
its name is that of the steps. Prompts have more words than a model reads, so texts are as long as they can be. A
request's time is the client's, from its first byte to the answer's last one: JPEG, base64 in JSON, over loopback.
`said_s` are medians by stage as the answers say, `beside_s` what is beyond them: HTTP, and bytes on their way. The file
is written after every model; what it has already is not measured again.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import server
from tetrion.entrypoints.bench.serve import Load, measure, table
from tetrion.entrypoints.record import make_record, write_record

NUM_WORDS = 2000
WARM_UP = 3


def steps_of(text: str) -> tuple[str, int | None]:
    """`NAME` or `NAME:STEPS`."""
    name, _, steps = text.partition(":")
    return name, int(steps) if steps else None


def measured(name: str, num_steps: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model's row."""
    words = " ".join(f"word{number}" for number in range(NUM_WORDS))
    fields = {"output_format": "jpeg"} | ({} if num_steps is None else {"num_inference_steps": num_steps})
    line = ["--model", name, "--load-format", "dummy", "--devices", arguments.devices, "--log-level", "warning"]
    begun_s = time.monotonic()
    with server(line, start_timeout_s=arguments.start_timeout_s) as (url, _):
        start_s = time.monotonic() - begun_s
        load = Load(num_requests=arguments.count, sizes=(arguments.size,), warm_up=WARM_UP)
        prompts = [f"picture {number}: {words}" for number in range(arguments.count + WARM_UP)]  # none is cached
        found = measure(url=url, load=load, fields=fields, prompts=prompts)
    print(table(found), flush=True)
    (row,) = found["rows"]
    return {"model": name, "num_steps": num_steps, "devices": arguments.devices, "start_s": start_s, **row}


def is_of(row: dict[str, Any], name: str, num_steps: int | None, arguments: argparse.Namespace) -> bool:
    wanted = (name, num_steps, arguments.devices, arguments.size)
    return (row["model"], row["num_steps"], row["devices"], row["size"]) == wanted


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", required=True, help="NAME or NAME:STEPS, joined by commas")
    parser.add_argument("--devices", default="cuda:0")
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--count", type=int, default=20, help="pictures of each model")
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--budget-s", type=float, default=1e9, help="no model is begun after that")
    arguments = parser.parse_args(words)
    begun_s, line = time.monotonic(), f"python -m benchmarks.gpu.one_picture {shlex.join(words)}"
    rows = json.loads(arguments.output.read_bytes())["rows"] if arguments.output.exists() else []
    for name, num_steps in map(steps_of, arguments.models.split(",")):
        if any(is_of(row, name, num_steps, arguments) for row in rows):
            continue
        if time.monotonic() - begun_s > arguments.budget_s:
            print(f"not begun: {name}", flush=True)
            continue
        rows.append(measured(name, num_steps, arguments))
        write_record(make_record(line, rows), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
