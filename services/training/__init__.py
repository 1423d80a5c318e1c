"""Trainings: jobs that make a LoRA from a dataset."""
