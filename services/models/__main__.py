"""Composes the models service: `python -m services.models`."""

from __future__ import annotations

import asyncio

from esd.models.v1.models_pb2_grpc import add_ModelsServiceServicer_to_server
from services.common.audit import Audit
from services.common.auth import Verifier
from services.common.blobs import Blobs
from services.common.clients import TokenSource, channel
from services.common.database import Database
from services.common.logs import configure
from services.common.outbound import Outbound
from services.common.server import Server
from services.common.settings import BlobSettings, load, read_secret
from services.common.users import Users
from services.models.background import Background
from services.models.chores import LONG, Chores
from services.models.dataset_store import DatasetStore
from services.models.datasets import Datasets
from services.models.domain import Models
from services.models.import_store import IMPORT, ImportStore
from services.models.imports import Imports
from services.models.parts import Limits
from services.models.servicer import ModelsServicer
from services.models.settings import ModelsSettings
from services.models.store import LOOK, MOVE_OBJECTS, REMOVE_OBJECT, REMOVE_OBJECTS, REMOVE_REFUSED, ModelStore
from services.models.trained import Trained


async def main() -> None:
    """Serves until it is told to stop."""
    settings = load(ModelsSettings)
    blobs = Blobs(load(BlobSettings))
    configure("models", settings)
    verifier = Verifier.from_file(settings.verifying_key_file)
    tokens = TokenSource(settings.identity_address, read_secret(settings.secret_file))
    users = Users(channel(settings.identity_address, tokens))
    database = Database(settings.database_url)
    await database.migrate("models")
    chores = Chores(settings.database_url)
    await chores.prepare()
    audit = Audit.from_file("models", settings.audit_key_file)
    store = ModelStore(database, chores, audit)
    models = Models(store, blobs, users, settings.look_max_bytes)
    outbound = Outbound(settings.import_allowed_networks)
    limits = Limits(settings.import_max_bytes, settings.import_max_hours, settings.max_imports_per_user)
    imports = Imports(models, store, ImportStore(database, chores, audit), blobs, outbound, limits)
    background = Background(models, store, blobs, settings.upload_max_hours, settings.renamed_keep_hours)
    chores.add(MOVE_OBJECTS, background.move_objects)
    chores.add(REMOVE_OBJECT, background.remove_object)
    chores.add(REMOVE_OBJECTS, background.remove_objects)
    chores.add(REMOVE_REFUSED, background.remove_refused)
    chores.add(LOOK, background.look, is_counted=True)
    chores.add_periodic("end_stale_uploads", "*/10 * * * *", background.end_stale_uploads)
    chores.add(IMPORT, imports.run, queue=LONG)
    chores.add_periodic("end_overdue_imports", "*/10 * * * *", imports.end_overdue)
    datasets = Datasets(DatasetStore(database, audit), blobs)
    chores.add_periodic("empty_dataset_folders", "* * * * *", datasets.empty_folders)
    servicer = ModelsServicer(models, imports, datasets, Trained(models, store, blobs))
    server = Server(settings.listen, verifier)
    add_ModelsServiceServicer_to_server(servicer, server.grpc)
    await server.run(chores.run(), audit.log_heads(database))
    await database.dispose()


if __name__ == "__main__":
    asyncio.run(main())
