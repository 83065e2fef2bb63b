"""Sizes of every component of the FLUX-class model `shapes`, fresh modules with random weights, and how it reads text.

FLUX.1's own classes at small size; transformer 14.9 M parameters, everything together under 16.7 M so that float16
files stay below 32 MiB.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
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


def build(seed: int = 0) -> FluxPipeline:
    """All components in their final sizes, weights drawn from `seed`."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        transformer=_transformer(),
        vae=_vae(),
        text_encoder=CLIPTextModel(clip_config(clip, CLIP_WIDTH, CLIP_WIDTH, num_layers=2, num_heads=3)),
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


def encode(pipeline: FluxPipeline, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the transformer reads: T5's rows [B, T, text_dim], CLIP's pooled vector [B, pooled_dim]."""
    return pipeline.text_encoder_2(t5_ids).last_hidden_state, pipeline.text_encoder(clip_ids).pooler_output


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


def clip_config(
    tokenizer: PreTrainedTokenizerBase, width: int, projection_width: int, num_layers: int, num_heads: int
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection_width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=CLIP_MAX_TOKENS,
        hidden_act="gelu",
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
