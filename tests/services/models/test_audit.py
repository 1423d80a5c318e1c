"""The audit of checkpoints and datasets: a row for each change, none for what is refused."""

from google.protobuf.json_format import ParseDict

from esd.models.v1 import models_pb2 as pb
from services.common.database import Database
from tests.auditing import Trail, through_gateway
from tests.services.models.conftest import Running, refused, tag
from tests.services.models.files import malicious, safetensors


async def test_each_change_of_a_checkpoint_writes_one_row(models: Running, service: tuple[Running, Database]) -> None:
    trail = await Trail.begin(service[1])
    ann, content = through_gateway(models.ann), safetensors()
    created = await models.create(("a.safetensors", 1), by=ann)
    checkpoint_id = created.checkpoint.id
    assert await trail.new() == [("checkpoint.create", checkpoint_id)]
    (row,) = trail.rows
    assert (row["actor"], row["address"], row["request_id"]) == ("ann", "192.0.2.7", "request-1")
    assert "Signature" not in await trail.text()

    for wrong in ({"a.safetensors": [tag(1, "wrong")]}, {"b": [tag(1, "x")]}):
        async with refused("INVALID_ARGUMENT"):
            await models.update(checkpoint_id, wrong, by=ann)
    async with refused("FAILED_PRECONDITION", "already exists"):
        await models.create(("a.safetensors", 1), by=ann)
    async with refused("PERMISSION_DENIED"):
        await models.delete([checkpoint_id], by=models.bob)
    assert await trail.new() == []

    await models.update(checkpoint_id, {"a.safetensors": await models.put(created, "a.safetensors", content)}, by=ann)
    assert await trail.new() == [("checkpoint.complete_file", checkpoint_id), ("checkpoint.update", checkpoint_id)]
    assert trail.rows[0]["changes"]["files"]["to"]["a.safetensors"]["complete"]
    assert trail.rows[1]["changes"] == {"status": {"from": "Initial", "to": "Active"}}

    body = pb.UpdateCheckpointBody(name="b")
    await models.stub.UpdateCheckpoint(pb.UpdateCheckpointRequest(checkpoint_id=checkpoint_id, body=body), metadata=ann)
    await models.delete([checkpoint_id], by=ann)
    assert await trail.new() == [("checkpoint.rename", checkpoint_id), ("checkpoint.delete", checkpoint_id)]


async def test_a_refused_file_is_in_the_audit_with_its_reason(
    models: Running, service: tuple[Running, Database]
) -> None:
    trail = await Trail.begin(service[1])
    async with refused("FAILED_PRECONDITION", "has code in its pickle"):
        await models.upload("a.ckpt", malicious("touch x"))
    assert [action for action, _ in await trail.new()] == ["checkpoint.create", "checkpoint.refuse"]
    assert "a.ckpt" in trail.rows[1]["changes"]["error"]["to"]


async def test_each_change_of_a_dataset_writes_one_row(models: Running, service: tuple[Running, Database]) -> None:
    trail = await Trail.begin(service[1])
    content = [{"filename": "1.png", "name": "1", "type": "image", "params": {}}]
    body = {"dataset_name": "cat", "content": content, "creator": "me", "prefix": "", "params": {}}
    create = ParseDict(body, pb.CreateDatasetRequest())
    await models.stub.CreateDataset(create, metadata=models.ann)
    async with refused("PERMISSION_DENIED"):
        await models.stub.CreateDataset(create, metadata=models.bob)
    update = pb.UpdateDatasetRequest(dataset_name="cat", body=pb.UpdateDatasetBody(status="Enabled"))
    await models.stub.UpdateDataset(update, metadata=models.ann)
    await models.stub.DeleteDatasets(pb.DeleteDatasetsRequest(dataset_name_list=["cat"]), metadata=models.ann)
    assert await trail.new() == [("dataset.create", "cat"), ("dataset.update", "cat"), ("dataset.delete", "cat")]
