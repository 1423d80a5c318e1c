"""The trainer's own end of the stream: what was saved before a failure or a stop is told before it leaves."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from esd.training.v1 import training_pb2 as pb
from gpu_worker.job import JobError
from gpu_worker.trainer.loop import Stopped
from gpu_worker.trainer.reporter import Reporter
from gpu_worker.trainer.session import TrainerSettings, _Session
from gpu_worker.trainer.stream import TrainStream
from gpu_worker.transfer import Transfer
from services.common.auth import TOKEN_METADATA
from services.common.clients import TokenSource
from tests.services.training.conftest import Service
from tests.services.training.test_train_stream import events
from tests.serving import Metadata


class Given(TokenSource):
    """A token that is there already."""

    def __init__(self, metadata: Metadata) -> None:
        self._token = str(dict(metadata)[TOKEN_METADATA])

    async def token(self) -> str:
        return self._token


class Scripted(_Session):
    """A trainer that saves a network, and ends as the test says, instead of training."""

    end: Callable[[threading.Event], None]

    async def _train(self, welcome: pb.TrainerWelcome) -> None:
        self.told = threading.Event()
        reporter = Reporter(self.stream, self._transfer, self._folder, lambda: self._is_stopped)

        def work() -> None:
            path = self._folder / "demo-000001.safetensors"
            path.write_bytes(b"first")
            reporter.saved(path, 1, 4, is_last=False)
            self.end(self.told)

        await self._reported(asyncio.to_thread(work), reporter)

    def stop(self) -> None:
        super().stop()
        self.told.set()


def fail(told: threading.Event) -> None:
    raise JobError("the loss is not a number any more")


def wait_for_stop(told: threading.Event) -> None:
    assert told.wait(60)
    raise Stopped


@pytest.mark.parametrize(("end", "status"), [(fail, "Failed"), (wait_for_stop, "Stopped")])
async def test_what_was_saved_is_told_before_the_trainer_leaves(
    service: Service, tmp_path: Path, end: Callable[[threading.Event], None], status: str
) -> None:
    created = await service.create(service.document(output_name="demo"))
    settings = TrainerSettings(server_url="http://x", secret_file=tmp_path, task_id=created.id, cache_dir=tmp_path)
    async with Transfer() as transfer:
        session = Scripted(settings, "cpu", tmp_path, transfer)
        session.end = end
        session.stream = TrainStream(Given(service.tokens.trainer(created.id)), service.channel, "cpu", session.stop)
        talking = asyncio.create_task(session.stream.run())
        working = asyncio.create_task(session.run())
        await session.stream.welcome()
        if end is wait_for_stop:
            await service.stub.StopTrainingJob(pb.StopTrainingJobRequest(job_id=created.id), metadata=service.user())
        await events(service, created.id)  # until its end
        await asyncio.wait([talking, working], return_when=asyncio.FIRST_COMPLETED)
        for task in (talking, working):
            task.cancel()
        await asyncio.gather(talking, working, return_exceptions=True)
    assert (await service.get(created.id)).job_status == status
    assert [file.name for file in service.world.finished[created.id].files] == ["demo-000001.safetensors"]
