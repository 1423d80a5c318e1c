"""A tiny Stable Diffusion 1.5 that draws coloured shapes: what it learns from, how, and who judges; README.md tells."""

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("demo-sd15.safetensors")
PROMPT = "a red circle on blue"
SIDE = 64  # pixels of its pictures
