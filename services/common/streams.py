"""Owns the open streams of a server, and ends those whose callers may no longer have them.

A request is over before its token is, a stream is not. So the tokens of the open streams are reviewed every two
seconds, and when a stream is opened: one whose key is revoked or over, whose user's roles changed or whose secret is
gone ends with UNAUTHENTICATED, and the client may try again with what it then is. While identity does not answer,
streams go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import structlog

from services.common.errors import EsdError
from services.common.tasks import heard

log = structlog.get_logger()

# Answers, for tokens, whether each still holds.
Review = Callable[[Sequence[str]], Awaitable[Sequence[bool]]]

REVIEW_SECONDS = 2.0
_ENDING_SECONDS = 1.0  # for telling the client; one that does not read what came before cannot be told
ENDED = "what this stream was opened with does not hold any more: the key, a role or the secret has changed"


class OpenStreams:
    """The streams that callers with a token have open."""

    def __init__(self, review: Review) -> None:
        self._review = review
        self._open: dict[asyncio.Task[Any], tuple[str, grpc.aio.ServicerContext[Any, Any]]] = {}
        self._opened = asyncio.Event()

    @contextmanager
    def opened(self, token: str | None, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
        """Counts the stream that this task serves as open during the block; not one that anybody may have."""
        task = asyncio.current_task()
        if token is None or task is None:
            yield
            return
        self._open[task] = token, context
        self._opened.set()
        try:
            yield
        finally:
            self._open.pop(task, None)

    async def run(self) -> None:
        """Reviews until cancelled."""
        while True:
            await self._opened.wait()
            self._opened.clear()
            while self._open:
                await self._review_all()
                await heard(self._opened, REVIEW_SECONDS)

    async def _review_all(self) -> None:
        streams = dict(self._open)
        tokens = sorted({token for token, _ in streams.values()})
        try:
            holds = dict(zip(tokens, await self._review(tokens), strict=True))
        except EsdError as error:
            log.warning("open streams are not reviewed", streams=len(streams), error=str(error))
            return
        over = [
            (task, context) for task, (token, context) in streams.items() if not holds[token] and task in self._open
        ]
        await asyncio.gather(*(_end(task, context) for task, context in over))


async def _end(task: asyncio.Task[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
    log.info("a stream is ended: its token does not hold any more")
    # A BaseError is raised whenever it succeeds, and when the client has gone.
    with suppress(grpc.aio.BaseError, TimeoutError):
        async with asyncio.timeout(_ENDING_SECONDS):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, ENDED)
    task.cancel()
