"""The command ``gemma-tuner``."""
