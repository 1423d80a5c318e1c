import asyncio
import json
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.json_format import MessageToDict

from esd.inference.v1 import inference_pb2 as pb
from services.common.auth import Profile, UsernameStatus
from services.inference import domain
from services.inference.channels import JOB_ENDED
from services.inference.submitting.quotas import Quotas
from tests.pictures import encoded, noise
from tests.services.inference.conftest import LARGE, LONG, PNG, Service

pytestmark = pytest.mark.timeout(60)
UNKNOWN = "00000000-0000-4000-8000-000000000000"


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a call was refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


def create(service: Service, metadata: Any = None, **fields: Any) -> Any:
    """A creation, to be awaited."""
    given = {"task_type": "txt2img", "inference_type": "Async", "models": {"Stable-diffusion": ["v1-5.safetensors"]}}
    request = pb.CreateInferenceJobRequest(**(given | fields))
    return service.jobs.CreateInferenceJob(request, metadata=metadata or service.user())


async def envelope(call: Any) -> tuple[str, str]:
    """Status and message that the gateway will print."""
    metadata = dict(await call.initial_metadata())
    return metadata["x-esd-status"], metadata["x-esd-message"]


async def test_a_created_job_tells_where_its_payload_goes_and_which_models_it_has(service: Service) -> None:
    call = create(service, models={"Stable-diffusion": ["v1-5.safetensors"], "VAE": ["Automatic"], "embeddings": []})
    receipt = MessageToDict((await call).inference)
    assert await envelope(call) == ("201", "Created")
    job_id = receipt["id"]
    assert receipt["type"] == "txt2img"
    location = f"s3://{service.blobs.bucket}/txt2img/infer_v2/{job_id}/api_param.json"
    assert receipt["api_params_s3_location"] == location
    assert receipt["models"] == [
        {"id": service.world.checkpoint_id, "name": ["v1-5.safetensors", "v1-5.yaml"], "type": "Stable-diffusion"},
        {"id": "VAE", "name": ["Automatic"], "type": "VAE"},
    ]
    job = MessageToDict(await service.get(job_id))
    assert job["status"] == "created"
    assert job["startTime"] == job["createTime"]
    assert job["img_presigned_urls"] == []
    assert len(job["output_presigned_urls"]) == 1
    assert job["owner_group_or_role"] == ["ann"]
    assert not {"completeTime", "image_names", "inference_info_name", "sagemakerRaw", "payload_string"} & set(job)
    params = job["params"]
    assert params["input_body_s3"] == location
    assert params["input_body_presign_url"] == receipt["api_params_s3_upload_url"]
    assert params["sagemaker_inference_endpoint_id"] == service.endpoint_id
    assert params["sagemaker_inference_endpoint_name"].startswith("esd-async-")
    assert params["sagemaker_inference_instance_type"] == "one-machine"
    assert params["used_models"]["VAE"] == [{"id": "VAE", "model_name": "Automatic", "s3": "None", "type": "VAE"}]
    assert params["used_models"]["Stable-diffusion"][0]["model_name"] == "v1-5.safetensors"
    assert "embeddings" not in params["used_models"]


async def test_an_async_job_runs_on_a_worker_and_shows_its_pictures(service: Service) -> None:
    receipt = await service.create()
    await service.upload(receipt, seed=7, batch_size=2)
    call = service.jobs.StartInferenceJob(pb.StartInferenceJobRequest(job_id=receipt.id), metadata=service.user())
    started = (await call).inference
    assert await envelope(call) == ("202", "Accepted")
    assert (started.inference_id, started.status) == (receipt.id, "inprogress")
    assert started.output_path.startswith(f"s3://{service.blobs.bucket}/sagemaker_output/")
    async with service.worker() as worker:
        assign = await worker.take()
        spec = assign.spec
        assert (spec.job_id, spec.task_type) == (receipt.id, "txt2img")
        assert spec.payload["seed"] == 7
        assert [upload.name for upload in spec.image_uploads] == ["image_0.png", "image_1.png"]
        assert spec.models[0].cache_key == "ab" * 32
        await worker.begin(assign)
        answer = await worker.finish(assign)
        assert answer.acknowledge.lease_id == assign.lease_id
    job = MessageToDict(await service.get(receipt.id))
    assert job["status"] == "succeed"
    assert job["image_names"] == ["image_0.png", "image_1.png"]
    assert job["inference_info_name"] == f"/tmp/{receipt.id}_param.json"
    assert "sagemakerRaw" not in job
    assert job["createTime"] < job["startTime"] < job["completeTime"]
    parts = {
        name: job["params"]["timings"][f"{name}_seconds"] for name in ("fetch", "load", "pipeline", "encode", "upload")
    }
    assert parts == {"fetch": 0.1, "load": 0.4, "pipeline": 0.2, "encode": 0.5, "upload": 0.3}
    for url in job["img_presigned_urls"] + job["output_presigned_urls"]:
        assert (await service.http.get(url)).content == PNG
    assert job["output_presigned_urls"][0].split("?")[0].endswith(f"/{receipt.id}_param.json")


