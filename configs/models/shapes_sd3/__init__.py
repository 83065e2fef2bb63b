"""The embedded SD3-class text-to-image model in diffusers layout; `preset.json` names what it takes from `shapes`."""
