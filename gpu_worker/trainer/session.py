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
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import structlog
from pydantic import Field

from esd.training.v1 import training_pb2 as pb
from esd.worker.v1 import worker_pb2
from gpu_worker.addresses import gateway
from gpu_worker.files.cache import CachedModel, ModelCache
from gpu_worker.files.transfer import Transfer
from gpu_worker.job import JobError
from gpu_worker.models import weights
from gpu_worker.trainer import dataset, listening, steps
from gpu_worker.trainer.files import Files
from gpu_worker.trainer.listening import Stopped
from gpu_worker.trainer.loop import Loop, within_memory
from gpu_worker.trainer.reporter import Reporter
from gpu_worker.trainer.stream import Dismissed, Superseded, TrainStream
from services.common.clients import TokenSource, plain_channel
from services.common.errors import InvalidArgument
from services.common.payloads.models import BASE
from services.common.payloads.training import Training, check_training
from services.common.process import EXIT_INTERRUPTED
from services.common.sentences import MAX_REASON, printable
from services.common.settings import SOME_URLS, URL, Settings, read_secret
from services.common.structs import plain

log = structlog.get_logger()
T = TypeVar("T")


class TrainerSettings(Settings):
    """What a trainer needs: the gateway's URL, its secret, and a folder."""

    server_url: str = Field(pattern=URL, examples=SOME_URLS)
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
        self._stopping = asyncio.Event()
        self._is_interrupted = False
        self.stream: TrainStream

    def stop(self) -> None:
        """The training shall end within a step."""
        self._stopping.set()

    def interrupt(self) -> None:
        """This process shall end; the training goes on elsewhere."""
        self._is_interrupted = True
        self._stopping.set()

    @property
    def _is_stopped(self) -> bool:
        return self._stopping.is_set()

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
            self.stream.tell(failed=pb.TrainerFailed(reason=printable(str(error), MAX_REASON)))
        else:
            self.stream.tell(done=pb.TrainerDone())
        await self.stream.all_kept()
        return 0

    async def _train(self, welcome: pb.TrainerWelcome) -> None:
        """Raises:
        JobError: the training cannot be done. Stopped: it shall not go on.
        """
        config = check_training(plain(welcome.config) | self._places(welcome))
        files = Files(self.stream, self._transfer)
        reporter = Reporter(self.stream, files, self._folder / "out", lambda: self._is_stopped)
        for line in (*config.notes, *(f"the key {name} is not known here and does nothing" for name in config.unknown)):
            reporter.log(line)
        self._phase("Downloading")
        async with contextlib.AsyncExitStack() as held:

            async def fetch() -> tuple[dataset.Dataset, CachedModel, Path | None]:
                others = self._folder / "regularisation"
                await files.download_all(pb.URL_KIND_PICTURE, welcome.pictures, Path(config.train_data_dir))
                await files.download_all(pb.URL_KIND_REGULARISATION, welcome.regularisation, others)
                pictures = await asyncio.to_thread(dataset.read, config, reporter.log)
                return pictures, await self._base(files, welcome, held), await self._state(files, welcome)

            pictures, base, state = await self._unless_stopped(fetch())
            self._phase("Training")
            training = asyncio.to_thread(self._loop, config, base, pictures, reporter, welcome.fm_type, state)
            await self._reported(training, reporter)

    async def _reported(self, training: Coroutine[Any, Any, None], reporter: Reporter) -> None:
        """Trains, and uploads meanwhile; what cannot be uploaded ends the training."""
        trained = asyncio.create_task(training)

        async def work() -> None:
            try:
                await trained
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
                self._stopping.set()
                await asyncio.wait([trained])  # not its files, which nobody uploads any more
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
        Loop(config, models, base, pictures, self._folder / "out", reporter).run(state, is_own=True)

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

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work makes.

        Raises:
            Stopped: the training was to stop before that; the work is given up.
        """
        working, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Stopped
            return await working
        finally:
            for task in (working, stopping):
                task.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _base(self, files: Files, welcome: pb.TrainerWelcome, held: contextlib.AsyncExitStack) -> CachedModel:
        """The base model, from the cache if it is there; it stays there while it is held."""
        cache = ModelCache(self._settings.cache_dir, self._settings.cache_max_bytes, self._transfer)

        async def hold(url: str) -> CachedModel:
            model = worker_pb2.ModelFile(
                type=BASE,
                name=welcome.base.name,
                url=url,
                size_bytes=welcome.base.size_bytes,
                cache_key=welcome.base_cache_key,
                sha256=welcome.base.sha256,
            )
            return await held.enter_async_context(cache.hold(model))

        return await files.attempt(pb.URL_KIND_BASE, welcome.base.name, hold)

    async def _state(self, files: Files, welcome: pb.TrainerWelcome) -> Path | None:
        """The state of an earlier session, if there is one."""
        if not welcome.HasField("state"):
            return None
        path, state = self._folder / "earlier-state.pt", welcome.state
        await files.download(pb.URL_KIND_STATE, state.name, path, state.size_bytes, state.sha256)
        return path
