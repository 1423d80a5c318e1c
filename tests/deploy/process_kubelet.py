"""A node whose pods are processes of this machine: what a kubelet does, as far as our pods need it.

It registers a Node with GPUs, runs the container of each pod bound to it, mounts Secrets and empty folders (by
rewriting the environment: there is no root file system to mount them in), restarts what ends, and stops by SIGTERM, and
SIGKILL after the grace period.
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes_asyncio import client, watch
from kubernetes_asyncio.client.exceptions import ApiException

_BACKOFF_SECONDS = 0.2
_BEAT_SECONDS = 2.0
_LEAST_GRACE_SECONDS = 2  # that a kubelet gives, also to what was deleted without any
_SIGNAL_BASE = 128  # how runtimes tell that a signal ended a container
_ENDED = ("Succeeded", "Failed")


class ProcessKubelet:
    """One node, while the block runs. A node that dies takes its processes with it and says nothing."""

    def __init__(self, api: client.ApiClient, name: str, gpus: int, folder: Path) -> None:
        self._core: Any = client.CoreV1Api(api)
        self._name, self._gpus, self._folder = name, gpus, folder
        self._pods: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._line = asyncio.Event()  # set while the API server and this node hear each other
        self._line.set()

    async def __aenter__(self) -> ProcessKubelet:
        labels = {"kubernetes.io/hostname": self._name, "nvidia.com/gpu.present": "true"}
        await self._core.create_node({"metadata": {"name": self._name, "labels": labels}})
        await self._beat()
        self._talk()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()
        with suppress(ApiException):
            await self._core.delete_node(self._name)

    async def die(self) -> None:
        """Power is gone: the processes too, and nobody is told."""
        await _cancel(*self._tasks, *self._pods.values())

    async def fall_silent(self) -> None:
        """The network is gone: the API server and this node do not hear each other. Nobody hears the processes either,
        which stand still: else they would go on telling others what a real node's could tell nobody."""
        self._line.clear()
        for process in self._processes.values():
            process.send_signal(signal.SIGSTOP)
        await _cancel(*self._tasks)

    def come_back(self) -> None:
        """The network is there again."""
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
        self._line.set()
        self._talk()

    def kill(self, pod: Any) -> None:
        """The pod's process is killed, as the kernel does when memory is short."""
        self._processes[pod.metadata.uid].kill()

    def _talk(self) -> None:
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._beats())]

    async def _beats(self) -> None:
        while True:
            with suppress(ApiException, aiohttp.ClientError, TimeoutError):  # the next one may get through
                await self._beat()
            await asyncio.sleep(_BEAT_SECONDS)

    async def _beat(self) -> None:
        room = {"cpu": "64", "memory": "256Gi", "pods": "50", "nvidia.com/gpu": str(self._gpus)}
        ready = {"type": "Ready", "status": "True", "reason": "ok", "lastHeartbeatTime": _now()}
        status = {"capacity": room, "allocatable": room, "conditions": [{**ready, "lastTransitionTime": _now()}]}
        await self._core.patch_node_status(self._name, {"status": status})

    async def _watch(self) -> None:
        """Runs pods that are new here, and stops those that are to go; again after the API server was away."""
        while True:
            with suppress(ApiException, aiohttp.ClientError, TimeoutError):
                await self._watch_once()
            await asyncio.sleep(_BACKOFF_SECONDS)

    async def _watch_once(self) -> None:
        async with watch.Watch() as events:
            mine = f"spec.nodeName={self._name}"
            async for event in events.stream(self._core.list_pod_for_all_namespaces, field_selector=mine):
                pod = event["object"]
                uid = pod.metadata.uid
                is_leaving = event["type"] == "DELETED" or pod.metadata.deletion_timestamp
                if event["type"] != "DELETED" and uid not in self._pods:
                    self._pods[uid] = asyncio.create_task(self._run(pod))
                elif is_leaving and (process := self._processes.pop(uid, None)):
                    _stop(process, pod.metadata.deletion_grace_period_seconds or 0)
                elif pod.metadata.deletion_timestamp and pod.status.phase in _ENDED:
                    await self._remove(pod)

    async def _run(self, pod: Any) -> None:
        """The pod's life: started, started again when it ends, gone when it was to go."""
        uid, container = pod.metadata.uid, pod.spec.containers[0]
        num_restarts, end = 0, None
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            environment = await self._environment(pod, Path(folder))
            while True:
                log = Path(folder) / "log"
                with log.open("wb") as output:
                    process = await asyncio.create_subprocess_exec(
                        *container.command, env=environment, stdout=output, stderr=output
                    )
                self._processes[uid] = process
                await self._tell(pod, num_restarts, {"running": {"startedAt": _now()}}, end)
                try:
                    code = await process.wait()
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                was_told_to_go = self._processes.pop(uid, None) is None
                code = _SIGNAL_BASE - code if code < 0 else code
                words = log.read_bytes()[-2048:].decode(errors="replace")
                end = {"terminated": {"exitCode": code, "message": words, "finishedAt": _now()}}
                if pod.spec.restart_policy == "Never":
                    await self._tell(pod, 0, end, None, phase="Failed" if code else "Succeeded")
                if was_told_to_go:
                    break
                if pod.spec.restart_policy == "Never":
                    return
                await self._tell(pod, num_restarts, {"waiting": {"reason": "CrashLoopBackOff"}}, end)
                await asyncio.sleep(_BACKOFF_SECONDS)
                num_restarts += 1
        await self._remove(pod)

    async def _remove(self, pod: Any) -> None:
        name, namespace = pod.metadata.name, pod.metadata.namespace
        with suppress(ApiException):
            now = {"gracePeriodSeconds": 0}
            await self._until_heard(lambda: self._core.delete_namespaced_pod(name, namespace, body=now))

    async def _environment(self, pod: Any, folder: Path) -> dict[str, str]:
        """The container's environment with its mounts as folders of this machine."""
        spec = pod.spec
        volumes = {volume.name: volume for volume in spec.volumes}
        mounts: dict[str, str] = {}
        for mount in spec.containers[0].volume_mounts or ():
            place = folder / mount.name
            place.mkdir()
            mounts[mount.mount_path] = str(place)
            if (source := volumes[mount.name].secret) is not None:
                for name, content in (await self._secret(source.secret_name, pod.metadata.namespace)).items():
                    (place / name).write_bytes(base64.b64decode(content))
        fields = {"metadata.name": pod.metadata.name}
        environment = {
            entry.name: fields[entry.value_from.field_ref.field_path] if entry.value_from else entry.value
            for entry in spec.containers[0].env
        }
        for name, value in environment.items():
            for path, place_of in mounts.items():
                if value == path or value.startswith(f"{path}/"):
                    environment[name] = place_of + value.removeprefix(path)
        return {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | environment

    async def _secret(self, name: str, namespace: str) -> dict[str, str]:
        """What is in a Secret, which may come after its pod."""
        while True:
            with suppress(ApiException, aiohttp.ClientError, TimeoutError):
                found: dict[str, str] = (await self._core.read_namespaced_secret(name, namespace)).data
                return found
            await asyncio.sleep(_BACKOFF_SECONDS)

    async def _tell(
        self, pod: Any, num_restarts: int, state: dict[str, Any], last: dict[str, Any] | None, phase: str = "Running"
    ) -> None:
        ready = "running" in state
        container = {
            "name": pod.spec.containers[0].name,
            "image": pod.spec.containers[0].image,
            "imageID": "",
            "ready": ready,
            "restartCount": num_restarts,
            "state": state,
            "lastState": last or {},
        }
        conditions = [
            {"type": kind, "status": str(ready), "lastTransitionTime": _now()} for kind in ("Ready", "ContainersReady")
        ]
        status = {"phase": phase, "startTime": _now(), "conditions": conditions, "containerStatuses": [container]}
        name, namespace = pod.metadata.name, pod.metadata.namespace
        with suppress(ApiException):  # it is gone already
            await self._until_heard(lambda: self._core.patch_namespaced_pod_status(name, namespace, {"status": status}))

    async def _until_heard(self, call: Callable[[], Awaitable[Any]]) -> None:
        """Makes the call again while nobody answers."""
        while True:
            await self._line.wait()
            try:
                await call()
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(_BACKOFF_SECONDS)
            else:
                return


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Ends them. Raises what one had failed of before: a node that does only half of its work is no node."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended


def _stop(process: asyncio.subprocess.Process, grace_seconds: int) -> None:
    def kill() -> None:
        if process.returncode is None:
            process.kill()

    with suppress(ProcessLookupError):  # it has just ended by itself
        process.send_signal(signal.SIGTERM)
    asyncio.get_running_loop().call_later(max(grace_seconds, _LEAST_GRACE_SECONDS), kill)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
