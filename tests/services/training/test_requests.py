"""Creating, showing, listing and deleting trainings, in both shapes, and everything that is refused."""

import asyncio
import tomllib
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from sqlalchemy import text

from esd.training.v1 import training_pb2 as pb
from services.training import domain
from tests.services.training.conftest import CHECKPOINT, MODEL, Service, next_of

INVALID, FORBIDDEN = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED


def client(**changes: Any) -> dict[str, Any]:
    """The params of the WebUI client's shape."""
    params = {"training_instance_type": "ml.g4dn.2xlarge", "model": MODEL, "dataset": "lego", "fm_type": "SD_1_5"}
    config = {
        "saving_arguments": {"output_name": "lego-lora", "save_every_n_epochs": 1000},
        "training_arguments": {"max_train_epochs": 100},
    }
    return {"training_params": params | changes.pop("training_params", {}), "config_params": config | changes}


async def test_the_documents_shape_begins_a_training(service: Service) -> None:
    params = service.document(output_name="demo", optimizer_type="AdamW8bit", save_every_n_epochs=50)
    created = await service.create(params)
    folder = f"s3://{service.blobs.bucket}/kohya/train/{created.id}"
    assert created.status == "Training"
    assert float(created.created) > 1.7e9
    assert (created.input_location, created.output_location) == (f"{folder}/input", f"{folder}/output")
    shown = MessageToDict(created.params)
    assert shown["training_type"] == "kohya"
    toml_path = {"s3_toml_path": f"{folder}/input/kohya_config_cloud.toml"}
    assert shown["training_params"] == params["training_params"] | toml_path
    assert shown["config_params"]["training"] == params["config_params"]["training"]
    assert shown["config_params"]["saving_arguments"] == {"output_name": "demo"}
    [task] = service.world.started
    assert (task.task_id, task.instance_type, task.max_attempts) == (created.id, "ml.g5.2xlarge", 3)
    assert service.world.names == {created.id: "demo.safetensors"}
    toml = tomllib.loads((await service.blobs.get(f"kohya/train/{created.id}/input/kohya_config_cloud.toml")).decode())
    assert toml["training"] | {"max_train_epochs": 3, "save_every_n_epochs": 50, "network_dim": 32} == toml["training"]


async def test_the_clients_shape_begins_a_training_too(service: Service) -> None:
    created = await service.create(client(training_params={"fm_type": "sd_xl"}), lora_train_type="KOHYA")
    shown = MessageToDict(created.params)
    bucket = service.blobs.bucket
    assert shown["training_params"] == {
        "training_instance_type": "ml.g4dn.2xlarge",
        "fm_type": "sd_xl",
        "s3_model_path": f"s3://{bucket}/Stable-diffusion/checkpoint/custom/{CHECKPOINT}/{MODEL}",
        "s3_data_path": f"s3://{bucket}/dataset/lego",
        "s3_toml_path": f"s3://{bucket}/kohya/train/{created.id}/input/kohya_config_cloud_xl.toml",
    }
    assert shown["config_params"]["saving_arguments"] == {"output_name": "lego-lora", "save_every_n_epochs": 1000}
    flat = {"output_name": "lego-lora", "save_every_n_epochs": 1000, "max_train_epochs": 100}
    assert shown["config_params"]["training"] == flat
    toml = await service.blobs.get(f"kohya/train/{created.id}/input/kohya_config_cloud_xl.toml")
    assert tomllib.loads(toml.decode())["training"]["no_half_vae"] is True


async def test_of_contradicting_sections_training_gives_way_and_the_last_by_name_wins(service: Service) -> None:
    sections = {f"{letter}_arguments": {"seed": number} for number, letter in enumerate("ugczlvbx")}
    config = client()["config_params"] | sections | {"training": {"seed": 99, "output_name": "other", "network_dim": 7}}
    created = await service.create(client() | {"config_params": config})
    shown = MessageToDict(created.params)["config_params"]["training"]
    flat = {"output_name": "lego-lora", "save_every_n_epochs": 1000, "max_train_epochs": 100}
    assert shown == flat | {"seed": 3, "network_dim": 7}  # the last by name is z


async def test_without_a_configuration_it_is_the_template(service: Service) -> None:
    params = service.document()
    del params["config_params"]
    created = await service.create(params)
    assert service.world.names[created.id] == "output_name.safetensors"
    assert MessageToDict(created.params)["config_params"]["saving_arguments"]["output_name"] == "output_name"