async def test_a_real_time_start_waits_for_the_end(service: Service) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    receipt = await service.create("Real-time")
    await service.upload(receipt)
    async with service.worker(endpoint_id=endpoint) as worker:
        await worker.want()  # an idle worker: the job comes by notification
        call = service.jobs.StartInferenceJob(pb.StartInferenceJobRequest(job_id=receipt.id), metadata=service.user())
        waiting = asyncio.ensure_future(call)
        assign = (await worker.read()).assign
        assert assign.spec.is_real_time
        assert not waiting.done()
        await worker.finish(assign)
        job = (await waiting).data
    assert await envelope(call) == ("200", "OK")
    assert (job.status, len(job.img_presigned_urls)) == ("succeed", 1)
    assert "output_path" not in MessageToDict(job)["params"]


async def test_a_real_time_job_that_fails_is_an_error_with_the_workers_reason(service: Service) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    async with service.worker(endpoint_id=endpoint) as worker:
        call = create(service, inference_type="Real-time", payload_string='{"prompt": "x"}')
        waiting = asyncio.ensure_future(call)
        assign = await worker.take()
        await worker.tell(assign.lease_id, failed={"reason": "the checkpoint is truncated"})
        assert await refusal(waiting) == (grpc.StatusCode.FAILED_PRECONDITION, "the checkpoint is truncated")
    job = MessageToDict(await service.get(assign.spec.job_id))
    assert (job["status"], job["sagemakerRaw"]) == ("failed", "the checkpoint is truncated")


async def test_who_stops_waiting_does_not_stop_the_job(service: Service) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    async with service.worker(endpoint_id=endpoint) as worker:
        call = create(service, inference_type="Real-time", payload_string='{"prompt": "x"}')
        assign = await worker.take()
        call.cancel()
        assert (await worker.finish(assign)).WhichOneof("message") == "acknowledge"
    assert (await service.get(assign.spec.job_id)).status == "succeed"


async def test_who_waits_at_a_service_that_stops_is_told_that_the_job_goes_on(
    service: Service, stopping: asyncio.Event
) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    async with service.worker(endpoint_id=endpoint) as worker:
        call = create(service, inference_type="Real-time", payload_string='{"prompt": "x"}')
        job_id = (await worker.take()).spec.job_id
        stopping.set()
        told = f"inference {job_id} goes on, but who waited for it stops: ask for it by its id"
        assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, told)
    assert (await service.get(job_id)).status == "inprogress"


async def test_a_payload_string_starts_the_job_at_once(service: Service) -> None:
    call = create(service, payload_string='{"prompt": "inline", "seed": 3, "s_tmax": Infinity}')
    started = (await call).inference
    assert await envelope(call) == ("202", "Accepted")
    async with service.worker() as worker:
        assign = await worker.take()
        assert (assign.spec.job_id, assign.spec.payload["prompt"]) == (started.inference_id, "inline")
    job = MessageToDict(await service.get(started.inference_id))
    assert job["payload_string"].startswith('{"prompt": "inline"')
    assert "input_body_presign_url" not in job["params"]


async def test_a_payload_replaced_after_the_start_has_no_effect(service: Service) -> None:
    receipt = await service.create()
    await service.upload(receipt, seed=1)
    await service.start(receipt.id)
    await service.upload(receipt, seed=2)
    async with service.worker() as worker:
        assert (await worker.take()).spec.payload["seed"] == 1


