"""Sizes of every component of the embedded model, and fresh modules with random weights.

FLUX.1's own classes at small size; transformer 14.9 M parameters, everything together under 16.7 M so that float16
files stay below 32 MiB.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from benchmarks.embedded_model.tokenizer_files import CLIP_MAX_TOKENS, clip_tokenizer, t5_tokenizer

LATENT_CHANNELS = 8
T5_WIDTH = 128
CLIP_WIDTH = 96
PRESET = {
    "name": "shapes",
    "num_steps": 16,
    "guidance": None,
    "max_text_tokens": 64,
    "min_size": 128,
    "max_size": 512,
    "default_width": 256,
    "default_height": 256,
}


@dataclass
class Components:
    """What a FLUX.1 folder in diffusers layout holds."""

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase
    scheduler: FlowMatchEulerDiscreteScheduler

    def modules(self) -> dict[str, nn.Module]:
        """The components that have weights, by folder name."""
        names = ("transformer", "vae", "text_encoder", "text_encoder_2")
        return {name: getattr(self, name) for name in names}


def build(seed: int = 0) -> Components:
    """All components in their final sizes, weights drawn from `seed`."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return Components(
        transformer=_transformer(),
        vae=_vae(),
        text_encoder=_clip_encoder(len(clip), clip.bos_token_id, clip.eos_token_id),
        text_encoder_2=_t5_encoder(len(t5)),
        tokenizer=clip,
        tokenizer_2=t5,
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=1.3,
            max_shift=4.7,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


def _transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=12,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 56, 56),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=True,
    )


def _t5_encoder(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_heads=4,
            feed_forward_proj="relu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def _clip_encoder(vocab_size: int, bos_token_id: int, eos_token_id: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=CLIP_MAX_TOKENS,
            hidden_act="gelu",
            attention_dropout=0.0,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
    )
