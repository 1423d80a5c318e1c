"""The OpenAPI document: that it tells of exactly the routes there are, and how it is served."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import schemathesis

from gateway.openapi import openapi
from tests.gateway.conftest import Gateway
from tests.protos import ROOT, methods, route


def document() -> Any:
    """The document as the gateway renders it."""
    return openapi((ROOT / "esd" / "descriptors.binpb").read_bytes())


def test_it_has_every_route_with_a_description_and_what_it_needs() -> None:
    described = {
        (verb.upper(), path): operation
        for path, item in document()["paths"].items()
        for verb, operation in item.items()
    }
    expected = {(found.verb, found.path): method for method in methods() if (found := route(method))}
    assert described.keys() == expected.keys()
    for at, operation in described.items():
        assert operation["operationId"] == expected[at].name
        assert operation["description"].startswith(expected[at].name)
        in_path = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", at[1]))
    assert described["GET", "/users"]["x-permissions"] == ["user:all", "user:list"]
    assert list(described["DELETE", "/users"]["responses"]) == ["204", "4XX", "5XX"]


def test_it_has_every_status_that_an_answer_can_have() -> None:
    paths = document()["paths"]
    for path, verb, statuses in (
        ("/checkpoints", "post", {"201": "Created", "202": "Checkpoint creation in progress, please check later"}),
        ("/checkpoints/{checkpoint_id}", "put", {"200": "OK", "202": "rename is processing, please wait"}),
        ("/inferences", "post", {"201": "Created", "200": "OK", "202": "Accepted"}),
        ("/inferences/{job_id}/start", "put", {"200": "OK", "202": "Accepted"}),
    ):
        responses = paths[path][verb]["responses"]
        found = {status: response["description"] for status, response in responses.items() if status.isdigit()}
        assert found == statuses
        schemas = [responses[status]["content"]["application/json"]["schema"] for status in statuses]
        assert all(schema == schemas[0] for schema in schemas)


def test_the_rules_of_a_request_are_in_its_schema() -> None:
    schemas = document()["components"]["schemas"]
    dataset = schemas["CreateDatasetRequest"]
    assert dataset["required"] == ["dataset_name", "content", "params"]
    assert dataset["properties"]["dataset_name"] | {"description": ""} == {
        "type": "string",
        "minLength": 1,
        "maxLength": 20,
        "pattern": "^[A-Za-z][A-Za-z0-9_-]*$",
        "description": "",
    }
    assert dataset["properties"]["content"]["items"] == {"$ref": "#/components/schemas/DatasetUpload"}
    assert schemas["CheckpointFile"]["properties"]["parts_number"]["maximum"] == 100
    assert "VAE" in schemas["CreateCheckpointRequest"]["properties"]["checkpoint_type"]["enum"]


def test_only_what_is_safe_to_send_again_takes_an_idempotency_key() -> None:
    taking = [
        (verb, path)
        for path, operations in document()["paths"].items()
        for verb, operation in operations.items()
        if any(parameter["name"] == "Idempotency-Key" for parameter in operation["parameters"])
    ]
    assert taking == [("post", "/inferences")]


def test_it_is_a_sound_document() -> None:
    schemathesis.openapi.from_dict(document()).validate()


async def test_it_is_served_to_holders_of_a_key_only(gateway: Gateway) -> None:
    for path in ("/api", "/prod/api", "/prod//api"):
        answer = await gateway.client.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-api-version"] == "1.5.0"
        assert answer.headers["access-control-allow-origin"] == "*"
        served = json.loads(answer.content)
        assert served == document() | {"servers": [{"url": "/prod"}]}
    assert (await gateway.webui.get("/api")).status_code == 200
    assert (await gateway.client.post("/api")).status_code == 404
    async with httpx.AsyncClient(base_url=gateway.client.base_url) as anonymous:
        assert (await anonymous.get("/api")).json() == {"statusCode": 403, "message": "Forbidden"}