async def test_keys_of_places_that_a_trainer_has_of_its_own_are_noted(service: Service) -> None:
    created = await service.create(service.document(train_data_dir="/data", output_dir="/out"))
    async with service.trainer(created.id) as trainer:
        notes = MessageToDict(trainer.welcome.config)["notes"]
    assert [note.split(":")[0] for note in notes] == ["xformers", "train_data_dir", "output_dir"]


async def test_keys_to_other_services_are_not_kept(service: Service) -> None:
    config = client()["config_params"] | {"logging_arguments": {"wandb_api_key": "s3cr3t", "log_with": "wandb"}}
    created = await service.create(client() | {"config_params": config})
    shown = MessageToDict((await service.get(created.id)).params)
    assert shown["config_params"]["logging_arguments"] == {"log_with": "wandb"}
    toml = await service.blobs.get(f"kohya/train/{created.id}/input/kohya_config_cloud.toml")
    assert b"s3cr3t" not in toml
    assert "s3cr3t" not in str(shown)


async def test_steps_of_the_request_win_over_epochs_of_the_template(service: Service) -> None:
    params = service.document(max_train_steps=7)
    del params["config_params"]["training"]["max_train_epochs"]
    created = await service.create(params)
    async with service.trainer(created.id) as trainer:
        config = MessageToDict(trainer.welcome.config)
    assert (config["max_train_steps"], config["max_train_epochs"]) == (7, None)


async def test_a_key_that_is_null_or_an_empty_text_is_as_if_it_were_not_given(service: Service) -> None:
    params = service.document(max_train_epochs=None, max_train_steps="", seed="", network_dim=7)
    created = await service.create(params)
    assert MessageToDict(created.params)["config_params"]["training"] == params["config_params"]["training"]
    async with service.trainer(created.id) as trainer:
        config = MessageToDict(trainer.welcome.config)
    assert (config["max_train_epochs"], config["seed"], config["network_dim"]) == (10, 1337, 7)  # the template's


WRONG_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"s3_model_path": ""}, "Missing train parameters, fm_type, s3_model_path and s3_data_path should be in"),
    ({"fm_type": None}, "Missing train parameters, fm_type, s3_model_path and s3_data_path should be in"),
    ({"fm_type": "sd_3"}, "Invalid fm_type sd_3, the valid values are sd_1_5 and sd_xl"),
    ({"s3_model_path": "s3://elsewhere/x"}, 'Model not found: s3_model_path "s3://elsewhere/x" names no active'),
    ({"s3_data_path": "s3://elsewhere/dataset/lego"}, "Dataset not found: s3_data_path"),
    ({"s3_data_path": "dataset/nothing"}, "Dataset not found: s3_data_path"),
    ({"s3_data_path": "dataset/lego/../others"}, "Dataset not found: s3_data_path"),
]


async def test_wrong_params_of_the_document_are_named(service: Service) -> None:
    for change, sentence in WRONG_PARAMS:
        params = service.document()
        params["training_params"] |= change
        code, details = await service.refused(params)
        assert (code, details[: len(sentence)]) == (INVALID, sentence)
    assert service.world.started == []
    assert service.world.names == {}


async def test_a_model_is_only_found_in_its_own_folder(service: Service) -> None:
    params = service.document()
    other = f"s3://{service.blobs.bucket}/Stable-diffusion/checkpoint/custom/{uuid4()}/{MODEL}"
    params["training_params"]["s3_model_path"] = other
    assert (await service.refused(params))[1].startswith(f'Model not found: s3_model_path "{other}"')


WRONG_PARAMS_OF_THE_CLIENT: list[tuple[dict[str, Any], str]] = [
    (client(training_params={"model": ""}), "Missing training_params.model"),
    (client(training_params={"dataset": 0}), "Missing training_params.dataset"),
    (client(training_params={"training_instance_type": None}), "Missing training_params.training_instance_type"),
    (client(training_params={"model": "other.safetensors"}), "Model not found"),
    (client(training_params={"dataset": "nothing"}), "Dataset not found"),
    (client(training_params={"fm_type": "sd_3"}), "Invalid fm_type sd_3, the valid values are sd_1_5 and sd_xl"),
    (client(training_arguments={}), "Missing config_params.training_arguments.max_train_epochs"),
    (client(saving_arguments={"output_name": "x"}), "Missing config_params.saving_arguments.save_every_n_epochs"),
    (client(other=3), "config_params.other is no object with kohya's keys"),
    ({}, "Missing train parameters, fm_type, s3_model_path and s3_data_path should be in training_params"),
    ({"training_params": "x"}, "params.training_params is no object"),
    ({"config_params": {"training": {"x": [[]] * 1000}}}, "params: 1004 values are too many, 1000 are allowed"),
    (client(other={"x": "y" * 40_000}), "params: 40"),
]


