"""Ends jobs whose deadline has passed, waiting or running."""

from __future__ import annotations

import structlog

from services.common.errors import Unavailable
from services.common.notifications import Notifications
from services.common.tasks import heard
from services.inference.channels import DEADLINE_SET
from services.inference.store import JobStore

log = structlog.get_logger()

_SWEEP_SECONDS = 7.0
_AT_LEAST_SECONDS = 0.02  # a job that another transaction has locked is tried again then


class Deadlines:
    """Sleeps until the next deadline. Two replicas may do so at once."""

    def __init__(self, store: JobStore, notifications: Notifications) -> None:
        self._store = store
        self._notifications = notifications

    async def run(self) -> None:
        """Ends what is late, until cancelled."""
        with self._notifications.subscribed((DEADLINE_SET, "")) as changed:
            while True:
                seconds = _SWEEP_SECONDS
                try:
                    until_next = await self._store.expire()
                    if until_next is not None:
                        seconds = min(max(until_next, _AT_LEAST_SECONDS), _SWEEP_SECONDS)
                except Unavailable as error:
                    log.warning("deadlines wait", reason=str(error))
                await heard(changed, seconds)
