"""Keeps checkpoints: what was uploaded, who may use it, and what an inspection found in it."""
