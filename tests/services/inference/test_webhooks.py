"""Calls to a user's server when a job has ended: signed, repeated, dead, sent again, never where they must not go."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest
from aiohttp import web

from esd.inference.v1 import inference_pb2 as pb
from tests.services.inference.conftest import Service

pytestmark = pytest.mark.timeout(60)

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


@dataclass
class Receiver:
    """A user's server. It answers what `answers` says, then 200; of /slow, when it is `released`."""

    url: str = ""
    calls: "asyncio.Queue[tuple[dict[str, str], bytes]]" = field(default_factory=asyncio.Queue)
    answers: list[web.Response] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.Response:
        await self.calls.put(({name.lower(): text for name, text in request.headers.items()}, await request.read()))
        if request.path == "/slow":
            await self.released.wait()
        return self.answers.pop(0) if self.answers else web.Response()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", found.handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook?key=1"
    yield found
    found.released.set()
    await runner.cleanup()


async def ended(service: Service, url: str) -> str:
    """The id of a job that has ended with this webhook."""
    receipt = await service.create(webhook=url, webhook_secret=SECRET)
    await service.upload(receipt)
    await service.start(receipt.id)
    async with service.worker() as worker:
        await worker.finish(await worker.take())
    return str(receipt.id)


async def listed(service: Service, state: str = "", user: str = "ann") -> list[Any]:
    request = pb.ListWebhooksRequest(state=state)
    return list((await service.jobs.ListWebhooks(request, metadata=service.user(user))).webhooks)


async def until(service: Service, job_id: str, state: str) -> Any:
    """The webhook once it is in this state. Nothing tells clients of it, so they ask."""
    while not (found := [one for one in await listed(service, state) if one.job_id == job_id]):  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return found[0]


async def resend(service: Service, job_id: str, user: str = "ann") -> Any:
    request = pb.ResendWebhookRequest(job_id=job_id)
    return (await service.jobs.ResendWebhook(request, metadata=service.user(user))).data


async def test_the_end_of_a_job_is_told_once_and_signed(service: Service, receiver: Receiver) -> None:
    job_id = await ended(service, receiver.url)
    headers, body = await receiver.calls.get()
    told = json.loads(body)
    assert (told["type"], told["data"]["InferenceJobId"]) == ("inference.succeed", job_id)
    assert (told["data"]["status"], told["data"]["image_names"]) == ("succeed", ["image_0.png"])
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    webhook = await until(service, job_id, "delivered")
    assert (webhook.num_attempts, webhook.message_id) == (1, headers["webhook-id"])
    assert webhook.url == receiver.url.partition("?")[0]
    assert receiver.calls.empty()
    assert SECRET not in str(await service.get(job_id))


async def test_a_failed_and_a_cancelled_job_are_told_too(service: Service, receiver: Receiver) -> None:
    receipt = await service.create(webhook=receiver.url, webhook_secret=SECRET)
    await service.jobs.CancelInferenceJob(pb.CancelInferenceJobRequest(job_id=receipt.id), metadata=service.user())
    told = json.loads((await receiver.calls.get())[1])
    assert told["type"] == "inference.failed"
    assert "cancelled" in told["data"]["sagemakerRaw"]


async def test_a_call_that_is_refused_is_repeated_under_the_same_id(service: Service, receiver: Receiver) -> None:
    receiver.answers = [web.Response(status=500), web.Response(status=404)]
    job_id = await ended(service, receiver.url)
    ids = {(await receiver.calls.get())[0]["webhook-id"] for _ in range(3)}
    assert len(ids) == 1
    webhook = await until(service, job_id, "delivered")
    assert (webhook.num_attempts, webhook.last_error.WhichOneof("kind")) == (3, "null_value")


