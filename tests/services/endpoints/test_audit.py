"""The audit of endpoints: what people ask for and what becomes of it, but not what is merely observed."""

from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict

from esd.endpoints.v1 import endpoints_pb2 as pb
from services.common.database import Database
from services.endpoints.store import EndpointStore
from tests.auditing import Trail, through_gateway
from tests.serving import Metadata

BODY: dict[str, Any] = {"endpoint_name": "a", "instance_type": "cpu", "initial_instance_count": "1"}
BODY |= {"autoscaling_enabled": False, "assign_to_roles": ["painter"]}


async def test_each_change_of_an_endpoint_writes_one_row(
    stub: Any, store: EndpointStore, database: Database, admin: Metadata
) -> None:
    trail = await Trail.begin(database)
    ann = through_gateway(admin)
    await stub.CreateEndpoint(ParseDict(BODY, pb.CreateEndpointRequest()), metadata=ann)
    for refused in (BODY, BODY | {"endpoint_type": "Serverless"}):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.CreateEndpoint(ParseDict(refused, pb.CreateEndpointRequest()), metadata=ann)
    assert await trail.new() == [("endpoint.create", "esd-async-a")]
    (row,) = trail.rows
    assert (row["actor"], row["address"], row["request_id"]) == ("ann", "192.0.2.7", "request-1")
    assert row["changes"]["owners"] == {"to": ["painter"]}

    (endpoint,) = await store.get_all_live()
    await store.set_num_live(endpoint.id, 1)
    await store.set_in_service(endpoint.id, datetime.now(UTC))
    await store.set_in_service(endpoint.id, datetime.now(UTC))
    await store.set_failed(endpoint.id, "it broke")
    assert await trail.new() == [("endpoint.update", "esd-async-a")] * 2
    assert trail.rows[0]["changes"] == {"status": {"from": "Creating", "to": "InService"}}
    assert trail.rows[1]["changes"] == {"status": {"from": "InService", "to": "Failed"}, "error": {"to": "it broke"}}
    assert {(row["kind"], row["actor"]) for row in trail.rows} == {("service", "endpoints")}

    delete = pb.DeleteEndpointsRequest(endpoint_name_list=["esd-async-a", "unknown"])
    await stub.DeleteEndpoints(delete, metadata=ann)
    await stub.DeleteEndpoints(delete, metadata=ann)
    await store.remove_endpoint(endpoint.id)
    assert await trail.new() == [("endpoint.delete", "esd-async-a"), ("endpoint.remove", "esd-async-a")]
