"""What a gRPC client sees through the gateway: native answers, native errors, no envelope."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from deploy.local.ports import free_port
from esd.identity.v1 import ext_authz_pb2, ext_authz_pb2_grpc, identity_pb2, identity_pb2_grpc
from esd.inference.v1 import inference_pb2, inference_pb2_grpc
from esd.training.v1 import training_pb2, training_pb2_grpc
from tests.gateway.conftest import KEY, Gateway, Seen, running_gateway

WITH_KEY = (("x-api-key", KEY),)


@pytest.fixture
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    """A client's own connection."""
    async with grpc.aio.insecure_channel(gateway.address) as opened:
        yield opened


async def test_a_native_client_gets_a_native_answer_whatever_the_rest_status(channel: grpc.aio.Channel) -> None:
    stub = identity_pb2_grpc.IdentityServiceStub(channel)
    assert len((await stub.ListRoles(identity_pb2.ListRolesRequest(role="3"), metadata=WITH_KEY)).roles) == 3
    assert await stub.CreateRole(identity_pb2.CreateRoleRequest(role_name="a"), metadata=WITH_KEY) is not None
    assert await stub.DeleteRoles(identity_pb2.DeleteRolesRequest(), metadata=WITH_KEY) is not None


async def test_a_native_client_gets_the_services_own_error(channel: grpc.aio.Channel) -> None:
    stub = identity_pb2_grpc.IdentityServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListRoles(identity_pb2.ListRolesRequest(role="missing"), metadata=WITH_KEY)
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.NOT_FOUND,
        'no role "missing" in Zürich',
    )


@pytest.mark.parametrize("metadata", [(), (("x-api-key", "wrong"),), (("authorization", f"Bearer {KEY}"),)])
async def test_a_native_client_without_a_valid_key_is_told_where_it_belongs(
    channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await identity_pb2_grpc.IdentityServiceStub(channel).Ping(identity_pb2.PingRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.details() == "the metadata x-api-key must be a valid API key"


async def test_a_native_client_of_a_service_that_is_down_gets_unavailable(channel: grpc.aio.Channel) -> None:
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListTrainingJobs(training_pb2.ListTrainingJobsRequest(), metadata=WITH_KEY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the service is not available, try again"


async def test_what_a_service_that_stops_has_not_answered_is_unavailable(channel: grpc.aio.Channel) -> None:
    request = identity_pb2.ListRolesRequest(role="cancelled")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await identity_pb2_grpc.IdentityServiceStub(channel).ListRoles(request, metadata=WITH_KEY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the service is not available, try again"


async def test_a_native_client_while_identity_is_down_gets_unavailable(
    services: tuple[str, Seen], tmp_path: Path
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    async with (
        running_gateway(tmp_path, services[0], ESD_IDENTITY_ADDRESS=nobody) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetInferenceJob(inference_pb2.GetInferenceJobRequest(), metadata=WITH_KEY)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the service is not available, try again"


@pytest.mark.parametrize("method", ["esd.nobody.v1.NobodyService/Get", "grpc.reflection.v1.ServerReflection/Info"])
async def test_a_native_client_of_a_service_that_there_is_not_is_told_so(
    channel: grpc.aio.Channel, method: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"/{method}")(b"", metadata=WITH_KEY)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "there is no such service behind this gateway"


async def test_metadata_with_an_underscore_goes_no_further_and_does_no_harm(
    channel: grpc.aio.Channel, seen: Seen
) -> None:
    await identity_pb2_grpc.IdentityServiceStub(channel).Ping(
        identity_pb2.PingRequest(), metadata=(*WITH_KEY, ("trace_id", "1"), ("x_esd_token", "forged"))
    )
    assert not {"trace_id", "x_esd_token"} & seen.calls[0].keys()


async def test_the_token_of_a_user_reaches_internal_rpcs_which_refuse_it_themselves(
    channel: grpc.aio.Channel, seen: Seen
) -> None:
    stub = inference_pb2_grpc.QueueServiceStub(channel)
    metadata = (*WITH_KEY, ("x-esd-token", "forged"))
    pools = [pool async for pool in stub.WatchPools(inference_pb2.WatchPoolsRequest(), metadata=metadata)]
    assert len(pools) == 1
    assert seen.calls[0]["x-esd-token"] == "token for document"


async def test_nobody_asks_identity_to_check_a_key_through_the_gateway(channel: grpc.aio.Channel, seen: Seen) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ext_authz_pb2_grpc.AuthorizationStub(channel).Check(ext_authz_pb2.CheckRequest(), metadata=WITH_KEY)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(seen.checks) == 1  # the gateway's own


async def test_a_worker_trades_its_secret_without_a_key(channel: grpc.aio.Channel, seen: Seen) -> None:
    stub = identity_pb2_grpc.IdentityServiceStub(channel)
    assert (await stub.IssueToken(identity_pb2.IssueTokenRequest(secret="s"))).token == "token for s"
    assert not seen.checks


async def test_a_workers_token_passes_on_its_stream_in_both_directions(channel: grpc.aio.Channel, seen: Seen) -> None:
    call = inference_pb2_grpc.QueueServiceStub(channel).Work(metadata=(("x-esd-token", "worker's own"),))
    for lease in ("1", "2"):
        await call.write(inference_pb2.WorkRequest(hello={"held_leases": [lease]}))
        assert (await call.read()).welcome.kept_leases == [lease]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert seen.calls[0]["x-esd-token"] == "worker's own"
    assert not seen.checks


@pytest.mark.parametrize("path", ["/esd.identity.v1.IdentityService/IssueToken", "/esd.inference.v1.QueueService/Work"])
async def test_json_does_not_reach_the_workers_routes(gateway: Gateway, path: str) -> None:
    response = await gateway.client.post(path, json={"secret": "s"})
    assert (response.status_code, response.json()) == (404, {"statusCode": 404, "message": "Not Found"})
