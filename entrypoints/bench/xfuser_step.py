"""A rank of xfuser's (xDiT's) FLUX.1 transformer under `tetrion bench step`: USP with Ulysses over all ranks.

Fails at import where xfuser is not installed (`pip install xfuser`); that is its row's reason then.
"""

import importlib
from types import SimpleNamespace
from typing import Any

from torch import nn

from tetrion.entrypoints.bench.transformer_step import StepJob, device_of, new_transformer, run, world


def build(job: StepJob) -> nn.Module:
    xfuser, distributed = _import("xfuser"), _import("xfuser.core.distributed")
    flux = _import("xfuser.model_executor.models.transformers.transformer_flux")
    device, (rank, num_ranks) = device_of(job), world()
    distributed.init_distributed_environment(world_size=num_ranks, rank=rank, local_rank=rank)
    distributed.initialize_model_parallel(sequence_parallel_degree=num_ranks, ulysses_degree=num_ranks)
    transformer = new_transformer(flux.xFuserFlux1Transformer2DWrapper, job, device)
    engine_config, _ = xfuser.xFuserArgs(model=job.transformer, ulysses_degree=num_ranks).create_config()
    # Of the pipeline, the runtime state looks at nothing but the transformer.
    distributed.initialize_runtime_state(SimpleNamespace(transformer=transformer), engine_config)
    distributed.get_runtime_state().max_condition_sequence_length = job.num_text  # which a pipeline would set
    if job.compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    return transformer


def _import(name: str) -> Any:
    return importlib.import_module(name)


if __name__ == "__main__":
    run(build)
