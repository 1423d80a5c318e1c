"""Previews: what they show, how often they come, and that a job is the same with them."""

import asyncio
import io
import threading
from typing import Any

import pytest
import torch
from PIL import Image

from esd.inference.v1 import inference_pb2
from gpu_worker.audience import Audience
from gpu_worker.devices import Cpu
from gpu_worker.engine.core import Core
from gpu_worker.engine.preview import MAX_SIZE, colours
from gpu_worker.engine.run import Run
from gpu_worker.engine.settings import EngineSettings
from gpu_worker.stream import WorkStream
from gpu_worker.worker import Worker
from services.common.clients import TokenSource, plain_channel
from tests.gpu_worker.conftest import as_cached
from tests.gpu_worker.doors import SECRET, services
from tests.gpu_worker.driving import txt2img_of


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 96), (64, 96)), ((256, 128), (MAX_SIZE, 64)), ((128, 128), (128, 128))]
)
def test_a_preview_is_small_and_in_colour(size: tuple[int, int], expected: tuple[int, int]) -> None:
    latents = torch.zeros(1, 4, *size)
    assert colours(latents, is_sdxl=False).shape == (*expected, 3)
    assert colours(latents, is_sdxl=True).unique().tolist() == [128]
    latents[:, 3] = 2  # blue is what this channel takes away most
    red, green, blue = colours(latents, is_sdxl=False)[0, 0].tolist()
    assert blue < green < red < 128


def test_nobody_or_somebody_too_soon_gets_no_preview() -> None:
    audience = Audience()
    assert not audience.take()
    audience.is_watching = True
    assert audience.take()
    assert not audience.take()


def test_a_watched_job_is_the_same_picture_and_shows_a_file_of_the_right_shape(tiny_checkpoint: Any) -> None:
    core, outcomes, drawn = Core(Cpu(), EngineSettings(), lambda: None), [], threading.Event()
    previews: list[bytes] = []

    def show(jpeg: bytes) -> None:
        previews.append(jpeg)
        drawn.set()

    request = txt2img_of(prompt="a cat", steps=3, width=64, height=128, seed=3)
    for audience in (None, Audience()):
        if audience is not None:
            audience.is_watching = True
        files, nothing = [as_cached(tiny_checkpoint)], lambda *_: None
        core.add(Run("job", request, files, nothing, nothing, outcomes.append, audience=audience, on_preview=show))
        number = len(outcomes)
        while len(outcomes) == number:
            core.work()
    assert drawn.wait(30)
    core.close()
    assert (outcomes[0].images[0] == outcomes[1].images[0]).all()
    picture = Image.open(io.BytesIO(previews[0]))
    assert (picture.format, picture.size) == ("JPEG", (8, 16))
    assert len(previews[0]) < 6000


async def test_only_a_watched_job_sends_previews(worker: Worker, make_spec: Any) -> None:
    async with services() as peers, plain_channel(peers.address) as channel:
        stream = WorkStream(worker, TokenSource(peers.address, SECRET), channel, "worker-1")
        task = asyncio.create_task(stream.run())
        connection = await peers.queue.connection()
        await connection.welcome()
        await connection.until_room()
        await connection.assign("unwatched", make_spec(steps=8))
        await connection.until("done")
        assert not any(request.event.event.HasField("preview") for request in connection.seen)
        await connection.acknowledge("unwatched")
        await connection.assign("watched", make_spec(steps=150, n_iter=2))
        await connection.send(watched=inference_pb2.Watched(lease_id="watched", is_watched=True))
        assert (await connection.until("preview")).lease_id == "watched"
        await connection.send(cancel=inference_pb2.Cancel(lease_id="watched"))
        await connection.until("failed")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
