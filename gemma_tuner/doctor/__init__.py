"""Examine a machine: known faults of its kernels, a training step against the CPU, speeds."""
