"""Measures speed and memory of the real stack: `make bench`."""
