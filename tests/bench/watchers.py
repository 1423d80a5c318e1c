"""How long a job's event takes to its watcher, and what a watcher costs: many jobs, each watched through Envoy."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle

import httpx
from rich.table import Table

from deploy.local.demo import Client
from deploy.local.stack import Stack
from tests.bench.ticking_worker import TICK_SECONDS, now_milliseconds

SETTINGS = {
    "ESD_WORKER_COMMAND": json.dumps([sys.executable, "-m", "tests.bench.ticking_worker"]),
    "ESD_MAX_QUEUED_JOBS_PER_USER": "0",
}
_WARM_SECONDS = 10.0
_MEASURED_SECONDS = 20.0
_PER_CLIENT = 50  # watchers; over HTTP/2 they share a connection, of which the gateway takes 100 streams
_AT_ONCE = 25  # so many watchers come at once: memory that only a crowd at the door needs is not theirs


@dataclass
class _Heard:
    """What the watchers have heard while it was measured. `num_ready` of them have heard a step at all."""

    milliseconds: list[float] = field(default_factory=list)
    is_measured: bool = False
    num_ready: int = 0
    all_ready: asyncio.Event = field(default_factory=asyncio.Event)


def start_jobs(client: Client, model: str, number: int) -> list[str]:
    """Queues so many jobs and answers their ids."""
    payload = json.dumps({"prompt": "a red circle", "steps": 1, "width": 64, "height": 64})
    body = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": [model]}}
    jobs = [client.call("POST", "/inferences", body | {"payload_string": payload}) for _ in range(number)]
    return [str(job["inference"]["inference_id"]) for job in jobs]


def bench_watchers(
    stack: Stack, key: str, job_ids: list[str], measure_memory: Callable[[], dict[str, float]], http2: bool
) -> tuple[list[float], Table]:
    """Milliseconds from the worker's word to the watcher's ear, and a table of the memory of a watcher.

    Over HTTP/1.1 each has a connection; over HTTP/2 they share some, as the tabs of a browser do.
    """
    headers, limits = {"x-api-key": key}, httpx.Limits(max_connections=None)
    clients = [
        httpx.AsyncClient(
            base_url=stack.url, headers=headers, timeout=None, limits=limits, http1=not http2, http2=http2
        )
        for _ in range(len(job_ids) // _PER_CLIENT + 1)
    ]
    return asyncio.run(_measure(clients, job_ids, measure_memory, "HTTP/2" if http2 else "HTTP/1.1"))


async def _measure(
    clients: list[httpx.AsyncClient], job_ids: list[str], measure_memory: Callable[[], dict[str, float]], protocol: str
) -> tuple[list[float], Table]:
    heard = _Heard()
    # The first watchers pay for what all share: connections, caches, grown heaps.
    warm, others = job_ids[: len(job_ids) // 10], job_ids[len(job_ids) // 10 :]
    async with AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        in_turn = cycle(clients)
        watchers = await _begin(in_turn, warm, heard)
        await asyncio.sleep(_WARM_SECONDS)
        before = await asyncio.to_thread(measure_memory)
        for first in range(0, len(others), _AT_ONCE):
            watchers += await _begin(in_turn, others[first : first + _AT_ONCE], heard)
        await asyncio.sleep(2 * TICK_SECONDS)  # what waited while they came is told
        heard.is_measured = True
        began = time.monotonic()
        await asyncio.sleep(_MEASURED_SECONDS)
        heard.is_measured = False
        seconds = time.monotonic() - began
        after = await asyncio.to_thread(measure_memory)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
    expected = len(job_ids) * seconds / TICK_SECONDS
    table = Table(title=f"Memory of a watcher ({len(job_ids)} of them, {protocol})", title_justify="left")
    for column in ("what", "value", "unit", "target"):
        table.add_column(column, justify="right" if column == "value" else "left")
    total = 0.0
    for name in sorted(after):
        grown = (after[name] - before.get(name, 0.0)) * 1024 / len(others)
        total += grown
        if abs(grown) >= 1:
            table.add_row(f"  {name}", f"{grown:.0f}", "KB", "")
    table.add_row("one watcher, all processes (PSS)", f"{total:.0f}", "KB", "≤ 100")
    table.add_row("events heard of those told", f"{100 * len(heard.milliseconds) / expected:.0f}", "%", "100")
    return heard.milliseconds, table


async def _begin(clients: Iterator[httpx.AsyncClient], job_ids: list[str], heard: _Heard) -> list[asyncio.Task[None]]:
    """Watchers of these jobs, all of whom have heard something."""
    heard.num_ready, heard.all_ready = 0, asyncio.Event()
    watchers = [
        asyncio.create_task(_watch(http, f"/inferences/{id_}/events", heard, len(job_ids)))
        for http, id_ in zip(clients, job_ids, strict=False)
    ]
    ready = asyncio.create_task(heard.all_ready.wait())
    done, _ = await asyncio.wait([ready, *watchers], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()  # a watcher that ends here has failed
    return watchers


async def _watch(http: httpx.AsyncClient, url: str, heard: _Heard, num_all: int) -> None:
    is_ready = False
    async with http.stream("GET", url) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith('data: {"step"'):
                continue
            if heard.is_measured:
                step = json.loads(line.removeprefix("data: "))["step"]["step"]
                heard.milliseconds.append(now_milliseconds() - step)
            if not is_ready:
                is_ready = True
                heard.num_ready += 1
                if heard.num_ready == num_all:
                    heard.all_ready.set()
    raise SystemExit(f"the events of {url} ended")
