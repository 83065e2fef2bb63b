"""What the first picture of a size costs beside the second, and what requests beside it notice.

    python -m benchmarks.gpu.new_sizes OUTPUT.json --devices cuda:0,1
    python -m benchmarks.gpu.new_sizes OUTPUT.json --model configs/models/shapes --load-format safetensors \\
        --devices cpu:2 --neighbour 128 --most-pixels 200000 --count 3 --seconds 5      a rehearsal

Sizes are drawn at random, none of them one that the engine prepares at its start. Alone: each is drawn `REPEATS` times,
and `over_ms` is the first's time less the median of the others'. Beside neighbours: the same arrivals of one usual size
three times, alone, with the first pictures of new sizes between them, and with the same sizes again.
"""

import argparse
import asyncio
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.request import ImageRequest
from tetrion.engine.stages import STAGES
from tetrion.entrypoints.record import make_record, write_record

Size = tuple[int, int]
REPEATS = 4
LEAST_SHARE = 0.2
"""The fewest pixels of a new size over the most."""


class Load:
    """Requests of one engine. `degree`: of every step; None: as the planner likes."""

    def __init__(self, engine: AsyncEngine, num_steps: int, degree: int | None) -> None:
        self._engine, self._num_steps = engine, num_steps
        self._fields: dict[str, Any] = {} if degree is None else {"force_degrees": (degree,) * num_steps}
        self._number = 0

    async def draw(self, size: Size) -> tuple[float, ...]:
        """Seconds: all of it, and on devices by stage."""
        self._number += 1
        request = ImageRequest(
            prompt="a red circle",
            width=size[0],
            height=size[1],
            num_steps=self._num_steps,
            seed=self._number,
            **self._fields,
        )
        begun_s = time.monotonic()
        drawn = await self._engine.generate(request)
        return time.monotonic() - begun_s, drawn.encode_s, drawn.denoise_s, drawn.decode_s

    async def first_and_later(self, sizes: Sequence[Size]) -> list[dict[str, Any]]:
        """One after the other, alone."""
        rows = []
        for size in sizes:
            first, *later = [await self.draw(size) for _ in range(REPEATS)]
            usual = [median(column) for column in zip(*later, strict=True)]
            over_ms = [1e3 * (new_s - usual_s) for new_s, usual_s in zip(first, usual, strict=True)]
            row = {"size": f"{size[0]}x{size[1]}", "first_s": first[0], "later_s": usual[0], "over_ms": over_ms[0]}
            rows.append(row | {f"{stage}_over_ms": ms for stage, ms in zip(STAGES, over_ms[1:], strict=True)})
            print(", ".join(f"{name} {value:.4g}" if name != "size" else value for name, value in rows[-1].items()))
        return rows

    async def beside(self, neighbour: Size, arrivals_s: Sequence[float], others: Sequence[Size]) -> list[float]:
        """Seconds of each neighbour, with `others` spread evenly over the time."""
        seconds = arrivals_s[-1]

        async def at(time_s: float, size: Size) -> float:
            await asyncio.sleep(time_s)
            return (await self.draw(size))[0]

        spread = [at((i + 0.5) * seconds / len(others), size) for i, size in enumerate(others)]
        done = await asyncio.gather(*(at(time_s, neighbour) for time_s in arrivals_s), *spread)
        return done[: len(arrivals_s)]


def new_sizes(count: int, multiple: int, most_pixels: int, known: set[Size], draws: random.Random) -> list[Size]:
    """Different ones."""
    sizes: list[Size] = []
    while len(sizes) < count:
        area = most_pixels * draws.uniform(LEAST_SHARE, 1.0)
        aspect = draws.uniform(0.5, 2.0)
        width, height = (round((area * a) ** 0.5 / multiple) * multiple for a in (aspect, 1 / aspect))
        if width % 64 and (width, height) not in known and (width, height) not in sizes:
            sizes.append((width, height))
    return sizes


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = EngineConfig(models=(str(arguments.model),), devices=arguments.devices, load_format=arguments.load_format)
    draws = random.Random(arguments.seed)
    neighbour = (arguments.neighbour, arguments.neighbour)
    async with AsyncEngine(config) as engine:
        load = Load(engine, arguments.num_steps, arguments.degree)
        sizes = new_sizes(2 * arguments.count, 16, arguments.most_pixels, {neighbour}, draws)
        for _ in range(2 * len(engine.devices)):
            alone_s, *_ = await load.draw(neighbour)
        rows = await load.first_and_later(sizes[: arguments.count])
        over_ms = [row["over_ms"] for row in rows]
        rows.append({"median_over_ms": median(over_ms), "worst_over_ms": max(over_ms)})
        rate, time_s, arrivals_s = arguments.share / alone_s, 0.0, []
        while time_s < arguments.seconds:
            arrivals_s.append(time_s := time_s + draws.expovariate(rate))
        calm_s = None
        for phase, others in (
            ("alone", []),
            ("new sizes", sizes[arguments.count :]),
            ("the same again", sizes[arguments.count :]),
        ):
            taken_s = await load.beside(neighbour, arrivals_s, others)
            p50, p95, worst = (float(np.percentile(taken_s, share)) for share in (50, 95, 100))
            calm_s = calm_s or p95
            row = {"phase": phase, "neighbours": len(taken_s), "p50_s": p50, "p95_s": p95, "worst_s": worst}
            rows.append(row | {"p95_ratio": p95 / calm_s})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, default=Path("configs/models/flux1-dev"))
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--devices", default="cuda:0,1")
    parser.add_argument("--degree", type=int, default=None, help="of every step; default: the planner decides")
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--count", type=int, default=20, help="new sizes alone, and as many beside neighbours")
    parser.add_argument("--most-pixels", type=int, default=1 << 20, help="of a new size")
    parser.add_argument("--neighbour", type=int, default=1024, help="pixels a side")
    parser.add_argument("--share", type=float, default=0.5, help="neighbours a second, times what one takes alone")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each phase with neighbours")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments))
    command = f"python -m benchmarks.gpu.new_sizes {shlex.join(sys.argv[1:])}"
    print(write_record(make_record(command, rows), arguments.output))


if __name__ == "__main__":
    main()
