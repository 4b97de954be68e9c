"""Frozen weights in 4 or 8 bits: the values that they can have, layers, tables, unpacking."""
