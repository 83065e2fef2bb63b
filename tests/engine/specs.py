"""A model spec for tests that need no checkpoint."""

from tetrion.engine.model_spec import ModelSpec, SchedulerSpec, Sizes, SlotField


def make_spec(
    *,
    num_heads: int = 12,
    head_dim: int = 32,
    in_channels: int = 16,
    pooled_dim: int = 32,
    min_size: int = 128,
    max_size: int = 512,
    default_size: tuple[int, int] = (256, 256),
    **changes: object,
) -> ModelSpec:
    """Of the FLUX.1 family. Sizes in pixels, 16 a row's side."""
    fields: dict[str, object] = {
        "name": "tiny",
        "path": "nowhere",
        "family": "flux",
        "num_heads": num_heads,
        "head_dim": head_dim,
        "segments": ("text", "image"),
        "fields": (
            SlotField(name="text", rows="text", width=num_heads * head_dim, per_branch=True),
            SlotField(name="pooled", rows="one", width=pooled_dim, per_branch=True),
            SlotField(name="latents", rows="image", width=in_channels, fp32=True, changes=True),
        ),
        "max_branches": 2,
        "scheduler": SchedulerSpec(),
        "num_steps": 12,
        "guidance": 0.0,
        "max_text_tokens": 64,
        "sizes": Sizes(min=min_size, max=max_size, multiple=16, default=default_size),
        "inputs": frozenset({"negative_prompt", "true_cfg_scale"}),
    }
    return ModelSpec(**(fields | changes))  # type: ignore[arg-type]
