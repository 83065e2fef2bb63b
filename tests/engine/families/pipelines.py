"""Tiny diffusers pipelines with random weights, one for each way that a family's checkpoints differ."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import tetrion.configs.models.shapes as shapes
from tetrion.engine.sampling.flow_match import pack_latents, unpack_latents

PROMPT, NEGATIVE = "a red circle above a blue square", "a green star"
MISTRAL_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message.content[0].text + '[/SYSTEM_PROMPT]' }}
    {%- else %}
        {{- '[INST]' + message.content[0].text + '[/INST]' }}
    {%- endif %}
{%- endfor %}"""
"""What Mistral's does with a system prompt and one message of a user."""
T5_ROWS, T5_WIDTH, POOLED = 19, 96, 40
LATENT_CHANNELS = 4
QWEN_WIDTH = 48
CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""What Qwen3's does with one message of a user."""


VISION_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- for part in message.content %}{{- part.text }}{%- endfor %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
"""What Qwen3-VL's does with messages of text."""


class Drawn(NamedTuple):
    """`latents`: as we pack them, [rows, channels]; `picture`: uint8."""

    latents: Tensor
    picture: np.ndarray


@dataclass(frozen=True)
class Case(abc.ABC):
    """`options`: of the transformer. `guidance`, `true_cfg_scale`: of the request; `num_branches` follow from them.
    `picture`: size of the one that it brings; `second`: of another; `strength`: how far the result goes from it, where
    it begins with it."""

    name: str
    options: Mapping[str, Any]
    guidance: float
    true_cfg_scale: float = 1.0
    num_branches: int = 1
    num_devices: int = 4
    preset: Mapping[str, Any] = field(default_factory=lambda: {"max_text_tokens": T5_ROWS})
    width: int = 56
    height: int = 72
    picture: tuple[int, int] | None = None
    second: tuple[int, int] | None = None
    strength: float | None = None
    unit: int = 8
    """Pixels of a token's side."""
    text_rows: ClassVar[int] = T5_ROWS
    """The most tokens of a prompt."""
    negative: ClassVar[str] = NEGATIVE

    def __str__(self) -> str:
        return self.name

    @abc.abstractmethod
    def pipeline(self) -> DiffusionPipeline: ...

    @abc.abstractmethod
    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        """Of the transformer alone, for packed latents: [rows, channels]."""

    @abc.abstractmethod
    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of the pipeline that differ by family."""

    has_mask = False
    img2img: ClassVar[type[DiffusionPipeline]]
    """The pipeline that begins with a picture."""

    @abc.abstractmethod
    def packed(self, latents: Tensor) -> Tensor:
        """What the pipeline has between steps -> [rows, channels]."""

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """What the request brings: waves of colours, of which no two rows are alike."""
        sizes = (size for size in (self.picture, self.second) if size is not None)
        return tuple(waves(*size, float(phase)) for phase, size in enumerate(sizes))

    @property
    def references(self) -> tuple[tuple[int, int], ...]:
        """Sizes of those pictures that steps attend to."""
        if self.strength is not None:
            return ()
        return tuple(size for size in (self.picture, self.second) if size is not None)

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """As a worker finds them."""
        return self.pictures

    @property
    def image(self) -> Image.Image:
        (picture,) = self.pictures
        return Image.fromarray(picture)

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        pipeline.save_pretrained(folder, max_shard_size="1MB")
        preset = {"name": self.name, "min_size": 16, "max_size": 128, "default_width": 64, "default_height": 64}
        (folder / "preset.json").write_bytes(msgspec.json.encode(preset | dict(self.preset)))

    def draw(self, pipeline: DiffusionPipeline, num_steps: int, seed: int) -> Drawn:
        """The whole pipeline."""
        kept: dict[str, Tensor] = {}

        def keep(_: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            kept.update(values)
            return values

        if self.strength is not None:
            pipeline = self.img2img(**pipeline.components)
            pipeline.set_progress_bar_config(disable=True)
        (pictures,) = pipeline(
            prompt=PROMPT, height=self.height, width=self.width, num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(seed), output_type="np", max_sequence_length=self.text_rows,
            callback_on_step_end=keep, return_dict=False, **self.call(pipeline),
            **({} if self.strength is None else {"image": self.image, "strength": self.strength}),
        )  # fmt: skip
        return Drawn(self.packed(kept["latents"]), (pictures[0] * 255).round().astype(np.uint8))

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height // self.unit, self.width // self.unit


class Flux(Case):
    """Its width is such that an odd number of rows ends in a part of what the CPU's loops take at a time, so that
    activations whose bits depend on the number of rows would show."""

    img2img = FluxImg2ImgPipeline
    kind: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    in_channels = 4 * LATENT_CHANNELS

    def pipeline(self) -> DiffusionPipeline:
        torch.manual_seed(1)
        transformer = FluxTransformer2DModel(
            in_channels=self.in_channels, out_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=2,
            attention_head_dim=18, num_attention_heads=7, joint_attention_dim=T5_WIDTH, pooled_projection_dim=POOLED,
            axes_dims_rope=(6, 6, 6), **self.options,
        )  # fmt: skip
        clip = CLIPTextModel(clip_config(width=POOLED))
        pipeline = self.kind(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(), text_encoder=clip,
            tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(), transformer=transformer,
        )  # fmt: skip
        return randomized(pipeline)

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        text, pooled, text_ids = pipeline.encode_prompt(prompt, None, max_sequence_length=T5_ROWS)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, *self.tokens, latents.device, latents.dtype)
        reference, reference_ids = self.reference(pipeline)
        rows = torch.cat([torch.cat([latents, self.around(pipeline)], dim=1), reference])[None]
        ids = torch.cat([image_ids, reference_ids])
        guidance = torch.tensor([self.guidance]) if pipeline.transformer.config.guidance_embeds else None
        return pipeline.transformer(
            rows, text, pooled, torch.tensor([time]) / 1000, ids, text_ids, guidance, return_dict=False
        )[0][0, : len(latents)]

    def reference(self, pipeline: DiffusionPipeline) -> tuple[Tensor, Tensor]:
        """Rows and positions of what steps attend to beside the image."""
        return torch.empty(0, self.in_channels), torch.empty(0, 3)

    def around(self, pipeline: DiffusionPipeline) -> Tensor:
        """What is read of each row beside its latents."""
        rows, columns = self.tokens
        return torch.empty(rows * columns, 0)

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {
            "guidance_scale": self.guidance, "true_cfg_scale": self.true_cfg_scale, "negative_prompt": self.negative
        }  # fmt: skip

    def packed(self, latents: Tensor) -> Tensor:
        return latents[0]


class Kontext(Flux):
    kind = FluxKontextPipeline

    def reference(self, pipeline: DiffusionPipeline) -> tuple[Tensor, Tensor]:
        if self.picture is None:
            return super().reference(pipeline)
        width, height = self.picture
        picture = pipeline.image_processor.preprocess(self.image, height, width)
        rows = pack_latents(pipeline._encode_vae_image(picture, torch.Generator())[0])
        sides = height // self.unit, width // self.unit
        ids = FluxPipeline._prepare_latent_image_ids(1, *sides, picture.device, picture.dtype)
        ids[:, 0] = 1
        return rows, ids

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        image = None if self.picture is None else self.image
        beside = {"image": image, "max_area": self.width * self.height, "_auto_resize": False}
        return super().call(pipeline) | beside


class Fill(Flux):
    """It begins with a picture, too, as far as the strength says."""

    img2img = kind = FluxFillPipeline
    in_channels = 2 * 4 * LATENT_CHANNELS + 8 * 8
    has_mask = True

    @property
    def mask(self) -> np.ndarray:
        """A corner, and a stripe that no token's edge is at."""
        mask = np.zeros((self.height, self.width), np.uint8)
        mask[: self.height // 2, 5 : self.width // 2] = mask[:, -3:-1] = 255
        return mask

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        return (*self.pictures, self.mask[..., None])

    def around(self, pipeline: DiffusionPipeline) -> Tensor:
        picture = pipeline.image_processor.preprocess(self.image, self.height, self.width)
        mask = pipeline.mask_processor.preprocess(Image.fromarray(self.mask), self.height, self.width)
        generator = torch.Generator().manual_seed(7)
        for _ in range(2):  # what the pipeline has drawn by then
            torch.randn(1, LATENT_CHANNELS, *[2 * side for side in self.tokens], generator=generator)
        mask, latents = pipeline.prepare_mask_latents(
            mask, picture * (1 - mask), 1, LATENT_CHANNELS, 1, self.height, self.width, torch.float32, "cpu", generator
        )
        return torch.cat([latents, mask], dim=-1)[0]

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"guidance_scale": self.guidance, "mask_image": Image.fromarray(self.mask)}


class SD3(Case):
    img2img = StableDiffusion3Img2ImgPipeline
    with_t5 = True
    shift = 3.0

    def pipeline(self) -> DiffusionPipeline:
        torch.manual_seed(2)
        width = self.options["num_attention_heads"] * self.options["attention_head_dim"]
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=3,
            joint_attention_dim=T5_WIDTH, caption_projection_dim=width, pooled_projection_dim=POOLED,
            pos_embed_max_size=17, **self.options,
        )  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift), vae=vae(),
            text_encoder=CLIPTextModelWithProjection(clip_config(width=32, projection_dim=16)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(width=48, projection_dim=POOLED - 16, end=2)),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5() if self.with_t5 else None, tokenizer_3=t5_tokenizer() if self.with_t5 else None,
        )  # fmt: skip
        return randomized(pipeline)

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        text, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, max_sequence_length=T5_ROWS)
        pixels = unpack_latents(latents, *self.tokens)[None]
        velocity = pipeline.transformer(pixels, text, pooled, torch.tensor([time]), return_dict=False)[0]
        return self.packed(velocity)

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"guidance_scale": self.guidance, "negative_prompt": self.negative}

    def packed(self, latents: Tensor) -> Tensor:
        return pack_latents(latents[0])


