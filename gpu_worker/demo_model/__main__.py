"""Trains the demo model from nothing, examines it and draws a page of samples:

    python -m gpu_worker.demo_model --out FILE.safetensors

Minutes on a GPU with `--device cuda --makers 12`, hours on two cores. Interrupted, it goes on where it was, by the
state in FILE.training/.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gpu_worker.demo_model import recipe, report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint; FILE.png beside it has the samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="such as cuda; on one CPU a seed gives the same file again")
    parser.add_argument("--threads", type=int, default=2, help="of torch; another number gives other last bits")
    parser.add_argument("--makers", type=int, default=1, help="processes that draw and write captions ahead")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps: 0.01 is a trial")
    arguments = parser.parse_args()
    folder = arguments.out.with_suffix(".training")
    folder.mkdir(parents=True, exist_ok=True)
    studio = recipe.studio(folder, arguments.device, arguments.threads, arguments.makers, arguments.seed)
    recipe.follow(arguments.out, studio, arguments.scale)
    report.make(arguments.out, arguments.device, arguments.threads)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
