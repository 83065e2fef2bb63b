"""FLUX.1-dev's step at full size on a GPU, recorded as a graph, against diffusers with the same random weights."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.device_ops import DeviceOps
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.flux import FluxTransformer, read_config, transformer_shapes, weights_plan
from tetrion.engine.models.loading import Component, component_tensors, load_to_device
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.parallel.device_exchange import DeviceExchange
from tetrion.engine.parallel.device_memory import DeviceMemory
from tetrion.engine.parallel.layout import ControlLayout, slab_layout
from tetrion.engine.sampling.flow_match import initial_noise, sigmas, timesteps
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker.step_graphs import StepGraphs, StepTables
from tetrion.engine.worker.work_queue import CudaQueue

NUM_STEPS, SIZE, GUIDANCE, SLOT = 2, 256, 3.5, 1
Inputs = tuple[Tensor, Tensor, Tensor]
"""Noise fp32 [tokens, 64], prompt embeddings and pooled embedding in bf16."""


@pytest.mark.gpu
def test_as_close_to_fp32_as_diffusers() -> None:
    spec = read_model_spec(resolve_model("flux1-dev"), "dummy")
    folder = Path(spec.path) / "transformer"
    files = DummyFiles(folder, transformer_shapes(folder))
    generator = torch.Generator("cuda").manual_seed(1)
    embeds, pooled = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16()
        for shape in ((spec.max_text_tokens, spec.text_dim), (spec.pooled_dim,))
    )
    inputs = initial_noise(5, SIZE, SIZE, spec).cuda(), embeds, pooled
    with torch.no_grad():
        exact, theirs = diffusers_latents(files, spec, inputs)
        torch.cuda.empty_cache()
        ours, repeated = our_latents(files, spec, inputs)
    assert torch.equal(ours, repeated), "the recorded step gives other bits the second time"
    error, their_error = (relative_error(latents - inputs[0], exact - inputs[0]) for latents in (ours, theirs))
    print(f"relative error to fp32: ours {error:.5f}, diffusers in bf16 {their_error:.5f}")
    assert 0 < error <= their_error


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def diffusers_latents(files: DummyFiles, spec: ModelSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """After all steps, computed in fp32 and in bf16, as FluxPipeline does."""
    cuda = torch.device("cuda")
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(files.folder))
    model.load_state_dict({name: files.read(name, cuda) for name in files.names}, assign=True)
    in_bf16 = _diffusers_run(model, spec, inputs, torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return _diffusers_run(model, spec, inputs, torch.float32), in_bf16


def _diffusers_run(model: FluxTransformer2DModel, spec: ModelSpec, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    noise, embeds, pooled = (tensor.to(dtype) for tensor in inputs)
    side = SIZE // spec.sizes.multiple
    image_ids = torch.zeros(side, side, 3, device="cuda")
    image_ids[..., 1] += torch.arange(side, device="cuda")[:, None]
    image_ids[..., 2] += torch.arange(side, device="cuda")[None, :]
    levels = sigmas(spec.scheduler, NUM_STEPS, side * side)
    latents = noise
    for i, time in enumerate(timesteps(spec.scheduler, levels)):
        velocity = model(
            hidden_states=latents[None],
            encoder_hidden_states=embeds[None],
            pooled_projections=pooled[None],
            timestep=torch.full((1,), float(time), device="cuda").to(dtype) / 1000,
            guidance=torch.full((1,), GUIDANCE, device="cuda"),
            img_ids=image_ids.flatten(0, 1),
            txt_ids=torch.zeros(len(embeds), 3, device="cuda"),
        ).sample[0]
        latents = (latents.float() + float(levels[i + 1] - levels[i]) * velocity).to(dtype)
    return latents.float()


def our_latents(files: DummyFiles, spec: ModelSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """After all steps at degree 1, twice."""
    queue = CudaQueue(0)
    step = torch.zeros(1, dtype=torch.int32, device=queue.device)
    config = read_config(files.folder / "config.json")
    tensors = load_to_device({"transformer": Component(files, weights_plan(config))}, queue.device, torch.bfloat16)
    flux = FluxTransformer(config, component_tensors(tensors, "transformer"), DeviceOps(step))
    layout = slab_layout(spec, 1, 2, itemsize=2)
    control = SharedSegment.create("control", ControlLayout(num_devices=1).num_bytes)
    memory = DeviceMemory(layout, 0, queue.device, [os.memfd_create("slab")], os.dup(control.fd))
    exchange = DeviceExchange(memory.slabs, memory.abort, memory.clear_abort, spec.num_heads, spec.head_dim)
    tables = StepTables(step, config.num_vectors, config.hidden_size, torch.bfloat16)
    run = _runner(queue, flux, memory, exchange, StepGraphs(queue, flux, exchange, tables), tables, spec, inputs)
    return run(), run()


def _runner(
    queue: CudaQueue,
    flux: FluxTransformer,
    memory: DeviceMemory,
    exchange: DeviceExchange,
    graphs: StepGraphs,
    tables: StepTables,
    spec: ModelSpec,
    inputs: Inputs,
) -> Callable[[], Tensor]:
    noise, embeds, pooled = inputs
    levels = sigmas(spec.scheduler, NUM_STEPS, len(noise))
    times = torch.from_numpy(timesteps(spec.scheduler, levels)).to(queue.device)
    plan, group = exchange.alone(len(embeds), len(noise))
    side = SIZE // spec.sizes.multiple

    def run() -> Tensor:
        state = memory.slabs.slot(0, SLOT)
        state.latents[: len(noise)].copy_(noise)
        graph = graphs.get(group.shape)
        group.bind(plan, SLOT, source=0, start_version=0, end_version=0)
        group.enter()
        graph.load_rope((side, side))
        graph.load_text(flux.project_text(embeds))
        tables.load(torch.from_numpy(levels).diff().to(queue.device), flux.modulations(times, GUIDANCE, pooled))
        for _ in range(NUM_STEPS):
            graph.replay()
        group.finish()
        queue.drain()
        assert exchange.status.tolist() == [0, 0]
        return state.latents[: len(noise)].clone()

    return run
