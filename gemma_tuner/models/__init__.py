"""Gemma families: what they compute, packed layers, and wrapping them with LoRA."""
