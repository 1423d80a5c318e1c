"""Checkpoints that trainings make, and datasets that they are made from."""

from uuid import uuid4

from esd.models.v1 import models_pb2 as pb
from tests.services.models.conftest import Running, refused
from tests.services.models.files import safetensors

NETWORK = safetensors(name="lora_unet_mid_block.lora_up.weight")


async def begun(models: Running, name: str) -> str:
    """A training's id, whose network will have this name."""
    training_id = str(uuid4())
    request = pb.CreateTrainedCheckpointRequest(
        checkpoint_id=training_id, name=name, username="ann", roles=["designer"]
    )
    await models.stub.CreateTrainedCheckpoint(request, metadata=models.tokens.service("training"))
    return training_id


async def finished(
    models: Running, training_id: str, *names: str, reason: str = ""
) -> pb.FinishTrainedCheckpointResponse:
    """What became of the checkpoint with these files."""
    files = [pb.TrainedFile(name=name, sha256="ab" * 32) for name in names]
    request = pb.FinishTrainedCheckpointRequest(checkpoint_id=training_id, files=files, reason=reason)
    return await models.stub.FinishTrainedCheckpoint(request, metadata=models.tokens.service("training"))


async def put(models: Running, training_id: str, name: str, content: bytes = NETWORK) -> None:
    await models.blobs.put(f"kohya/train/{training_id}/output/{name}", content)


async def test_the_name_is_taken_when_a_training_begins_and_its_files_lie_where_it_wrote_them(models: Running) -> None:
    training_id = await begun(models, "zog.safetensors")
    assert (await models.show(training_id))["status"] == "Initial"
    async with refused("FAILED_PRECONDITION", "zog.safetensors"):
        await begun(models, "zog.safetensors")
    async with refused("FAILED_PRECONDITION", "is being trained"):
        await models.update(training_id, {"zog.safetensors": []})
    for name in ("zog.safetensors", "zog-000001.safetensors"):
        await put(models, training_id, name)
    for _ in range(2):  # it may be told twice
        told = await finished(models, training_id, "zog.safetensors", "zog-000001.safetensors")
        assert (list(told.names), told.reason) == (["zog.safetensors", "zog-000001.safetensors"], "")
    shown = await models.show(training_id)
    assert (shown["status"], shown["type"], shown["allowed_roles_or_users"]) == ("Active", "Lora", ["designer"])
    assert shown["s3Location"].endswith(f"/kohya/train/{training_id}/output")


async def test_a_training_that_left_nothing_says_why_and_frees_its_name(models: Running) -> None:
    training_id = await begun(models, "zog.safetensors")
    assert (await finished(models, training_id, reason="stopped by ann")).reason == "stopped by ann"
    assert (await models.show(training_id))["params"]["error"] == "stopped by ann"
    await begun(models, "zog.safetensors")


async def test_a_damaged_network_is_refused_and_a_snapshot_whose_name_is_in_use_left_out(models: Running) -> None:
    training_id = await begun(models, "zog.safetensors")
    await put(models, training_id, "zog.safetensors", b"no network")
    assert "zog.safetensors" in (await finished(models, training_id, "zog.safetensors")).reason
    await models.upload("kit-000001.safetensors", NETWORK, kind="Lora")
    other = await begun(models, "kit.safetensors")
    for name in ("kit.safetensors", "kit-000001.safetensors"):
        await put(models, other, name)
    assert list((await finished(models, other, "kit.safetensors", "kit-000001.safetensors")).names) == [
        "kit.safetensors"
    ]


async def test_a_network_that_is_gone_from_the_store_ends_the_checkpoint_which_says_so(models: Running) -> None:
    training_id = await begun(models, "zog.safetensors")
    await put(models, training_id, "zog-000001.safetensors")
    for _ in range(2):
        told = await finished(models, training_id, "zog.safetensors", "zog-000001.safetensors")
        assert (list(told.names), told.reason) == ([], "zog.safetensors is not in the object store any more")
    assert (await models.show(training_id))["status"] == "Disabled"


async def test_only_what_is_not_active_is_deleted_with_its_training(models: Running) -> None:
    active, initial = await begun(models, "a.safetensors"), await begun(models, "b.safetensors")
    for training_id, name in ((active, "a.safetensors"), (initial, "b.safetensors")):
        await put(models, training_id, name)
    await finished(models, active, "a.safetensors")
    for training_id, was_kept in ((active, True), (initial, False), (initial, False)):
        request = pb.DeleteTrainedCheckpointRequest(checkpoint_id=training_id)
        answer = await models.stub.DeleteTrainedCheckpoint(request, metadata=models.tokens.service("training"))
        assert answer.was_kept == was_kept
    await models.emptied(f"kohya/train/{initial}/")
    async with refused("PERMISSION_DENIED"):
        await models.stub.DeleteTrainedCheckpoint(request, metadata=models.admin)
