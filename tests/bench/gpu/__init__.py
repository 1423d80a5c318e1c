"""What the engine does on a GPU, in numbers: `python -m tests.bench.gpu --out DIR` (see __main__)."""
