"""The stream of trainers: what they are told, what is kept of what they tell, and each way in which a training ends."""

import asyncio
import contextlib
import hashlib
from typing import Any
from uuid import UUID, uuid4

import grpc
import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from sqlalchemy import text

from esd.endpoints.v1 import endpoints_pb2
from esd.training.v1 import training_pb2 as pb
from services.common.sentences import MAX_REASON
from services.training.facts import Saved, Uploaded
from services.training.store import TrainingStore
from services.training.trainer_store import TakenOver, TrainerStore
from services.training.trainers import Trainers
from tests.services.training.conftest import Service, next_of

RATES = {"unet": 0.001, "text": 0.0001}


def points(*steps: int) -> pb.TrainerProgress:
    made = [pb.MetricPoint(step=step, epoch=1, loss=1 / step, average_loss=0.5, learning_rates=RATES) for step in steps]
    return pb.TrainerProgress(points=made, num_steps=9, num_epochs=3, seconds_left=12)


async def events(service: Service, job_id: str) -> list[Any]:
    """All that a watcher is told until the training has ended."""
    request = pb.WatchTrainingJobRequest(job_id=job_id)
    return [event async for event in service.stub.WatchTrainingJob(request, metadata=service.user())]


async def stop(service: Service, job_id: str) -> None:
    await service.stub.StopTrainingJob(pb.StopTrainingJobRequest(job_id=job_id), metadata=service.user())


def error_of(job: Any) -> str:
    return str(MessageToDict(job.params)["resp"]["error_msg"])


async def test_a_trainer_is_told_what_to_train_and_gets_urls_when_it_needs_them(service: Service) -> None:
    created = await service.create(service.document(network_dim=7, reg_data_dir="dataset/others"))
    async with service.trainer(created.id) as trainer:
        welcome = trainer.welcome
        assert MessageToDict(welcome.config)["network_dim"] == 7
        assert (welcome.fm_type, welcome.base.name, welcome.base_cache_key) == ("sd_1_5", "v1-5.safetensors", "ab" * 32)
        assert [file.name for file in welcome.pictures] == ["10_lego/a.png", "10_lego/a.txt"]
        assert [file.name for file in welcome.regularisation] == ["1_brick/b.png"]
        assert not welcome.HasField("state")
        got = [
            *await trainer.urls(pb.URL_KIND_BASE, "v1-5.safetensors"),
            *await trainer.urls(pb.URL_KIND_PICTURE, "10_lego/a.txt", "10_lego/a.png"),
            *await trainer.urls(pb.URL_KIND_REGULARISATION, "1_brick/b.png"),
        ]
        contents = [(await service.http.get(url)).content for url in got]
        assert contents == [
            b"seventeen bytes !", b"dataset/lego/10_lego/a.txt", b"dataset/lego/10_lego/a.png",
            b"dataset/others/1_brick/b.png",
        ]  # fmt: skip


