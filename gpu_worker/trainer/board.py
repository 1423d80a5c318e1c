"""TensorBoard event files, with the tags that kohya writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpu_worker.trainer.listening import Progress

_TAGS = {"unet": "lr/unet", "text": "lr/textencoder"}


class Board:
    """The curves of one process of a training, in a folder of their own; nothing without a folder."""

    def __init__(self, folder: str, prefix: str) -> None:
        self._writer: Any = None
        if folder:
            from tensorboardX import SummaryWriter  # noqa: PLC0415 - not every training has curves

            name = prefix + time.strftime("%Y%m%d%H%M%S")
            self._writer = SummaryWriter(str(Path(folder) / name), flush_secs=10)

    def stepped(self, progress: Progress) -> None:
        """Adds a step to the curves."""
        if self._writer is None:
            return
        self._writer.add_scalar("loss/current", progress.loss, progress.step)
        self._writer.add_scalar("loss/average", progress.average_loss, progress.step)
        for part, rate in progress.rates.items():
            self._writer.add_scalar(_TAGS[part], rate, progress.step)

    def flush(self) -> None:
        """Writes out what is pending."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
