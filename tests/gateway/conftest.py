"""A real Envoy before real gRPC servers that answer as services/common/interceptor.py does, and a small store."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest
from google.protobuf import json_format, struct_pb2
from google.rpc import code_pb2, status_pb2

from deploy.local.ports import free_port
from esd.endpoints.v1 import endpoints_pb2, endpoints_pb2_grpc
from esd.identity.v1 import ext_authz_pb2, ext_authz_pb2_grpc, identity_pb2, identity_pb2_grpc
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.models.v1 import models_pb2, models_pb2_grpc

KEY = "09876543210987654321"
SLOW_KEY = "as good, but identity takes a second to say so"
SECRET = "the gateway's 100% secret"
ROOT = Path(__file__).parents[2]
Context = grpc.aio.ServicerContext[Any, Any]


async def send_reply(context: Context, status: int, message: str = "", *flags: str) -> None:
    """The initial metadata with which a service describes its envelope."""
    pairs = [("x-esd-status", str(status)), ("x-esd-message", quote(message, safe=" "))]
    await context.send_initial_metadata((*pairs, *((flag, "1") for flag in flags)))


def metadata(context: Context) -> dict[str, str]:
    """What arrived with a call."""
    return {str(key): str(value) for key, value in context.invocation_metadata() or ()}


@dataclass
class Seen:
    """What the services were told."""

    checks: list[ext_authz_pb2.CheckRequest] = field(default_factory=list)
    check_secrets: list[str] = field(default_factory=list)
    calls: list[dict[str, str]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    may_end: asyncio.Event = field(default_factory=asyncio.Event)  # set by a test that watches a job


class Authorization(ext_authz_pb2_grpc.AuthorizationServicer):
    """Knows one key."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def Check(self, request: ext_authz_pb2.CheckRequest, context: Context) -> ext_authz_pb2.CheckResponse:
        self.seen.checks.append(request)
        self.seen.check_secrets.append(metadata(context).get("x-esd-secret", ""))
        key = request.attributes.request.http.headers.get("x-api-key")
        if key == SLOW_KEY:
            await asyncio.sleep(1)  # a database that is busy
        elif key != KEY:
            denied = ext_authz_pb2.DeniedHttpResponse(status={"code": 403}, body="Forbidden")
            return ext_authz_pb2.CheckResponse(
                status=status_pb2.Status(code=code_pb2.PERMISSION_DENIED), denied_response=denied
            )
        token = f"token for {request.attributes.context_extensions['profile']}"
        header = ext_authz_pb2.HeaderValueOption(
            header={"key": "x-esd-token", "value": token}, append_action="OVERWRITE_IF_EXISTS_OR_ADD"
        )
        ok = ext_authz_pb2.OkHttpResponse(headers=[header], headers_to_remove=["x-api-key"])
        return ext_authz_pb2.CheckResponse(ok_response=ok)


class Identity(identity_pb2_grpc.IdentityServiceServicer):
    """Answers with each kind of envelope."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def Ping(self, request: identity_pb2.PingRequest, context: Context) -> identity_pb2.PingResponse:
        self.seen.calls.append(metadata(context))
        await send_reply(context, 200, "pong")
        return identity_pb2.PingResponse()

    async def ListRoles(
        self, request: identity_pb2.ListRolesRequest, context: Context
    ) -> identity_pb2.ListRolesResponse:
        if request.role == "missing":
            await context.abort(grpc.StatusCode.NOT_FOUND, 'no role "missing" in Zürich')
        if request.role == "cancelled":
            await context.abort(grpc.StatusCode.CANCELLED, "Cancelling all calls")
        await send_reply(context, 200, "OK")
        count = int(request.role) if request.role.isdigit() else 1
        reply = identity_pb2.ListRolesResponse(previous_evaluated_key="not_applicable")
        reply.last_evaluated_key.null_value = struct_pb2.NULL_VALUE
        reply.roles.extend(identity_pb2.Role(role_name="x" * 1000) for _ in range(count))
        return reply

    async def CreateRole(
        self, request: identity_pb2.CreateRoleRequest, context: Context
    ) -> identity_pb2.CreateRoleResponse:
        self.seen.requests.append(request)
        await send_reply(context, 201, f'role "{request.role_name}" created\n100%')
        return identity_pb2.CreateRoleResponse()

    async def DeleteRoles(
        self, request: identity_pb2.DeleteRolesRequest, context: Context
    ) -> identity_pb2.DeleteRolesResponse:
        await send_reply(context, 204, "roles deleted")
        return identity_pb2.DeleteRolesResponse()

    async def IssueToken(
        self, request: identity_pb2.IssueTokenRequest, context: Context
    ) -> identity_pb2.IssueTokenResponse:
        return identity_pb2.IssueTokenResponse(token=f"token for {request.secret}")


class Models(models_pb2_grpc.ModelsServiceServicer):
    """Answers a raw body."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def UpdateCheckpoint(
        self, request: models_pb2.UpdateCheckpointRequest, context: Context
    ) -> models_pb2.UpdateCheckpointResponse:
        self.seen.requests.append(request)
        await send_reply(context, 202, "unused", "x-esd-raw")
        return models_pb2.UpdateCheckpointResponse(status_code=202, message="rename is processing, please wait")


