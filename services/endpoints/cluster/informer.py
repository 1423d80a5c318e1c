"""Owns a copy of our objects of one kind in the cluster, kept by a list and a watch, so that looking costs no request.

As of Kubernetes' "API concepts", efficient detection of changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import aiohttp
import structlog
from kubernetes_asyncio import watch
from kubernetes_asyncio.client.exceptions import ApiException

from services.endpoints.cluster.kubernetes_api import TIMEOUT_SECONDS, sentence
from services.endpoints.cluster.pods import MANAGED, OWNER

log = structlog.get_logger()

_WATCH_SECONDS = 300  # then the API server ends it; one whose connection died silently is given up a little later
_RETRY_SECONDS = 1.0
_FRESH_SECONDS = 5.0


class Informer:
    """The objects that `list_` lists in a namespace, by owner. `on_change` is called when one changes."""

    def __init__(self, kind: str, list_: Callable[..., Any], namespace: str, on_change: Callable[[], None]) -> None:
        self._kind = kind
        self._list = list_
        self._namespace = namespace
        self._on_change = on_change
        self._owned: dict[str, dict[str, Any]] = {}
        self._is_fresh = asyncio.Event()

    async def of(self, owner_id: str) -> list[Any]:
        """The owner's objects.

        Raises:
            TimeoutError: the API server does not answer at present.
        """
        if not self._is_fresh.is_set():
            async with asyncio.timeout(_FRESH_SECONDS):
                await self._is_fresh.wait()
        return list(self._owned.get(owner_id, {}).values())

    def put(self, item: Any) -> None:
        """Takes in what a request has answered, unless something newer is known."""
        owned = self._owned.setdefault(item.metadata.labels.get(OWNER, ""), {})
        known = owned.get(item.metadata.name)
        if known is None or _version(known) <= _version(item):
            owned[item.metadata.name] = item

    async def run(self) -> None:
        """Follows the cluster until cancelled."""
        while True:
            try:
                await self._follow()
            except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
                if not (isinstance(error, ApiException) and error.status == HTTPStatus.GONE):
                    self._is_fresh.clear()
                    log.warning("the cluster is not watched", kind=self._kind, error=sentence(error))
                    await asyncio.sleep(_RETRY_SECONDS)  # nothing tells when an API server that is down comes back

    async def _follow(self) -> None:
        """One list, and the changes since then until the watch ends."""
        listed = await self._list(self._namespace, label_selector=MANAGED, _request_timeout=TIMEOUT_SECONDS)
        self._owned.clear()
        for item in listed.items:
            self.put(item)
        self._is_fresh.set()
        self._on_change()
        async with watch.Watch() as events:
            stream = events.stream(
                self._list,
                self._namespace,
                label_selector=MANAGED,
                resource_version=listed.metadata.resource_version,
                timeout_seconds=_WATCH_SECONDS,
                _request_timeout=_WATCH_SECONDS + TIMEOUT_SECONDS,
            )
            async for event in stream:
                if event["type"] == "DELETED":
                    self._remove(event["object"])
                else:
                    self.put(event["object"])
                self._on_change()

    def _remove(self, item: Any) -> None:
        owner_id = item.metadata.labels.get(OWNER, "")
        owned = self._owned.get(owner_id, {})
        owned.pop(item.metadata.name, None)
        if not owned:
            self._owned.pop(owner_id, None)


def _version(item: Any) -> int:
    """Of two states of an object the newer has the higher one (Kubernetes 1.35; true of etcd's always)."""
    return int(item.metadata.resource_version)