async def test_wrong_params_of_the_client_are_named(service: Service) -> None:
    for params, sentence in WRONG_PARAMS_OF_THE_CLIENT:
        code, details = await service.refused(params)
        assert (code, details[: len(sentence)]) == (INVALID, sentence)


WRONG_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"network_dim": "many"}, 'network_dim "many": input should be a valid integer'),
    ({"output_name": "../x"}, 'output_name "../x" cannot be the name of a file'),
    ({"v2": True}, "v2 true: Stable Diffusion 2 is not known here"),
    ({"vae": "/etc/passwd"}, "vae '/etc/passwd': the VAE is the base model's own; leave it out"),
    ({"reg_data_dir": "/etc"}, 'Dataset not found: reg_data_dir "/etc" names no dataset that you may use'),
]


async def test_wrong_keys_are_named_before_anything_begins(service: Service) -> None:
    for keys, sentence in WRONG_KEYS:
        code, details = await service.refused(service.document(**keys))
        assert (code, details[: len(sentence)]) == (INVALID, sentence)
    assert service.world.names == {}


async def test_another_type_is_refused_first(service: Service) -> None:
    refusal = await service.refused({}, lora_train_type="dreambooth")
    assert refusal == (INVALID, "Invalid lora train type: dreambooth, the valid value is kohya.")


async def test_somebody_elses_model_or_dataset_is_not_there(service: Service) -> None:
    stranger = service.tokens.user("eve", ["train:all"], ["Other"])
    assert (await service.refused(service.document(), stranger))[1].startswith("Model not found")
    assert (await service.refused(client(), stranger))[1] == "Model not found"
    of_nobody = service.document()
    of_nobody["training_params"]["s3_data_path"] = "dataset/nobodys"
    assert (await service.refused(of_nobody))[1].startswith("Dataset not found")
    assert (await service.refused(client(training_params={"dataset": "nobodys"})))[1] == "Dataset not found"
    assert (await service.refused(service.document(reg_data_dir="dataset/nobodys")))[1].startswith("Dataset not found")
    assert await service.create(of_nobody, metadata=service.user("root", "user:all"))


async def test_a_name_in_use_is_refused(service: Service) -> None:
    await service.create(service.document(output_name="same"))
    code, details = await service.refused(service.document(output_name="same"))
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, "same.safetensors already exists")


async def test_a_user_has_so_many_trainings_that_have_not_ended(service: Service) -> None:
    first, *_ = [await service.create(service.document(output_name=f"t{number}")) for number in range(3)]
    code, details = await service.refused(service.document(output_name="t3"))
    assert (code, details) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "3 trainings of ann have not ended; at most 3 are possible",
    )
    assert "t3.safetensors" not in service.world.names
    assert await service.create(service.document(output_name="t3"), metadata=service.user("root", "user:all"))
    await service.stub.StopTrainingJob(pb.StopTrainingJobRequest(job_id=first.id), metadata=service.user())
    assert await service.create(service.document(output_name="t4"))


async def test_without_compute_nothing_is_left_once_it_is_back(service: Service) -> None:
    service.world.is_away = True
    code, _ = await service.refused(service.document(output_name="gone"))
    assert code == grpc.StatusCode.UNAVAILABLE
    await assert_unseen(service, *service.world.names)


async def test_of_a_request_that_was_cut_short_nothing_is_left(service: Service) -> None:
    service.world.is_stuck = True
    asking = asyncio.create_task(service.create(service.document(output_name="gone")))
    async with asyncio.timeout(60):
        await service.world.stuck.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await assert_unseen(service, *service.world.names)


async def assert_unseen(service: Service, job_id: str) -> None:
    """A training that has not begun is not there for anybody, and goes with its name and objects when it can."""
    listed = await service.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(), metadata=service.user())
    assert list(listed.trainings) == []
    with pytest.raises(grpc.aio.AioRpcError, match=f"Job with id {job_id} not found"):
        await service.get(job_id)
    service.world.is_away = service.world.is_stuck = False
    await service.until_gone(job_id)
    assert service.world.names == {}
    async with service.database.transaction() as session:
        prefixes = set(await session.scalars(text("SELECT prefix FROM leftover")))
    assert prefixes == {f"kohya/train/{job_id}/{part}/" for part in ("input", "work", "output")}


