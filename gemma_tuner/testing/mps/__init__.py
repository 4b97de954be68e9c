"""A pretend MPS device."""
