"""What two deaths of a worker within a minute cost, on GPUs, with weights from files in the page cache.

    python -m benchmarks.gpu.losses OUTPUT.json --folder checkpoints/flux --devices cuda:0,1      34 GB on disk
    python -m benchmarks.gpu.losses OUTPUT.json --folder checkpoints/shapes --model configs/models/shapes \\
        --devices cpu:2 --size 128 --num-steps 8 --count 20 --kills-s 3 8      a rehearsal

Writes a checkpoint of random weights at the model's own shapes into FOLDER unless it is there. Then the same random
arrivals twice, in one engine: undisturbed, and with a SIGKILL of worker 0 at each of `--kills-s`. Pictures are compared
by their bytes. `back_s`: from a death until another worker is loaded in its place.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.families.served import read_model
from tetrion.engine.models.loading import TensorFiles
from tetrion.engine.models.registry import components_of
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.record import make_record, write_record

SHARD_BYTES = 5_000_000_000
TOKENIZERS = ("tokenizer", "tokenizer_2")
SHAPES = Path("configs/models/shapes")
"""Its tokenizers stand in where a model's configs come without."""
BACK_TIMEOUT_S = 120.0
Drawn = tuple[str, float]
"""Digest, seconds; the digest of a request that failed is its error."""


def write_checkpoint(source: Path, folder: Path, device: torch.device) -> None:
    """Configs of `source`, random weights, in shards with an index."""
    begun = folder.with_suffix(".begun")
    shutil.copytree(source, begun, ignore=shutil.ignore_patterns("*.safetensors*", "*.py"), dirs_exist_ok=True)
    for name in TOKENIZERS:
        shutil.copytree(SHAPES / name, begun / name, dirs_exist_ok=True)
    for component in components_of(read_model(str(source), "dummy"), "dummy").values():
        target = begun / component.files.folder.name
        stem = "model" if target.name.startswith("text") else "diffusion_pytorch_model"
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(_shards(component.files, device), start=1):
            file = f"{stem}-{number:05d}.safetensors"
            save_file(shard, target / file)
            weight_map |= dict.fromkeys(shard, file)
        (target / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    begun.rename(folder)


def _shards(files: TensorFiles, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors on the CPU, some gigabytes at a time."""
    shard: dict[str, torch.Tensor] = {}
    for name in files.names:
        shard[name] = files.read(name, device).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


class Load:
    """The same requests at the same times, as often as they are asked for."""

    def __init__(self, engine: AsyncEngine, size: int, num_steps: int, rate: float, count: int) -> None:
        self._engine, self._size, self._num_steps = engine, size, num_steps
        draws, time_s = random.Random(5), 0.0
        self._arrivals_s = [time_s := time_s + draws.expovariate(rate) for _ in range(count)]

    async def run(self, kills_s: Sequence[float] = ()) -> tuple[list[Drawn], list[float | None]]:
        """What became of each request, and for each kill when the worker was back (None: it was not)."""
        begun_s = time.monotonic()
        requests = [asyncio.create_task(self._one(number, begun_s)) for number in range(len(self._arrivals_s))]
        back_s = [await self._kill(begun_s + at_s) for at_s in kills_s]
        return await asyncio.gather(*requests), back_s

    async def draw(self, number: int, **fields: Any) -> Drawn:
        begun_s = time.monotonic()
        request = ImageRequest(
            prompt=f"a picture {number % 7}",
            width=self._size,
            height=self._size,
            num_steps=self._num_steps,
            seed=number,
            **fields,
        )
        try:
            image = (await self._engine.generate(request)).image
        except Exception as error:
            return f"{error!r}", time.monotonic() - begun_s
        return hashlib.sha256(np.ascontiguousarray(image)).hexdigest(), time.monotonic() - begun_s

    async def _one(self, number: int, begun_s: float) -> Drawn:
        await asyncio.sleep(max(0.0, begun_s + self._arrivals_s[number] - time.monotonic()))
        return await self.draw(number)

    async def _kill(self, at_s: float) -> float | None:
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        pid = self._engine.worker_pids()[0]
        os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        while time.monotonic() < killed_s + BACK_TIMEOUT_S:
            if self._engine.worker_pids().get(0, pid) != pid:
                return time.monotonic() - killed_s
            await asyncio.sleep(0.02)
        return None


def _row(phase: str, drawn: Sequence[Drawn], right: Sequence[Drawn]) -> dict[str, Any]:
    seconds = [seconds for _, seconds in drawn]
    p50, p99 = (float(np.percentile(seconds, share)) for share in (50, 99))
    lost = sum(len(digest) != 64 for digest, _ in drawn)
    wrong = sum(digest != other for (digest, _), (other, _) in zip(drawn, right, strict=True)) - lost
    return {"phase": phase, "sent": len(drawn), "wrong": wrong, "lost": lost, "p50_s": p50, "p99_s": p99}


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    config = EngineConfig(models=(str(arguments.folder),), devices=arguments.devices)
    async with AsyncEngine(config) as engine:
        load = Load(engine, arguments.size, arguments.num_steps, arguments.rate, arguments.count)
        for degree in range(1, len(engine.devices) + 1):  # what is new to a device is prepared now
            await load.draw(0, force_degrees=(degree,) * arguments.num_steps)
        calm, _ = await load.run()
        hit, back_s = await load.run(arguments.kills_s)
        rows = [_row("undisturbed", calm, calm), _row("killed", hit, calm)]
        rows[1] |= {"back_s": back_s, "p99_ratio": rows[1]["p99_s"] / rows[0]["p99_s"]}
        return [rows[0], rows[1] | msgspec.to_builtins(engine.stats().recovery)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("configs/models/flux1-dev"), help="whose configs are taken")
    parser.add_argument("--devices", default="cuda:0,1")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--count", type=int, default=90)
    parser.add_argument("--kills-s", type=float, nargs="+", default=[8.0, 25.0])
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_checkpoint(arguments.model, arguments.folder, device)
    rows = asyncio.run(measure(arguments))
    command = f"python -m benchmarks.gpu.losses {shlex.join(sys.argv[1:])}"
    print(write_record(make_record(command, rows), arguments.output))


if __name__ == "__main__":
    main()