class Endpoints(endpoints_pb2_grpc.EndpointsServiceServicer):
    """Answers a raw empty body, and in the webui profile none."""

    async def DeleteEndpoints(
        self, request: endpoints_pb2.DeleteEndpointsRequest, context: Context
    ) -> endpoints_pb2.DeleteEndpointsResponse:
        webui = metadata(context)["x-esd-token"] == "token for webui"
        await send_reply(context, 204 if webui else 200, "Endpoints Deleted", "x-esd-raw")
        return endpoints_pb2.DeleteEndpointsResponse()


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers a job, unwrapped, measures payloads or refuses them, and streams the events of a job until it may end."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def WatchInferenceJob(
        self, request: inference_pb2.WatchInferenceJobRequest, context: Context
    ) -> AsyncIterator[inference_pb2.WatchInferenceJobResponse]:
        if request.job_id == "missing":
            await context.abort(grpc.StatusCode.NOT_FOUND, "inference with id missing not found")
        yield inference_pb2.WatchInferenceJobResponse(queued={"position": 1})
        await self.seen.may_end.wait()
        yield inference_pb2.WatchInferenceJobResponse(preview={"jpeg": b"\xff\xd8"})
        yield inference_pb2.WatchInferenceJobResponse(image={"index": 0, "name": "image_0.png", "url": "http://s/0"})
        yield inference_pb2.WatchInferenceJobResponse(done={})

    async def CreateInferenceJob(
        self, request: inference_pb2.CreateInferenceJobRequest, context: Context
    ) -> inference_pb2.CreateInferenceJobResponse:
        self.seen.calls.append(metadata(context))
        if request.task_type == "one too many":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough", (("retry-after", "7"),))
        if request.task_type == "another":
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "the key came with another body")
        await send_reply(context, 201, "Created")
        receipt = inference_pb2.JobReceipt(id=str(len(request.payload_string)))
        return inference_pb2.CreateInferenceJobResponse(inference=receipt)

    async def GetInferenceJob(
        self, request: inference_pb2.GetInferenceJobRequest, context: Context
    ) -> inference_pb2.GetInferenceJobResponse:
        await send_reply(context, 200, "OK", "x-esd-unwrap")
        job = inference_pb2.InferenceJob(id=request.job_id, status="succeed")
        json_format.ParseDict({"data": {"x": None}}, job.params)
        return inference_pb2.GetInferenceJobResponse(data=job)


class Queue(inference_pb2_grpc.QueueServiceServicer):
    """Echoes a worker's hello."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def Work(
        self, request_iterator: AsyncIterator[inference_pb2.WorkRequest], context: Context
    ) -> AsyncIterator[inference_pb2.WorkResponse]:
        self.seen.calls.append(metadata(context))
        async for request in request_iterator:
            yield inference_pb2.WorkResponse(welcome={"kept_leases": request.hello.held_leases})

    async def WatchPools(
        self, request: inference_pb2.WatchPoolsRequest, context: Context
    ) -> AsyncIterator[inference_pb2.WatchPoolsResponse]:
        self.seen.calls.append(metadata(context))
        yield inference_pb2.WatchPoolsResponse()


@pytest.fixture(scope="package")
async def services() -> AsyncIterator[tuple[str, Seen]]:
    """The address of one server that speaks for identity, models, endpoints and inference, and what it saw."""
    seen = Seen()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 70 << 20)])
    ext_authz_pb2_grpc.add_AuthorizationServicer_to_server(Authorization(seen), server)
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(Identity(seen), server)
    models_pb2_grpc.add_ModelsServiceServicer_to_server(Models(seen), server)
    endpoints_pb2_grpc.add_EndpointsServiceServicer_to_server(Endpoints(), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(seen), server)
    inference_pb2_grpc.add_QueueServiceServicer_to_server(Queue(seen), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", seen
    await server.stop(None)


@dataclass
class Store:
    """A plain HTTP server in the store's place: it records each request line and Host, and counts the body."""

    address: str
    requests: list[tuple[str, str, dict[str, str], int]] = field(default_factory=list)


