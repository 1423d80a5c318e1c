"""Who looks at a job while it runs: when the next preview is due, and where it goes. Knows nothing of torch."""

from __future__ import annotations

import time
from collections.abc import Callable

PREVIEW_SECONDS = 0.5


class Audience:
    """Shared by the event loop, which says whether somebody looks, and the engine's thread, which asks.

    `show` receives a JPEG on the event loop.
    """

    def __init__(self) -> None:
        self.is_watching = False
        self.show: Callable[[bytes], None] = lambda _: None
        self._due_at = 0.0

    def take(self) -> bool:
        """Whether a preview is due now; the next one is due half a second later."""
        if not self.is_watching or (now := time.monotonic()) < self._due_at:
            return False
        self._due_at = now + PREVIEW_SECONDS
        return True
