"""A task that does what a test tells it: it says who it is on the Unix socket of its first argument, and ends as told.

With `--stubborn` behind the socket it ignores SIGTERM, with `--importing` it has not come to do anything about it yet.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

from services.common.process import EXIT_INTERRUPTED, die_with_launcher

if __name__ == "__main__":
    die_with_launcher()
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif "--importing" not in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))  # it was asked to leave, and does
    with socket.socket(socket.AF_UNIX) as _line:
        _line.connect(sys.argv[1])
        _said = {
            "task_id": os.environ["ESD_TASK_ID"],
            "secret": Path(os.environ["ESD_SECRET_FILE"]).read_text(),
            "word": sys.argv[-1],
            "pid": os.getpid(),
            "environment": dict(os.environ),
        }
        _line.sendall(json.dumps(_said).encode() + b"\n")
        _told = json.loads(_line.makefile().readline() or '{"code": 9, "words": "nobody listens"}')
    print(_told["words"], file=sys.stderr)
    sys.exit(_told["code"])