async def test_a_whole_training_ends_completed_with_its_files_in_the_output(service: Service) -> None:
    created = await service.create(service.document(output_name="demo"))
    watching = asyncio.create_task(events(service, created.id))
    await service.until(created.id, "Starting")
    async with service.trainer(created.id) as trainer:
        await trainer.tell(phase=pb.TrainerPhase(status="Downloading"))
        assert (await service.get(created.id)).job_status == "Downloading"
        await trainer.tell(log=pb.TrainerLog(line="left out: a.png"))
        await trainer.tell(phase=pb.TrainerPhase(status="Training"))
        await trainer.tell(progress=points(1, 2, 3))
        await trainer.save("demo-000001.safetensors", b"first", 1)
        drawn = await trainer.upload("sample/demo_e000001_00.png", b"picture")
        await trainer.tell(preview=pb.DrawnPreview(file=drawn, epoch=1, prompt="a demo"))
        await trainer.tell(board=await trainer.upload("logs/x/events.out.tfevents.1", b"curve"))
        await trainer.save("demo.safetensors", b"last", 3)
        await trainer.tell(phase=pb.TrainerPhase(status="Uploading"))
        await trainer.tell(done=pb.TrainerDone())
        assert await trainer.end() == grpc.StatusCode.OK
    job = await service.until(created.id, "Completed")
    assert MessageToDict(job.params)["resp"]["raw_resp"]["files"] == ["demo.safetensors", "demo-000001.safetensors"]
    finished = service.world.finished[created.id]
    assert [file.name for file in finished.files] == ["demo.safetensors", "demo-000001.safetensors"]
    assert await service.keys(f"kohya/train/{created.id}/output/") == [
        "demo-000001.safetensors", "demo.safetensors", "logs/x/events.out.tfevents.1", "sample/demo_e000001_00.png",
    ]  # fmt: skip
    assert await service.keys(f"kohya/train/{created.id}/work/") == []
    told = await watching
    assert told[-1].ended == pb.TrainingEnd(status="Completed")
    assert {event.WhichOneof("event") for event in told} >= {"status", "log", "saved", "preview", "step", "ended"}
    [preview] = [event.preview for event in told if event.HasField("preview")]
    assert (preview.epoch, preview.prompt, preview.name) == (1, "a demo", "sample/demo_e000001_00.png")
    assert (await service.http.get(preview.url)).content == b"picture"
    step = next(event.step for event in told if event.HasField("step"))
    assert step == pb.TrainingStep(
        step=3, num_steps=9, epoch=1, num_epochs=3, loss=1 / 3, average_loss=0.5, learning_rates=RATES, seconds_left=12
    )
    saved = [event.saved for event in told if event.HasField("saved")]
    assert [(file.name, file.epoch, file.size_bytes) for file in saved] == [
        ("demo-000001.safetensors", 1, len(b"first")), ("demo.safetensors", 3, len(b"last")),
    ]  # fmt: skip
    assert all(event.log.time for event in told if event.HasField("log"))
    metrics = pb.GetTrainingMetricsRequest(job_id=created.id)
    await stop(service, created.id)
    assert (await service.get(created.id)).job_status == "Completed", "it has ended"
    [*_, point] = (await service.stub.GetTrainingMetrics(metrics, metadata=service.user())).points
    assert point == pb.MetricPoint(step=3, epoch=1, loss=1 / 3, average_loss=0.5, learning_rates=RATES)


