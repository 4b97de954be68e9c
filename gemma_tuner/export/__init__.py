"""Carry a fine-tune away: adapters, merged checkpoints, MLX; each opens in what will run it."""
