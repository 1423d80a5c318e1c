"""Bytes to and from the object store, and model files on the worker's disk."""
