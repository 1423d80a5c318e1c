"""What a job does on the GPU, one file for each task type. The only callers of models beside the engine."""
