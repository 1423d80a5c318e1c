"""The backlog of pools, asked for as KEDA asks: its service, its metadata, its certificates."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.kubernetes.certificates import Certificates, make_certificates
from deploy.local.ports import free_port
from esd.inference.v1 import externalscaler_pb2 as pb
from esd.inference.v1 import externalscaler_pb2_grpc as rpc
from services.common.database import Database
from services.endpoints.scaling import Load, ScalingPolicy, needed_workers
from services.inference.__main__ import InferenceSettings, keda_door
from services.inference.queue.pool_store import PoolState, PoolStore
from services.inference.queue.scaler import ScalerServicer, Trigger, backlog
from tests.services.inference.conftest import Service
from tests.serving import Tokens

HOST = "inference.esd"


@dataclass
class Keda:
    """KEDA's end: the address of the scaler, and what KEDA knows."""

    port: int
    certificates: Certificates

    def stub(self, credentials: grpc.ChannelCredentials) -> rpc.ExternalScalerStub:
        options = [("grpc.ssl_target_name_override", HOST)]
        return rpc.ExternalScalerStub(grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options))

    @property
    def own(self) -> grpc.ChannelCredentials:
        """KEDA's credentials."""
        made = self.certificates
        return grpc.ssl_channel_credentials(made.authority, made.client.key, made.client.certificate)


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return make_certificates([HOST], "keda")


@pytest.fixture
async def keda(
    service: Service,
    database_url: str,
    stopping: asyncio.Event,
    tokens: Tokens,
    certificates: Certificates,
    tmp_path: Path,
) -> AsyncIterator[Keda]:
    files = {
        "tls.crt": certificates.server.certificate,
        "tls.key": certificates.server.key,
        "ca.crt": certificates.authority,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    settings = InferenceSettings.model_construct(keda_listen=f"127.0.0.1:{free_port()}", keda_certificates=tmp_path)
    database = Database(database_url)
    servicer = ScalerServicer(PoolStore(database), service.notifications, stopping)
    async with keda_door(settings, tokens.verifier(), servicer):
        yield Keda(int(settings.keda_listen.rpartition(":")[2]), certificates)
        stopping.set()
    await database.dispose()


def scaled_object(endpoint_id: str, **metadata: str) -> pb.ScaledObjectRef:
    known = {"endpointId": endpoint_id, "target": "3", "jobSeconds": "10", "scalerAddress": "inference.esd:9001"}
    return pb.ScaledObjectRef(name="esd-x", namespace="esd-workers", scaler_metadata=known | metadata)


async def test_keda_learns_how_much_work_a_pool_has(service: Service, keda: Keda) -> None:
    stub, pool = keda.stub(keda.own), scaled_object(service.endpoint_id)
    spec = (await stub.GetMetricSpec(pool)).metric_specs[0]
    assert (spec.metric_name, spec.target_size, spec.target_size_float) == ("backlog", 3, 3.0)
    asked = pb.GetMetricsRequest(scaled_object_ref=pool, metric_name=spec.metric_name)

    assert not (await stub.IsActive(pool)).result
    assert (await stub.GetMetrics(asked)).metric_values[0].metric_value_float == 0
    for _ in range(4):
        await service.started()
    assert (await stub.IsActive(pool)).result
    value = (await stub.GetMetrics(asked)).metric_values[0]
    assert (value.metric_name, value.metric_value, value.metric_value_float) == ("backlog", 4, 4.0)
    assert not (await stub.IsActive(scaled_object(str(uuid4())))).result


async def test_keda_hears_at_once_when_the_first_job_waits_and_when_the_last_has_ended(
    service: Service, keda: Keda
) -> None:
    stream = keda.stub(keda.own).StreamIsActive(scaled_object(service.endpoint_id))
    assert not (await stream.read()).result
    await service.started()
    assert (await stream.read()).result
    async with service.worker() as worker:
        await worker.finish(await worker.take())
        assert not (await stream.read()).result


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"endpointId": "x"}, 'the trigger\'s metadata has endpointId: "x", which is wrong'),
        ({"target": "0"}, 'the trigger\'s metadata has target: "0", which is wrong'),
        ({"jobSeconds": "nan"}, 'the trigger\'s metadata has jobSeconds: "nan", which is wrong'),
    ],
)
async def test_wrong_metadata_is_named(service: Service, keda: Keda, metadata: dict[str, str], sentence: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="which is wrong") as failed:
        await keda.stub(keda.own).IsActive(scaled_object(service.endpoint_id, **metadata))
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, sentence)


async def test_nobody_asks_without_a_certificate_that_was_made_for_it(service: Service, keda: Keda) -> None:
    strange = make_certificates([HOST], "keda").client
    for credentials in (
        grpc.ssl_channel_credentials(keda.certificates.authority),
        grpc.ssl_channel_credentials(keda.certificates.authority, strange.key, strange.certificate),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await keda.stub(credentials).IsActive(scaled_object(service.endpoint_id))
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE


@given(
    num_queued=st.integers(0, 500),
    num_held=st.integers(0, 50),
    work_seconds=st.none() | st.floats(0, 1e6),
    target=st.floats(0.5, 20),
    job_seconds=st.floats(0.5, 600),
)
def test_a_backlog_by_its_target_is_as_many_workers_as_the_own_policy_has(
    num_queued: int, num_held: int, work_seconds: float | None, target: float, job_seconds: float
) -> None:
    trigger = Trigger(uuid4(), target, job_seconds)
    amount = backlog(PoolState([], num_queued, num_held, work_seconds), trigger)
    policy = ScalingPolicy(target_async=target, job_seconds=job_seconds)
    needed = needed_workers(Load(frozenset(), num_queued, num_held, work_seconds), is_real_time=False, policy=policy)
    # KEDA's answer is the quotient rounded up; a rounding error at a whole number is not worth a worker.
    assert needed in {math.ceil(amount / target), math.ceil(amount / target - 1e-9)}
