"""Which tokens still hold, and that an open stream ends with the key, role or secret that it was opened with."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from esd.identity.v1 import identity_pb2 as pb
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.options.v1 import options_pb2 as options
from services.common import streams
from services.common.auth import TOKEN_METADATA, current_caller
from services.common.clients import TokenSource, token_review
from services.common.clients import channel as channel_to
from services.common.server import Server
from tests.services.identity.conftest import MODELS_SECRET

ENDPOINT = "00000000-0000-4000-8000-000000000001"


async def token_of(identity: Any, key: str, **headers: str) -> str:
    """The token that the gateway gets for a request with the key."""
    response = await identity.check(x_api_key=key, **headers)
    return str(response.ok_response.headers[0].header.value)


async def secret_of_worker(identity: Any, service_token: Any) -> str:
    request = pb.CreateSecretRequest(caller=options.CALLER_WORKER, subject=ENDPOINT)
    return str((await identity.stub.CreateSecret(request, metadata=service_token("endpoints"))).secret)


async def token_for(identity: Any, secret: str) -> str:
    return str((await identity.stub.IssueToken(pb.IssueTokenRequest(secret=secret))).token)


async def test_a_token_holds_until_what_it_was_made_from_changes(identity: Any, service_token: Any) -> None:
    stub, admin = identity.stub, identity.admin
    keys = {name: await identity.make_user(name, ["train:all"]) for name in ("ann", "bob", "cid", "dan", "eve")}
    tokens = {name: await token_of(identity, key) for name, key in keys.items()}
    tokens["ann named"] = await token_of(identity, keys["ann"], username="ann")
    tokens["bob by api"] = await token_of(identity, identity.first_key, username="bob")
    tokens["nobody"] = await token_of(identity, identity.first_key, username="nobody")
    tokens["long"] = await token_of(identity, identity.first_key, username="x" * 300)
    tokens["worker"] = await token_for(identity, await secret_of_worker(identity, service_token))
    tokens["service"] = await token_for(identity, MODELS_SECRET)

    async def gone() -> set[str]:
        request = pb.ReviewTokensRequest(tokens=tokens.values())
        holds = (await stub.ReviewTokens(request, metadata=service_token("inference"))).holds
        return {name for name, good in zip(tokens, holds, strict=True) if not good}

    assert await gone() == set()
    (key,) = (await stub.ListApiKeys(pb.ListApiKeysRequest(username="ann"), metadata=admin)).keys
    await stub.DeleteApiKeys(pb.DeleteApiKeysRequest(key_id_list=[key.id]), metadata=admin)
    assert await gone() == {"ann", "ann named"}
    role = pb.CreateRoleRequest(role_name="role of bob", permissions=["train:list"])
    await stub.CreateRole(role, metadata=admin)
    assert await gone() == {"ann", "ann named", "bob", "bob by api"}
    await stub.DeleteUsers(pb.DeleteUsersRequest(user_name_list=["cid"]), metadata=admin)
    await stub.DeleteRoles(pb.DeleteRolesRequest(role_name_list=["role of dan"]), metadata=admin)
    replaced = await token_for(identity, await secret_of_worker(identity, service_token))
    await identity.make_user("nobody", ["train:all"])
    tokens["made up"], tokens["worker again"] = "a.b.c", replaced
    assert set(tokens) - await gone() == {"eve", "long", "service", "worker again"}


async def test_a_review_of_what_was_found_to_hold_asks_the_database_again_after_a_change(
    identity: Any, service_token: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = await identity.make_user("ann", ["train:all"])
    tokens = [await token_of(identity, key) for key in (own, identity.first_key)]
    looks, find = [], identity.store.find_key_use

    async def looking(*args: Any) -> Any:
        looks.append(args)
        return await find(*args)

    monkeypatch.setattr(identity.store, "find_key_use", looking)

    async def review() -> list[bool]:
        looks.clear()
        request = pb.ReviewTokensRequest(tokens=tokens)
        return list((await identity.stub.ReviewTokens(request, metadata=service_token("inference"))).holds)

    assert await review() == [True, True]
    assert len(looks) == len(tokens)
    assert await review() == [True, True]
    assert not looks
    request = pb.CreateRoleRequest(role_name="role of ann", permissions=["train:list"])
    await identity.stub.CreateRole(request, metadata=identity.admin)
    assert await review() == [False, True]
    assert await review() == [False, True]
    assert len(looks) == 1


async def test_only_services_may_review(identity: Any, worker_token: Any) -> None:
    for metadata in (identity.admin, worker_token(ENDPOINT), None):
        with pytest.raises(grpc.aio.AioRpcError):
            await identity.stub.ReviewTokens(pb.ReviewTokensRequest(tokens=["x"]), metadata=metadata)


async def end_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    """How the stream ends."""
    with suppress(grpc.aio.AioRpcError):
        while await stream.read() is not grpc.aio.EOF:
            pass
    return await stream.code(), await stream.details()


class Watching(inference_pb2_grpc.InferenceServiceServicer, inference_pb2_grpc.QueueServiceServicer):
    """Streams that say once who has them, and then nothing."""

    def __init__(self) -> None:
        self.num_open = 0

    async def _say(self, message: Any) -> AsyncIterator[Any]:
        self.num_open += 1
        try:
            yield message
            await asyncio.Event().wait()
        finally:
            self.num_open -= 1

    def WatchInferenceJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        return self._say(inference_pb2.WatchInferenceJobResponse())

    def Work(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        assert current_caller().name == ENDPOINT
        return self._say(inference_pb2.WorkResponse())


async def test_open_streams_end_with_the_key_or_the_secret_and_the_others_stay(
    identity: Any, tokens: Any, service_token: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "REVIEW_SECONDS", 0.05)
    own = channel_to(identity.address, TokenSource(identity.address, MODELS_SECRET))
    server, servicer = Server("127.0.0.1:0", tokens.verifier("inference"), token_review(own)), Watching()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.grpc)
    inference_pb2_grpc.add_QueueServiceServicer_to_server(servicer, server.grpc)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, own:
        watcher, queue = inference_pb2_grpc.InferenceServiceStub(channel), inference_pb2_grpc.QueueServiceStub(channel)
        request = inference_pb2.WatchInferenceJobRequest(job_id=ENDPOINT)
        opened = {}
        for name in ("ann", "bob"):
            token = await token_of(identity, await identity.make_user(name, ["inference:all"]))
            opened[name] = watcher.WatchInferenceJob(request, metadata=((TOKEN_METADATA, token),))
        worker = await token_for(identity, await secret_of_worker(identity, service_token))
        opened["worker"] = queue.Work(metadata=((TOKEN_METADATA, worker),))
        for stream in opened.values():
            await stream.read()

        role = pb.CreateRoleRequest(role_name="role of ann", permissions=["inference:all", "train:all"])
        await identity.stub.CreateRole(role, metadata=identity.admin)
        assert await end_of(opened["ann"]) == (grpc.StatusCode.UNAUTHENTICATED, streams.ENDED)
        await secret_of_worker(identity, service_token)
        assert await end_of(opened["worker"]) == (grpc.StatusCode.UNAUTHENTICATED, streams.ENDED)
        again = queue.Work(metadata=((TOKEN_METADATA, worker),))
        assert await end_of(again) == (grpc.StatusCode.UNAUTHENTICATED, streams.ENDED), "the old token opens none"

        assert not opened["bob"].done()
        opened["bob"].cancel()
    await server.stop(grace_seconds=0)
    assert servicer.num_open == 0
