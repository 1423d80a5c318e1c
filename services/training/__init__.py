"""Trainings: jobs that make a LoRA from a dataset. Declared in the proto, not built yet."""
