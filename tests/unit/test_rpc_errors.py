"""What becomes of another service's refusal."""

from __future__ import annotations

import grpc
import pytest

from services.common.errors import EsdError, NotFound, Unavailable
from services.common.rpc_errors import domain_error


def failed(code: grpc.StatusCode) -> EsdError:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="its own words")
    return domain_error(error, "models")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_refusal_of_our_own_token_is_not_the_users_fault(code: grpc.StatusCode) -> None:
    error = failed(code)
    assert type(error) is Unavailable
    assert str(error) == "the models service refuses this service at present"


def test_what_another_service_does_not_find_is_not_found_in_its_words() -> None:
    error = failed(grpc.StatusCode.NOT_FOUND)
    assert (type(error), str(error)) == (NotFound, "its own words")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_service_that_is_away_or_too_slow_does_not_answer(code: grpc.StatusCode) -> None:
    error = failed(code)
    assert (type(error), str(error)) == (Unavailable, "the models service does not answer at present")