@pytest.fixture(scope="package")
def store() -> Iterator[Store]:
    """A store that answers every request with 200, a header of its own and the text `stored`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size, left = 0, int(self.headers.get("content-length", 0))
            while left > 0 and (chunk := self.rfile.read(min(left, 1 << 16))):
                size, left = size + len(chunk), left - len(chunk)
            headers = {name.lower(): value for name, value in self.headers.items()}
            recorded.requests.append((self.command, self.path, headers, size))
            self.send_response(200)
            self.send_header("etag", '"of the store"')
            self.send_header("content-length", "6")
            self.end_headers()
            self.wfile.write(b"stored")

        do_PUT = do_OPTIONS = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the tests' output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recorded = Store(f"127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield recorded
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Gateway:
    """A running gateway: its process, its addresses and a client of each listener that holds a good key."""

    process: asyncio.subprocess.Process
    address: str
    webui_address: str
    client: httpx.AsyncClient
    webui: httpx.AsyncClient


@asynccontextmanager
async def running_gateway(folder: Path, services: str, **settings: str) -> AsyncIterator[Gateway]:
    """`python -m gateway` with these settings over the usual ones, until the block ends."""
    secret = folder / "secret"
    secret.write_text(SECRET + "\n")
    address, webui_port = f"127.0.0.1:{free_port()}", free_port()
    names = ("identity", "models", "endpoints", "inference")
    environment = {
        **{f"ESD_{name}_ADDRESS".upper(): services for name in names},
        "ESD_TRAINING_ADDRESS": f"127.0.0.1:{free_port()}",
        "ESD_LISTEN": address,
        "ESD_WEBUI_PORT": str(webui_port),
        "ESD_SECRET_FILE": str(secret),
        "ESD_RUN_DIR": str(folder / "run"),
        **settings,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ESD_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", cwd=ROOT, env={**kept, **environment}
    )
    try:
        await _until_listening(process, address)
        headers = {"x-api-key": KEY}
        webui = f"127.0.0.1:{webui_port}"
        scheme = "https" if "ESD_TLS_CERT_FILE" in settings else "http"
        verify = scheme == "http"
        async with (
            httpx.AsyncClient(base_url=f"{scheme}://{address}", headers=headers, timeout=30, verify=verify) as client,
            httpx.AsyncClient(base_url=f"{scheme}://{webui}", headers=headers, timeout=30, verify=verify) as other,
        ):
            yield Gateway(process, address, webui, client, other)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _until_listening(process: asyncio.subprocess.Process, address: str) -> None:
    host, port = address.split(":")
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            assert process.returncode is None, "the gateway ended before it listened"
            await asyncio.sleep(0.05)  # Envoy tells nobody when it listens
        else:
            writer.close()
            await writer.wait_closed()
            return
    raise AssertionError("the gateway does not listen")


@pytest.fixture(scope="package")
async def gateway(
    services: tuple[str, Seen], store: Store, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    """One gateway with a base path, both listeners and a bucket; only the training service is down."""
    folder = tmp_path_factory.mktemp("gateway")
    bucket = {"ESD_S3_ENDPOINT_URL": f"http://{store.address}", "ESD_S3_BUCKET": "esd-bucket"}
    async with running_gateway(folder, services[0], ESD_BASE_PATH="/prod", **bucket) as started:
        yield started


@pytest.fixture
def seen(services: tuple[str, Seen]) -> Seen:
    """What the services saw during this test."""
    record = services[1]
    for memory in (record.checks, record.check_secrets, record.calls, record.requests):
        memory.clear()
    return record
