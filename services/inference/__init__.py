"""Inference jobs: created by users, queued, handed to the workers of their endpoint, finished exactly once."""
