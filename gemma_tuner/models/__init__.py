"""Gemma families, loading them completely, and wrapping them with LoRA."""
