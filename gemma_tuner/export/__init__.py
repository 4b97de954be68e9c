"""A fine-tune in the formats of other programs: adapter, merged checkpoint, MLX, GGUF."""
