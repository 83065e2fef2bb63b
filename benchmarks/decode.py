"""Ways of decoding a FLUX.1 picture on one GPU: as diffusers does, with channels last, and fused, as the engine does.

    python -m benchmarks.decode OUTPUT.json                 on a GPU, half a minute
    TRITON_INTERPRET=1 python -m benchmarks.decode OUTPUT.json --device cpu      a rehearsal: one small picture

Random weights at full size, so that pictures show nothing. `largest_difference`: to decoding it whole, of 255;
`peak_gb`: of memory beyond the weights.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.autoencoders import Autoencoder
from tetrion.engine.models.fused_decoder import fuse
from tetrion.engine.models.loading import component_tensors, load_to_device
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.models.memory_budget import TILED_PIXELS
from tetrion.engine.models.registry import model_components
from tetrion.entrypoints.record import make_record, write_record

SIDES, TINY_SIDES = (512, 1024, 2048), (64,)
REPEATS = 5
Row = dict[str, Any]


def load(spec: ModelSpec, device: torch.device) -> Autoencoder:
    components = {"vae": model_components(spec, "dummy")["vae"]}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = load_to_device(components, device, dtype)
    return Autoencoder(Path(spec.path) / "vae", component_tensors(tensors, "vae"), spec)


def measure(decode: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Row]:
    on_gpu = device.type == "cuda"
    picture = decode()
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times_ms = []
    for _ in range(REPEATS):
        began_s = time.monotonic()
        picture = decode()
        if on_gpu:
            torch.cuda.synchronize()
        times_ms.append(1e3 * (time.monotonic() - began_s))
    peak_gb = (torch.cuda.max_memory_reserved() - before) / 1e9 if on_gpu else None
    return picture, {"ms": statistics.median(times_ms), "peak_gb": peak_gb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    spec = read_model_spec(resolve_model("flux1-dev"), "dummy")
    plain, channels_last, fused = (load(spec, device) for _ in range(3))
    channels_last.decoder.to(memory_format=torch.channels_last)  # the convolutions' outputs follow their weights
    fuse(fused.decoder)
    rows: list[Row] = []
    for side in SIDES if device.type == "cuda" else TINY_SIDES:
        tokens = (side // spec.sizes.multiple) ** 2
        latents = torch.randn(tokens, spec.in_channels, device=device)
        whole: Tensor | None = None
        for way, autoencoder, pixels in (
            ("whole, as diffusers decodes", plain, side**2),
            ("whole, channels last", channels_last, side**2),
            ("whole, fused", fused, side**2),
            ("in tiles, fused", fused, min(TILED_PIXELS, side**2 - 1)),
        ):
            autoencoder.whole_pixels = pixels
            row: Row = {"way": way, "px": side}
            try:
                picture, measured = measure(lambda: autoencoder.decode(latents, side, side), device)  # noqa: B023
            except torch.OutOfMemoryError as error:
                rows.append(row | {"ms": None, "reason": str(error)[:200]})
                continue
            whole = picture if whole is None else whole
            difference = (picture.int() - whole.int()).abs().max().item()
            rows.append(row | measured | {"largest_difference": difference})
            print(rows[-1], flush=True)
    write_record(make_record(f"python -m benchmarks.decode {shlex.join(sys.argv[1:])}", rows), arguments.output)


if __name__ == "__main__":
    main()
