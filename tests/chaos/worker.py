"""The real worker on a line that can be cut: `python -m tests.chaos.worker HOST:PORT paint|tiny LOG_FOLDER`.

Only the engine is another one, which paints; with `tiny` it is the real one too. Each process has a log of its own,
because the endpoints service keeps only the last one's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gpu_worker import __main__ as worker
from tests.chaos.painting import PaintingEngine

if __name__ == "__main__":
    _address, _engine, _folder = sys.argv[1:]
    del sys.argv[1:]  # a worker has no arguments
    _log = os.open(Path(_folder) / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(_log, sys.stdout.fileno())
    os.dup2(_log, sys.stderr.fileno())
    os.environ["ESD_SERVER_URL"] = f"http://{_address}"
    if _engine == "paint":
        worker.Engine = PaintingEngine  # type: ignore[assignment, misc]
    worker.main()
