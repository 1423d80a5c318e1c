"""How soon a revoked key, a changed role and a forgotten secret count everywhere.

    python -m tests.bench.revocation [--times 30]

Two processes of every service. A change is made in one of identity's, and counts from the answer to it until the other,
which keeps a token, judges as it should; and until a worker's open stream at inference ends.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import grpc
from rich.console import Console
from rich.table import Table

from deploy.local.stack import Stack
from esd.identity.v1 import identity_pb2 as pb
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.options.v1 import options_pb2
from services.common.auth import TOKEN_METADATA
from tests.rest.replicas import NAMES, Replica
from tests.serving import Metadata

console = Console(width=110)


async def until(is_so: Callable[[], Awaitable[bool]]) -> float:
    """Seconds until it is so."""
    began = time.perf_counter()
    while not await is_so():  # noqa: ASYNC110 - another process tells nobody
        await asyncio.sleep(0.001)
    return time.perf_counter() - began


class Bench:
    """A user of its own, whose key both replicas know."""

    def __init__(self, stack: Stack) -> None:
        self._here, self._there = (Replica(stack, name) for name in NAMES)
        self._key = stack.api_key
        self._service_secret = (stack.home / "secrets" / "endpoints.secret").read_text()
        self._queue = grpc.aio.insecure_channel(f"127.0.0.1:{stack.ports()['inference']}")

    async def role_change(self) -> float:
        """A role gets another permission."""
        name, admin = uuid4().hex, await self._here.acting(self._key)
        key = await self._user(name, admin)
        await self._there.permissions(key)
        await self._here.identity.CreateRole(_role(name, "inference:all"), metadata=admin)

        async def is_changed() -> bool:
            return await self._there.permissions(key) == ["inference:all"]

        return await until(is_changed)

    async def revocation(self) -> float:
        """A key is revoked."""
        name, admin = uuid4().hex, await self._here.acting(self._key)
        key = await self._user(name, admin)
        await self._there.permissions(key)
        keys = await self._here.identity.ListApiKeys(pb.ListApiKeysRequest(username=name), metadata=admin)
        await self._here.identity.DeleteApiKeys(pb.DeleteApiKeysRequest(key_id_list=[keys.keys[0].id]), metadata=admin)

        async def is_closed() -> bool:
            return not await self._there.token(key)

        return await until(is_closed)

    async def open_stream(self) -> float:
        """The secret of an endpoint's workers is forgotten, one of whom has a stream open."""
        whose = {"caller": options_pb2.CALLER_WORKER, "subject": str(uuid4())}
        endpoints = await self._traded(self._service_secret)
        made = await self._here.identity.CreateSecret(pb.CreateSecretRequest(**whose), metadata=endpoints)
        queue: inference_pb2_grpc.QueueServiceAsyncStub = inference_pb2_grpc.QueueServiceStub(self._queue)
        stream = queue.Work(metadata=await self._traded(made.secret))
        await stream.write(inference_pb2.WorkRequest(hello=inference_pb2.Hello(worker_id="bench")))
        await stream.read()
        await self._here.identity.DeleteSecret(pb.DeleteSecretRequest(**whose), metadata=endpoints)
        began = time.perf_counter()
        if await stream.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise SystemExit(f"the stream ended with {await stream.code()}: {await stream.details()}")
        return time.perf_counter() - began

    async def _user(self, name: str, admin: Metadata) -> str:
        await self._here.identity.CreateRole(_role(name, "train:all"), metadata=admin)
        user = pb.CreateUserRequest(username=name, password="p", roles=[name])
        await self._here.identity.CreateUser(user, metadata=admin)
        made = await self._here.identity.CreateApiKey(pb.CreateApiKeyRequest(username=name), metadata=admin)
        return made.key

    async def _traded(self, secret: str) -> Metadata:
        issued = await self._here.identity.IssueToken(pb.IssueTokenRequest(secret=secret))
        return ((TOKEN_METADATA, issued.token),)


def _role(name: str, permission: str) -> pb.CreateRoleRequest:
    return pb.CreateRoleRequest(role_name=name, permissions=[permission])


async def run(stack: Stack, times: int) -> None:
    """Measures and prints."""
    bench = Bench(stack)
    table = Table(title="From the answer to a change until it counts elsewhere", title_justify="left")
    for column in ("change", "times", "p50 ms", "max ms", "target"):
        table.add_column(column, justify="left" if column in {"change", "target"} else "right")
    for name, measure, count, target in (
        ("a role, at the other replica of identity", bench.role_change, times, "≤ 1 s"),
        ("a revoked key, at the other replica of identity", bench.revocation, times, "≤ 1 s"),
        ("a forgotten secret, at a worker's open stream", bench.open_stream, max(3, times // 5), "≤ 5 s"),
    ):
        seconds = [await measure() for _ in range(count)]
        row = (str(count), f"{1000 * statistics.median(seconds):.0f}", f"{1000 * max(seconds):.0f}", target)
        table.add_row(name, *row)
    console.print(table)


def main() -> None:
    """Starts a stack, and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=30, help="changes of each kind (default 30)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="esd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # PostgreSQL's user must get through, when root runs this
        with Stack(folder / "home", replicas=2) as stack:
            asyncio.run(run(stack, options.times))


if __name__ == "__main__":
    main()
