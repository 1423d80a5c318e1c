"""From a request to a job that may wait: its endpoint and models, its payload checked and frozen, and fair use."""
