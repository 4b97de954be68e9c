"""Checkpoints as files: loaded completely or refused, listed, packed, written whole."""
