"""Speaks TrainingService: every RPC answers that it is not implemented yet, as the generated base does."""

from __future__ import annotations

from esd.training.v1 import training_pb2_grpc as rpc


class TrainingServicer(rpc.TrainingServiceServicer):
    """The trainings' RPCs."""
