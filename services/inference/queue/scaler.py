"""Tells KEDA how much work a pool has, on a port of its own with certificates on both sides.

It knows the backlog. What follows from it is KEDA's decision, by the bounds and times of the ScaledObject that the
endpoints service writes; the same backlog and target give as many workers as services/endpoints/scaling.py has them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from esd.inference.v1 import externalscaler_pb2 as pb
from esd.inference.v1 import externalscaler_pb2_grpc as rpc
from services.common.errors import InvalidArgument, Unavailable
from services.common.notifications import Notifications
from services.common.tasks import heard
from services.inference.channels import JOB_ENDED, JOBS_QUEUED, POOLS_CHANGED
from services.inference.queue.pool_store import PoolState, PoolStore

METRIC = "backlog"
_LEAST = 0.001  # what KEDA can tell from nothing
_SWEEP_SECONDS = 5.0


@dataclass(frozen=True)
class Trigger:
    """What the metadata of a ScaledObject's trigger says of a pool."""

    endpoint_id: UUID
    target: float
    job_seconds: float

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Trigger:
        """Reads it.

        Raises:
            InvalidArgument: a value is missing or wrong.
        """
        return cls(
            endpoint_id=_value(metadata, "endpointId", UUID),
            target=_value(metadata, "target", _positive),
            job_seconds=_value(metadata, "jobSeconds", _positive),
        )


def backlog(pool: PoolState | None, trigger: Trigger) -> float:
    """The jobs of a pool that have not ended; where it is known how long they take, as so many of `job_seconds`.

    Never more than gives each of them a worker of its own, and more than nothing while there is one.
    """
    num_jobs = pool.num_queued + pool.num_held if pool else 0
    if pool is None or num_jobs == 0:
        return 0.0
    weight = float(num_jobs) if pool.work_seconds is None else pool.work_seconds / trigger.job_seconds
    return min(max(weight, _LEAST), num_jobs * trigger.target)


class ScalerServicer(rpc.ExternalScalerServicer):
    """KEDA's questions. `stopping` ends the streams, so that KEDA asks another replica."""

    def __init__(self, pools: PoolStore, notifications: Notifications, stopping: asyncio.Event) -> None:
        self._pools = pools
        self._notifications = notifications
        self._stopping = stopping

    async def IsActive(self, request: pb.ScaledObjectRef, context: Any) -> pb.IsActiveResponse:
        return pb.IsActiveResponse(result=await self._is_active(Trigger.read(request.scaler_metadata)))

    async def StreamIsActive(self, request: pb.ScaledObjectRef, context: Any) -> AsyncIterator[pb.IsActiveResponse]:
        trigger = Trigger.read(request.scaler_metadata)
        told: bool | None = None
        keys = (POOLS_CHANGED, ""), (JOBS_QUEUED, ""), (JOB_ENDED, "")
        with self._notifications.subscribed(*keys) as changed:
            while not self._stopping.is_set():
                if (is_active := await self._is_active(trigger)) != told:
                    yield pb.IsActiveResponse(result=is_active)
                    told = is_active
                await heard(changed, _SWEEP_SECONDS)
        raise Unavailable("the service is stopping; ask again")

    async def GetMetricSpec(self, request: pb.ScaledObjectRef, context: Any) -> pb.GetMetricSpecResponse:
        target = Trigger.read(request.scaler_metadata).target
        spec = pb.MetricSpec(metric_name=METRIC, target_size=math.ceil(target), target_size_float=target)
        return pb.GetMetricSpecResponse(metric_specs=[spec])

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Any) -> pb.GetMetricsResponse:
        if request.metric_name != METRIC:
            raise InvalidArgument(f'there is no metric "{request.metric_name}"; there is {METRIC}')
        trigger = Trigger.read(request.scaled_object_ref.scaler_metadata)
        amount = backlog((await self._pools.pools()).get(trigger.endpoint_id), trigger)
        value = pb.MetricValue(metric_name=METRIC, metric_value=math.ceil(amount), metric_value_float=amount)
        return pb.GetMetricsResponse(metric_values=[value])

    async def _is_active(self, trigger: Trigger) -> bool:
        return backlog((await self._pools.pools()).get(trigger.endpoint_id), trigger) > 0


def _value(metadata: Mapping[str, str], name: str, read: Any) -> Any:
    try:
        return read(metadata[name])
    except KeyError:
        raise InvalidArgument(f"the trigger's metadata lacks {name}") from None
    except ValueError:
        raise InvalidArgument(f'the trigger\'s metadata has {name}: "{metadata[name][:100]}", which is wrong') from None


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number
