"""From files to models in memory: checkpoints, what a job adds to them, upscalers, and the prompts that they read."""
