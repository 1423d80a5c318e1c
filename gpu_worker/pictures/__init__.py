"""Pictures before and after the engine: canvas and hints of a job, extras, grids, and what a finished one tells."""
