"""Composes the models service: `python -m services.models`."""

from __future__ import annotations

import asyncio

from esd.models.v1.models_pb2_grpc import add_ModelsServiceServicer_to_server
from services.common.auth import Verifier
from services.common.blobs import Blobs
from services.common.clients import TokenSource, channel
from services.common.database import Database
from services.common.logs import configure
from services.common.server import serve
from services.common.settings import BlobSettings, ServiceSettings, load, read_secret
from services.models.background import Background
from services.models.chores import Chores
from services.models.dataset_store import DatasetStore
from services.models.datasets import Datasets
from services.models.domain import Models
from services.models.peers import Identity
from services.models.servicer import ModelsServicer
from services.models.store import MOVE_OBJECTS, ModelStore


async def main() -> None:
    """Serves until it is told to stop."""
    settings = load(ServiceSettings)
    blobs = Blobs(load(BlobSettings))
    configure("models", settings)
    verifier = Verifier.from_file(settings.verifying_key_file)
    tokens = TokenSource(settings.identity_address, read_secret(settings.secret_file))
    identity = Identity(channel(settings.identity_address, tokens))
    database = Database(settings.database_url)
    await database.migrate("models")
    chores = Chores(settings.database_url)
    await chores.prepare()
    store = ModelStore(database, chores)
    chores.add(MOVE_OBJECTS, Background(store, blobs).move_objects)
    servicer = ModelsServicer(Models(store, blobs, identity), Datasets(DatasetStore(database), blobs))
    try:
        async with asyncio.TaskGroup() as group:  # should the chores fail, serving ends, and the process starts again
            doing = group.create_task(chores.run())
            await serve(settings.listen, verifier, lambda server: add_ModelsServiceServicer_to_server(servicer, server))
            doing.cancel()
    finally:
        await database.dispose()


if __name__ == "__main__":
    asyncio.run(main())
