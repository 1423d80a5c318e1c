"""Sessions of the trainer itself, with a tiny model: what it asks for, and when."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from esd.training.v1 import training_pb2 as pb
from gpu_worker.files.transfer import Transfer
from gpu_worker.models import tiny
from gpu_worker.trainer import reporter, state
from gpu_worker.trainer.session import TrainerSettings, _Session
from gpu_worker.trainer.stream import TrainStream
from tests.pictures import circle
from tests.services.training.conftest import CHECKPOINT, MODEL, Service
from tests.services.training.test_last_words import Given
from tests.services.training.test_train_stream import events

# What comes when it comes.
_UNORDERED = {"log", "progress"}


class Recorded(TrainStream):
    """A stream that remembers in which order URLs are asked for and events told."""

    seen: list[str]

    async def urls(self, kind: Any, names: list[str]) -> list[str]:
        kinds = pb.UrlKind.Name(kind).removeprefix("URL_KIND_").lower()
        self.seen.append(f"{kinds} URL: {', '.join(name.partition('/events.')[0] for name in names)}")
        return await super().urls(kind, names)

    def tell(self, **event: Any) -> None:
        [(kind, message)] = event.items()
        if kind not in _UNORDERED:
            self.seen.append(message.status if kind == "phase" else kind)
        super().tell(**event)


class Stuck(Recorded):
    """One that waits for the base model's URL without end."""

    stuck: asyncio.Event

    async def urls(self, kind: Any, names: list[str]) -> list[str]:
        if kind == pb.URL_KIND_BASE:
            self.stuck.set()
            await asyncio.Event().wait()
        return await super().urls(kind, names)


class Gone(Recorded):
    """One that hears nothing more when its first state is kept."""

    gone: asyncio.Event

    async def urls(self, kind: Any, names: list[str]) -> list[str]:
        is_kept = "state" in self.seen
        urls = await super().urls(kind, names)
        if is_kept:
            self.gone.set()
            await asyncio.Event().wait()
        return urls


async def take_part(service: Service, training_id: str, folder: Path, kind: type[Recorded] = Recorded) -> list[str]:
    """A trainer's part in a training; answers what it asked for and told, in order."""
    settings = TrainerSettings(server_url="http://x", secret_file=folder, task_id=training_id, cache_dir=folder)
    async with Transfer() as transfer:
        session = _Session(settings, "cpu", folder / "work", transfer)
        stream = kind(Given(service.tokens.trainer(training_id)), service.channel, "cpu", session.stop)
        session.stream, stream.seen = stream, []
        talking, working = asyncio.create_task(stream.run()), asyncio.create_task(session.run())
        try:
            await asyncio.wait([talking, working], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (talking, working):
                task.cancel()
            await asyncio.gather(talking, working, return_exceptions=True)
    return stream.seen


@pytest.mark.slow
async def test_urls_are_asked_for_when_they_are_needed(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "_TOLD_SECONDS", 3600)  # what is told then is told because something ends
    tiny.write(tmp_path / MODEL, seed=1)
    content = (tmp_path / MODEL).read_bytes()
    service.world.size_bytes, service.world.sha256 = len(content), hashlib.sha256(content).hexdigest()
    await service.blobs.put(f"Stable-diffusion/checkpoint/custom/{CHECKPOINT}/{MODEL}", content)
    await service.blobs.put("dataset/lego/10_lego/a.png", circle(0))
    await service.blobs.put("dataset/others/1_brick/b.png", circle(60))
    keys = {"reg_data_dir": "dataset/others", "resolution": "64,64", "train_batch_size": 5, "max_train_epochs": 2,
            "save_every_n_epochs": 1, "sample_every_n_epochs": 0, "network_dim": 4, "mystery": 1}  # fmt: skip
    created = await service.create(service.document(output_name="demo", **keys))
    seen = await take_part(service, created.id, tmp_path)
    await service.until(created.id, "Completed")
    seen.remove("Uploading")  # when the last step is done, wherever uploads are by then
    logs = f"upload URL: logs/{seen[-3].rpartition('/')[2]}"
    assert seen == [
        "Downloading",
        "picture URL: 10_lego/a.png, 10_lego/a.txt",
        "regularisation URL: 1_brick/b.png",
        f"base URL: {MODEL}",
        "Training",
        "upload URL: demo-000001.safetensors", "saved",
        "upload URL: state-000001.pt", "state",
        logs, "board",
        "upload URL: demo.safetensors", "saved",
        logs, "board",
        "done",
    ]  # fmt: skip
    lines = [event.log.line for event in await events(service, created.id) if event.HasField("log")]
    assert lines[0].startswith("xformers: attention is computed by torch")
    assert lines[1] == "the key mystery is not known here and does nothing"
    assert "2 pictures, 2 epochs, 8 steps" in lines
    metrics = pb.GetTrainingMetricsRequest(job_id=created.id)
    told = await service.stub.GetTrainingMetrics(metrics, metadata=service.user())
    assert [point.step for point in told.points] == list(range(1, 9))


@pytest.mark.slow
async def test_a_training_goes_on_from_a_state_of_a_version_that_read_its_keys_in_another_way(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(tmp_path / MODEL, seed=1)
    content = (tmp_path / MODEL).read_bytes()
    service.world.size_bytes, service.world.sha256 = len(content), hashlib.sha256(content).hexdigest()
    await service.blobs.put(f"Stable-diffusion/checkpoint/custom/{CHECKPOINT}/{MODEL}", content)
    await service.blobs.put("dataset/lego/10_lego/a.png", circle(0))
    keys = {"resolution": "64,64", "train_batch_size": 5, "max_train_epochs": 2, "sample_every_n_epochs": 0}
    created = await service.create(service.document(output_name="demo", **keys))
    with monkeypatch.context() as earlier:
        earlier.setattr(state, "_fingerprint", lambda config: "of an earlier version")
        Gone.gone = asyncio.Event()
        first = asyncio.create_task(take_part(service, created.id, tmp_path, Gone))
        await Gone.gone.wait()
        first.cancel()
        await asyncio.wait([first])
    seen = await take_part(service, created.id, tmp_path)
    assert seen[-1] == "done"
    await service.until(created.id, "Completed")
    lines = [event.log.line for event in await events(service, created.id) if event.HasField("log")]
    assert "going on after epoch 1 of 2, step 2" in lines


async def test_a_dataset_without_pictures_fails_before_the_model_is_asked_for(service: Service, tmp_path: Path) -> None:
    created = await service.create()
    seen = await take_part(service, created.id, tmp_path)
    assert seen == ["Downloading", "picture URL: 10_lego/a.png, 10_lego/a.txt", "failed"]
    ended = await service.until(created.id, "Failed")
    reason = MessageToDict(ended.params)["resp"]["error_msg"]
    assert reason.startswith("no picture of the dataset can be used: 10_lego/a.png ")


async def test_a_stop_does_not_wait_for_what_is_fetched(service: Service, tmp_path: Path) -> None:
    await service.blobs.put("dataset/lego/10_lego/a.png", circle(0))
    created = await service.create(service.document(resolution="64,64"))
    Stuck.stuck = asyncio.Event()
    training = asyncio.create_task(take_part(service, created.id, tmp_path, Stuck))
    await Stuck.stuck.wait()
    await service.stub.StopTrainingJob(pb.StopTrainingJobRequest(job_id=created.id), metadata=service.user())
    assert (await training)[-1] == "done"
    await service.until(created.id, "Stopped")