class SD3WithoutT5(SD3):
    with_t5 = False
    shift = 2.0


class ZImage(Case):
    """Prompts of different lengths, neither a multiple of 32; nor is the number of image rows (63)."""

    img2img = ZImageImg2ImgPipeline
    text_rows = 96
    shift: ClassVar[float] = 6.0

    def pipeline(self) -> DiffusionPipeline:
        torch.manual_seed(3)
        transformer = ZImageTransformer2DModel(
            in_channels=LATENT_CHANNELS, n_layers=3, cap_feat_dim=QWEN_WIDTH, axes_lens=[128, 32, 32], **self.options
        )
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift), vae=vae(), transformer=transformer,
            text_encoder=Qwen3Model(qwen3_config(num_layers=3)), tokenizer=qwen_tokenizer(),
        )  # fmt: skip
        return randomized(pipeline)

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        (text,), _ = pipeline.encode_prompt(prompt, None, False, max_sequence_length=self.text_rows)
        rows, columns = self.tokens
        pixels = unpack_latents(latents[: rows * columns], rows, columns).unsqueeze(1)
        times = (1000 - torch.tensor([time])) / 1000
        return -self.packed(pipeline.transformer([pixels], times, [text], return_dict=False)[0][0][None, :, 0])

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"guidance_scale": self.guidance, "negative_prompt": self.negative}

    def packed(self, latents: Tensor) -> Tensor:
        return pack_latents(latents[0])