async def test_a_server_that_does_not_answer_holds_up_the_calls_of_its_owner_only(
    service: Service, receiver: Receiver
) -> None:
    async def cancelled(user: str, url: str) -> str:
        request = pb.CreateInferenceJobRequest(
            inference_type="Async",
            task_type="txt2img",
            models={"Stable-diffusion": ["v1-5.safetensors"]},
            webhook=url,
            webhook_secret=SECRET,
        )
        job_id = str((await service.jobs.CreateInferenceJob(request, metadata=service.user(user))).inference.id)
        await service.jobs.CancelInferenceJob(pb.CancelInferenceJobRequest(job_id=job_id), metadata=service.user(user))
        return job_id

    for _ in range(16):  # as many calls as a replica makes at once
        await cancelled("ann", receiver.url.replace("/hook", "/slow"))
    bobs = await cancelled("bob", receiver.url)
    num_calls = 1
    while json.loads((await receiver.calls.get())[1])["data"]["InferenceJobId"] != bobs:
        num_calls += 1
    assert num_calls < 16  # else it waited for others to be over


class TestWithoutPatience:
    """Webhooks that are tried once."""

    @pytest.fixture
    def webhook_seconds(self) -> float:
        return 0.0

    async def test_a_dead_webhook_is_listed_with_its_reason_and_can_be_sent_again(
        self, service: Service, receiver: Receiver
    ) -> None:
        receiver.answers = [web.Response(status=503)]
        job_id = await ended(service, receiver.url)
        dead = await until(service, job_id, "dead")
        assert dead.last_error.string_value == f"{receiver.url.partition('?')[0]} answered 503"
        again = await resend(service, job_id)
        assert (again.state, again.num_attempts, again.message_id) == ("pending", 0, dead.message_id)
        assert (await until(service, job_id, "delivered")).num_attempts == 1
        assert await listed(service, "dead") == []

    @pytest.mark.parametrize(
        "target", ["http://10.0.0.1/", "http://169.254.169.254/latest", "ftp://127.0.0.1/", "http://[a"]
    )
    async def test_a_redirect_to_a_place_that_is_not_public_is_not_followed(
        self, service: Service, receiver: Receiver, target: str
    ) -> None:
        receiver.answers = [web.Response(status=307, headers={"Location": target})]
        dead = await until(service, await ended(service, receiver.url), "dead")
        reason = dead.last_error.string_value
        assert any(words in reason for words in ("not a public address", "only http", "is no URL")), reason


async def test_a_call_that_breaks_in_an_unforeseen_way_is_repeated(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks, look_up, port = [RuntimeError("unforeseen")], socket.getaddrinfo, urlsplit(receiver.url).port

    def broken_once(host: Any, asked: Any, *arguments: Any, **options: Any) -> Any:
        if breaks and asked == port:
            raise breaks.pop()
        return look_up(host, asked, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", broken_once)
    job_id = await ended(service, receiver.url)
    assert (await until(service, job_id, "delivered")).num_attempts == 2


async def test_a_webhook_in_a_private_network_is_dead_at_once(service: Service) -> None:
    dead = await until(service, await ended(service, "http://192.168.0.1/"), "dead")
    assert (dead.num_attempts, dead.last_error.string_value) == (1, "192.168.0.1 is not a public address")


async def test_webhooks_are_for_the_owner_of_the_job(service: Service, receiver: Receiver) -> None:
    job_id = await ended(service, receiver.url)
    await until(service, job_id, "delivered")
    assert await listed(service, user="bob") == []
    for name, wanted, code in [
        ("bob", job_id, grpc.StatusCode.PERMISSION_DENIED),
        ("ann", "nonsense", grpc.StatusCode.NOT_FOUND),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await resend(service, wanted, name)
        assert caught.value.code() is code
    with pytest.raises(grpc.aio.AioRpcError, match="possible: pending, delivered, dead"):
        await listed(service, "lost")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"webhook": "file:///etc/passwd", "webhook_secret": SECRET}, "only http and https"),
        ({"webhook": "https://example.com/"}, "webhook_secret"),
        ({"webhook": "https://example.com/", "webhook_secret": "short"}, "24 to 64 bytes"),
        ({"webhook": "https://example.com/", "webhook_secret": "whsec_????"}, "24 to 64 bytes"),
        ({"webhook_secret": SECRET}, "no use without webhook"),
    ],
)
async def test_a_bad_webhook_is_refused_with_the_job(service: Service, fields: dict[str, str], message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
        await service.create(**fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
