"""The embedded text-to-image model: a FLUX-architecture diffusion transformer in diffusers folder layout."""
