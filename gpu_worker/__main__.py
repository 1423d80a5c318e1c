"""Composition root of the GPU worker: settings, engine, the two doors, and an orderly end.

`python -m gpu_worker` works for an endpoint's queue, `python -m gpu_worker train` for the training service, and
`python -m gpu_worker train config.toml` trains by hand.

Exit codes of a worker: 0 after a drain, 2 for a wrong setting or an unusable device, 3 when its secret is not known, 4
when its GPU has failed, 6 when its engine is broken or stuck.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from uuid import uuid4

import grpc
import structlog
from pydantic import Field, ValidationInfo, field_validator

from esd.worker.v1 import worker_pb2_grpc
from gpu_worker.addresses import gateway
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.importing import uncollected
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.files.cache import ModelCache
from gpu_worker.files.transfer import RESULT_PATIENCE_SECONDS, Transfer
from gpu_worker.servicer import GpuWorkerServicer
from gpu_worker.stream import Refused, WorkStream
from gpu_worker.worker import Worker
from services.common import logs
from services.common.auth import Verifier
from services.common.clients import TokenSource, plain_channel
from services.common.process import EXIT_WRONG_SETTING, die_with_launcher, refuse
from services.common.settings import SOME_URLS, URL, Settings, load, read_secret

log = structlog.get_logger()

EXIT_REFUSED = 3
_LEAVE_SECONDS = 5.0  # to be heard after the drain; whoever started this process has patience for twice as long
# Set before the engine's thread imports diffusers: nothing is fetched from a model hub or reported to one.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


class WorkerSettings(Settings):
    """What a worker needs: the gateway's URL, its secret, and a folder."""

    server_url: str = Field(pattern=URL, examples=SOME_URLS)
    secret_file: Path
    cache_dir: Path
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")
    # GpuWorkerService is served on this `host:port`, and not at all when it is empty.
    listen: str = ""
    verifying_key_file: Path | None = None
    # The name under which the queue knows this process; whoever started it may choose, so as to find it there.
    worker_id: str = Field(default_factory=lambda: str(uuid4()))
    cache_max_bytes: int = Field(100 * 2**30, ge=0)
    # Bounds on what models take on the device, and on copies of them in the host's memory, from where they come back
    # fast. None: 60 % of a GPU's memory and 40 % of the machine's; on the CPU half of the machine's, and no copies.
    model_bytes: int | None = Field(None, ge=0)
    copy_bytes: int | None = Field(None, ge=0)
    # Of the UNet: auto is float16 on CUDA, float32 on the CPU.
    precision: str = Field("auto", pattern="^(auto|float16|bfloat16|float32)$")
    # On CUDA: UNet calls are captured as CUDA graphs; with them, blocks are compiled (a minute for a family's first
    # checkpoint), and linear layers are multiplied in FP8 (bfloat16 only, on GPUs that have it).
    cuda_graphs: bool = True
    compile: bool = False
    fp8: bool = False
    # How many jobs may be in the worker at a time, besides those whose results are being uploaded.
    max_jobs: int = Field(16, ge=1)
    # torch's threads on the CPU; 0 leaves the number to torch.
    num_threads: int = Field(0, ge=0)
    # How long a job under way may take to finish after SIGTERM.
    drain_seconds: float = Field(60.0, ge=0)

    @field_validator("fp8")
    @classmethod
    def _needs_bfloat16(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("precision") != "bfloat16":
            raise ValueError("needs ESD_PRECISION=bfloat16")
        return value


async def work(settings: WorkerSettings) -> int:
    """Works until drained or refused, and answers the exit code."""
    engine = Engine(
        EngineSettings(
            device=settings.device,
            num_threads=settings.num_threads,
            model_bytes=settings.model_bytes,
            copy_bytes=settings.copy_bytes,
            precision=settings.precision,
            graphs=settings.cuda_graphs,
            compiled=settings.compile,
            fp8=settings.fp8,
        )
    )
    engine.start()
    try:
        return await _work(settings, engine)
    finally:
        await engine.stop()


async def _work(settings: WorkerSettings, engine: Engine) -> int:
    address, credentials = gateway(settings.server_url)
    async with (
        Transfer(upload_patience_seconds=RESULT_PATIENCE_SECONDS) as transfer,
        plain_channel(address, credentials) as channel,
    ):
        cache = ModelCache(settings.cache_dir, settings.cache_max_bytes, transfer)
        worker = Worker(engine, cache, transfer, settings.max_jobs)
        tokens = TokenSource(address, read_secret(settings.secret_file), credentials)
        stream = WorkStream(worker, tokens, channel, worker_id=settings.worker_id)
        server = await _serve(settings, worker)
        try:
            return await _until_over(stream, engine, worker, settings.drain_seconds)
        finally:
            if server is not None:
                await server.stop(None)
            await worker.stop()


async def _until_over(stream: WorkStream, engine: Engine, worker: Worker, drain_seconds: float) -> int:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    running = asyncio.create_task(_serve_queue(stream, engine))
    stop = asyncio.create_task(told_to_stop.wait())
    try:
        await asyncio.wait([running, stop], return_when=asyncio.FIRST_COMPLETED)
        if engine.ready.done() and (failure := engine.ready.exception()) is not None:
            log.error("the engine cannot start", reason=str(failure))
            return EXIT_WRONG_SETTING
        if stop.done() and engine.ready.done():
            log.info("draining", seconds=drain_seconds)
            stream.drain()
            await asyncio.wait([running], timeout=drain_seconds)
            if not running.done():  # jobs tell that they end here, so that others have them at once
                stopping = asyncio.create_task(worker.stop())
                await asyncio.wait([running], timeout=_LEAVE_SECONDS)
                await stopping
        if running.done():
            await running
    except Refused as refusal:
        log.warning("this worker's secret is not known any more, it leaves", reason=str(refusal))
        return EXIT_REFUSED
    else:
        return 0
    finally:
        for task in (running, stop):
            task.cancel()
        await asyncio.gather(running, stop, return_exceptions=True)


async def _serve_queue(stream: WorkStream, engine: Engine) -> None:
    """Says hello once the engine works: a worker that the queue sees is one that can take jobs."""
    await asyncio.shield(engine.ready)
    log.info("the engine is ready", device=engine.device)
    await stream.run()


async def _serve(settings: WorkerSettings, worker: Worker) -> grpc.aio.Server | None:
    if not settings.listen:
        return None
    if settings.verifying_key_file is None:
        refuse("setting ESD_VERIFYING_KEY_FILE: Field required when ESD_LISTEN is set")
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 2**20)])
    servicer = GpuWorkerServicer(worker, Verifier.from_file(settings.verifying_key_file))
    worker_pb2_grpc.add_GpuWorkerServiceServicer_to_server(servicer, server)
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError:
        raise SystemExit(f"ESD_LISTEN={settings.listen} cannot be bound: is the port in use?") from None
    await server.start()
    log.info("serving", address=settings.listen, port=port)
    return server


