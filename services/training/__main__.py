"""Puts the training service together and runs it: `python -m services.training`. It needs no database yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

from esd.training.v1 import training_pb2_grpc as rpc
from services.common import logs
from services.common.auth import Verifier
from services.common.server import Server
from services.common.settings import Settings, load
from services.training.servicer import TrainingServicer


class TrainingSettings(Settings):
    """What a service without a database needs."""

    listen: str = "127.0.0.1:0"
    verifying_key_file: Path


async def main(settings: TrainingSettings) -> None:
    """Serves until told to stop."""
    server = Server(settings.listen, Verifier.from_file(settings.verifying_key_file))
    rpc.add_TrainingServiceServicer_to_server(TrainingServicer(), server.grpc)
    await server.run()


if __name__ == "__main__":
    _settings = load(TrainingSettings)
    logs.configure("training", _settings)
    asyncio.run(main(_settings))
