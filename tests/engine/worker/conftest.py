"""A tiny model of random weights, and workers of both kinds in this process."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest
import torch

from tetrion.engine.config import DeviceSpec
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.messages import Command, Event
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import ControlLayout, slab_layout
from tetrion.engine.parallel.saved_states import SavedStates
from tetrion.engine.params import Params
from tetrion.engine.transport.channel import ChannelSpec, RingSpec
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from tetrion.engine.worker.runner import Backend

CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {"_class_name": "FluxPipeline"},
    "preset.json": {
        "name": "tiny", "num_steps": 3, "max_text_tokens": 4, "min_size": 8, "max_size": 32, "default_width": 16,
        "default_height": 16,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0,
    },
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel", "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12],
        "guidance_embeds": True, "in_channels": 16, "joint_attention_dim": 24, "num_attention_heads": 3,
        "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 20,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4, "scaling_factor": 0.4, "shift_factor": 0.1, "sample_size": 32,
    },
    "text_encoder/config.json": {
        "model_type": "clip_text_model", "hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 20, "vocab_size": 300, "eos_token_id": 2, "bos_token_id": 0,
        "pad_token_id": 1,
    },
    "text_encoder_2/config.json": {
        "model_type": "t5", "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 200,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Config files only; 3 heads of 32, a text of 4 tokens, 4 pixels a token side."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", CONFIGS)


def make_model(folder: Path, configs: dict[str, dict[str, Any]]) -> ModelSpec:
    for name, content in configs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(content))
    return read_model_spec(folder, "dummy")


class Memory:
    """What the engine shares with its workers; `spec(device_id)` is what it tells one of them."""

    def __init__(self, model: ModelSpec, num_devices: int, itemsize: int = 4) -> None:
        self.model, self.num_devices = model, num_devices
        self.layout = slab_layout([model], num_devices, num_slots=2, itemsize=itemsize)
        control = ControlLayout(num_devices=num_devices).num_bytes
        self.control = SharedSegment.create("control", control)
        self._slabs = [SharedSegment.create("slab", self.layout.num_bytes) for _ in range(num_devices)]
        self.images = ImageSlab.create(2, 3 * 4 * model.sizes.max**2)
        self.inputs = ImageSlab.create(2, max(1, model.max_input_bytes), name="inputs")
        self.saved = SavedStates.create(self.layout)

    def spec(self, device_id: int) -> WorkerSpec:
        nothing = RingSpec(segment_fd=-1, segment_bytes=0, bell_read_fd=-1, bell_write_fd=-1)
        return WorkerSpec(
            attention="auto",
            device=DeviceSpec(device_id=device_id, kind="cpu", index=device_id),
            num_threads=1,
            models=(self.model,),
            load_format="dummy",
            layout=self.layout,
            channel=ChannelSpec(commands=nothing, events=nothing),
            slab_fds=tuple(os.dup(slab.fd) for slab in self._slabs),
            control_fd=os.dup(self.control.fd),
            saved_states_fd=os.dup(self.saved.segment.fd),
            image_slab_fd=os.dup(self.images.fd),
            num_image_slots=self.images.num_slots,
            image_slot_bytes=self.images.slot_bytes,
            input_slab_fd=os.dup(self.inputs.fd),
            num_input_slots=self.inputs.num_slots,
            input_slot_bytes=self.inputs.slot_bytes,
            weights_fd=os.memfd_create("test-weights"),
            engine_life_fd=-1,
            worker_life_fd=-1,
        )


BackendKind = Literal["cpu", "gpu"]
"""`gpu`: a GPU worker's code with work done when it is enqueued, its kernels interpreted."""


def has_gpu_exchange() -> bool:
    """Whether a GPU worker's backend can be imported at all."""
    try:
        from tetrion.engine.worker.gpu import GpuBackend  # noqa: F401
    except ImportError:
        return False
    return not torch.cuda.is_available()


def make_backend(kind: BackendKind, spec: WorkerSpec) -> "Backend":
    if kind == "cpu":
        from tetrion.engine.worker.cpu import CpuBackend

        return CpuBackend(spec)
    from tetrion.engine.worker.gpu import GpuBackend
    from tetrion.engine.worker.work_queue import ImmediateQueue

    return GpuBackend(spec, ImmediateQueue())


def answers_of(kind: BackendKind, spec: WorkerSpec, commands: Iterable[Command]) -> list[Event]:
    """A worker's answers to `commands`, in order."""
    from tetrion.engine.worker.completions import Completions
    from tetrion.engine.worker.entry import execute
    from tetrion.engine.worker.runner import Runner

    answers: list[Event] = []
    completions = Completions(spec.device.device_id, answers.append, on_broken=lambda: None)
    with torch.no_grad():
        runner = Runner(spec, make_backend(kind, spec), completions)
        for command in commands:
            event = execute(runner, command, spec.device.device_id)
            if event is not None:
                completions.send(event)
    completions.close()
    return answers


def request_params(spec: ModelSpec, num_steps: int, size: tuple[int, int] = (20, 8), num_branches: int = 1) -> Params:
    return Params(
        model=spec.name,
        shape=spec.shape(*size, num_branches),
        num_steps=num_steps,
        guidance=2.5,
        seed=3,
        true_cfg_scale=4.0,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