class ZImageTurbo(ZImage):
    shift = 3.0


class Flux2Klein(Case):
    """The pipeline's second prompt is empty, whatever is asked."""

    text_rows = 96
    negative = ""
    is_distilled = False

    def pipeline(self) -> DiffusionPipeline:
        return randomized(
            Flux2KleinPipeline(
                text_encoder=Qwen3ForCausalLM(qwen3_config(num_layers=28)), tokenizer=qwen_tokenizer(),
                is_distilled=self.is_distilled, **self.parts(),
            )
        )  # fmt: skip

    def parts(self) -> dict[str, Any]:
        torch.manual_seed(4)
        transformer = Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=3, joint_attention_dim=3 * QWEN_WIDTH,
            **self.options,
        )  # fmt: skip
        autoencoder = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
            layers_per_block=1, decoder_block_out_channels=(8, 12, 16),
        )  # fmt: skip
        autoencoder.bn.running_mean.normal_()
        autoencoder.bn.running_var.uniform_(0.5, 2)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        return {"scheduler": scheduler, "vae": autoencoder, "transformer": transformer}

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        text, text_ids = pipeline.encode_prompt(prompt, max_sequence_length=self.text_rows)
        rows, image_ids = latents[None], pipeline._prepare_latent_ids(torch.empty(1, 1, *self.tokens))
        if self.picture is not None:
            pictures = [pipeline.image_processor.preprocess(image) for image in self.images]
            reference, ids = pipeline.prepare_image_latents(pictures, 1, torch.Generator(), "cpu", torch.float32)
            rows, image_ids = torch.cat([rows, reference], dim=1), torch.cat([image_ids, ids], dim=1)
        guidance = torch.tensor([self.guidance]) if pipeline.transformer.config.guidance_embeds else None
        return pipeline.transformer(
            rows, text, torch.tensor([time]) / 1000, image_ids, text_ids, guidance, return_dict=False
        )[0][0, : len(latents)]

    @property
    def images(self) -> list[Image.Image]:
        return [Image.fromarray(picture) for picture in self.pictures]

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"guidance_scale": self.guidance} | ({} if self.picture is None else {"image": self.images})

    def packed(self, latents: Tensor) -> Tensor:
        return latents[0]


