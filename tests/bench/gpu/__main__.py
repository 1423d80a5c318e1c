"""Speed, memory and sameness of the engine on a GPU, beside the plain diffusers pipeline in the same run.

    python -m tests.bench.gpu --out DIR [--section NAME ...] [--seconds-budget N] [--tiny]

Nothing comes from the network: models have the full size of Stable Diffusion 1.5 and SDXL and random weights. Each
section is a process of its own with a limit on its time; it writes DIR/NAME.json after each figure, and one that fails
stops no other. The next section imports and builds on the CPU while the one before it has the GPU. `--tiny` is for a
trial on a machine without one.

It needs the worker's own packages, and no generated code: torch, diffusers, transformers, safetensors,
numpy, scipy, torchsde, pillow, pydantic, structlog, httpx, protobuf.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

# Seconds that a section may take, in the order in which they run.
SECTIONS = {
    "sdxl": 240,
    "sd15": 150,
    "correct": 75,
    "memory": 45,
    "switches": 60,
    "formsxl": 200,
    "forms15": 150,
    "profile": 200,
    "file": 60,
}
_AHEAD = 1  # sections that get ready while one runs
_MIN_SECONDS = 15


@dataclass
class _Child:
    """A section's process. When it has imported everything it makes a file, and waits for a line before it touches the
    GPU."""

    name: str
    process: subprocess.Popen[str]
    log: TextIO
    is_ready: Path

    def wait_until_ready(self) -> None:
        while not self.is_ready.exists() and self.process.poll() is None:
            time.sleep(0.05)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="only this one; may be repeated")
    parser.add_argument("--seconds-budget", type=float, default=300)
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU where there is no GPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        from tests.bench.gpu.child import run

        sys.exit(run(arguments.section[0], arguments.out, arguments.tiny))
    run_all(arguments.section or list(SECTIONS), arguments.out, arguments.tiny, arguments.seconds_budget)
    print(table(arguments.out), flush=True)


def run_all(names: list[str], out: Path, tiny: bool, budget_seconds: float) -> None:
    """Runs sections one after the other for as long as the budget lasts."""
    ends_at = time.monotonic() + budget_seconds
    waiting, ready = deque(names), deque[_Child]()
    while waiting or ready:
        while waiting and len(ready) <= _AHEAD:
            ready.append(_start(waiting.popleft(), out, tiny))
        child = ready.popleft()
        child.wait_until_ready()
        left = ends_at - time.monotonic()
        if left < _MIN_SECONDS:
            _finish(child, 0, "no time was left")
            continue
        began = time.monotonic()
        outcome = _finish(child, left if tiny else min(left, SECTIONS[child.name]))
        print(f"{child.name}: {outcome} after {time.monotonic() - began:.0f} s", flush=True)


def _start(name: str, out: Path, tiny: bool) -> _Child:
    command = [sys.executable, "-m", "tests.bench.gpu", "--child", "--section", name, "--out", str(out)]
    log = (out / f"{name}.log").open("w")
    is_ready = out / f"{name}.ready"
    is_ready.unlink(missing_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(
        command + ["--tiny"] * tiny,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | offline | {"PYTHONUNBUFFERED": "1", "DIFFUSERS_VERBOSITY": "error"},
    )
    return _Child(name, process, log, is_ready)


def _finish(child: _Child, seconds: float, skipped: str = "") -> str:
    """Lets a section run for so long, and says how it ended."""
    try:
        if seconds:
            child.process.communicate(f"{seconds}\n", timeout=seconds + 5)
            return "done" if child.process.returncode == 0 else f"FAILED, see {child.name}.log"
    except subprocess.TimeoutExpired:
        skipped = "out of time"
    child.process.kill()
    child.process.wait()
    child.log.close()
    return skipped


def table(out: Path) -> str:
    """All figures so far, one a line."""
    lines = []
    for name in SECTIONS:
        path = out / f"{name}.json"
        if not path.exists():
            continue
        found: dict[str, Any] = json.loads(path.read_text())
        if not lines:
            lines.append("  ".join(f"{key} {value}" for key, value in found["machine"].items()))
        lines.append(f"-- {name} ({found['seconds']:.0f} s){' ' + found['error'] if found['error'] else ''}")
        for row in found["rows"]:
            numbers = "  ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "what")
            lines.append(f"{row['what']:<34} {numbers}")
    return "\n".join(lines)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    import diffusers
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    return {"device": name, **versions, "python": platform.python_version()}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


if __name__ == "__main__":
    main()