async def test_a_large_payload_travels_by_url_with_its_sha256(service: Service) -> None:
    await service.started(**LARGE)
    async with service.worker() as worker:
        spec = (await worker.take()).spec
    assert not spec.payload.fields
    content = (await service.http.get(spec.payload_url)).content
    assert json.loads(content)["steps"] == 2
    assert len(spec.payload_sha256) == 64
    assert "/frozen/" in spec.payload_url


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (None, "was never uploaded"),
        (b"", "the payload is empty"),
        (b"{nonsense", "the payload is not valid JSON"),
        (b'{"steps": 0}', "steps 0 is out of range: 1 to 150 is possible"),
        (b'{"sampler_name": "Magic"}', 'sampler_name "Magic" is not known'),
    ],
)
async def test_a_bad_payload_is_refused_at_the_start_and_can_be_mended(
    service: Service, payload: bytes | None, sentence: str
) -> None:
    receipt = await service.create()
    if payload is not None:
        await service.upload(receipt, payload)
    _, message = await refusal(service.start(receipt.id))
    assert sentence in message
    assert (await service.get(receipt.id)).status == "created"
    await service.upload(receipt)
    assert (await service.start(receipt.id)).inference.status == "inprogress"


async def test_a_job_is_refused_in_the_order_of_the_contract(service: Service) -> None:
    nobody = service.tokens.user("ann", [])
    bad_everything = {"payload_string": "{", "task_type": "paint", "models": {"Lora": ["x"]}}
    steps: list[tuple[Any, dict[str, Any], str]] = [
        (nobody, bad_everything, "payload_string must be valid json string"),
        (nobody, {"task_type": "paint"}, "has no permissions: ['inference:all', 'inference:create']"),
        (None, {"task_type": "paint"}, "task type paint should be in ['extra-single-image', 'extra-batch-images', "),
        (None, {"inference_type": "Serverless"}, 'no available Serverless endpoints for user "ann"'),
        (None, {"inference_type": "Real-time"}, 'no available Real-time endpoints for user "ann"'),
        (None, {"sagemaker_endpoint_name": "esd-x"}, "sagemaker endpoint with name esd-x is not found"),
        (
            None,
            {"models": {"Stable-diffusion": ["no.ckpt"], "Lora": ["nor this"]}},
            "checkpoint with name no.ckpt, type Stable-diffusion is not found "
            "checkpoint with name nor this, type Lora is not found",
        ),
        (None, {"models": {"Lora": "x"}}, "models: Lora is not a list of file names"),
        (
            None,
            {"models": {"Lora": [str(n) for n in range(1001)]}},
            "models names 1001 files; at most 1000 are possible",
        ),
        (None, {"payload_string": '{"steps": 0}'}, "steps 0 is out of range"),
        (None, {"payload_string": "{}", "models": {}}, "models names no checkpoint of type Stable-diffusion"),
    ]
    for metadata, fields, sentence in steps:
        _, message = await refusal(create(service, metadata, **fields))
        assert sentence in message
    listed = await service.jobs.ListInferenceJobs(pb.ListInferenceJobsRequest(), metadata=service.user())
    assert not listed.inferences  # nothing was left half-made


async def test_a_pinned_endpoint_must_be_in_service(service: Service) -> None:
    service.world.add_endpoint(status="Creating")
    pinned = service.world.endpoints[-1]
    code, message = await refusal(create(service, sagemaker_endpoint_name=pinned.endpoint_name))
    assert (code, message) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "sagemaker endpoint is not ready with status: Creating",
    )
    pinned.endpoint_status = "InService"
    job = await service.create(sagemaker_endpoint_name=pinned.endpoint_name)
    assert MessageToDict(await service.get(job.id))["params"]["sagemaker_inference_endpoint_id"] == pinned.id


