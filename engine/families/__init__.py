"""What the engine must know of each family of models, without torch: one module a family, and what they share."""