def main() -> None:
    """Runs the worker, or a training."""
    die_with_launcher()
    os.environ.update(OFFLINE)
    if sys.argv[1:2] == ["train"]:
        sys.exit(_train(sys.argv[2:]))
    if sys.argv[1:]:
        refuse("a worker has settings and no arguments; a training by hand is `python -m gpu_worker train config.toml`")
    settings = load(WorkerSettings)
    keep_compiled(settings.cache_dir)
    logs.configure("worker", settings)
    sys.exit(asyncio.run(work(settings)))


def keep_compiled(cache_dir: Path) -> None:
    """Has torch and Triton keep what they compile beside the models, where the next start finds it, and where it can be
    written and run, unlike in other folders of a container."""
    folder = cache_dir.absolute() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def _train(arguments: list[str]) -> int:
    """A training by hand; without arguments, in a task of the endpoints service, one of the training service."""
    if arguments or "ESD_TASK_ID" not in os.environ:
        from gpu_worker.trainer import command  # noqa: PLC0415 - the worker does without it

        return command.main(arguments)
    with uncollected():
        from gpu_worker.trainer import session  # noqa: PLC0415 - the worker does without it
    settings = load(session.TrainerSettings)
    logs.configure("trainer", settings)
    return asyncio.run(session.train(settings))


if __name__ == "__main__":
    main()