async def test_who_watches_after_the_end_is_told_what_was_noted(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        await trainer.tell(log=pb.TrainerLog(line="one"))
        await trainer.tell(failed=pb.TrainerFailed(reason="the dataset has no picture"))
    await service.until(created.id, "Failed")
    told = await events(service, created.id)
    assert [event.log.line for event in told if event.HasField("log")] == ["one"]
    assert told[-1].ended == pb.TrainingEnd(status="Failed", reason="the dataset has no picture")


async def test_the_curve_is_kept_thinned_and_rewritten_by_a_later_trainer(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        await trainer.tell(progress=points(*range(1, 100)))
        await trainer.tell(progress=points(*range(100, 201)))

    async def curve(max_points: str = "") -> Any:
        request = pb.GetTrainingMetricsRequest(job_id=created.id, max_points=max_points)
        return await service.stub.GetTrainingMetrics(request, metadata=service.user())

    assert [point.step for point in (await curve()).points] == list(range(1, 201))
    few = await curve("10")
    assert ([point.step for point in few.points], few.num_steps) == (list(range(20, 201, 20)), 200)
    async with service.trainer(created.id) as trainer:
        again = pb.MetricPoint(step=5, epoch=2, loss=7, average_loss=7)
        await trainer.tell(progress=pb.TrainerProgress(points=[again, again], num_steps=9, num_epochs=3))
    assert (await curve()).points[4].loss == 7
    for wrong in ("0", "10001", "many", "-1", "1" * 5000):
        with pytest.raises(grpc.aio.AioRpcError, match="is not a whole number from 1 to 10000"):
            await curve(wrong)


async def test_what_is_told_twice_counts_once(service: Service) -> None:
    created, session = await service.create(), str(uuid4())
    async with service.trainer(created.id, session) as trainer:
        await trainer.tell(log=pb.TrainerLog(line="one"))
        await trainer.tell(log=pb.TrainerLog(line="two"))
    async with service.trainer(created.id, session) as trainer:  # the same process, on a new stream
        assert trainer.welcome.num_kept == 2
        await trainer.send(2, log=pb.TrainerLog(line="two"))
        assert (await trainer.until("kept")).sequence == 2
        await trainer.tell(failed=pb.TrainerFailed(reason="enough"))
    told = await events(service, created.id)
    assert [event.log.line for event in told if event.HasField("log")] == ["one", "two"]


async def test_a_later_trainer_goes_on_from_the_last_state_and_the_earlier_one_is_not_heard(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as first:
        for epoch in (1, 2):
            state = await first.upload(f"state-{epoch:06}.pt", f"after epoch {epoch}".encode())
            await first.tell(state=pb.KeptState(file=state, epoch=epoch))
        await first.upload("state-000003.pt", b"after epoch 3")  # it ends before it has told
        async with service.database.transaction() as session:
            [superseded] = await session.scalars(text("SELECT prefix FROM leftover"))
        assert superseded.endswith("/state-000001.pt")
        async with service.trainer(created.id) as second:
            assert second.welcome.state.size_bytes == len(b"after epoch 2")
            [url] = await second.urls(pb.URL_KIND_STATE, "state.pt")
            assert (await service.http.get(url)).content == b"after epoch 2"
            assert (await first.until("stop")).goes_on_elsewhere
            assert await first.end() == grpc.StatusCode.FAILED_PRECONDITION
            await second.tell(failed=pb.TrainerFailed(reason="enough"))
    assert not [event for event in await events(service, created.id) if event.HasField("log")]


async def test_what_an_earlier_trainer_saves_too_late_changes_nothing_in_the_output(service: Service) -> None:
    created, name = await service.create(), "lego-000001.safetensors"
    session = uuid4()
    async with service.trainer(created.id, str(session)) as first:
        told = await first.upload(name, b"the first trainer's")
        async with service.trainer(created.id) as second:
            await second.save(name, b"the second trainer's", 1)
            late = Saved(Uploaded(told.name, told.size_bytes, told.sha256), 1)  # was under way when the second one came
            training = await TrainingStore(service.database).get(UUID(created.id))
            assert training is not None
            with pytest.raises(TakenOver):
                await Trainers(TrainerStore(service.database), service.blobs).record(training, session, 1, late)
            found = await service.blobs.digest(training.output_prefix + name)
            assert found.sha256 == hashlib.sha256(b"the second trainer's").hexdigest()
            await second.tell(failed=pb.TrainerFailed(reason="enough"))


async def test_a_trainer_that_was_away_does_not_take_the_training_back_from_its_successor(service: Service) -> None:
    created, session = await service.create(), str(uuid4())
    async with service.trainer(created.id, session):
        pass  # its stream breaks
    async with service.trainer(created.id) as successor:
        call = service.trainers.Train(metadata=service.tokens.trainer(created.id))
        await call.write(pb.TrainRequest(hello=pb.TrainerHello(session=session)))
        assert (await next_of(call)).stop.goes_on_elsewhere
        assert await next_of(call) is None
        assert await call.code() == grpc.StatusCode.FAILED_PRECONDITION
        await successor.tell(log=pb.TrainerLog(line="here I am"))
        await successor.tell(failed=pb.TrainerFailed(reason="enough"))
    assert [event.log.line for event in await events(service, created.id) if event.HasField("log")] == ["here I am"]


async def test_a_stop_reaches_the_trainer_and_what_was_saved_stays(service: Service) -> None:
    created = await service.create(service.document(output_name="demo"))
    async with service.trainer(created.id) as trainer:
        await trainer.save("demo-000001.safetensors", b"first", 1)
        await stop(service, created.id)
        assert (await service.get(created.id)).job_status == "Stopped"
        await trainer.until("stop")
        await trainer.tell(phase=pb.TrainerPhase(status="Uploading"))
        assert (await service.get(created.id)).job_status == "Stopped"
        await trainer.save("demo-000002.safetensors", b"second", 2)
        await trainer.tell(done=pb.TrainerDone())
        assert await trainer.end() == grpc.StatusCode.OK
    told = await events(service, created.id)
    assert told[-1].ended == pb.TrainingEnd(status="Stopped", reason="stopped by ann")
    names = [file.name for file in service.world.finished[created.id].files]
    assert names == ["demo-000002.safetensors", "demo-000001.safetensors"]
    assert created.id in service.world.stopped
    await stop(service, created.id)
    assert (await service.get(created.id)).job_status == "Stopped"


@pytest.mark.parametrize("stage", ["Downloading", "Training", "Uploading"])
async def test_a_training_can_be_stopped_at_every_stage(service: Service, stage: str) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        await trainer.tell(phase=pb.TrainerPhase(status=stage))
        assert (await service.get(created.id)).job_status == stage
        await stop(service, created.id)
        assert (await service.get(created.id)).job_status == "Stopped"
        await trainer.until("stop")
        await trainer.tell(done=pb.TrainerDone())
    assert (await events(service, created.id))[-1].ended.status == "Stopped"


async def test_a_trainer_that_does_not_leave_after_a_stop_is_heard_for_a_minute_only(service: Service) -> None:
    created, session = await service.create(), str(uuid4())
    async with service.trainer(created.id, session):
        await stop(service, created.id)
    async with service.trainer(created.id, session) as trainer:  # it was away when the stop was told
        await trainer.until("stop")
        async with service.database.transaction() as transaction:
            await transaction.execute(text("UPDATE training SET end_time = end_time - interval '1 minute'"))
            await transaction.execute(text("SELECT pg_notify('trainings_due', '')"))
        assert (await events(service, created.id))[-1].ended.status == "Stopped"
        await trainer.send(1, log=pb.TrainerLog(line="too late"))
        assert await trainer.end() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_training_that_never_began_can_be_stopped(service: Service) -> None:
    service.world.task = endpoints_pb2.Task(state=endpoints_pb2.TASK_STATE_WAITING, reason="it waits for a GPU")
    created = await service.create()
    watching = service.stub.WatchTrainingJob(pb.WatchTrainingJobRequest(job_id=created.id), metadata=service.user())
    while (await watching.read()).status.reason != "it waits for a GPU":
        pass
    await stop(service, created.id)
    told = []
    while not (event := await watching.read()).HasField("ended"):
        told.append(event)
    assert told[-1].status == pb.TrainingStatus(status="Stopped"), "it waits for nothing any more"
    assert event.ended.status == "Stopped"
    assert service.world.finished[created.id].reason == "stopped by ann"
    with pytest.raises(AssertionError, match="has ended: it is Stopped"):
        async with service.trainer(created.id):
            pass


async def test_a_trainer_that_cannot_be_kept_alive_is_a_failed_training(service: Service) -> None:
    created = await service.create()
    service.world.task = endpoints_pb2.Task(
        state=endpoints_pb2.TASK_STATE_FAILED, reason="it was killed: its last words"
    )
    job = await service.until(created.id, "Failed")
    assert error_of(job) == "the trainer failed: it was killed: its last words"


async def test_a_training_whose_deletion_was_cut_short_says_so(service: Service) -> None:
    created = await service.create()
    service.world.task = endpoints_pb2.Task(state=endpoints_pb2.TASK_STATE_STOPPED)
    job = await service.until(created.id, "Stopped", "Failed")
    reason = "a deletion stopped it, but could not be finished; delete it again"
    assert (job.job_status, error_of(job)) == ("Stopped", reason)


async def test_a_trainer_that_leaves_without_a_word_is_a_failed_training(service: Service) -> None:
    created = await service.create()
    service.world.task = endpoints_pb2.Task(state=endpoints_pb2.TASK_STATE_SUCCEEDED)
    job = await service.until(created.id, "Failed")
    assert "without having told how" in error_of(job)


async def test_a_network_that_is_refused_is_a_failed_training(service: Service) -> None:
    created = await service.create(service.document(output_name="demo"))
    service.world.refusal = "demo.safetensors is damaged"
    async with service.trainer(created.id) as trainer:
        await trainer.save("demo.safetensors", b"last", 3)
        await trainer.tell(done=pb.TrainerDone())
    job = await service.until(created.id, "Failed")
    assert error_of(job) == "demo.safetensors is damaged"


async def test_a_network_that_is_not_wanted_any_more_goes(service: Service) -> None:
    created = await service.create(service.document(output_name="demo"))
    async with service.trainer(created.id) as trainer:
        await trainer.save("demo-000001.safetensors", b"first", 1)
        await trainer.save("demo-000002.safetensors", b"second", 2)
        await trainer.tell(removed=pb.RemovedNetwork(name="demo-000001.safetensors"))
        await trainer.tell(done=pb.TrainerDone())
    await service.until(created.id, "Completed")
    assert await service.keys(f"kohya/train/{created.id}/output/") == ["demo-000002.safetensors"]
    assert [file.name for file in service.world.finished[created.id].files] == ["demo-000002.safetensors"]


async def test_a_file_that_is_not_what_was_told_ends_the_stream(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        file = await trainer.upload("demo.safetensors", b"this")
        file.sha256 = "0" * 64
        await trainer.send(1, saved=pb.SavedNetwork(file=file, epoch=1))
        assert await trainer.end() == grpc.StatusCode.FAILED_PRECONDITION
    async with service.trainer(created.id) as trainer:
        missing = pb.UploadedFile(name="never.safetensors", size_bytes=1, sha256="0" * 64)
        await trainer.send(1, saved=pb.SavedNetwork(file=missing, epoch=1))
        assert await trainer.end() == grpc.StatusCode.FAILED_PRECONDITION
    assert await service.keys(f"kohya/train/{created.id}/output/") == []


BAD_POINTS = [
    pb.MetricPoint(step=1, loss=float("nan")),
    pb.MetricPoint(step=1, average_loss=float("inf")),
    pb.MetricPoint(step=1, learning_rates={"unet": float("-inf")}),
    pb.MetricPoint(step=0),
]


async def test_steps_that_cannot_be_kept_end_the_stream_so_that_they_are_not_told_again(service: Service) -> None:
    created = await service.create()
    for point in BAD_POINTS:
        async with service.trainer(created.id) as trainer:
            await trainer.send(1, progress=pb.TrainerProgress(points=[point], num_steps=9, num_epochs=3))
            assert await trainer.end() == grpc.StatusCode.INVALID_ARGUMENT


async def test_events_may_have_any_number_that_can_be_kept(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        await trainer.send(2**63 - 1, log=pb.TrainerLog(line="the last one"))
        assert (await trainer.until("kept")).sequence == 2**63 - 1
        await trainer.send(2**63, log=pb.TrainerLog(line="one too many"))
        assert await trainer.end() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("hello", "sentence"),
    [
        ({"session": "no UUID"}, "hello.session: "),
        ({"session": str(uuid4()), "device": "x" * 501}, "is too long (length: 501, maximum allowed: 500)"),
    ],
)
async def test_a_trainer_whose_hello_is_wrong_is_told_what_is(
    service: Service, hello: dict[str, str], sentence: str
) -> None:
    created = await service.create()
    call = service.trainers.Train(metadata=service.tokens.trainer(created.id))
    await call.write(pb.TrainRequest(hello=pb.TrainerHello(**hello)))
    assert await next_of(call) is None
    assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in await call.details()


async def test_a_reason_that_is_too_long_is_cut(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        await trainer.tell(failed=pb.TrainerFailed(reason="x" * (MAX_REASON + 1)))
    assert len((await events(service, created.id))[-1].ended.reason) == MAX_REASON


async def test_texts_with_nul_are_kept_without_it(service: Service) -> None:
    created = await service.create()
    async with service.trainer(created.id) as trainer:
        await trainer.tell(log=pb.TrainerLog(line="z\0og"))
        drawn = await trainer.upload("sample/a.png", b"picture")
        await trainer.tell(preview=pb.DrawnPreview(file=drawn, epoch=1, prompt="a\0 zog"))
        await trainer.tell(failed=pb.TrainerFailed(reason="no\0 more"))
    told = await events(service, created.id)
    assert [event.log.line for event in told if event.HasField("log")] == ["zog"]
    assert [event.preview.prompt for event in told if event.HasField("preview")] == ["a zog"]
    assert told[-1].ended.reason == "no more"


NOT_THEIRS = [
    (pb.URL_KIND_UPLOAD, "../../other/output/x.safetensors"),
    (pb.URL_KIND_UPLOAD, "sample/../x.png"),
    (pb.URL_KIND_UPLOAD, "x.exe"),
    (pb.URL_KIND_PICTURE, "../others/1_brick/b.png"),
    (pb.URL_KIND_PICTURE, "/etc/passwd"),
    (pb.URL_KIND_REGULARISATION, "1_brick/b.png"),  # none was asked for
    (pb.URL_KIND_STATE, "state.pt"),  # there is none
    (pb.URL_KIND_UNSPECIFIED, "x"),
]


async def test_a_trainer_gets_no_url_of_anything_else(service: Service) -> None:
    created = await service.create()
    for kind, name in NOT_THEIRS:
        call = service.trainers.Train(metadata=service.tokens.trainer(created.id))
        await call.write(pb.TrainRequest(hello=pb.TrainerHello(session=str(uuid4()))))
        await call.write(pb.TrainRequest(want=pb.UrlsWanted(request_id=1, kind=kind, names=[name])))
        while (message := await next_of(call)) is not None:
            assert message.WhichOneof("message") == "welcome"
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT, name


async def test_only_the_trainer_of_the_training_may_come(service: Service) -> None:
    created = await service.create()
    for metadata, code in (
        (service.user(), grpc.StatusCode.PERMISSION_DENIED),
        (service.tokens.service("inference"), grpc.StatusCode.PERMISSION_DENIED),
        (service.tokens.trainer(str(uuid4())), grpc.StatusCode.NOT_FOUND),
        (service.tokens.worker(created.id), grpc.StatusCode.UNAUTHENTICATED),
    ):
        call = service.trainers.Train(metadata=metadata)
        with contextlib.suppress(grpc.aio.AioRpcError):  # it may be refused before it has said hello
            await call.write(pb.TrainRequest(hello=pb.TrainerHello(session=str(uuid4()))))
        while await next_of(call) is not None:
            pass
        assert await call.code() == code


async def test_deleting_a_running_training_stops_it_and_keeps_what_a_checkpoint_has(service: Service) -> None:
    created = await service.create(service.document(output_name="demo"))
    async with service.trainer(created.id) as trainer:
        await trainer.save("demo-000001.safetensors", b"first", 1)
        [late] = await trainer.urls(pb.URL_KIND_UPLOAD, "demo.safetensors")
        await service.stub.DeleteTrainingJobs(
            pb.DeleteTrainingJobsRequest(training_id_list=[created.id]), metadata=service.user()
        )
        await trainer.until("stop")
    assert await service.keys(f"kohya/train/{created.id}/") == ["output/demo-000001.safetensors"]
    # A URL that was given out before still writes; that object goes when no such URL is valid any more.
    async with httpx.AsyncClient() as http:
        assert (await http.put(late, content=b"late")).is_success
    async with service.database.transaction() as session:
        prefixes = (await session.scalars(text("SELECT prefix FROM leftover"))).all()
    assert f"kohya/train/{created.id}/work/" in prefixes


async def test_streams_end_when_the_service_stops_and_trainers_come_back(
    service: Service, stopping: asyncio.Event
) -> None:
    created = await service.create()
    watching = service.stub.WatchTrainingJob(pb.WatchTrainingJobRequest(job_id=created.id), metadata=service.user())
    await watching.read()
    async with service.trainer(created.id) as trainer:
        stopping.set()
        assert await trainer.end() == grpc.StatusCode.UNAVAILABLE
    while await next_of(watching) is not None:
        pass
    assert await watching.code() == grpc.StatusCode.UNAVAILABLE
