"""Architecture name -> how its pipeline is loaded. The one place that knows which models exist.

Owns the way from a checkpoint folder to a `Pipeline` over shared weights. Worker-only: importing it takes seconds.
A new architecture is one entry in `ARCHITECTURES`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tetrion.engine.model_spec import CheckpointError, ModelSpec
from tetrion.engine.models.autoencoder import UNUSED_PREFIXES, Autoencoder
from tetrion.engine.models.flux import FluxTransformer, read_config, weights_plan
from tetrion.engine.models.loading import Component, ComponentFiles, Part, attach, component_tensors, publish
from tetrion.engine.models.text_encoders import PromptEmbedding, TextEncoders


class Pipeline:
    """A loaded model: text encoders, transformer, decoder, all over one set of shared weights."""

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
        self._text_encoders = text_encoders
        self._autoencoder = autoencoder

    def encode(self, prompt: str) -> PromptEmbedding:
        return self._text_encoders.encode(prompt)

    def decode(self, latents: Tensor, width: int, height: int) -> NDArray[np.uint8]:
        """Packed latents [tokens, in_channels] -> uint8 RGB [height, width, 3]."""
        return self._autoencoder.decode(latents, width, height)


Builder = Callable[[ModelSpec, int, bool], Pipeline]


def load_pipeline(spec: ModelSpec, fd: int, publish: bool) -> Pipeline:
    """Load the model of `spec` over the shared weights segment `fd`.

    The one worker with `publish` reads the checkpoint and fills the segment (which may be empty: it is sized here);
    the others map what it wrote. Raises CheckpointError, or SharedMemoryError if the segment cannot be filled.
    """
    if spec.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"model: architecture {spec.architecture!r} is not supported (supported: {known})")
    return ARCHITECTURES[spec.architecture](spec, fd, publish)


def _load_flux(spec: ModelSpec, fd: int, publish_weights: bool) -> Pipeline:
    path = Path(spec.path)
    config = read_config(path / "transformer" / "config.json")
    if publish_weights:
        components = {name: _whole(path / name) for name in ("text_encoder", "text_encoder_2")}
        components["vae"] = _whole(path / "vae", without=UNUSED_PREFIXES)
        components["transformer"] = Component(ComponentFiles(path / "transformer"), weights_plan(config))
        publish(fd, components)
    tensors = attach(fd)
    return Pipeline(
        spec=spec,
        flux=FluxTransformer(config, component_tensors(tensors, "transformer")),
        text_encoders=TextEncoders(
            component_tensors(tensors, "text_encoder"),
            component_tensors(tensors, "text_encoder_2"),
            spec,
        ),
        autoencoder=Autoencoder(path / "vae", component_tensors(tensors, "vae"), spec),
        weights_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _whole(folder: Path, without: tuple[str, ...] = ()) -> Component:
    files = ComponentFiles(folder)
    return Component(files, {name: Part((name,)) for name in files.names if not name.startswith(without or ("\0",))})


ARCHITECTURES: Mapping[str, Builder] = {"flux": _load_flux}
