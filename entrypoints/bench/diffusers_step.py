"""A rank of diffusers' FLUX.1 transformer under `tetrion bench step`: eager or regionally compiled, with Ulysses."""

import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from torch import nn

from tetrion.entrypoints.bench.transformer_step import StepJob, device_of, new_transformer, run, world


def build(job: StepJob) -> nn.Module:
    device, (rank, num_ranks) = device_of(job), world()
    if num_ranks > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=num_ranks)
    transformer = new_transformer(FluxTransformer2DModel, job, device)
    if device.type == "cuda":
        transformer.set_attention_backend("_native_cudnn")
    if num_ranks > 1:
        tokens = [job.num_text, *(width * height for _, width, height in job.sizes)]
        uneven = any(count % num_ranks for count in tokens)
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=num_ranks, ulysses_anything=uneven))
    if job.compiled:
        transformer.compile_repeated_blocks(fullgraph=num_ranks == 1, dynamic=False)
    return transformer


if __name__ == "__main__":
    run(build)
