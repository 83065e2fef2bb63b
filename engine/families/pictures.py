"""What models that take pictures do with them: begin with one, or attend to them as references. No torch."""

import math
from pathlib import Path
from typing import Any

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.checkpoint import component_folder
from tetrion.engine.families.components import VaeConfig, read_part
from tetrion.engine.families.files import fault
from tetrion.engine.families.library_shapes import has_encoder
from tetrion.engine.families.weights import read_shapes
from tetrion.engine.model_spec import Sizes
from tetrion.engine.shape import Size

AROUND = "around"
"""The field of what is left of a picture around a hole, and of where that is."""
STRENGTH = 0.6
"""Of diffusers' image-to-image pipelines."""
KONTEXT_SIDE = 1024
KONTEXT_SIZES: tuple[Size, ...] = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""Those that FLUX.1 Kontext was trained on, all of about 1024² pixels."""


def takes_pictures(folder: Path, load_format: LoadFormat, vae: VaeConfig | None = None) -> bool:
    """Whether the checkpoint's VAE has the half that makes latents of them. `vae`: its config, if it is another than
    AutoencoderKL. Raises CheckpointError; OSError."""
    path = component_folder(folder, "vae")
    config = vae or read_part(path, VaeConfig, "AutoencoderKL")
    return config.has_encoder if load_format == "dummy" else has_encoder(config, read_shapes(path))


def picture_inputs(folder: Path, load_format: LoadFormat) -> frozenset[str]:
    """What a model takes of pictures whose results may begin with one. Raises CheckpointError; OSError."""
    return frozenset({"pictures", "strength"} if takes_pictures(folder, load_format) else ())


def picture_limits(folder: Path, load_format: LoadFormat) -> dict[str, Any]:
    """Fields of its `ModelSpec` beside `inputs`. Raises CheckpointError; OSError."""
    return {"max_pictures": 1, "strength": STRENGTH} if takes_pictures(folder, load_format) else {}


def check_takes_pictures(folder: Path, load_format: LoadFormat) -> None:
    """Raises CheckpointError if a model that is made to edit cannot; OSError."""
    if not takes_pictures(folder, load_format):
        raise fault(component_folder(folder, "vae"), " has no encoder, which pictures need that are to be edited")


def kontext_sizes(folder: Path, load_format: LoadFormat, sizes: Sizes) -> tuple[Size, ...]:
    """What a reference is resized to; a model that draws smaller pictures gets smaller ones. Raises CheckpointError if
    the VAE cannot encode any; OSError."""
    check_takes_pictures(folder, load_format)
    factor = math.sqrt(math.prod(sizes.default)) / KONTEXT_SIDE
    scaled = [tuple(_floored(side * factor, sizes.multiple) for side in size) for size in KONTEXT_SIZES]
    return tuple(dict.fromkeys((width, height) for width, height in scaled))


def _floored(pixels: float, multiple: int) -> int:
    return max(int(pixels // multiple), 1) * multiple
