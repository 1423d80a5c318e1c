"""The trainer's own end of the stream: what was saved before a failure or a stop is told before it leaves."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from esd.training.v1 import training_pb2 as pb
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import JobError
from gpu_worker.trainer import stream
from gpu_worker.trainer.files import Files
from gpu_worker.trainer.listening import Plan, Progress, Stopped
from gpu_worker.trainer.reporter import Reporter
from gpu_worker.trainer.session import TrainerSettings, _Session
from gpu_worker.trainer.stream import TrainStream
from services.common.auth import TOKEN_METADATA
from services.common.clients import TokenSource
from services.common.interceptor import INTERNAL
from services.training import facts
from services.training.trainer_store import TrainerStore
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
        reporter = Reporter(self.stream, Files(self.stream, self._transfer), self._folder, lambda: self._is_stopped)

        def work() -> None:
            path = self._folder / "demo-000001.safetensors"
            path.write_bytes(b"first")
            reporter.saved(path, 1, 4)
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


async def take_part(
    service: Service,
    training_id: str,
    folder: Path,
    end: Callable[[threading.Event], None],
    *,
    is_stopped: bool = False,
) -> None:
    """A trainer's part in a training, until the training has ended; a user may stop it."""
    settings = TrainerSettings(server_url="http://x", secret_file=folder, task_id=training_id, cache_dir=folder)
    async with Transfer() as transfer:
        session = Scripted(settings, "cpu", folder, transfer)
        session.end = end
        session.stream = TrainStream(Given(service.tokens.trainer(training_id)), service.channel, "cpu", session.stop)
        talking = asyncio.create_task(session.stream.run())
        working = asyncio.create_task(session.run())
        await session.stream.welcome()
        if is_stopped:
            await service.stub.StopTrainingJob(pb.StopTrainingJobRequest(job_id=training_id), metadata=service.user())
        await events(service, training_id)  # until its end
        await asyncio.wait([talking, working], return_when=asyncio.FIRST_COMPLETED)
        for task in (talking, working):
            task.cancel()
        await asyncio.gather(talking, working, return_exceptions=True)


@pytest.mark.parametrize(("end", "status"), [(fail, "Failed"), (wait_for_stop, "Stopped")])
async def test_what_was_saved_is_told_before_the_trainer_leaves(
    service: Service, tmp_path: Path, end: Callable[[threading.Event], None], status: str
) -> None:
    created = await service.create(service.document(output_name="demo"))
    await take_part(service, created.id, tmp_path, end, is_stopped=end is wait_for_stop)
    assert (await service.get(created.id)).job_status == status
    assert [file.name for file in service.world.finished[created.id].files] == ["demo-000001.safetensors"]


async def test_a_training_fails_of_what_the_service_can_never_take(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = TrainerStore.record

    async def record_all_but_networks(
        store: TrainerStore, training: UUID, session: UUID, number: int, fact: Any
    ) -> Any:
        assert not isinstance(fact, facts.Saved), "a bug"
        return await record(store, training, session, number, fact)

    monkeypatch.setattr(TrainerStore, "record", record_all_but_networks)
    monkeypatch.setattr(stream, "_MAX_REPEATS", 2)
    created = await service.create(service.document(output_name="demo"))
    await take_part(service, created.id, tmp_path, wait_for_stop)
    told = await events(service, created.id)
    assert told[-1].ended.status == "Failed"
    assert told[-1].ended.reason == f"the training service cannot go on: {INTERNAL}"


class Noting(TrainStream):
    """A stream that remembers what kinds of events were told."""

    kinds: list[str]

    def tell(self, **event: Any) -> None:
        self.kinds += event
        super().tell(**event)


async def test_the_steps_of_an_epoch_are_told_before_its_state_with_which_a_later_trainer_would_leave_them_out(
    service: Service, tmp_path: Path
) -> None:
    created = await service.create()
    told = Noting(Given(service.tokens.trainer(created.id)), service.channel, "cpu", lambda: None)
    told.kinds = []
    (tmp_path / "state.pt").write_bytes(b"after epoch 1")

    async with Transfer() as transfer, asyncio.TaskGroup() as group:
        talking = group.create_task(told.run())
        await told.welcome()
        reporter = Reporter(told, Files(told, transfer), tmp_path, lambda: False)
        sending = group.create_task(reporter.run())

        def train() -> None:
            reporter.begun(Plan(num_pictures=1, num_epochs=2, num_steps=2, first_step=0))
            reporter.stepped(Progress(step=1, epoch=1, loss=1, average_loss=1, rates={}, seconds_left=1))
            reporter.kept(tmp_path / "state.pt", 1)

        await asyncio.to_thread(train)
        await reporter.flush()
        await told.all_kept()
        talking.cancel()
        sending.cancel()
    assert told.kinds.index("progress") < told.kinds.index("state")


async def test_a_network_that_is_removed_before_its_turn_is_not_told_and_ends_nothing(
    service: Service, tmp_path: Path
) -> None:
    created = await service.create()
    told = Noting(Given(service.tokens.trainer(created.id)), service.channel, "cpu", lambda: None)
    told.kinds = []
    old, new = tmp_path / "demo-000001.safetensors", tmp_path / "demo-000002.safetensors"
    old.write_bytes(b"first")
    new.write_bytes(b"second")
    async with Transfer() as transfer, asyncio.TaskGroup() as group:
        talking = group.create_task(told.run())
        await told.welcome()
        reporter = Reporter(told, Files(told, transfer), tmp_path, lambda: False)
        reporter.saved(old, 1, 4)
        reporter.saved(new, 2, 8)
        reporter.removed(old)
        old.unlink()
        sending = group.create_task(reporter.run())
        await asyncio.sleep(0)  # what the training's thread said is in the queue then
        await reporter.flush()
        await told.all_kept()
        talking.cancel()
        sending.cancel()
    assert told.kinds == ["saved", "removed"]
