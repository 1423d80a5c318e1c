"""A training of the service: `python -m gpu_worker train`, started as a task. Fetches what it needs, trains in a thread
of its own, and uploads what that leaves, in order.

Exit codes: 0 when the service has heard how the training ended, or has no more use for it; 5 when the training goes on
elsewhere, since this process was asked to leave or another trainer has taken over; else it is tried again, so often.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import structlog
from pydantic import Field

from esd.training.v1 import training_pb2 as pb
from esd.worker.v1 import worker_pb2
from gpu_worker import weights
from gpu_worker.addresses import gateway
from gpu_worker.cache import CachedModel, ModelCache
from gpu_worker.job import JobError, to_python
from gpu_worker.trainer import dataset, listening, steps
from gpu_worker.trainer.loop import Loop, Stopped, within_memory
from gpu_worker.trainer.reporter import Reporter
from gpu_worker.trainer.stream import Dismissed, Superseded, TrainStream
from gpu_worker.transfer import Transfer
from services.common.clients import TokenSource, plain_channel
from services.common.errors import InvalidArgument
from services.common.payloads.training import Training, check_training
from services.common.process import EXIT_INTERRUPTED
from services.common.settings import Settings, read_secret

log = structlog.get_logger()

_URLS_AT_ONCE = 100
_FETCHES_AT_ONCE = 8
_BASE = "Stable-diffusion"


class TrainerSettings(Settings):
    """What a trainer needs: the gateway's URL, its secret, and a folder."""

    server_url: str = Field(pattern=r"^https?://[^/]+")
    secret_file: Path
    task_id: str = Field(pattern=r"^[0-9a-f-]{36}$")
    cache_dir: Path
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")
    cache_max_bytes: int = Field(100 * 2**30, ge=0)
    num_threads: int = Field(0, ge=0)


async def train(settings: TrainerSettings) -> int:
    """Trains, and answers the exit code."""
    device, description = await asyncio.to_thread(weights.use_device, settings.device, settings.num_threads)
    address, credentials = gateway(settings.server_url)
    folder = settings.cache_dir / "trainings" / settings.task_id
    await asyncio.to_thread(shutil.rmtree, folder, True)
    folder.mkdir(parents=True)
    async with Transfer() as transfer, plain_channel(address, credentials) as channel:
        tokens = TokenSource(address, read_secret(settings.secret_file), credentials)
        session = _Session(settings, device, folder, transfer)
        stream = TrainStream(tokens, channel, description, session.stop)
        session.stream = stream
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, session.interrupt)
        talking = asyncio.create_task(stream.run())
        working = asyncio.create_task(session.run())
        try:
            await asyncio.wait([talking, working], return_when=asyncio.FIRST_COMPLETED)
            if talking.done() and not working.done():
                session.stop()
            return await _outcome(talking, working)
        finally:
            for task in (talking, working):
                task.cancel()
            await asyncio.gather(talking, working, return_exceptions=True)
            await asyncio.to_thread(shutil.rmtree, folder, True)


async def _outcome(talking: asyncio.Task[None], working: asyncio.Task[int]) -> int:
    if not working.done():
        try:
            await talking
        except Dismissed as dismissal:
            log.info("this trainer leaves", reason=str(dismissal))
            return EXIT_INTERRUPTED if isinstance(dismissal, Superseded) else 0
    return await working


