"""The training service before it is built: every RPC is there and says so."""

import grpc
import pytest

from esd.training.v1 import training_pb2, training_pb2_grpc
from services.training.servicer import TrainingServicer
from tests.serving import Tokens, serving


async def test_a_declared_rpc_answers_that_it_is_not_implemented_yet(tokens: Tokens) -> None:
    def add(server: grpc.aio.Server) -> None:
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(), server)

    async with serving(add, tokens.verifier()) as channel:
        stub = training_pb2_grpc.TrainingServiceStub(channel)
        request = training_pb2.ListTrainingJobsRequest()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListTrainingJobs(request, metadata=tokens.user("ann", ["train:all"]))
        assert (refused.value.code(), refused.value.details()) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "not implemented yet",
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListTrainingJobs(request, metadata=tokens.user("ann", []))
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