class Flux2KleinDistilled(Flux2Klein):
    is_distilled = True


class Flux2Dev(Flux2Klein):
    """Its prompts are filled up on the left. A tokenizer stands in for its processor, which does the same with text."""

    text_rows = 288

    def pipeline(self) -> DiffusionPipeline:
        encoder = Mistral3ForConditionalGeneration(mistral3_config(num_layers=31))
        return randomized(Flux2Pipeline(text_encoder=encoder, tokenizer=mistral_tokenizer(), **self.parts()))

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        super().save(pipeline, folder)
        index = msgspec.json.decode((folder / "model_index.json").read_bytes())
        index["tokenizer"] = ["transformers", "PixtralProcessor"]
        (folder / "model_index.json").write_bytes(msgspec.json.encode(index))


class QwenImage(Case):
    """Prompts of different lengths."""

    img2img = QwenImageImg2ImgPipeline
    text_rows = 288

    def pipeline(self) -> DiffusionPipeline:
        return randomized(QwenImagePipeline(tokenizer=qwen_tokenizer(), **self.parts()))

    def parts(self) -> dict[str, Any]:
        torch.manual_seed(5)
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=3, joint_attention_dim=QWEN_WIDTH,
            **self.options,
        )  # fmt: skip
        autoencoder = AutoencoderKLQwenImage(
            base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.3, -0.2, 0.5, 0.1], latents_std=[1.5, 0.7, 2.0, 1.1],
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02,
            use_dynamic_shifting=True,
        )  # fmt: skip
        encoder = Qwen2_5_VLForConditionalGeneration(qwen25_vl_config(num_layers=3))
        return {"scheduler": scheduler, "vae": autoencoder, "transformer": transformer, "text_encoder": encoder}

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        text, _ = pipeline.encode_prompt(prompt, max_sequence_length=self.text_rows)
        return pipeline.transformer(
            latents[None], text, None, torch.tensor([time]) / 1000, [[(1, *self.tokens)]], return_dict=False
        )[0][0]

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        negative = self.negative if self.num_branches > 1 else None
        return {"true_cfg_scale": self.guidance, "negative_prompt": negative}

    def packed(self, latents: Tensor) -> Tensor:
        return latents[0]


class VisionProcessor(Qwen2Tokenizer):
    """What the pipeline asks of Qwen3-VL's processor for a text alone. The library's takes torchvision to be made."""

    @property
    def tokenizer(self) -> Qwen2Tokenizer:
        return self

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> Any:
        return super().apply_chat_template([conversation], **options)


