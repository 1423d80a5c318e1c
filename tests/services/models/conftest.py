"""Owns a running models service: the real server on a real database, object store and identity service."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from google.protobuf.json_format import MessageToDict

from esd.identity.v1 import identity_pb2_grpc
from esd.models.v1 import models_pb2 as pb
from esd.models.v1 import models_pb2_grpc
from services.common.audit import Audit
from services.common.blobs import Blobs
from services.common.clients import TokenSource
from services.common.clients import channel as channel_to
from services.common.database import Database
from services.common.outbound import Outbound
from services.common.server import Server
from services.common.tasks import cancel
from services.common.users import Users
from services.identity.domain import Identity as IdentityDomain
from services.identity.key_uses import KeyUses
from services.identity.keys import new_api_key
from services.identity.passwords import Passwords
from services.identity.rows import Role, User
from services.identity.servicer import IdentityServicer
from services.identity.store import IdentityStore
from services.identity.tokens import Tokens as IdentityTokens
from services.identity.tokens import sha256
from services.models.background import Background
from services.models.chores import LONG, Chores
from services.models.dataset_store import DatasetStore
from services.models.datasets import Datasets
from services.models.domain import Models
from services.models.import_store import IMPORT, ImportStore
from services.models.imports import Imports
from services.models.parts import Limits
from services.models.servicer import ModelsServicer
from services.models.store import LOOK, MOVE_OBJECTS, REMOVE_OBJECT, REMOVE_OBJECTS, REMOVE_REFUSED, ModelStore
from services.models.trained import Trained
from tests.databases import Databases
from tests.serving import AUDIT_KEY, Metadata, Tokens, serving

UPLOAD_MAX_HOURS = 48
RENAMED_KEEP_HOURS = 168
LOOK_MAX_BYTES = 20 * 1024 * 1024
MAX_IMPORT_BYTES = 64 * 1024 * 1024
LIMITS = Limits(MAX_IMPORT_BYTES, max_hours=24, max_per_user=30)
SECRET = "the models service's secret"


def tag(number: Any, etag: Any) -> dict[str, Any]:
    return {"PartNumber": number, "ETag": etag}


@dataclass
class Running:
    """A models service and what is needed to call it. `admin` holds user:all; ann is a designer, bob a guest."""

    stub: Any
    blobs: Blobs
    http: httpx.AsyncClient
    tokens: Tokens
    background: Background
    admin: Metadata = field(init=False)
    ann: Metadata = field(init=False)
    bob: Metadata = field(init=False)

    def __post_init__(self) -> None:
        self.admin = self.tokens.user(
            "api", ["checkpoint:all", "train:all", "user:all"], ["IT Operator"], impersonate=True
        )
        self.ann = self.tokens.user("ann", ["checkpoint:all", "train:all"], ["designer"])
        self.bob = self.tokens.user("bob", ["checkpoint:all"], ["guest"])

    async def create(
        self, *files: tuple[str, int], kind: str = "Stable-diffusion", by: Metadata | None = None
    ) -> pb.CreateCheckpointResponse:
        """Opens an upload of (file name, number of parts)."""
        request = pb.CreateCheckpointRequest(
            checkpoint_type=kind,
            filenames=[pb.CheckpointFile(filename=name, parts_number=parts) for name, parts in files],
            params={"message": "hello", "creator": "somebody else", "n": 1},
        )
        return await self.stub.CreateCheckpoint(request, metadata=by or self.ann)

    async def put(self, created: pb.CreateCheckpointResponse, name: str, *contents: bytes) -> list[dict[str, Any]]:
        """Uploads the parts through the presigned URLs and answers their tags."""
        tags = []
        urls = created.s3_presign_url[name]
        for number, (url, content) in enumerate(zip(urls, contents, strict=True), 1):
            response = await self.http.put(url, content=content)
            assert response.status_code == 200
            tags.append(tag(number, response.headers["ETag"]))
        return tags

    async def update(
        self, checkpoint_id: str, tags: dict[str, Any], status: str = "Active", by: Metadata | None = None
    ) -> pb.UpdateCheckpointResponse:
        """Completes uploads and sets the status."""
        body = pb.UpdateCheckpointBody(status=status)
        for name, values in tags.items():
            body.multi_parts_tags[name].extend(values)
        request = pb.UpdateCheckpointRequest(checkpoint_id=checkpoint_id, body=body)
        return await self.stub.UpdateCheckpoint(request, metadata=by or self.ann)

    async def upload(
        self, name: str, content: bytes, kind: str = "Stable-diffusion", by: Metadata | None = None
    ) -> str:
        """Uploads one file in one part, activates it and answers the id."""
        created = await self.create((name, 1), kind=kind, by=by)
        checkpoint_id = created.checkpoint.id
        await self.update(checkpoint_id, {name: await self.put(created, name, content)}, by=by)
        return checkpoint_id

    async def list(self, by: Metadata | None = None, **query: Any) -> pb.ListCheckpointsResponse:
        """A page."""
        return await self.stub.ListCheckpoints(pb.ListCheckpointsRequest(**query), metadata=by or self.admin)

    async def show(self, checkpoint_id: str) -> dict[str, Any]:
        """The checkpoint as the list shows it."""
        items = MessageToDict(await self.list(per_page="100"))["checkpoints"]
        return next(item for item in items if item["id"] == checkpoint_id)

    async def emptied(self, prefix: str) -> None:
        """Returns when there are no objects and no open uploads below a prefix."""
        async with asyncio.timeout(120):
            while await self.blobs.find(prefix) or await self.blobs.find_uploads(prefix):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # the store tells nobody

    async def delete(self, ids: Iterable[str], by: Metadata | None = None) -> None:
        """Deletes checkpoints."""
        await self.stub.DeleteCheckpoints(pb.DeleteCheckpointsRequest(checkpoint_id_list=ids), metadata=by or self.ann)


@asynccontextmanager
async def refused(code: str, *words: str) -> AsyncIterator[None]:
    """The block's call is refused with the code and a message that holds the words."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() == grpc.StatusCode[code], caught.value.details()
    for word in words:
        assert word in (caught.value.details() or "")


