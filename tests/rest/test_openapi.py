"""schemathesis over our OpenAPI document, through the real gateway: nothing that a client sends is our fault, and every
answer is one that the document tells of."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error, response_schema_conformance, status_code_conformance

from deploy.local.stack import Stack
from gateway.openapi import openapi
from tests.e2e.conftest import Api
from tests.protos import ROOT

pytestmark = pytest.mark.slow

DOCUMENT = openapi((ROOT / "esd" / "descriptors.binpb").read_bytes(), "/prod")
TOO_MANY = 10_000  # instances that no endpoint may have
api = schemathesis.openapi.from_dict(DOCUMENT)


@api.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_nothing_that_fits_or_breaks_the_document_is_a_server_error(
    case: Any, stack: Stack, session: requests.Session
) -> None:
    if case.operation.label == "POST /endpoints" and isinstance(case.body, dict):
        case.body["initial_instance_count"] = TOO_MANY  # a sound one would start workers
    answer = case.call(base_url=f"{stack.url}/prod", session=session)
    case.validate_response(answer, checks=[not_a_server_error, status_code_conformance, response_schema_conformance])
    if answer.status_code != 204:
        assert isinstance(answer.json(), dict), "every other answer is JSON"


def test_the_document_is_served(stack: Stack, admin: Api) -> None:
    answer = httpx.get(f"{stack.url}/prod/api", headers={"x-api-key": admin.key})
    assert answer.json() == DOCUMENT
