"""Speaks esd.models.v1: parses, calls the domain, replies. Datasets' RPCs are in dataset_servicer.py."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import grpc
from google.protobuf import struct_pb2

from esd.models.v1 import models_pb2 as pb
from esd.models.v1 import models_pb2_grpc
from services.common.errors import InvalidArgument
from services.common.status import set_reply
from services.common.structs import json_value, plain, struct
from services.common.viewer import Viewer
from services.models.checks import Tag
from services.models.dataset_servicer import DatasetRpcs
from services.models.datasets import Datasets
from services.models.domain import Models, NewFile, Resolved
from services.models.imports import Imports
from services.models.messages import numbers_as_text, viewer
from services.models.rows import Checkpoint
from services.models.store import Filters
from services.models.trained import Trained, TrainedFile

Context = grpc.aio.ServicerContext[Any, Any]
MAX_PAGE = 2**31 - 1
MAX_PER_PAGE = 1000  # each with params of up to 64 KiB


class ModelsServicer(DatasetRpcs, models_pb2_grpc.ModelsServiceServicer):
    """The service's RPCs."""

    def __init__(self, models: Models, imports: Imports, datasets: Datasets, trained: Trained) -> None:
        super().__init__(datasets)
        self._models = models
        self._imports = imports
        self._trained = trained

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Context) -> pb.ListCheckpointsResponse:
        page = _count("page", request.page, 1, MAX_PAGE)
        per_page = _count("per_page", request.per_page, 10, MAX_PER_PAGE)
        filters = Filters(
            statuses=[status for status in request.status if status],
            types=[kind for kind in request.types if kind],
            owners=[role for role in request.roles if role],
        )
        rows, total = await self._models.list_checkpoints(viewer(), page, per_page, filters, request.username)
        return pb.ListCheckpointsResponse(
            page=page,
            per_page=per_page,
            pages=-(-total // per_page),
            total=total,
            checkpoints=[_list_item(row, self._models.s3_location(row)) for row in rows],
        )

    async def CreateCheckpoint(
        self, request: pb.CreateCheckpointRequest, context: Context
    ) -> pb.CreateCheckpointResponse:
        if request.urls:
            await self._imports.create_imports(
                viewer(), request.checkpoint_type, list(request.urls), dict(request.sha256), plain(request.params)
            )
            set_reply(202)
            return pb.CreateCheckpointResponse()
        files = [NewFile(file.filename, file.parts_number) for file in request.filenames]
        row, urls = await self._models.create_checkpoint(
            viewer(), request.checkpoint_type, files, plain(request.params)
        )
        return pb.CreateCheckpointResponse(checkpoint=self._message(row), s3_presign_url=struct(urls))

    async def UpdateCheckpoint(
        self, request: pb.UpdateCheckpointRequest, context: Context
    ) -> pb.UpdateCheckpointResponse:
        body = request.body
        row = await self._models.get_checkpoint(viewer(), request.checkpoint_id)
        if body.HasField("status"):
            row, before = await self._models.update_status(row, body.status, _tags(body))
            shown = self._message(row, before)
            data = pb.UpdateCheckpointResponse.Data(checkpoint=shown)
            return pb.UpdateCheckpointResponse(status_code=200, message="OK", checkpoint=shown, data=data)
        status, message = 200, "OK"
        if body.HasField("name"):
            renamed = await self._models.rename(row, body.name)
            status, message = (202, "rename is processing, please wait") if renamed else (200, "no need to update")
        set_reply(status)
        return pb.UpdateCheckpointResponse(status_code=status, message=message)

    async def DeleteCheckpoints(
        self, request: pb.DeleteCheckpointsRequest, context: Context
    ) -> pb.DeleteCheckpointsResponse:
        await self._models.delete_checkpoints(viewer(), list(request.checkpoint_id_list))
        return pb.DeleteCheckpointsResponse()

    async def ResolveCheckpoints(
        self, request: pb.ResolveCheckpointsRequest, context: Context
    ) -> pb.ResolveCheckpointsResponse:
        owner = Viewer(request.username, list(request.roles), request.sees_everything)
        names = [(name.type, name.name) for name in request.names]
        found = await self._models.resolve_checkpoints(names, owner)
        return pb.ResolveCheckpointsResponse(
            checkpoints=[_resolved(one) for one in found if one],
            missing=[name for name, one in zip(request.names, found, strict=True) if not one],
        )

    async def CreateTrainedCheckpoint(
        self, request: pb.CreateTrainedCheckpointRequest, context: Context
    ) -> pb.CreateTrainedCheckpointResponse:
        owner = Viewer(request.username, list(request.roles))
        await self._trained.create_checkpoint(UUID(request.checkpoint_id), request.name, owner)
        return pb.CreateTrainedCheckpointResponse()

    async def FinishTrainedCheckpoint(
        self, request: pb.FinishTrainedCheckpointRequest, context: Context
    ) -> pb.FinishTrainedCheckpointResponse:
        files = [TrainedFile(file.name, file.sha256) for file in request.files]
        names, reason = await self._trained.finish_checkpoint(UUID(request.checkpoint_id), files, request.reason)
        return pb.FinishTrainedCheckpointResponse(names=names, reason=reason)

    async def DeleteTrainedCheckpoint(
        self, request: pb.DeleteTrainedCheckpointRequest, context: Context
    ) -> pb.DeleteTrainedCheckpointResponse:
        was_kept = await self._trained.delete_checkpoint(UUID(request.checkpoint_id))
        return pb.DeleteTrainedCheckpointResponse(was_kept=was_kept)

    def _message(self, row: Checkpoint, status: str | None = None) -> pb.Checkpoint:
        return pb.Checkpoint(
            id=str(row.id),
            type=row.type,
            s3_location=self._models.s3_location(row),
            status=status or row.status,
            params=struct(row.params),
        )


def _count(name: str, text: str, default: int, maximum: int) -> int:
    """A number of a query, which arrives as text and may be empty."""
    if not text.strip():
        return default
    if not re.fullmatch(r"[0-9]{1,10}", text.strip(), re.ASCII) or not 1 <= int(text) <= maximum:
        raise InvalidArgument(f'{name}: "{text}" is not a whole number from 1 to {maximum}')
    return int(text)


def _tags(body: pb.UpdateCheckpointBody) -> dict[str, list[Tag]]:
    return {
        filename: [_tag(f'multi_parts_tags["{filename}"][{index}]', entry) for index, entry in enumerate(tags.values)]
        for filename, tags in body.multi_parts_tags.items()
    }


def _tag(where: str, entry: struct_pb2.Value) -> Tag:
    if entry.WhichOneof("kind") != "struct_value":
        raise InvalidArgument(f"{where} is not an object with ETag and PartNumber")
    fields = entry.struct_value.fields
    if missing := [name for name in ("ETag", "PartNumber") if name not in fields]:
        raise InvalidArgument(f"{where} has no {' and no '.join(missing)}")
    etag, number = fields["ETag"], fields["PartNumber"]
    if etag.WhichOneof("kind") != "string_value" or not etag.string_value.strip('" '):
        raise InvalidArgument(f"{where}: ETag is not the text that the upload of the part answered")
    if number.WhichOneof("kind") != "number_value" or number.number_value not in range(1, 10_001):
        raise InvalidArgument(f"{where}: PartNumber is not a whole number from 1 to 10000")
    return Tag(int(number.number_value), etag.string_value.strip('" '))


def _list_item(row: Checkpoint, s3_location: str) -> pb.CheckpointListItem:
    return pb.CheckpointListItem(
        id=str(row.id),
        s3_location=s3_location,
        type=row.type,
        status=row.status,
        name=json_value(row.names or None),
        created=f"{row.created_at.timestamp():.6f}",
        params=json_value(numbers_as_text(row.params)),
        allowed_roles_or_users=row.owners,
    )


def _resolved(found: Resolved) -> pb.ResolvedCheckpoint:
    file = found.file
    return pb.ResolvedCheckpoint(
        id=str(file.checkpoint_id),
        type=file.type,
        name=file.name,
        all_names=file.all_names,
        s3_location=found.s3_location,
        key=file.key,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
    )
