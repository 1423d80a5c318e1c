"""`make chaos`: jobs from several users through the gateway while everything they need is killed at random.

    python -m tests.chaos [--jobs 300] [--kills 40] [--seed N] [--engine paint|tiny]

Two replicas of every service, an Async and a Real-time endpoint. Exits 1 with the story of each job that was lost,
doubled, never ended, or has not the result that it must have.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.chaos.report import report
from tests.chaos.run import Chaos

_FAULT_SECONDS = 4.0


def main() -> None:
    """Parses, runs, reports."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=40, help="kills, freezes, cut and held lines")
    parser.add_argument("--seconds", type=float, default=_FAULT_SECONDS, help="between two of them, on average")
    parser.add_argument("--seed", type=int, default=None, help="of everything that is chosen at random")
    parser.add_argument("--engine", choices=["paint", "tiny"], default="paint")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(10**6)
    console = Console(width=120)
    console.print(f"{options.jobs} jobs, {options.kills} faults, seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="esd-chaos-"))
    folder.chmod(0o711)  # PostgreSQL's user must get through, when root runs this
    chaos = Chaos(folder, options.jobs, options.kills, options.seconds, seed, options.engine, console)
    outcome = asyncio.run(chaos.run())
    report(outcome, folder, console)
    if not outcome.verdict.is_good:
        sys.exit(1)  # and the folder stays
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
