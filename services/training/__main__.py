"""The training service: reads settings, builds the parts, serves: `python -m services.training`."""

from __future__ import annotations

import asyncio

from pydantic import Field

from esd.training.v1 import training_pb2_grpc as rpc
from services.common import logs
from services.common.auth import Verifier
from services.common.blobs import Blobs
from services.common.clients import TokenSource, channel, token_review
from services.common.database import Database
from services.common.leftovers import LeftoverStore
from services.common.notifications import Notifications
from services.common.server import Server
from services.common.settings import Address, BlobSettings, ServiceSettings, load, read_secret
from services.training.channels import CHANNELS
from services.training.domain import Trainings
from services.training.peers import Models, Tasks
from services.training.reconcile import ControlLoop
from services.training.servicer import TrainingServicer
from services.training.store import TrainingStore
from services.training.trainer_servicer import TrainerServicer
from services.training.trainer_store import TrainerStore
from services.training.trainers import Trainers
from services.training.watching import Watching


class TrainingSettings(ServiceSettings):
    """The service's own settings beside those of every service."""

    identity_address: Address
    models_address: Address
    endpoints_address: Address
    training_max_hours: float = Field(0.0, ge=0.0, description="hours that a training may take; 0: any number")
    max_trainings_per_user: int = Field(100, ge=0, description="of one user that wait or run; 0: any number")


async def main() -> None:
    """Runs until told to stop."""
    settings = load(TrainingSettings)
    logs.configure("training", settings)
    database = Database(settings.database_url)
    await database.migrate("training")
    tokens = TokenSource(settings.identity_address, read_secret(settings.secret_file))
    models = Models(channel(settings.models_address, tokens))
    tasks = Tasks(channel(settings.endpoints_address, tokens))
    notifications, blobs = Notifications(), Blobs(load(BlobSettings))
    store, trainer_store = TrainingStore(database), TrainerStore(database)
    control = ControlLoop(store, trainer_store, LeftoverStore(database), blobs, models, tasks, notifications)
    max_seconds = round(settings.training_max_hours * 3600)
    trainings = Trainings(store, blobs, models, control, max_seconds, settings.max_trainings_per_user)
    verifier = Verifier.from_file(settings.verifying_key_file, audience="training")
    server = Server(settings.listen, verifier, token_review(channel(settings.identity_address, tokens)))
    watching = Watching(trainings, store, notifications, server.stopping)
    rpc.add_TrainingServiceServicer_to_server(TrainingServicer(trainings, watching), server.grpc)
    trainers = TrainerServicer(Trainers(trainer_store, blobs), store, notifications, server.stopping)
    rpc.add_TrainerServiceServicer_to_server(trainers, server.grpc)
    await server.run(
        database.listen(CHANNELS, notifications.on_notify), notifications.wake_all(at=server.stopping), control.run()
    )
    await database.dispose()


if __name__ == "__main__":
    asyncio.run(main())
