"""A tiny Stable Diffusion 1.5 that draws coloured shapes: what it learns from, how, and who judges; README.md tells."""

SIDE = 64  # pixels of its pictures