@pytest.fixture(scope="module")
async def identity_address(databases: Databases, tokens: Tokens) -> AsyncIterator[str]:
    """The address of an identity service that knows ann, bob, root (user:all) and the models service's secret."""
    database = Database(databases.make(), pool_size=2)
    await database.migrate("identity")
    store = IdentityStore(database, Audit("identity", AUDIT_KEY))
    issued = IdentityTokens(store, tokens.signer, tokens.verifier(), {sha256(SECRET): "models"}, KeyUses(store).note)
    domain = IdentityDomain(store, Passwords(Fernet.generate_key().decode()), issued.forget)
    await domain.bootstrap(new_api_key())
    for name in ("designer", "guest"):
        await store.save_role(Role(role_name=name, creator="api", permissions=["checkpoint:all"]), None)
    for name, roles in {"ann": ["designer"], "bob": ["guest"], "root": ["IT Operator"]}.items():
        await store.save_user(User(username=name, roles=roles, creator="api"))
    server = Server("127.0.0.1:0", tokens.verifier())
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(IdentityServicer(domain, issued), server.grpc)
    port = await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(grace_seconds=0)
    await database.dispose()


@pytest.fixture(scope="module")
async def service(
    databases: Databases, blobs: Blobs, http: httpx.AsyncClient, tokens: Tokens, identity_address: str
) -> AsyncIterator[tuple[Running, Database]]:
    """The service for the tests of a module."""
    url = databases.make()
    database = Database(url, pool_size=4)
    await database.migrate("models")
    chores = Chores(url, first_wait_seconds=0.1)
    await chores.prepare()
    audit = Audit("models", AUDIT_KEY)
    store = ModelStore(database, chores, audit)
    async with AsyncExitStack() as stack:
        identity = await stack.enter_async_context(channel_to(identity_address, TokenSource(identity_address, SECRET)))
        domain = Models(store, blobs, Users(identity), LOOK_MAX_BYTES)
        outbound = Outbound([ipaddress.ip_network("127.0.0.0/8")])
        imports = Imports(domain, store, ImportStore(database, chores, audit), blobs, outbound, LIMITS)
        datasets = Datasets(DatasetStore(database, audit), blobs)
        servicer = ModelsServicer(domain, imports, datasets, Trained(domain, store, blobs))

        def add(server: grpc.aio.Server) -> None:
            models_pb2_grpc.add_ModelsServiceServicer_to_server(servicer, server)

        channel = await stack.enter_async_context(serving(add, tokens.verifier()))
        background = Background(domain, store, blobs, UPLOAD_MAX_HOURS, RENAMED_KEEP_HOURS)
        chores.add(MOVE_OBJECTS, background.move_objects)
        chores.add(REMOVE_OBJECT, background.remove_object)
        chores.add(REMOVE_OBJECTS, background.remove_objects)
        chores.add(REMOVE_REFUSED, background.remove_refused)
        chores.add(LOOK, background.look, is_counted=True)
        chores.add_periodic("end_stale_uploads", "*/1 * * * * */1", background.end_stale_uploads)
        chores.add(IMPORT, imports.run, queue=LONG)
        chores.add_periodic("end_overdue_imports", "*/1 * * * * */1", imports.end_overdue)
        chores.add_periodic("empty_dataset_folders", "*/1 * * * * */1", datasets.empty_folders)
        doing = asyncio.create_task(chores.run())
        yield Running(models_pb2_grpc.ModelsServiceStub(channel), blobs, http, tokens, background), database
        await cancel([doing])
    await database.dispose()


@pytest.fixture
async def models(service: tuple[Running, Database]) -> Running:
    """The service without any checkpoints."""
    running, database = service
    async with database.transaction() as session:
        for table in ("checkpoints", "datasets", "kept_dataset_names"):
            # Not TRUNCATE, which locks whole tables and so meets the chores of the test before in a deadlock.
            await session.execute(sa.text(f"DELETE FROM {table}"))
    return running
