"""The embedded models that the commands of this folder train and evaluate: all that differs between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks.embedded_model import architecture, architecture_sd3
from benchmarks.embedded_model.captions import CaptionWriter, PartialCaptionWriter
from benchmarks.embedded_model.examples import BucketPlan
from benchmarks.embedded_model.train_text_encoders import SceneTagger, TokenTagger
from benchmarks.embedded_model.training_forward import TrainingForward
from benchmarks.embedded_model.training_forward_flux import FluxForward
from benchmarks.embedded_model.training_forward_sd3 import SD3Forward


class SamplingChoice(NamedTuple):
    """One way to sample that `choose_schedule` tries."""

    scheduler: Mapping[str, float]
    """Changes to the scheduler's config."""
    guidance: float | None


@dataclass(frozen=True)
class EmbeddedModel:
    """How one embedded model is built, trained and judged."""

    preset: Mapping[str, Any]
    build: Callable[[int], DiffusionPipeline]
    """A pipeline with fresh weights from a seed."""
    stages: tuple[str, ...]
    """Of the training, in order."""
    is_editable: bool
    """Whether it can be trained on to edit: the stage `edit`, alone, from a model folder."""
    taggers: Callable[[DiffusionPipeline], list[nn.Module]]
    """What pre-trains its text encoders."""
    encode: Callable[[DiffusionPipeline, Tensor, Tensor], tuple[Tensor, Tensor]]
    """CLIP's and T5's ids -> text rows and pooled vectors that the transformer reads."""
    forward: type[TrainingForward]
    caption_writer: type[CaptionWriter]
    text_lengths: Mapping[int, float]
    """Share of the training steps by T5's number of tokens, the usual one first."""
    buckets: Mapping[tuple[int, int], BucketPlan]
    """By width and height."""
    targets: Mapping[str, float]
    """Share of fully right pictures that is to be reached, by prompt set."""
    sampling_choices: tuple[SamplingChoice, ...]


SHAPES = EmbeddedModel(
    preset=architecture.PRESET,
    build=architecture.build,
    stages=("autoencoder", "decoder", "text", "transformer"),
    is_editable=True,
    taggers=lambda pipeline: [TokenTagger(pipeline.text_encoder_2), SceneTagger(pipeline.text_encoder)],
    encode=architecture.encode,
    forward=FluxForward,
    caption_writer=CaptionWriter,
    text_lengths={64: 0.92, 128: 0.04, 512: 0.04},
    buckets={
        (256, 256): BucketPlan(0.34, 130),
        (128, 128): BucketPlan(0.12, 40),
        (192, 192): BucketPlan(0.02, 8),
        (384, 384): BucketPlan(0.04, 10),
        (512, 512): BucketPlan(0.24, 36),
        (512, 256): BucketPlan(0.10, 20),
        (256, 512): BucketPlan(0.05, 12),
        (384, 256): BucketPlan(0.02, 8),
        (256, 384): BucketPlan(0.02, 8),
        (320, 448): BucketPlan(0.05, 10),
    },
    targets={
        "one": 0.95,
        "two": 0.85,
        "three": 0.70,
        "one at 128x128": 0.90,
        "one at 512x512": 0.90,
        "one at 512x256": 0.90,
    },
    # logarithm of the shift at 256 image tokens (256²) and what is added to it at 4,096, in proportion between;
    # 3.4: with the square root of the tokens up to 1,024 of them (512²)
    sampling_choices=tuple(
        SamplingChoice({"base_shift": base, "max_shift": round(base + rise, 3)}, None)
        for base, rise in product((1.3, 1.6), (1.5, 3.4))
    ),
)

SHAPES_SD3 = EmbeddedModel(
    preset=architecture_sd3.PRESET,
    build=architecture_sd3.build,
    stages=("text", "transformer"),
    is_editable=False,
    taggers=lambda pipeline: [SceneTagger(pipeline.text_encoder), SceneTagger(pipeline.text_encoder_2)],
    encode=architecture_sd3.encode,
    forward=SD3Forward,
    caption_writer=PartialCaptionWriter,
    text_lengths={64: 1.0},
    buckets={
        (256, 256): BucketPlan(0.65, 140),
        (128, 128): BucketPlan(0.06, 20),
        (192, 192): BucketPlan(0.02, 6),
        (384, 384): BucketPlan(0.02, 4),
        (512, 512): BucketPlan(0.12, 14),
        (512, 256): BucketPlan(0.05, 10),
        (256, 512): BucketPlan(0.04, 8),
        (384, 256): BucketPlan(0.01, 4),
        (256, 384): BucketPlan(0.01, 4),
        (320, 448): BucketPlan(0.02, 4),
    },
    targets={"one": 0.88, "two": 0.75},
    sampling_choices=tuple(
        SamplingChoice({"shift": shift}, guidance) for shift, guidance in product((4.0, 5.0), (3.0, 4.5, 6.0, 8.0))
    ),
)

MODELS = {model.preset["name"]: model for model in (SHAPES, SHAPES_SD3)}
