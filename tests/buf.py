"""Lints the protos with buf when node is there: `python -m tests.buf`. tests/test_protos.py has rules without it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

BUF = "@bufbuild/buf@1.75.0"
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Answers buf's exit code, 0 without node."""
    npx = shutil.which("npx")
    if npx is None:
        print("buf lint is left out: node is not installed; the tests check the most important of its rules")
        return 0
    command = [npx, "--yes", BUF, "lint", str(ROOT / "esd" / "descriptors.binpb"), "--config", str(ROOT / "buf.yaml")]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