async def test_a_deadline_goes_to_the_task_but_not_beyond_the_setting(service: Service) -> None:
    wanted = {(await service.create(deadline_seconds=60)).id: 60}
    wanted |= {(await service.create()).id: 7200, (await service.create(deadline_seconds=9999)).id: 7200}
    assert {task.task_id: task.deadline_seconds for task in service.world.started} == wanted


async def test_a_list_ends_where_the_params_of_its_trainings_are_too_many_values(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [(await service.create(service.document(extra=list(range(200))))).id for _ in range(3)]
    monkeypatch.setattr(domain, "_MAX_PAGE_VALUES", 500)
    first = await service.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(), metadata=service.user())
    rest = pb.ListTrainingJobsRequest(exclusive_start_key=first.last_evaluated_key.string_value)
    second = await service.stub.ListTrainingJobs(rest, metadata=service.user())
    assert [[item.id for item in page.trainings] for page in (first, second)] == [ids[:0:-1], ids[:1]]
    assert second.last_evaluated_key.WhichOneof("kind") == "null_value"


async def test_a_training_is_shown_and_listed_for_its_owner_and_for_administrators(service: Service) -> None:
    first, second = await service.create(), await service.create()
    other = await service.create(metadata=service.user("bob"))
    shown = await service.get(first.id)
    assert (shown.id, shown.checkpoint_id, shown.model_id, shown.train_type) == (
        first.id, first.id, "kohya", "Stable-diffusion",
    )  # fmt: skip
    assert shown.timestamp == first.created

    async def ids(metadata: Any, **request: Any) -> list[str]:
        listed = await service.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(**request), metadata=metadata)
        return [item.id for item in listed.trainings]

    assert await ids(service.user()) == [second.id, first.id]
    assert await ids(service.user("bob")) == [other.id]
    assert await ids(service.user("root", "user:all")) == [other.id, second.id, first.id]
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await service.get(first.id, service.user("bob"))
    assert refusal.value.code() == FORBIDDEN
    page = await service.stub.ListTrainingJobs(pb.ListTrainingJobsRequest(limit="1"), metadata=service.user())
    key = page.last_evaluated_key.string_value
    assert [item.model_name for item in page.trainings] == ["not_applied"]
    assert page.trainings[0].sagemaker_train_name.startswith("kohya-20")
    assert await ids(service.user(), limit="1", exclusive_start_key=key) == [first.id]


async def test_unknown_ids_have_the_words_of_the_original(service: Service) -> None:
    for call, request, words in (
        (service.stub.GetTrainingJob, pb.GetTrainingJobRequest(job_id="x"), "Job with id x not found"),
        (service.stub.StopTrainingJob, pb.StopTrainingJobRequest(job_id="x"), "no such train job with id(x)"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(request, metadata=service.user())
        assert (refusal.value.code(), refusal.value.details()) == (grpc.StatusCode.NOT_FOUND, words)


async def test_deleting_removes_the_input_and_never_the_model_or_the_dataset(service: Service) -> None:
    created = await service.create()
    await service.stub.DeleteTrainingJobs(
        pb.DeleteTrainingJobsRequest(training_id_list=[created.id, "unknown", str(uuid4())]), metadata=service.user()
    )
    assert await service.keys(f"kohya/train/{created.id}/") == []
    assert service.world.stopped == [created.id]
    assert service.world.deleted == [created.id]
    assert await service.keys("dataset/lego/") == ["10_lego/a.png", "10_lego/a.txt"]
    assert await service.keys("Stable-diffusion/") != []
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await service.get(created.id)
    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND


async def test_nobody_sees_what_happens_in_somebody_elses_training(service: Service) -> None:
    other = await service.create(metadata=service.user("bob"))
    metrics = service.stub.GetTrainingMetrics(pb.GetTrainingMetricsRequest(job_id=other.id), metadata=service.user())
    events = service.stub.WatchTrainingJob(pb.WatchTrainingJobRequest(job_id=other.id), metadata=service.user())
    assert await next_of(events) is None
    assert [await call.code() for call in (metrics, events)] == [FORBIDDEN, FORBIDDEN]


async def test_nobody_stops_or_deletes_somebody_elses_training(service: Service) -> None:
    mine, other = await service.create(), await service.create(metadata=service.user("bob"))
    for call, request in (
        (service.stub.StopTrainingJob, pb.StopTrainingJobRequest(job_id=other.id)),
        (service.stub.DeleteTrainingJobs, pb.DeleteTrainingJobsRequest(training_id_list=[mine.id, other.id])),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(request, metadata=service.user())
        assert refusal.value.code() == FORBIDDEN
    assert (await service.get(mine.id)).id == mine.id