class _Session:
    """One process's part in a training."""

    def __init__(self, settings: TrainerSettings, device: str, folder: Path, transfer: Transfer) -> None:
        self._settings = settings
        self._device = device
        self._folder = folder
        self._transfer = transfer
        self._is_stopped = self._is_interrupted = False
        self.stream: TrainStream

    def stop(self) -> None:
        """The training shall end within a step."""
        self._is_stopped = True

    def interrupt(self) -> None:
        """This process shall end; the training goes on elsewhere."""
        self._is_interrupted = self._is_stopped = True

    async def run(self) -> int:
        """Fetches, trains, uploads; answers the exit code."""
        welcome = await self.stream.welcome()
        try:
            await self._train(welcome)
        except Stopped:
            log.info("stopped", interrupted=self._is_interrupted)
            if self._is_interrupted:
                return EXIT_INTERRUPTED
            self.stream.tell(done=pb.TrainerDone())
        except (JobError, InvalidArgument) as error:
            log.warning("the training failed", reason=str(error))
            self.stream.tell(failed=pb.TrainerFailed(reason=str(error)))
        else:
            self.stream.tell(done=pb.TrainerDone())
        await self.stream.all_kept()
        return 0

    async def _train(self, welcome: pb.TrainerWelcome) -> None:
        """Raises:
        JobError: the training cannot be done. Stopped: it shall not go on.
        """
        config = check_training(to_python(welcome.config) | self._places(welcome))
        reporter = Reporter(self.stream, self._transfer, self._folder / "out", lambda: self._is_stopped)
        for line in (*config.notes, *(f"the key {name} is not known here and does nothing" for name in config.unknown)):
            reporter.log(line)
        self._phase("Downloading")
        cache = ModelCache(self._settings.cache_dir, self._settings.cache_max_bytes, self._transfer)
        async with contextlib.AsyncExitStack() as held:
            await self._fetch_all(pb.URL_KIND_PICTURE, welcome.pictures, Path(config.train_data_dir))
            await self._fetch_all(pb.URL_KIND_REGULARISATION, welcome.regularisation, self._folder / "regularisation")
            pictures = await asyncio.to_thread(dataset.read, config, reporter.log)
            base = await held.enter_async_context(cache.hold(await self._model(welcome)))
            state = await self._state(welcome)
            self._phase("Training")
            training = asyncio.to_thread(self._loop, config, base, pictures, reporter, welcome.fm_type, state)
            await self._reported(training, reporter)

    async def _reported(self, training: Coroutine[Any, Any, None], reporter: Reporter) -> None:
        """Trains, and uploads meanwhile; what cannot be uploaded ends the training."""

        async def work() -> None:
            try:
                await training
            except (JobError, Stopped):
                if not self._is_interrupted:
                    await reporter.flush()  # what was saved before counts
                raise
            self._phase("Uploading")
            await reporter.flush()

        working, sending = asyncio.create_task(work()), asyncio.create_task(reporter.run())
        try:
            await asyncio.wait([working, sending], return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                self._is_stopped = True
                await asyncio.wait([working])
                await sending
            await working
        finally:
            for task in (working, sending):
                task.cancel()
            await asyncio.gather(working, sending, return_exceptions=True)

    @within_memory()
    def _loop(
        self,
        config: Training,
        base: CachedModel,
        pictures: dataset.Dataset,
        reporter: listening.Listener,
        fm_type: str,
        state: Path | None,
    ) -> None:
        """The training itself, in a thread."""
        models = weights.load(base, None, self._device, steps.precision(config, self._device))
        models.stay()
        if models.is_sdxl != (fm_type == "sd_xl"):
            found = "SDXL" if models.is_sdxl else "Stable Diffusion 1.5"
            raise JobError(f"fm_type is {fm_type}, but {base.name} is a {found} checkpoint")
        if config.no_half_vae:
            models.vae.float()
        Loop(config, models, base, pictures, self._folder / "out", reporter).run(state)

    def _places(self, welcome: pb.TrainerWelcome) -> dict[str, str]:
        """Where this process has what the configuration names."""
        return {
            "train_data_dir": str(self._folder / "pictures"),
            "reg_data_dir": str(self._folder / "regularisation") if welcome.regularisation else "",
            "output_dir": str(self._folder / "out"),
            "logging_dir": str(self._folder / "out" / "logs"),
        }

    def _phase(self, status: str) -> None:
        if self._is_stopped:
            raise Stopped
        self.stream.tell(phase=pb.TrainerPhase(status=status))

    # --- what is fetched ---

    async def _fetch_all(self, kind: pb.UrlKind, files: Iterable[pb.InputFile], folder: Path) -> None:
        """Fetches the files of a dataset, some at a time, with URLs that are fresh."""
        wanted = [file for file in files if _is_plain(file.name)]
        at_once = asyncio.Semaphore(_FETCHES_AT_ONCE)

        async def fetch(file: pb.InputFile, url: str) -> None:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            async with at_once:
                await self._transfer.download(url, path, file.name)

        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        for start in range(0, len(wanted), _URLS_AT_ONCE):
            if self._is_stopped:
                raise Stopped
            some = wanted[start : start + _URLS_AT_ONCE]
            urls = await self.stream.urls(kind, [file.name for file in some])
            await asyncio.gather(*(fetch(file, url) for file, url in zip(some, urls, strict=True)))

    async def _model(self, welcome: pb.TrainerWelcome) -> worker_pb2.ModelFile:
        """The base model, with a URL should it not be in the cache."""
        [url] = await self.stream.urls(pb.URL_KIND_BASE, [welcome.base.name])
        return worker_pb2.ModelFile(
            type=_BASE,
            name=welcome.base.name,
            url=url,
            size_bytes=welcome.base.size_bytes,
            cache_key=welcome.base_cache_key,
            sha256=welcome.base.sha256,
        )

    async def _state(self, welcome: pb.TrainerWelcome) -> Path | None:
        """The state of an earlier session, if there is one."""
        if not welcome.HasField("state"):
            return None
        path, state = self._folder / "earlier-state.pt", welcome.state
        [url] = await self.stream.urls(pb.URL_KIND_STATE, [state.name])
        await self._transfer.download(url, path, "the state of the training", state.size_bytes, state.sha256)
        return path


def _is_plain(name: str) -> bool:
    """Whether a file's name is a path downwards."""
    parts = name.split("/")
    return all(part not in {"", ".", ".."} for part in parts) and "\\" not in name and "\0" not in name
