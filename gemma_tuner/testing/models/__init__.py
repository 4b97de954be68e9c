"""Tiny models with random weights, and their processors."""
