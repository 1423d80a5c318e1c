"""Speaks the dataset RPCs of esd.models.v1: parses, calls the domain, replies."""

from __future__ import annotations

from typing import Any

import grpc

from esd.models.v1 import models_pb2 as pb
from services.common.structs import json_value, plain, struct
from services.common.viewer import Viewer
from services.models.dataset_store import Dataset, DatasetItem
from services.models.datasets import Datasets, NewItem
from services.models.messages import numbers_as_text, viewer

Context = grpc.aio.ServicerContext[Any, Any]


class DatasetRpcs:
    """The datasets' half of ModelsService."""

    def __init__(self, datasets: Datasets) -> None:
        self._datasets = datasets

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Context) -> pb.ListDatasetsResponse:
        rows, key = await self._datasets.list_datasets(
            viewer(), request.dataset_status, request.limit, request.exclusive_start_key
        )
        return pb.ListDatasetsResponse(
            datasets=[struct(self._shown(row)) for row in rows], last_evaluated_key=json_value(key)
        )

    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: Context) -> pb.CreateDatasetResponse:
        files = [NewItem(file.filename, file.name, file.type, plain(file.params)) for file in request.content]
        urls = await self._datasets.create_dataset(
            viewer(), request.dataset_name, request.prefix, files, plain(request.params)
        )
        return pb.CreateDatasetResponse(dataset_name=request.dataset_name, s3_presign_url=urls)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        row, items = await self._datasets.get_dataset(viewer(), request.dataset_name)
        own = {"dataset_name": row.name, "prefix": row.prefix, "data": [_item(item, url) for item, url in items]}
        return pb.GetDatasetResponse(data=struct(self._shown(row) | own))

    async def UpdateDataset(self, request: pb.UpdateDatasetRequest, context: Context) -> pb.UpdateDatasetResponse:
        await self._datasets.update_status(viewer(), request.dataset_name, request.body.status)
        return pb.UpdateDatasetResponse(dataset_name=request.dataset_name, status=request.body.status)

    async def DeleteDatasets(self, request: pb.DeleteDatasetsRequest, context: Context) -> pb.DeleteDatasetsResponse:
        await self._datasets.delete_datasets(viewer(), list(request.dataset_name_list))
        return pb.DeleteDatasetsResponse()

    async def ResolveDataset(self, request: pb.ResolveDatasetRequest, context: Context) -> pb.ResolveDatasetResponse:
        owner = Viewer(request.username, list(request.roles), request.sees_everything)
        prefix = await self._datasets.resolve_dataset(owner, request.dataset_name)
        return pb.ResolveDatasetResponse(prefix=prefix)

    def _shown(self, row: Dataset) -> dict[str, Any]:
        """What lists show of a dataset. Its params are merged in, where they have no name of our own."""
        description = row.params.get("description")
        own = {
            "datasetName": row.name,
            "s3": self._datasets.s3_location(row),
            "status": row.status,
            "timestamp": _timestamp(row),
            "description": description if isinstance(description, str) else "",
        }
        return numbers_as_text(row.params) | own


def _item(item: DatasetItem, preview_url: str) -> dict[str, Any]:
    own = {
        "key": f"{_timestamp(item)}_{item.name}",
        "name": item.name,
        "type": item.type,
        "preview_url": preview_url,
        "dataStatus": item.status,
    }
    return numbers_as_text(item.params) | own


def _timestamp(row: Dataset | DatasetItem) -> str:
    return f"{row.created_at.timestamp():.6f}"
