"""A trainer's part in a training, from the side of its process."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from esd.training.v1 import training_pb2 as pb
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import JobError
from gpu_worker.trainer.files import Files
from gpu_worker.trainer.reporter import Reporter
from gpu_worker.trainer.session import TrainerSettings, _Session
from services.common.process import EXIT_INTERRUPTED

REFUSAL = "demo-000001.safetensors cannot be uploaded: the object store answers 403"


class Refused(Files):
    """Files of which the object store takes none."""

    async def upload(self, name: str, content: bytes) -> pb.UploadedFile:
        raise JobError(REFUSAL)


class Silent:
    """A stream that nobody hears."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def welcome(self) -> pb.TrainerWelcome:
        """To a training of no keys."""
        return pb.TrainerWelcome()

    def tell(self, **event: Any) -> None:
        """Into the air."""
        self.told += event

    async def all_kept(self) -> None:
        """At once."""


@pytest.mark.parametrize("is_interrupted", [True, False], ids=["interrupted", "stopped"])
async def test_who_is_interrupted_says_by_the_exit_code_alone_that_the_training_goes_on(
    tmp_path: Path, is_interrupted: bool
) -> None:
    settings = TrainerSettings(server_url="http://x", secret_file=tmp_path, task_id="0" * 36, cache_dir=tmp_path)
    stream: Any = Silent()
    async with Transfer() as transfer:
        session = _Session(settings, "cpu", tmp_path, transfer)
        session.stream = stream
        (session.interrupt if is_interrupted else session.stop)()
        code = await session.run()
    assert (code, stream.told) == ((EXIT_INTERRUPTED, []) if is_interrupted else (0, ["done"]))


async def test_what_cannot_be_uploaded_ends_a_training_whatever_else_waits_for_its_upload(tmp_path: Path) -> None:
    settings = TrainerSettings(server_url="http://x", secret_file=tmp_path, task_id="0" * 36, cache_dir=tmp_path)
    stream: Any = Silent()
    async with Transfer() as transfer:
        session = _Session(settings, "cpu", tmp_path, transfer)
        session.stream = stream
        reporter = Reporter(stream, Refused(stream, transfer), tmp_path, lambda: False)

        def train() -> None:
            for epoch in (1, 2):
                path = tmp_path / f"demo-{epoch:06}.safetensors"
                path.write_bytes(b"network")
                reporter.saved(path, epoch, 4 * epoch)

        with pytest.raises(JobError, match=REFUSAL):
            async with asyncio.timeout(60):
                await session._reported(asyncio.to_thread(train), reporter)
