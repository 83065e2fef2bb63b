"""What the engine must know of each family of models: its checkpoints' limits, read from JSON files. No torch."""
