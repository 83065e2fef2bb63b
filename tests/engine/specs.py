"""A model spec for tests that need no checkpoint."""

from tetrion.engine.model_spec import ModelSpec, SchedulerSpec


def make_spec(**changes: object) -> ModelSpec:
    fields: dict[str, object] = {
        "name": "tiny",
        "path": "nowhere",
        "architecture": "flux",
        "num_heads": 12,
        "head_dim": 32,
        "in_channels": 16,
        "text_dim": 64,
        "pooled_dim": 32,
        "guidance_embeds": False,
        "vae_scale_factor": 8,
        "scheduler": SchedulerSpec(),
        "num_steps": 12,
        "guidance": 0.0,
        "max_text_tokens": 64,
        "min_size": 128,
        "max_size": 512,
        "default_width": 256,
        "default_height": 256,
    }
    return ModelSpec(**(fields | changes))  # type: ignore[arg-type]