class QwenImage21(Case):
    """Prompts of different lengths; 20 rows of the image, in an odd number of pairs."""

    text_rows = 96
    sigmas: ClassVar[list[float] | None] = None

    def pipeline(self) -> DiffusionPipeline:
        torch.manual_seed(5)
        transformer = QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=3, context_in_dim=QWEN_WIDTH, **self.options
        )
        vae = AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=12, z_dim=8, dim_mult=[1, 1, 2, 2, 2], num_res_blocks=1,
            latents_mean=[0.1 * i - 0.3 for i in range(8)], latents_std=[1 + 0.1 * i for i in range(8)],
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        )
        return randomized(
            QwenImage21Pipeline(
                scheduler=scheduler, vae=vae, text_encoder=Qwen3VLForConditionalGeneration(qwen3_vl_config(2)),
                processor=qwen_tokenizer(VisionProcessor, VISION_TEMPLATE), transformer=transformer,
                sample_sigmas=self.sigmas,
            )
        )  # fmt: skip

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        super().save(pipeline, folder)
        qwen_tokenizer(template=VISION_TEMPLATE).save_pretrained(folder / "processor")
        index = msgspec.json.decode((folder / "model_index.json").read_bytes())
        index["processor"] = ["transformers", "Qwen3VLProcessor"]
        (folder / "model_index.json").write_bytes(msgspec.json.encode(index))

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        text, _, mask = pipeline.encode_prompt(prompt)
        mask = torch.cat([mask, mask.new_ones(1, len(latents) // 4)], dim=1)
        return pipeline.transformer(
            latents[None], text, torch.tensor([time]) / 1000, [[(1, *self.tokens)]], mask, return_dict=False
        )[0][0, -len(latents) :]

    def draw(self, pipeline: DiffusionPipeline, num_steps: int, seed: int) -> Drawn:
        """Its pictures have an opacity: they are put on white."""
        kept: dict[str, Tensor] = {}

        def keep(_: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            kept.update(values)
            return values

        (pictures,) = pipeline(
            prompt=PROMPT, height=self.height, width=self.width, num_inference_steps=num_steps, output_type="np",
            generator=torch.Generator().manual_seed(seed), callback_on_step_end=keep, return_dict=False,
            **self.call(pipeline),
        )  # fmt: skip
        colours, opacity = pictures[0][..., :3], pictures[0][..., 3:]
        picture = colours * opacity + (1 - opacity)
        return Drawn(self.packed(kept["latents"]), (picture * 255).round().astype(np.uint8))

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        negative = self.negative if self.num_branches == 2 else None
        return {"true_cfg_scale": self.guidance, "negative_prompt": negative}

    def packed(self, latents: Tensor) -> Tensor:
        return latents[0]


class QwenImage21Turbo(QwenImage21):
    """With levels of its own for the number of steps that tests run. Its second prompt is empty."""

    sigmas: ClassVar[list[float] | None] = [1.0, 0.9, 0.7, 0.55, 0.3, 0.1]
    negative = ""


class Krea2(Case):
    """The form in front of a prompt has more tokens than are dropped, since a token is a byte."""

    text_rows = 256
    is_distilled = False

    def pipeline(self) -> DiffusionPipeline:
        torch.manual_seed(6)
        transformer = Krea2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS, num_layers=3, attention_head_dim=12, intermediate_size=88,
            text_hidden_dim=QWEN_WIDTH, num_text_layers=3, text_num_attention_heads=4, text_num_key_value_heads=2,
            text_intermediate_size=56, num_layerwise_text_blocks=1, axes_dims_rope=(4, 4, 4), **self.options,
        )  # fmt: skip
        tokenizer = self.tokenizer()
        config = qwen3_vl_config(num_layers=6)
        config.text_config.vocab_size = len(tokenizer)
        pipeline = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
            vae=qwen_image_vae(), transformer=transformer, text_encoder=Qwen3VLModel(config), tokenizer=tokenizer,
            text_encoder_select_layers=(1, 3, 5), is_distilled=self.is_distilled,
        )  # fmt: skip
        randomized(pipeline)
        for name, parameter in transformer.named_parameters():
            if "scale_shift_table" in name:
                parameter.normal_(std=0.3)
            elif "projector" in name:
                parameter.uniform_(0.3, 1)  # layers that cancel out would leave rounding
        return pipeline

    def tokenizer(self) -> Qwen2Tokenizer:
        """What is behind a prompt has five tokens, as in the published one."""
        tokenizer = qwen_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "assistant"]})
        return tokenizer

    def velocity(self, pipeline: DiffusionPipeline, latents: Tensor, time: float, prompt: str) -> Tensor:
        text, mask = pipeline.encode_prompt(prompt, max_sequence_length=self.text_rows)
        positions = pipeline.prepare_position_ids(text.shape[1], *self.tokens, latents.device)
        level = torch.tensor([time]) / 1000
        return pipeline.transformer(latents[None], text, level, positions, mask, return_dict=False)[0][0]

    def call(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        return {"guidance_scale": self.guidance, "negative_prompt": self.negative}

    def packed(self, latents: Tensor) -> Tensor:
        return latents[0]


class Krea2Turbo(Krea2):
    is_distilled = True


SIX_HEADS = {"num_attention_heads": 6, "attention_head_dim": 10}
FLUX2 = {"num_attention_heads": 6, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False}
QWEN_IMAGE = {"num_attention_heads": 6, "attention_head_dim": 18, "axes_dims_rope": (6, 6, 6)}
WIDER = {"default_width": 96, "default_height": 96}
"""References may have as many pixels."""
QWEN21 = {"num_attention_heads": 6, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
CASES: tuple[Case, ...] = (
    Flux("flux1-dev", {"guidance_embeds": True}, guidance=3.5),
    Flux("flux1-schnell", {"guidance_embeds": False}, guidance=0.0),
    Flux("flux1-true-cfg", {"guidance_embeds": True}, guidance=2.0, true_cfg_scale=4.0, num_branches=2, num_devices=6),
    Flux("flux1-strength", {"guidance_embeds": True}, guidance=3.5, picture=(56, 72), strength=0.65),
    Kontext("flux1-kontext", {"guidance_embeds": True}, guidance=2.5, picture=(88, 40)),
    Kontext(
        "flux1-kontext-true-cfg", {"guidance_embeds": True}, guidance=2.5, true_cfg_scale=3.0, num_branches=2,
        picture=(64, 64), num_devices=6,
    ),
    Kontext("flux1-kontext-alone", {"guidance_embeds": True}, guidance=2.5),
    Fill("flux1-fill", {"guidance_embeds": True}, guidance=30.0, picture=(56, 72), strength=1.0),
    Fill("flux1-fill-strength", {"guidance_embeds": True}, guidance=30.0, picture=(56, 72), strength=0.7),
    SD3("sd3-medium", SIX_HEADS, guidance=7.0, num_branches=2),
    SD3("sd3-strength", SIX_HEADS, guidance=7.0, num_branches=2, picture=(56, 72), strength=0.4),
    SD3("sd3-unguided", SIX_HEADS, guidance=1.0),
    SD3WithoutT5("sd3-without-t5", SIX_HEADS, guidance=5.0, num_branches=2, width=64, height=64),
    SD3(
        "sd3.5-medium", {**SIX_HEADS, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, guidance=4.5,
        num_branches=2, num_devices=5,
    ),
    SD3(
        "sd3.5-large", {"num_attention_heads": 38, "attention_head_dim": 6, "qk_norm": "rms_norm"}, guidance=3.5,
        num_branches=2, num_devices=8, width=32, height=40,
    ),
    ZImage(
        "z-image", {"dim": 60, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [2, 4, 4]}, guidance=4.0, num_branches=2,
        num_devices=5, preset={"max_text_tokens": 96},
    ),
    ZImageTurbo(
        "z-image-turbo", {"dim": 300, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [2, 4, 4]}, guidance=0.0,
        preset={"max_text_tokens": 96}, width=64, height=64,
    ),
    ZImage(
        "z-image-strength", {"dim": 60, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [2, 4, 4]}, guidance=4.0,
        num_branches=2, num_devices=5, preset={"max_text_tokens": 96}, picture=(56, 72), strength=0.6,
    ),
    Flux2Klein(
        "flux2-klein-base", FLUX2, guidance=4.0, num_branches=2, num_devices=5, preset={"max_text_tokens": 96}
    ),
    Flux2KleinDistilled("flux2-klein", FLUX2, guidance=4.0, preset={"max_text_tokens": 96}),
    Krea2(
        "krea-2", {"num_attention_heads": 10, "num_key_value_heads": 5}, guidance=3.5, num_branches=2, num_devices=5,
        preset={"max_text_tokens": 256},
    ),
    Krea2Turbo(
        "krea-2-turbo", {"num_attention_heads": 12, "num_key_value_heads": 3}, guidance=0.0, num_devices=3,
        preset={"max_text_tokens": 256}, width=64, height=64,
    ),
    QwenImage("qwen-image", QWEN_IMAGE, guidance=4.0, num_branches=2, num_devices=5, preset={"max_text_tokens": 288}),
    QwenImage("qwen-image-unguided", QWEN_IMAGE, guidance=4.0, preset={"max_text_tokens": 288}, width=64, height=40),
    QwenImage(
        "qwen-image-strength", QWEN_IMAGE, guidance=3.0, num_branches=2, picture=(56, 72), strength=0.6,
        preset={"max_text_tokens": 288},
    ),
    Flux2Dev("flux2-dev", FLUX2 | {"guidance_embeds": True}, guidance=3.0, preset={"max_text_tokens": 288}),
    Flux2Klein(
        "flux2-klein-base-reference", FLUX2, guidance=4.0, num_branches=2, num_devices=5, picture=(88, 72),
        preset={"max_text_tokens": 96} | WIDER,
    ),
    Flux2KleinDistilled(
        "flux2-klein-references", FLUX2, guidance=4.0, picture=(64, 104), second=(120, 72),
        preset={"max_text_tokens": 96} | WIDER,
    ),
    Flux2Dev(
        "flux2-dev-references", FLUX2 | {"guidance_embeds": True}, guidance=3.0, picture=(72, 64), second=(64, 64),
        preset={"max_text_tokens": 288} | WIDER,
    ),
    QwenImage21(
        "qwen-image-2.1", QWEN21, guidance=1.0, width=64, height=96, unit=16, num_devices=5,
        preset={"max_text_tokens": 96},
    ),
    QwenImage21Turbo(
        "qwen-image-2.1-turbo", QWEN21, guidance=3.0, num_branches=2, width=96, height=32, unit=16, num_devices=5,
        preset={"max_text_tokens": 96},
    ),
)  # fmt: skip
"""Heads that do not divide by the members of a branch's part: 6 over 4 and 5, 7 over 2 … 6, 38 over 3, 4, 5, 7; of keys
5 over 2, 3, 4 and 3 over 2."""


def waves(width: int, height: int, phase: float) -> np.ndarray:
    """A picture."""
    x, y, channel = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)
    pixels = np.sin(x / 5.0 + channel + phase) + np.cos(y / (4.0 + channel))
    return (pixels * 60 + 128).round().astype(np.uint8)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=LATENT_CHANNELS, norm_num_groups=4,
        layers_per_block=1, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def qwen_image_vae() -> AutoencoderKLQwenImage:
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.3, -0.2, 0.5, 0.1], latents_std=[1.5, 0.7, 2.0, 1.1],
    )  # fmt: skip
    for name, parameter in autoencoder.named_parameters():
        if name.endswith("gamma"):
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return autoencoder


