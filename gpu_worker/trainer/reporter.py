"""Tells the service what a training tells, and uploads what it wrote, one file after the other."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esd.training.v1 import training_pb2 as pb
from gpu_worker.trainer import listening
from gpu_worker.trainer.files import Files
from gpu_worker.trainer.stream import TrainStream
from services.common.payloads.trainers import MAX_POINTS

_TOLD_SECONDS = 1.0


class Reporter:
    """Hears of a training in its thread (see Listener), and does everything on the event loop. `folder` is what the
    training writes to. Of states that wait, the latest is uploaded."""

    def __init__(self, stream: TrainStream, files: Files, folder: Path, wants_stop: Callable[[], bool]) -> None:
        self._stream = stream
        self._files = files
        self._folder = folder
        self._wants_stop = wants_stop
        self._loop = asyncio.get_running_loop()
        self._uploads: asyncio.Queue[Callable[[], Any]] = asyncio.Queue()
        self._points: list[pb.MetricPoint] = []
        self._plan: listening.Plan | None = None
        self._seconds_left = 0.0
        self._state: tuple[Path, int] | None = None

    @property
    def wants_stop(self) -> bool:
        """See Listener."""
        return self._wants_stop()

    def log(self, line: str) -> None:
        """See Listener."""
        self._call(lambda: self._stream.tell(log=pb.TrainerLog(line=line)))

    def encoded(self, number: int, num_pictures: int) -> None:
        """See Listener."""
        if number == num_pictures:
            self.log(f"{num_pictures} pictures are encoded")

    def begun(self, plan: listening.Plan) -> None:
        """See Listener."""
        self._plan = plan
        self.log(f"{plan.num_pictures} pictures, {plan.num_epochs} epochs, {plan.num_steps} steps")

    def stepped(self, progress: listening.Progress) -> None:
        """See Listener."""
        point = pb.MetricPoint(
            step=progress.step,
            epoch=progress.epoch,
            loss=progress.loss,
            average_loss=progress.average_loss,
            learning_rates=progress.rates,
        )

        def note() -> None:
            self._points.append(point)
            self._seconds_left = progress.seconds_left

        self._call(note)

    def saved(self, path: Path, epoch: int, step: int) -> None:
        """See Listener."""

        async def upload() -> None:
            with contextlib.suppress(FileNotFoundError):  # it was removed again meanwhile
                file = await self._upload(path, path.name)
                self._stream.tell(saved=pb.SavedNetwork(file=file, epoch=epoch))

        self._call(lambda: self._uploads.put_nowait(upload))

    def removed(self, path: Path) -> None:
        """See Listener."""

        async def tell() -> None:
            self._stream.tell(removed=pb.RemovedNetwork(name=path.name))

        self._call(lambda: self._uploads.put_nowait(tell))

    def drawn(self, path: Path, epoch: int, prompt: str) -> None:
        """See Listener."""

        async def upload() -> None:
            file = await self._upload(path, f"sample/{path.name}")
            self._stream.tell(preview=pb.DrawnPreview(file=file, epoch=epoch, prompt=prompt))

        self._call(lambda: self._uploads.put_nowait(upload))

    def kept(self, path: Path, epoch: int) -> None:
        """See Listener."""
        taken = path.with_name(f"state-{epoch}.pt")
        shutil.copyfile(path, taken)  # the next epoch writes over it

        async def upload() -> None:
            if self._state is None:
                return  # a later one was uploaded
            latest, latest_epoch = self._state
            self._state = None
            # A name of its own: the state that is on record stays as it is until this one is.
            file = await self._upload(latest, f"state-{latest_epoch:06}.pt")
            self._tell_points()  # who goes on from this state does not do its steps again
            self._stream.tell(state=pb.KeptState(file=file, epoch=latest_epoch))
            latest.unlink()
            await self._upload_boards()

        def note() -> None:
            if self._state is not None:
                self._state[0].unlink()
            self._state = (taken, epoch)
            self._uploads.put_nowait(upload)

        self._call(note)

    async def run(self) -> None:
        """Uploads and tells until cancelled."""
        telling = asyncio.create_task(self._tell_progress())
        try:
            while True:
                upload = await self._uploads.get()
                try:
                    await upload()
                finally:
                    self._uploads.task_done()
        finally:
            telling.cancel()

    async def flush(self) -> None:
        """Waits until everything is uploaded and told."""
        await self._uploads.join()
        await self._upload_boards()
        self._tell_points()

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(_TOLD_SECONDS)  # what came within goes together
            self._tell_points()

    def _tell_points(self) -> None:
        while self._points and self._plan is not None:
            some, self._points = self._points[:MAX_POINTS], self._points[MAX_POINTS:]
            progress = pb.TrainerProgress(
                points=some,
                num_steps=self._plan.num_steps,
                num_epochs=self._plan.num_epochs,
                seconds_left=self._seconds_left,
            )
            self._stream.tell(progress=progress)

    async def _upload_boards(self) -> None:
        """Uploads TensorBoard's files as they are now."""
        for path in await asyncio.to_thread(lambda: sorted((self._folder / "logs").rglob("events.*"))):
            name = f"logs/{path.parent.name}/{path.name}"
            self._stream.tell(board=await self._upload(path, name))

    async def _upload(self, path: Path, name: str) -> pb.UploadedFile:
        content = await asyncio.to_thread(path.read_bytes)
        return await self._files.upload(name, content)

    def _call(self, work: Callable[[], Any]) -> None:
        self._loop.call_soon_threadsafe(work)
