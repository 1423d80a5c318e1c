"""One run: the stack, the users, the faults, the rest afterwards, the verdict."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.local.demo import Client, upload
from deploy.local.home import Home
from deploy.local.postgres import Postgres
from deploy.local.stack import Stack
from deploy.local.store import Store
from services.common.payloads import Generation
from tests.chaos.clients import Refused, Submission, User
from tests.chaos.faults import Faults
from tests.chaos.history import Change, History
from tests.chaos.painting import painted
from tests.chaos.verdict import IsRight, Judge, Pixels, Verdict
from tests.line import Line

_ENDPOINTS = {"Async": 2, "Real-time": 1}  # workers
_USERS = ("ada", "bob", "cleo", "dan")
_SETTLE_SECONDS = 300.0  # for the last job to end after the last fault
_READY_SECONDS = 120.0
_PART_BYTES = 64 * 2**20
# Silence is noticed sooner than by default, so that more of it fits into a run.
_SETTINGS = {"ESD_LEASE_SECONDS": "10", "ESD_GRACE_SECONDS": "2", "ESD_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a run found."""

    verdict: Verdict
    submissions: list[Submission]
    changes: dict[Any, list[Change]]
    faults: Faults
    seconds: float


class Chaos:
    """Everything a run needs, in one folder."""

    def __init__(
        self,
        folder: Path,
        num_jobs: int,
        num_faults: int,
        fault_seconds: float,
        seed: int,
        engine: str,
        console: Console,
    ) -> None:
        self._folder = folder
        self._num_faults = num_faults
        self._seconds = num_faults * fault_seconds
        self._engine = engine
        self._console = console
        self._rng = random.Random(seed)
        self._submissions = [self._make(number, seed) for number in range(num_jobs)]

    async def run(self) -> Outcome:
        """Goes the whole way; the stack is stopped at the end, its folder stays."""
        async with Line() as line:
            command = [sys.executable, "-m", "tests.chaos.worker", line.address, self._engine, str(self._folder)]
            settings = {**_SETTINGS, "ESD_WORKER_COMMAND": json.dumps(command)}
            stack = Stack(self._folder / "home", replicas=2, env_overrides=settings)
            try:
                await asyncio.to_thread(stack.start)
                line.url = stack.url
                return await self._run(stack, line)
            finally:
                await asyncio.to_thread(stack.stop)

    async def _run(self, stack: Stack, line: Line) -> Outcome:
        home = Home(stack.home)
        postgres, store = Postgres(home, stack.ports()["postgres"]), Store(home, stack.ports()["swift"])
        history = History(postgres.url("inference"))
        history.begin()
        model, keys = await asyncio.to_thread(self._prepare, stack)
        users = [User(stack.url, key, model, self._rng) for key in keys]
        faults = Faults(stack, line, self._rng)
        began = time.monotonic()
        try:
            await self._storm(users, faults)
        finally:
            for user in users:
                await user.close()
        for killed in (postgres, store):  # perhaps just now
            await asyncio.to_thread(killed.wait_until_up)
        judge = await asyncio.to_thread(Judge, history, store.client(), self._is_right())
        verdict = await asyncio.to_thread(judge.judge, self._submissions)
        return Outcome(verdict, self._submissions, judge.changes, faults, time.monotonic() - began)

    async def _storm(self, users: list[User], faults: Faults) -> None:
        """Submits at a steady rate while faults happen; returns when all jobs have ended, or it has waited enough."""
        columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            bars = {name: progress.add_task(name, total=len(self._submissions)) for name in ("accepted", "ended")}
            bars["faults"] = progress.add_task("faults", total=self._num_faults)

            async def one(submission: Submission) -> None:
                user = users[submission.number % len(users)]
                try:
                    await user.submit(submission)
                    progress.advance(bars["accepted"])
                    await user.await_end(submission)
                    progress.advance(bars["ended"])
                except Refused as refusal:
                    submission.surprises.append(str(refusal))

            async def strike() -> None:
                pauses = [self._rng.uniform(0.3, 1.7) for _ in range(self._num_faults)]
                for pause in pauses:
                    await asyncio.sleep(pause * self._seconds / len(pauses))
                    await faults.strike()
                    progress.advance(bars["faults"])
                await faults.over()

            striking = asyncio.create_task(strike())
            jobs = []
            for submission in self._submissions:
                jobs.append(asyncio.create_task(one(submission)))
                await asyncio.sleep(self._seconds / len(self._submissions))
            await striking
            _, waiting = await asyncio.wait(jobs, timeout=_SETTLE_SECONDS)
            for job in waiting:
                job.cancel()
            for ended in await asyncio.gather(*jobs, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

    def _prepare(self, stack: Stack) -> tuple[str, list[str]]:
        """A model, users, endpoints in service; answers the model's name and the users' keys."""
        checkpoint = self._folder / "chaos.safetensors"
        subprocess.run(
            [sys.executable, "-m", "gpu_worker.models.tiny", str(checkpoint)], check=True, capture_output=True
        )
        admin = Client(stack.url, stack.api_key)
        permissions = ["checkpoint:all", "sagemaker_endpoint:all", "inference:all"]
        for role in _ENDPOINTS:  # one each, because a role has one endpoint
            admin.call("POST", "/roles", {"role_name": role, "permissions": permissions})
        keys = []
        for name in _USERS:
            admin.call("POST", "/users", {"username": name, "password": "secret", "roles": list(_ENDPOINTS)})
            keys.append(admin.call("POST", "/keys", {"username": name})["key"])
        client = Client(stack.url, keys[0])
        upload(client, checkpoint, self._console, _PART_BYTES)
        for kind, num_workers in _ENDPOINTS.items():
            body = {"endpoint_name": kind.lower(), "endpoint_type": kind, "instance_type": "local"}
            body |= {"initial_instance_count": num_workers, "autoscaling_enabled": False}
            client.call("POST", "/endpoints", body | {"assign_to_roles": [kind]})
        give_up_at = time.monotonic() + _READY_SECONDS
        while any(item["endpoint_status"] != "InService" for item in client.call("GET", "/endpoints")["endpoints"]):
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"the endpoints are not in service after {_READY_SECONDS:.0f} s")
            time.sleep(0.2)
        client.close()
        admin.close()
        return checkpoint.name, keys

    def _make(self, number: int, seed: int) -> Submission:
        rng = self._rng
        payload = {
            "prompt": f"picture {number} of chaos {seed}",
            "steps": rng.choice([2, 5, 10, 20]) if self._engine == "paint" else 4,
            "width": 64,
            "height": 64,
            "seed": rng.choice([-1, rng.randrange(2**31)]),
            "batch_size": rng.choice([1, 1, 1, 2]),
            "sampler_name": "Euler a",
        }
        inference_type = rng.choices(list(_ENDPOINTS), [4, 1])[0]
        is_string = inference_type == "Async" and rng.random() < 0.3
        return Submission(number, inference_type, payload, is_string)

    def _is_right(self) -> IsRight:
        """How a picture of the engine in use is known to be the right one."""
        if self._engine == "tiny":
            from tests.chaos.reference import Reference  # imports torch, which takes seconds

            return Reference(self._folder / "chaos.safetensors").is_right
        return _is_painted


def _is_painted(request: Generation, index: int, pixels: Pixels) -> bool:
    return bool(np.array_equal(pixels, painted(request, index)))
