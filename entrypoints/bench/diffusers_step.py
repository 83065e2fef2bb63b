"""A rank of diffusers' transformer under `tetrion bench step`: eager or regionally compiled, with Ulysses where the
class knows context parallelism (FLUX.1's does, SD3's does not)."""

from typing import Any

import diffusers
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tetrion.entrypoints.bench.transformer_step import StepJob, class_name, device_of, new_transformer, run, world


def build(job: StepJob) -> nn.Module:
    device, (rank, num_ranks), name = device_of(job), world(), class_name(job)
    model = getattr(diffusers, name)
    if num_ranks > 1:
        if model._cp_plan is None:
            raise ValueError(f"diffusers' {name} knows no context parallelism")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=num_ranks)
    transformer = new_transformer(model, job, device)
    if device.type == "cuda":
        _attend_with_cudnn(transformer)
    if num_ranks > 1:
        tokens = [job.num_text, *(width * height for _, width, height in job.sizes)]
        uneven = any(count % num_ranks for count in tokens)
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=num_ranks, ulysses_anything=uneven))
    if job.compiled:
        if not transformer._repeated_blocks:  # SD3's class names its blocks here only
            transformer._repeated_blocks = transformer._no_split_modules
        transformer.compile_repeated_blocks(fullgraph=num_ranks == 1, dynamic=False)
    return transformer


def _attend_with_cudnn(transformer: Any) -> None:
    """The fastest here, which Tetrion takes too. SD3's attention asks torch past diffusers' choice of a backend."""
    transformer.set_attention_backend("_native_cudnn")
    if transformer._cp_plan is None:
        transformer.forward = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(transformer.forward)


if __name__ == "__main__":
    run(build)
