"""How long weights take from safetensors files to every device at once, files in the page cache.

    python -m benchmarks.load_time OUTPUT.json --folder checkpoints/flux --devices cuda:0,1      34 GB on disk
    python -m benchmarks.load_time OUTPUT.json --folder checkpoints/dummy --model shapes --devices cpu:2    a rehearsal

Writes a checkpoint of random weights at the model's own shapes into FOLDER unless it is there, then lets one process a
device load it as workers do, all beginning together, twice. Rows: `first` has whatever writing left in the cache.
"""

import argparse
import json
import multiprocessing as mp
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tetrion.engine.config import DeviceSpec, parse_devices
from tetrion.engine.families.flux import WITH_WEIGHTS
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.models.loading import TensorFiles, load_to_device
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.models.registry import model_components
from tetrion.entrypoints.record import make_record, write_record

SHARD_BYTES = 5_000_000_000
ROUNDS = ("first", "second")
TIMEOUT_S = 600.0
Row = dict[str, Any]


def write_checkpoint(source: Path, folder: Path, device: torch.device) -> None:
    """Configs of `source`, random weights in bf16, in shards with an index."""
    spec = read_model_spec(source, "dummy")
    for component in model_components(spec, "dummy").values():
        files = component.files
        target = folder / files.folder.name
        shutil.copytree(files.folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards(files, device), start=1):
            name = f"model-{number:05d}.safetensors"
            save_file(shard, target / name)
            weight_map |= dict.fromkeys(shard, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in source.rglob("*"):  # last, so that a folder that was begun and not finished is no checkpoint
        place = folder / path.relative_to(source)
        if path.is_file() and path.parent.name not in WITH_WEIGHTS and path.suffix != ".py":
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def shards(files: TensorFiles, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors on the CPU, some gigabytes at a time."""
    shard: dict[str, torch.Tensor] = {}
    for name in files.names:
        shard[name] = files.read(name, device).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def load(folder: Path, device: DeviceSpec, ready: Any, answers: Any) -> None:
    place = torch.device(device.name if device.kind == "cuda" else "cpu")
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    components = model_components(read_model_spec(folder, "dummy"), "safetensors")
    torch.zeros(1, device=place)
    for name in ROUNDS:
        ready.wait()
        began_s = time.monotonic()
        tensors = load_to_device(components, place, dtype)
        if device.kind == "cuda":
            torch.cuda.synchronize(place)
        seconds = time.monotonic() - began_s
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        answers.put({"round": name, "device": device.name, "seconds": seconds, "gb": num_bytes / 1e9})
        del tensors
        if device.kind == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="flux1-dev")
    parser.add_argument("--devices", default="cuda")
    arguments = parser.parse_args()
    devices = parse_devices(arguments.devices)
    if not (arguments.folder / "model_index.json").is_file():
        began_s = time.monotonic()
        first = torch.device(devices[0].name if devices[0].kind == "cuda" else "cpu")
        write_checkpoint(resolve_model(arguments.model), arguments.folder, first)
        print(f"written in {time.monotonic() - began_s:.1f} s", flush=True)
    context = mp.get_context("spawn")
    ready, answers = context.Barrier(len(devices)), context.Queue()
    workers = [context.Process(target=load, args=(arguments.folder, d, ready, answers)) for d in devices]
    for worker in workers:
        worker.start()
    rows: list[Row] = []
    for _ in range(len(ROUNDS) * len(devices)):
        rows.append(answers.get(timeout=TIMEOUT_S))
        print(rows[-1], flush=True)
    for worker in workers:
        worker.join()
    write_record(make_record(f"python -m benchmarks.load_time {shlex.join(sys.argv[1:])}", rows), arguments.output)


if __name__ == "__main__":
    main()
