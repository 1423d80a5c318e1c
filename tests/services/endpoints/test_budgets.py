"""A pool has a PodDisruptionBudget where the cluster knows `policy/v1`, which Kubernetes has since 1.21.

The API server is in memory, because the control plane that the tests can build for themselves is older.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes_asyncio import client

from deploy.local.ports import free_port
from services.endpoints.cluster import Pool
from services.endpoints.cluster.kubernetes import KubernetesCluster
from services.endpoints.cluster.kubernetes_api import KubernetesApi, KubernetesSettings

POOL = Pool("11111111-2222-3333-4444-555555555555", "a name", "ml.g5.xlarge")


class ApiServer:
    """Has nothing at first, takes everything, and remembers what was asked of it. `groups` is what discovery shows."""

    def __init__(self, groups: list[str]) -> None:
        self._groups = groups
        self.asked: list[tuple[str, str]] = []  # method and kind
        self._closing = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[KubernetesCluster]:
        """A cluster that is followed, during the block."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", free_port())
        await site.start()
        settings = KubernetesSettings(image="worker:1", server_url="http://gateway:8080")
        async with client.ApiClient(client.Configuration(host=site.name)) as api:
            own = KubernetesApi(api, settings, drain_seconds=60, gpu_priority="pools")
            cluster = KubernetesCluster(own, False, lambda: None)
            following = asyncio.create_task(cluster.run())
            try:
                yield cluster
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        self._closing.set()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.path.rstrip("/") == "/apis":
            groups = [{"name": name.partition("/")[0], "versions": [_version(name)]} for name in self._groups]
            return web.json_response({"kind": "APIGroupList", "groups": groups})
        if "watch" in request.query:
            await self._closing.wait()
            return web.json_response({})
        if request.method == "GET":
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": []})
        kind = request.path.partition("/esd-workers/")[2].split("/")[0]
        self.asked.append((request.method, kind))
        answer: dict[str, Any] = {}
        if kind == "deployments" and request.method == "PATCH":
            answer = json.loads(await request.text())
            answer["metadata"] |= {"generation": 1, "resourceVersion": "2"}
            answer["spec"]["replicas"] = 1
        return web.json_response(answer)


def _version(name: str) -> dict[str, str]:
    return {"groupVersion": name, "version": name.partition("/")[2]}


@pytest.mark.parametrize(
    ("groups", "kinds"),
    [
        (["apps/v1", "policy/v1"], ["deployments", "poddisruptionbudgets"]),
        (["apps/v1", "policy/v1beta1"], ["deployments"]),
    ],
)
async def test_a_pool_has_a_budget_where_discovery_shows_it_and_both_go_together(
    groups: list[str], kinds: list[str]
) -> None:
    server = ApiServer(groups)
    async with server.serving() as cluster:
        await cluster.apply(POOL, 1, ())
        assert server.asked == [("PATCH", kind) for kind in kinds]
        await cluster.apply(POOL, 1, ())
        assert server.asked == [("PATCH", kind) for kind in kinds], "what is as it was left needs no request"
        await cluster.forget(POOL.endpoint_id)
        deleted = {kind for method, kind in server.asked if method == "DELETE"}
        assert deleted == {*kinds, "jobs", "secrets"}
