"""Encoded bytes to RGB images and 16 kHz mono waveforms."""