async def test_an_extra_task_needs_no_models_and_a_bad_picture_is_refused_at_its_start(service: Service) -> None:
    receipt = await service.create(task_type="rembg", models={"Stable-diffusion": ["whatever"]})
    assert not receipt.HasField("models")
    await service.upload(receipt)
    _, message = await refusal(service.start(receipt.id))
    assert message == "input_image is missing"
    await service.upload(receipt, input_image=encoded(noise()), model="u2net")
    await service.start(receipt.id)
    async with service.worker() as worker:
        spec = (await worker.take()).spec
        assert (spec.task_type, list(spec.models)) == ("rembg", [])
        assert [upload.name for upload in spec.image_uploads] == ["image.png"]


async def test_an_img2img_job_carries_its_picture_to_the_worker_and_a_bad_one_is_refused_at_the_start(
    service: Service,
) -> None:
    image = encoded(noise(512, 512))
    receipt = await service.create(task_type="img2img")
    await service.upload(receipt, init_images=[image[:-40]])
    code, message = await refusal(service.start(receipt.id))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message == "init_images[0] is damaged or truncated: it cannot be read as PNG"
    await service.upload(receipt, init_images=[image])
    await service.start(receipt.id)
    async with service.worker() as worker:
        spec = (await worker.take()).spec
        assert spec.task_type == "img2img"
        payload = json.loads((await service.http.get(spec.payload_url)).content)
        assert payload["init_images"] == [image]


@pytest.mark.parametrize("job_id", [UNKNOWN, "no-uuid"])
async def test_an_unknown_job_is_not_found(service: Service, job_id: str) -> None:
    not_started = (grpc.StatusCode.INVALID_ARGUMENT, f"InferenceJobId {job_id} not found")
    assert await refusal(service.start(job_id)) == not_started
    assert await refusal(service.get(job_id)) == (
        grpc.StatusCode.NOT_FOUND,
        f"inference with id {job_id} not found",
    )


async def test_a_job_is_for_its_owner_and_holders_of_user_all(service: Service) -> None:
    receipt = await service.create()
    bob, admin = service.user("bob"), service.user("root", "user:all")
    webui = service.user(
        "api", profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True, key_owner="api"
    )
    assert (await refusal(service.get(receipt.id, bob)))[0] == grpc.StatusCode.PERMISSION_DENIED
    assert (await refusal(service.start(receipt.id, bob)))[0] == grpc.StatusCode.PERMISSION_DENIED
    assert (await service.get(receipt.id, admin)).id == receipt.id
    assert (await service.get(receipt.id, webui)).id == receipt.id


