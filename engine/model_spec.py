"""What the engine must know of a checkpoint, read from its JSON files alone (no torch, no weights).

A checkpoint is a folder in diffusers layout: `model_index.json` and one folder per component. An optional `preset.json`
in the folder gives sizes, steps and text length; otherwise FLUX.1-dev's own defaults hold, or FLUX.1-schnell's if the
model takes no guidance.
"""

import functools
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.config import LoadFormat

PRESET_FILE = "preset.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CONFIG_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
)
TOKENIZER_FILES = (f"tokenizer/{TOKENIZER_CONFIG}", f"tokenizer_2/{TOKENIZER_CONFIG}")
COMPONENTS_WITH_WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
UNSUPPORTED_OPTIONS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)
"""Of the scheduler."""


MAX_UNEVENNESS = 1.2
"""24 heads on 7 devices are 4 on the fullest, as many as on 6: attention has 28 places for 24 heads and gains nothing,
but the rest of a step does, so it may pay. A looser bound would add degrees like 10 and 11 (30 and 33 places, 3 heads
on the fullest as on 8) that are worth no measurement; a tighter one would leave one of seven devices idle."""


class CheckpointError(ValueError):
    """A checkpoint folder is missing, incomplete or of an architecture that is not supported."""


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults and limits of a model; the values here are FLUX.1-dev's. Sizes in pixels."""

    name: str = ""
    num_steps: int = 28
    guidance: float | None = 3.5
    max_text_tokens: int = 512
    min_size: int = 128
    max_size: int = 2048
    default_width: int = 1024
    default_height: int = 1024


SCHNELL = Preset(num_steps=4, guidance=None, max_text_tokens=256)


class SchedulerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a FlowMatchEulerDiscreteScheduler config that decides the noise levels."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes and limits of one model. One packed image token covers 2 × 2 latent pixels (`size_multiple` pixels)."""

    name: str
    path: str
    architecture: str
    num_heads: int
    head_dim: int
    in_channels: int
    text_dim: int
    pooled_dim: int
    guidance_embeds: bool
    vae_scale_factor: int
    scheduler: SchedulerSpec
    num_steps: int
    guidance: float
    max_text_tokens: int
    min_size: int
    max_size: int
    default_width: int
    default_height: int

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    @property
    def max_image_tokens(self) -> int:
        return self.num_image_tokens(self.max_size, self.max_size)

    def is_side(self, pixels: int) -> bool:
        """Whether the model draws pictures of this width or height."""
        return pixels % self.size_multiple == 0 and self.min_size <= pixels <= self.max_size

    def num_image_tokens(self, width: int, height: int) -> int:
        """Packed tokens of a picture of `width` × `height` pixels."""
        return (width // self.size_multiple) * (height // self.size_multiple)

    def legal_degrees(self, num_devices: int, num_branches: int = 1) -> tuple[int, ...]:
        """See the function of that name."""
        return legal_degrees(self.num_heads, num_branches, num_devices)


@functools.lru_cache
def legal_degrees(num_heads: int, num_branches: int, num_devices: int) -> tuple[int, ...]:
    """Degrees that a step may be run at, ascending: 1 … 9, 12, 13, 14, 23, 24 for 24 heads on many devices.

    Where the degree is a multiple of the branches, those go apart, each on its share of the devices; else in turn, each
    on all of them. The heads of a branch go to its devices as evenly as they can, and attention takes as long as the
    device with most of them; everything else is split by rows. At most `MAX_UNEVENNESS` of attention's device time may
    be lost by that. Whether a degree pays is for the measured cost table to say: policies use one that it has, if a
    step is 2 % faster than at every narrower degree.
    """

    def is_legal(degree: int) -> bool:
        divisible = degree % num_branches == 0
        members = degree // num_branches if divisible else degree
        most = -(-num_heads // members)
        return members <= num_heads and most * members <= MAX_UNEVENNESS * num_heads

    return tuple(degree for degree in range(1, num_devices + 1) if is_legal(degree))


def has_tokenizer(folder: Path) -> bool:
    """Whether a component folder holds a tokenizer."""
    return (folder / TOKENIZER_CONFIG).is_file()


def read_model_spec(path: Path, load_format: LoadFormat = "safetensors") -> ModelSpec:
    """Read and check a checkpoint folder; with `dummy` it needs neither weights nor tokenizers.

    Raises CheckpointError naming the first thing that is missing or not supported.
    """
    if not path.is_dir():
        raise CheckpointError(f"model: {str(path)!r} is not a folder")
    missing = [name for name in CONFIG_FILES if not (path / name).is_file()]
    if load_format != "dummy":
        missing += _missing_weights(path, hint=not missing)
    if missing:
        raise CheckpointError(f"model: {str(path)!r} is missing {', '.join(missing)}")
    read = functools.partial(_read_json, path)
    pipeline = read("model_index.json").get("_class_name")
    if pipeline != "FluxPipeline":
        raise CheckpointError(f"model: architecture {pipeline!r} is not supported (supported: FluxPipeline)")
    scheduler = read("scheduler/scheduler_config.json")
    _check_scheduler(scheduler)
    transformer, vae = read("transformer/config.json"), read("vae/config.json")
    if transformer.get("_class_name") != "FluxTransformer2DModel":
        raise CheckpointError(f"model: transformer {transformer.get('_class_name')!r} is not supported")
    try:
        guidance_embeds = bool(transformer.get("guidance_embeds", False))
        preset = read_preset(path, Preset() if guidance_embeds else SCHNELL)
        return ModelSpec(
            name=preset.name or _folder_name(path.resolve()),
            path=str(path.resolve()),
            architecture="flux",
            num_heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            in_channels=transformer["in_channels"],
            text_dim=transformer["joint_attention_dim"],
            pooled_dim=transformer["pooled_projection_dim"],
            guidance_embeds=guidance_embeds,
            vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
            scheduler=msgspec.convert(scheduler, SchedulerSpec),
            num_steps=preset.num_steps,
            guidance=preset.guidance or 0.0,
            max_text_tokens=preset.max_text_tokens,
            min_size=preset.min_size,
            max_size=preset.max_size,
            default_width=preset.default_width,
            default_height=preset.default_height,
        )
    except KeyError as error:
        raise CheckpointError(f"model: {str(path)!r} has a config without {error}") from None
    except msgspec.ValidationError as error:
        raise CheckpointError(f"model: {str(path)!r}: scheduler_config.json: {error}") from None


def _check_scheduler(config: dict[str, Any]) -> None:
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise CheckpointError(
            f"model: scheduler {config.get('_class_name')!r} is not supported"
            " (supported: FlowMatchEulerDiscreteScheduler)"
        )
    for option in UNSUPPORTED_OPTIONS:
        if config.get(option):
            raise CheckpointError(f"model: scheduler option {option} is not supported")


def _missing_weights(path: Path, hint: bool) -> list[str]:
    missing = [name for name in TOKENIZER_FILES if not (path / name).is_file()]
    weights = [
        f"{part}/*.safetensors" for part in COMPONENTS_WITH_WEIGHTS if not any((path / part).glob("*.safetensors"))
    ]
    if hint and len(weights) == len(COMPONENTS_WITH_WEIGHTS):
        weights[-1] += " (it holds configs only: load_format dummy draws random weights)"
    return missing + weights


def read_preset(path: Path, default: Preset) -> Preset:
    """The folder's preset file, or `default`."""
    try:
        return msgspec.json.decode((path / PRESET_FILE).read_bytes(), type=Preset)
    except FileNotFoundError:
        return default
    except msgspec.DecodeError as error:
        raise CheckpointError(f"model: {str(path / PRESET_FILE)!r}: {error}") from None


def _folder_name(path: Path) -> str:
    """The folder's, or in the hub's cache (`models--OWNER--NAME/snapshots/REVISION`) the model's."""
    repository = path.parent.parent.name
    return repository.rpartition("--")[2] if repository.startswith("models--") else path.name


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode((path / name).read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"model: {str(path / name)!r} is not a JSON object: {error}") from None
