"""Sizes of the SD3-class model `shapes-sd3`, fresh modules with random weights, and how it reads text.

Stable Diffusion 3.5's classes at small size. The autoencoder is that of `shapes`, T5 and the tokenizers are those that
`shapes` was trained with from text. The transformer and two CLIPs with a projection have 7.2 M parameters, so that
float16 files stay below 16 MiB.
"""

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from benchmarks.embedded_model.architecture import LATENT_CHANNELS, T5_WIDTH, clip_config
from benchmarks.embedded_model.export import MODELS_FOLDER, borrowed_components
from benchmarks.embedded_model.tokenizer_files import clip_tokenizer, t5_tokenizer

CLIP_WIDTHS, PROJECTION_WIDTHS = (48, 64), (64, 96)
NUM_HEADS, HEAD_DIM, NUM_LAYERS = 6, 32, 5
MAX_TOKENS_A_SIDE = 48  # 768 pixels
PRESET = {
    "name": "shapes-sd3",
    "num_steps": 20,
    "guidance": 4.5,
    "max_text_tokens": 64,
    "min_size": 128,
    "max_size": 512,
    "default_width": 256,
    "default_height": 256,
    "components_from": {"vae": "shapes/vae"},
}
T5_FOLDER = MODELS_FOLDER / "shapes-sd3/text_encoder_3"
"""As `shapes` had it before it learnt to edit."""


def build(seed: int = 0) -> StableDiffusion3Pipeline:
    """All components in their final sizes, the model's own with weights drawn from `seed`."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), T5EncoderModel.from_pretrained(T5_FOLDER)
    first, second = (
        CLIPTextModelWithProjection(clip_config(clip, width, projection, num_layers=3, num_heads=2))
        for width, projection in zip(CLIP_WIDTHS, PROJECTION_WIDTHS, strict=True)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    return StableDiffusion3Pipeline(
        transformer=_transformer(),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=t5,
        tokenizer=clip,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=scheduler,
        **borrowed_components(PRESET),
    )


def _transformer() -> SD3Transformer2DModel:
    """Its table of positions has a step of one between neighbours: as many tokens a side as `sample_size` has."""
    return SD3Transformer2DModel(
        sample_size=2 * MAX_TOKENS_A_SIDE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=NUM_LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=NUM_HEADS * HEAD_DIM,
        pooled_projection_dim=sum(PROJECTION_WIDTHS),
        pos_embed_max_size=MAX_TOKENS_A_SIDE,
        qk_norm="rms_norm",
    )


def encode(pipeline: StableDiffusion3Pipeline, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the transformer reads: text rows [B, 77 + T, text_dim] and pooled vectors side by side [B, pooled_dim].

    The CLIPs' last hidden layers but one side by side, padded with zeros to T5's width; T5's rows below.
    """
    clips = [clip(clip_ids, output_hidden_states=True) for clip in (pipeline.text_encoder, pipeline.text_encoder_2)]
    t5 = pipeline.text_encoder_3(t5_ids).last_hidden_state
    hidden = torch.cat([clip.hidden_states[-2] for clip in clips], -1)
    rows = F.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
    return torch.cat([rows, t5], 1), torch.cat([clip.text_embeds for clip in clips], -1)
