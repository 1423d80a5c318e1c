"""A job's events through the gateway: server-sent events for REST, messages for native gRPC."""

from __future__ import annotations

import json

import grpc

from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.conftest import KEY, Gateway, Seen

PATH = "/prod/inferences/some-job/events"


async def test_events_come_as_they_happen_one_line_of_json_each(gateway: Gateway, seen: Seen) -> None:
    seen.may_end.clear()
    async with gateway.client.stream("GET", PATH) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert answer.headers["x-api-version"] == "1.5.0"
        assert not [name for name in answer.headers if name.startswith(("x-esd", "grpc-"))]
        lines = (line async for line in answer.aiter_lines() if line)
        first = await anext(lines)
        assert first.startswith("data: ")
        assert json.loads(first.removeprefix("data: ")) == {"queued": {"position": 1}}
        seen.may_end.set()
        rest = [json.loads(line.removeprefix("data: ")) async for line in lines]
    assert rest == [
        {"preview": {"jpeg": "/9g="}},
        {"image": {"index": 0, "name": "image_0.png", "url": "http://s/0"}},
        {"done": {}},
    ]


async def test_a_refusal_has_the_usual_form(gateway: Gateway, seen: Seen) -> None:
    answer = await gateway.client.get("/inferences/missing/events")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"statusCode": 404, "message": "inference with id missing not found"}
    answer = await gateway.client.get("/inferences/some-job/events", headers={"x-api-key": "wrong"})
    assert (answer.status_code, answer.json()) == (403, {"statusCode": 403, "message": "Forbidden"})


async def test_a_native_client_gets_messages(gateway: Gateway, seen: Seen) -> None:
    seen.may_end.set()
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.WatchInferenceJobRequest(job_id="some-job")
        call = stub.WatchInferenceJob(request, metadata=(("x-api-key", KEY),))
        names = [message.WhichOneof("event") async for message in call]
    assert names == ["queued", "preview", "image", "done"]
