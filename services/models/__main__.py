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
from services.models.dataset_store import DatasetStore
from services.models.datasets import Datasets
from services.models.domain import Models
from services.models.peers import Identity
from services.models.servicer import ModelsServicer
from services.models.store import ModelStore


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
    servicer = ModelsServicer(Models(ModelStore(database), blobs, identity), Datasets(DatasetStore(database), blobs))
    try:
        await serve(settings.listen, verifier, lambda server: add_ModelsServiceServicer_to_server(servicer, server))
    finally:
        await database.dispose()


if __name__ == "__main__":
    asyncio.run(main())
