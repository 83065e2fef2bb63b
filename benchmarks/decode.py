"""Ways of decoding a FLUX.1 picture on one GPU: whole or in tiles, with channels last, with fused norms.

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
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tetrion.engine.model_spec import ModelSpec, read_model_spec
from tetrion.engine.models.autoencoder import Autoencoder
from tetrion.engine.models.loading import component_tensors, load_to_device
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.models.memory_budget import TILED_PIXELS
from tetrion.engine.models.registry import model_components
from tetrion.entrypoints.bench.record import make_record, write_record
from tetrion.kernels.group_norm_silu import group_norm_silu

SIDES, TINY_SIDES = (512, 1024, 2048), (64,)
REPEATS = 5
SCORE_ROWS = 4096
Row = dict[str, Any]


def load(spec: ModelSpec, device: torch.device) -> Autoencoder:
    components = {"vae": model_components(spec, "dummy")["vae"]}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = load_to_device(components, device, dtype)
    return Autoencoder(Path(spec.path) / "vae", component_tensors(tensors, "vae"), spec)


class FusedNorm(nn.Module):
    """A group norm and the SiLU behind it, for maps with channels last."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_1CHW: Tensor) -> Tensor:
        x_HWC = x_1CHW[0].permute(1, 2, 0).contiguous()
        norm = self.norm
        out_PC = group_norm_silu(x_HWC.flatten(0, 1), norm.weight, norm.bias, norm.num_groups, norm.eps)
        return out_PC.view_as(x_HWC).permute(2, 0, 1).unsqueeze(0)


def fuse_norms(decoder: nn.Module) -> None:
    for block in (module for module in decoder.modules() if isinstance(module, ResnetBlock2D)):
        block.norm1, block.norm2, block.nonlinearity = FusedNorm(block.norm1), FusedNorm(block.norm2), nn.Identity()
    decoder.conv_norm_out, decoder.conv_act = FusedNorm(decoder.conv_norm_out), nn.Identity()


class GemmAttention:
    """The decoder's one attention, whose head is too wide for flash attention: some rows of scores at a time."""

    def __call__(self, attn: Any, x_1CHW: Tensor, encoder_hidden_states: None = None, temb: None = None) -> Tensor:
        _, channels, height, width = x_1CHW.shape
        normed_PC = attn.group_norm(x_1CHW).permute(0, 2, 3, 1).reshape(-1, channels)
        q, k, v = (project(normed_PC) for project in (attn.to_q, attn.to_k, attn.to_v))
        out = torch.empty_like(q)
        for rows, part in zip(q.split(SCORE_ROWS), out.split(SCORE_ROWS), strict=True):
            torch.mm(torch.mm(rows * attn.scale, k.T).softmax(-1), v, out=part)
        attended = attn.to_out[0](out).view(1, height, width, channels).permute(0, 3, 1, 2)
        return (attended + x_1CHW) / attn.rescale_output_factor


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
    plain, channels_last, fused, gemms = (load(spec, device) for _ in range(4))
    for autoencoder in (channels_last, fused, gemms):
        autoencoder._vae.to(memory_format=torch.channels_last)  # the convolutions follow their weights' format
    for autoencoder in (fused, gemms):
        fuse_norms(autoencoder._vae.decoder)
    gemms._vae.decoder.mid_block.attentions[0].set_processor(GemmAttention())
    rows: list[Row] = []
    for side in SIDES if device.type == "cuda" else TINY_SIDES:
        tokens = (side // spec.size_multiple) ** 2
        latents = torch.randn(tokens, spec.in_channels, device=device)
        whole: Tensor | None = None
        for way, autoencoder, pixels in (
            ("whole", plain, side**2),
            ("whole, channels last", channels_last, side**2),
            ("whole, channels last, fused norms", fused, side**2),
            ("whole, channels last, fused norms, attention by GEMMs", gemms, side**2),
            ("in tiles", plain, min(TILED_PIXELS, side**2 - 1)),
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