@pytest.mark.parametrize(
    "large",
    [
        {"payload_string": json.dumps(LONG)},
        {"models": {"Stable-diffusion": [f"{n}v1-5.safetensors" for n in range(20)]}},
    ],
    ids=["payloads", "models"],
)
async def test_a_page_of_large_jobs_ends_before_its_limit(service: Service, large: dict[str, Any]) -> None:
    """1,000 of them would be an answer that is too large to be sent."""
    ids = [job.inference_id or job.id for job in [await service.create(**large) for _ in range(3)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain, "_MAX_PAGE_BYTES", 50_000)
        found, key = [], ""
        for _ in ids:
            request = pb.ListInferenceJobsRequest(limit="0", exclusive_start_key=key)
            page = await service.jobs.ListInferenceJobs(request, metadata=service.user())
            found.append([job.id for job in page.inferences])
            key = page.last_evaluated_key.string_value
            if not key:
                break
    assert found == [ids[:0:-1], [ids[0]]]


async def test_a_list_shows_ones_own_jobs_in_pages_with_null_for_what_is_unset(service: Service) -> None:
    ids = [(await service.create()).id for _ in range(3)]

    async def page(metadata: Any = None, **fields: str) -> dict[str, Any]:
        request = pb.ListInferenceJobsRequest(**fields)
        return MessageToDict(await service.jobs.ListInferenceJobs(request, metadata=metadata or service.user()))

    def ids_of(found: dict[str, Any]) -> list[str]:
        return [job["InferenceJobId"] for job in found.get("inferences", [])]

    first = await page(limit="2")
    second = await page(limit="2", exclusive_start_key=first["last_evaluated_key"])
    assert ids_of(first) + ids_of(second) == ids[::-1]
    assert second["last_evaluated_key"] is None
    job = first["inferences"][0]
    nullable = {"completeTime", "image_names", "inference_info_name", "sagemakerRaw", "payload_string"}
    assert {name for name, value in job.items() if value is None} == nullable
    assert "img_presigned_urls" not in job
    assert ids_of(await page(limit="-1")) == ids[::-1]
    assert ids_of(await page(service.user("bob"))) == []
    admin = service.user("root", "user:all")
    assert ids_of(await page(admin)) == ids[::-1]
    assert ids_of(await page(admin, username="bob")) == []
    assert ids_of(await page(type="img2img")) == []
    await cancel(service, ids[1])
    assert ids_of(await page(status="failed")) == [ids[1]]
    assert ids_of(await page(status="created", task_type="txt2img", limit="1")) == [ids[2]]
    assert ids_of(await page(endpoint=service.world.endpoints[0].endpoint_name)) == ids[::-1]
    assert ids_of(await page(endpoint="another")) == []
    middle = MessageToDict(await service.get(ids[1]))["createTime"]
    assert ids_of(await page(start_time=middle)) == ids[:0:-1]
    assert ids_of(await page(end_time=middle.replace(" ", "T") + "Z")) == ids[1::-1]
    assert ids_of(await page(start_time="2000-01-01", end_time="2000-12-31 23:59:59")) == []
    lists = service.jobs.ListInferenceJobs
    for fields, sentence in [
        ({"username": "eve"}, 'user: "eve" not exist'),
        ({"limit": "ten"}, 'limit "ten" is not a number'),
        ({"status": "done"}, 'status "done" is not known; possible: created, inprogress, succeed, failed'),
        ({"start_time": "today"}, 'start_time "today" is no time; 2026-01-31 or 2026-01-31 23:59:59 is possible'),
        ({"exclusive_start_key": "e30="}, "exclusive_start_key"),
    ]:
        call = lists(pb.ListInferenceJobsRequest(**fields), metadata=service.user())
        assert sentence in (await refusal(call))[1]


async def test_a_start_that_is_sent_again_is_the_same_start(service: Service) -> None:
    receipt = await service.create()
    await service.upload(receipt)
    first, second = await asyncio.gather(service.start(receipt.id), service.start(receipt.id))
    async with service.worker() as worker:
        assign = await worker.take()
        assert first == second == await service.start(receipt.id)
        await worker.finish(assign)
    assert (await service.get(receipt.id)).status == "succeed"


async def test_who_starts_a_real_time_job_again_waits_for_the_one_that_runs(service: Service) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    receipt = await service.create(inference_type="Real-time")
    await service.upload(receipt)
    waiting = [asyncio.ensure_future(service.start(receipt.id)) for _ in range(2)]
    async with service.worker(endpoint_id=endpoint) as worker:
        assign = await worker.take()
        while len(service.notifications._waiting.get((JOB_ENDED, receipt.id), ())) < 2:  # noqa: ASYNC110 - nothing tells who waits
            await asyncio.sleep(0.01)
        await worker.finish(assign)
        answers = [await answer for answer in waiting]
    assert {answer.data.id for answer in answers} == {receipt.id}


async def test_a_finished_job_can_be_started_again_with_the_payload_of_now(service: Service) -> None:
    job_id = await service.started(seed=1)
    async with service.worker() as worker:
        first = await worker.take()
        await worker.finish(first)
        job = await service.get(job_id)
        put = job.params.struct_value["input_body_presign_url"]
        (await service.http.put(put, content=b'{"seed": 2}')).raise_for_status()
        await service.start(job_id)
        assert (await service.get(job_id)).status == "inprogress"
        second = await worker.take()
        assert second.spec.payload["seed"] == 2
        await worker.finish(second)
    job = await service.get(job_id)
    assert len(job.img_presigned_urls) == 1
    assert second.lease_id in job.img_presigned_urls[0]


async def test_deleting_a_job_cancels_it_and_removes_its_objects(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        request = pb.DeleteInferenceJobsRequest(inference_id_list=[job_id, UNKNOWN, "no-uuid"])
        assert (await refusal(service.jobs.DeleteInferenceJobs(request, metadata=service.user("bob"))))[
            0
        ] == grpc.StatusCode.PERMISSION_DENIED
        await service.jobs.DeleteInferenceJobs(request, metadata=service.user())
        assert (await worker.read()).cancel.lease_id == assign.lease_id
    assert (await refusal(service.get(job_id)))[0] == grpc.StatusCode.NOT_FOUND
    assert await service.blobs.find(f"txt2img/infer_v2/{job_id}") == []
    assert await service.blobs.find(f"out/{job_id}") == []


async def cancel(service: Service, job_id: str, metadata: Any = None) -> Any:
    """The job after its cancelling."""
    request = pb.CancelInferenceJobRequest(job_id=job_id)
    return (await service.jobs.CancelInferenceJob(request, metadata=metadata or service.user())).data


async def test_a_queued_job_is_cancelled_at_once(service: Service) -> None:
    job_id = await service.started()
    for _ in range(2):  # the second time changes nothing
        job = MessageToDict(await cancel(service, job_id))
        assert (job["status"], job["sagemakerRaw"]) == ("failed", "the job was cancelled by ann")
        assert job["params"]["cancelled"] is True
        assert job["completeTime"]
    async with service.worker() as worker:
        other = await service.started()
        assert (await worker.take()).spec.job_id == other


async def test_a_running_job_is_cancelled_on_its_worker(service: Service) -> None:
    job_id = await service.started()
    async with service.worker() as worker:
        assign = await worker.take()
        await worker.begin(assign)
        assert (await cancel(service, job_id)).status == "failed"
        assert (await worker.read()).cancel.lease_id == assign.lease_id
        await worker.tell(assign.lease_id, failed={"reason": "the job was cancelled", "cancelled": True})
        await worker.read()
    assert (await service.get(job_id)).sagemaker_raw.string_value == "the job was cancelled by ann"


async def test_a_real_time_caller_hears_that_the_job_was_cancelled(service: Service) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    receipt = await service.create("Real-time")
    await service.upload(receipt)
    waiting = asyncio.ensure_future(service.start(receipt.id))
    async with service.worker(endpoint_id=endpoint) as worker:
        await worker.take()
        await cancel(service, receipt.id)
        assert await refusal(waiting) == (grpc.StatusCode.FAILED_PRECONDITION, "the job was cancelled by ann")


async def test_a_cancelled_job_can_be_started_again(service: Service) -> None:
    job_id = await service.started()
    await cancel(service, job_id)
    assert (await service.start(job_id)).inference.status == "inprogress"
    assert "cancelled" not in (await service.get(job_id)).params.struct_value


async def test_only_what_is_ones_own_and_has_not_ended_can_be_cancelled(service: Service) -> None:
    job_id = await service.started()
    assert (await refusal(cancel(service, job_id, service.user("bob"))))[0] == grpc.StatusCode.PERMISSION_DENIED
    assert await refusal(cancel(service, UNKNOWN)) == (
        grpc.StatusCode.NOT_FOUND,
        f"inference with id {UNKNOWN} not found",
    )
    async with service.worker() as worker:
        await worker.finish(await worker.take())
    code, message = await refusal(cancel(service, job_id, service.user("root", "user:all")))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert message == f"inference {job_id} has ended already: its status is succeed"


async def test_what_is_uploaded_after_a_job_was_deleted_is_removed_too(service: Service, database_url: str) -> None:
    receipt = await service.create()
    await service.upload(receipt)
    await service.start(receipt.id)
    async with service.worker() as worker:
        spec = (await worker.take()).spec
        request = pb.DeleteInferenceJobsRequest(inference_id_list=[receipt.id])
        await service.jobs.DeleteInferenceJobs(request, metadata=service.user())
        await service.upload(receipt)
        await service.http.put(spec.image_uploads[0].url, content=PNG)
    assert await service.blobs.find(f"out/{receipt.id}/")
    async with await psycopg.AsyncConnection.connect(database_url.replace("+psycopg", "")) as time_machine:
        await time_machine.execute("UPDATE leftover SET due_time = due_time - interval '61 seconds'")
    async with asyncio.timeout(60):
        for prefix in (f"out/{receipt.id}/", f"txt2img/infer_v2/{receipt.id}/"):
            while await service.blobs.find(prefix):  # noqa: ASYNC110 - nothing tells of what is done to objects
                await asyncio.sleep(0.05)


async def keyed(service: Service, key: str = "k", name: str = "ann", **fields: Any) -> Any:
    """A creation under an idempotency key."""
    return await create(service, (*service.user(name), ("idempotency-key", key)), **fields)


async def test_the_same_request_under_a_key_gives_the_same_job(service: Service) -> None:
    first, *others = await asyncio.gather(*(keyed(service) for _ in range(3)))
    assert {other.inference.id for other in others} == {first.inference.id}
    assert (await keyed(service, "another")).inference.id != first.inference.id
    assert (await keyed(service, name="bob")).inference.id != first.inference.id
    again = await keyed(service)
    await service.upload(again.inference)  # by a fresh URL
    await service.start(again.inference.id)
    assert (await keyed(service)).inference.id == first.inference.id


async def test_another_request_under_a_key_is_refused(service: Service) -> None:
    await keyed(service)
    assert await refusal(keyed(service, task_type="img2img")) == (
        grpc.StatusCode.ALREADY_EXISTS,
        'Idempotency-Key "k" came with another body before; a new request needs a new key',
    )
    assert (await refusal(keyed(service, "k" * 256)))[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_started_job_is_not_started_again_under_its_key(service: Service) -> None:
    started = (await keyed(service, payload_string='{"prompt": "x"}')).inference
    again = (await keyed(service, payload_string='{"prompt": "x"}')).inference
    assert again == started
    assert again.output_path
    async with service.worker() as worker:
        await worker.finish(await worker.take())
    assert (await keyed(service, payload_string='{"prompt": "x"}')).inference.status == "succeed"


async def test_a_real_time_request_that_is_sent_again_waits_for_the_same_job(service: Service) -> None:
    endpoint = service.world.add_endpoint("Real-time")
    fields = {"inference_type": "Real-time", "payload_string": '{"prompt": "x"}'}
    async with service.worker(endpoint_id=endpoint) as worker:
        waiting = [asyncio.ensure_future(keyed(service, **fields)) for _ in range(2)]
        assign = await worker.take()
        await worker.finish(assign)
        assert {(await answer).data.id for answer in waiting} == {assign.spec.job_id}


async def test_a_priority_is_possible_within_the_range_of_ones_roles(service: Service) -> None:
    code, message = await refusal(create(service, priority=1))
    assert (code, message) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "priority 1 is not possible for ann, whose roles allow -10 to 0",
    )
    operator = service.tokens.user("root", ["inference:all"], ["Designer", "IT Operator"])
    job_id = (await create(service, operator, priority=10)).inference.id
    assert (await service.get(job_id, operator)).params.struct_value["priority"] == 10
    job_id = (await create(service, priority=-10)).inference.id
    assert (await service.get(job_id)).params.struct_value["priority"] == -10


@pytest.mark.slow
async def test_a_deadline_ends_a_waiting_and_a_running_job(service: Service) -> None:
    waiting = (await create(service, payload_string="{}", deadline_seconds=0.3)).inference.inference_id
    job = await service.ended(waiting)
    sentence = "the deadline passed: the job had not ended 0.3 s after its start"
    assert (job.status, job.sagemaker_raw.string_value) == ("failed", sentence)
    async with service.worker() as worker:
        await worker.want()
        running = (await create(service, payload_string="{}", deadline_seconds=4.0)).inference.inference_id
        assign = (await worker.read()).assign
        assert (assign.spec.job_id, (await worker.read()).cancel.lease_id) == (running, assign.lease_id)
    assert (await service.get(running)).status == "failed"
    code, message = await refusal(create(service, deadline_seconds=0))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "deadline_seconds" in message


class TestFullQueue:
    """Users who may have one job in the queue."""

    @pytest.fixture
    def quotas(self) -> Quotas:
        return Quotas(max_queued_jobs=1)

    async def test_one_more_is_refused_with_the_time_to_wait_and_leaves_nothing(self, service: Service) -> None:
        await service.started()
        before = await service.blobs.find("frozen/")  # of other tests
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await create(service, payload_string=json.dumps(LARGE))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(refused.value.trailing_metadata() or ())["retry-after"] == "10"
        assert await service.blobs.find("frozen/") == before
        async with service.worker() as worker:
            await worker.take()
            await service.started()
