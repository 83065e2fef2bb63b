"""FLUX.1-dev's step at full size on a GPU, recorded as a graph, against diffusers with the same random weights."""

import os
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.family import Begin, LatentCodec, Model, TextEncoding
from tetrion.engine.models.flux import network, project_text, read_config, transformer_shapes, weights_plan
from tetrion.engine.models.gpu_ops import GpuOps
from tetrion.engine.models.loading import Component, component_tensors, load_to_device
from tetrion.engine.parallel.gpu.exchange import GpuExchange, SharedResources
from tetrion.engine.parallel.gpu.memory import GpuMemory
from tetrion.engine.parallel.layout import ControlLayout, slab_layout
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import euler_schedule, pack_latents, sigmas, timesteps
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker.denoiser import Denoiser, State
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
    config = read_config(folder / "config.json")
    embeds, pooled = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16()
        for shape in ((spec.max_text_tokens, config.joint_attention_dim), (config.pooled_projection_dim,))
    )
    size = spec.latents.width // 4, SIZE // 8, SIZE // 8
    noise = pack_latents(torch.randn(size, generator=torch.Generator().manual_seed(5))).cuda()
    inputs = noise, embeds, pooled
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
    ops = GpuOps(step)
    plan = weights_plan(read_config(files.folder / "config.json"))
    tensors = load_to_device({"transformer": Component(files, plan)}, queue.device, torch.bfloat16)
    transformer = network(spec, component_tensors(tensors, "transformer"), ops)
    control = SharedSegment.create("control", ControlLayout(num_devices=1).num_bytes)
    layout = slab_layout([spec], 1, 2, itemsize=2)
    memory = GpuMemory(layout, 0, queue.device, [os.memfd_create("slab")], os.dup(control.fd))
    shared = SharedResources(memory.slabs, memory.abort, memory.clear_abort, [spec])
    exchange = GpuExchange(shared, spec, queue.to_host)
    model = Model(
        spec=spec,
        network=transformer,
        text=cast(TextEncoding, None),
        codec=cast(LatentCodec, None),
        begin=cast(Begin, None),
        schedule=lambda num_steps, shape: euler_schedule(spec.scheduler, num_steps, shape.image),
        guidance_factor=lambda params: 1.0,
    )
    denoiser = Denoiser(model, ops, exchange, queue, step, torch.bfloat16)
    noise, embeds, pooled = inputs
    values = {"text": project_text(ops, transformer.weights, embeds), "pooled": pooled[None], "latents": noise}
    shape = spec.shape(SIZE, SIZE)
    params = Params(model=spec.name, shape=shape, num_steps=NUM_STEPS, guidance=GUIDANCE, seed=0)

    def run() -> Tensor:
        fields, state = {**exchange.constants(SLOT, 0), "latents": exchange.state(SLOT, 0)}, State(1, SLOT)
        for name, value in values.items():
            fields[name][: len(value)].copy_(value)
        versions = slot_version(1, 0), slot_version(1, NUM_STEPS)
        exchange.publish(SLOT, 0, versions[0])
        chunk = denoiser.chunk(shape, (0,), SLOT, 0, 0, versions)
        denoiser.make_room(chunk)
        exchange.bind(chunk)
        denoiser.prepare(chunk, state, params, 0)
        exchange.pull_state()
        exchange.enter()
        denoiser.run(chunk, state, params, range(NUM_STEPS))
        exchange.finish()
        check = exchange.outcome()
        queue.drain()
        check()
        return exchange.state(SLOT, 1)[: shape.image].clone()

    return run(), run()