def clip_config(width: int, projection_dim: int = POOLED, end: int | None = None) -> CLIPTextConfig:
    """`end`: the end mark's id; 2 means the highest of a prompt's, as in old checkpoints."""
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=projection_dim, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id if end is None else end,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()), d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def qwen3_config(num_layers: int) -> Qwen3Config:
    tokenizer = qwen_tokenizer()
    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=QWEN_WIDTH, intermediate_size=64, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def qwen25_vl_config(num_layers: int) -> Qwen2_5_VLConfig:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": QWEN_WIDTH, "intermediate_size": 64,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": QWEN_WIDTH,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def qwen3_vl_config(num_layers: int) -> Qwen3VLConfig:
    """Positions in three parts of a head's 16 pairs of channels."""
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": QWEN_WIDTH, "intermediate_size": 64,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": QWEN_WIDTH,
        "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def mistral3_config(num_layers: int) -> Mistral3Config:
    tokenizer = mistral_tokenizer()
    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": QWEN_WIDTH, "intermediate_size": 64,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
        "max_position_embeddings": 512, "sliding_window": None, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    return Mistral3Config(text_config=text, vision_config=vision)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    marks = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def qwen_tokenizer(kind: type[Qwen2Tokenizer] = Qwen2Tokenizer, template: str = CHAT_TEMPLATE) -> Qwen2Tokenizer:
    """A token for each byte, marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = kind(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    tokenizer.chat_template = template
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(_shapes("tokenizer"))


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer.from_pretrained(_shapes("tokenizer_2"))


def _shapes(name: str) -> Path:
    return Path(next(iter(shapes.__path__))) / name


def randomized(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Random norms and biases too: at their initial ones and zeros, a mixed-up pair would not show."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            for name, parameter in part.named_parameters():
                if parameter.ndim == 1 or "pad_token" in name:
                    about = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    parameter.copy_(torch.randn_like(parameter) * 0.2 + about)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
