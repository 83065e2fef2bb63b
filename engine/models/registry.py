"""Architecture name -> how its pipeline is loaded. The one place that knows which models exist.

Owns the way from a checkpoint folder to a `Pipeline`, over weights that all CPU workers share or over a device's own.
Worker-only: importing it takes seconds. A new architecture is one entry in `ARCHITECTURES`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.flux import WITH_WEIGHTS
from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.autoencoder import UNUSED_PREFIXES, Autoencoder, vae_shapes
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.flux import FluxTransformer, read_config, transformer_shapes, weights_plan
from tetrion.engine.models.loading import (
    Component,
    ComponentFiles,
    Part,
    TensorFiles,
    attach,
    component_tensors,
    load_to_device,
    publish,
)
from tetrion.engine.models.ops import Ops, ReferenceOps
from tetrion.engine.models.text_encoders import PromptEmbedding, TextEncoders, text_encoder_shapes


class Pipeline:
    """A loaded model: text encoders, transformer, decoder, all over one set of weights."""

    def __init__(
        self,
        spec: ModelSpec,
        flux: FluxTransformer,
        text_encoders: TextEncoders,
        autoencoder: Autoencoder,
        weights_bytes: int,
    ) -> None:
        self.spec = spec
        self.flux = flux
        self.weights_bytes = weights_bytes
        self.text_encoders = text_encoders
        self.autoencoder = autoencoder

    def encode(self, prompt: str) -> PromptEmbedding:
        return self.text_encoders.encode(prompt)

    def decode(self, latents: Tensor, width: int, height: int) -> Tensor:
        """Packed latents [tokens, in_channels], fp32 -> uint8 RGB [height, width, 3], on the model's device."""
        return self.autoencoder.decode(latents, width, height)


class Architecture(NamedTuple):
    """`components`: what is to be loaded, by component. `build`: a pipeline over loaded `component/name` tensors."""

    components: Callable[[ModelSpec, LoadFormat], Mapping[str, Component]]
    build: Callable[[ModelSpec, LoadFormat, Mapping[str, Tensor], Ops], Pipeline]


def load_pipeline(spec: ModelSpec, fd: int, publish_weights: bool, load_format: LoadFormat = "safetensors") -> Pipeline:
    """Load the model of `spec` over the shared weights segment `fd`, fp32, for a CPU worker.

    The one worker with `publish_weights` reads the checkpoint and fills the segment (which may be empty: it is sized
    here); the others map what it wrote. Raises CheckpointError, or SharedMemoryError if the segment cannot be filled.
    """
    architecture = _architecture(spec)
    if publish_weights:
        publish(fd, architecture.components(spec, load_format))
    return architecture.build(spec, load_format, attach(fd), ReferenceOps())


def load_device_pipeline(
    spec: ModelSpec,
    load_format: LoadFormat,
    components: Mapping[str, Component],
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops,
) -> Pipeline:
    """Load the `model_components` of `spec` into the memory of `device`.

    Raises CheckpointError, or the device's out-of-memory.
    """
    return _architecture(spec).build(spec, load_format, load_to_device(components, device, dtype), ops)


def model_components(spec: ModelSpec, load_format: LoadFormat) -> Mapping[str, Component]:
    """All that would be loaded, by component. Raises CheckpointError."""
    return _architecture(spec).components(spec, load_format)


def _architecture(spec: ModelSpec) -> Architecture:
    if spec.family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"model: architecture {spec.family!r} is not supported (supported: {known})")
    return ARCHITECTURES[spec.family]


def _flux_components(spec: ModelSpec, load_format: LoadFormat) -> dict[str, Component]:
    path = Path(spec.path)
    files = _dummy_files(path) if load_format == "dummy" else _checkpoint_files(path)
    components = {name: _whole(files[name]) for name in ("text_encoder", "text_encoder_2")}
    components["vae"] = _whole(files["vae"], without=UNUSED_PREFIXES)
    plan = weights_plan(read_config(component_folder(path, "transformer") / "config.json"))
    components["transformer"] = Component(files["transformer"], plan)
    return components


def _build_flux(spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Pipeline:
    path = Path(spec.path)
    return Pipeline(
        spec=spec,
        flux=FluxTransformer(
            read_config(component_folder(path, "transformer") / "config.json"),
            component_tensors(tensors, "transformer"),
            ops,
        ),
        text_encoders=TextEncoders(
            component_tensors(tensors, "text_encoder"),
            component_tensors(tensors, "text_encoder_2"),
            spec,
            load_format,
        ),
        autoencoder=Autoencoder(component_folder(path, "vae"), component_tensors(tensors, "vae"), spec),
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _checkpoint_files(path: Path) -> dict[str, TensorFiles]:
    return {name: ComponentFiles(component_folder(path, name)) for name in WITH_WEIGHTS}


def _dummy_files(path: Path) -> dict[str, TensorFiles]:
    clip, t5 = text_encoder_shapes(path)
    shapes = {
        "text_encoder": clip,
        "text_encoder_2": t5,
        "vae": vae_shapes(component_folder(path, "vae")),
        "transformer": transformer_shapes(component_folder(path, "transformer")),
    }
    return {name: DummyFiles(component_folder(path, name), shapes[name]) for name in WITH_WEIGHTS}


def _whole(files: TensorFiles, without: tuple[str, ...] = ()) -> Component:
    return Component(files, {name: Part((name,)) for name in files.names if not name.startswith(without or ("\0",))})


ARCHITECTURES: Mapping[str, Architecture] = {"flux": Architecture(_flux_components, _build_flux)}
