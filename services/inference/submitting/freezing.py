"""A payload on its way into the queue: fetched from where the client put it, checked, kept where no client writes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

from services.common import payloads
from services.common.blobs import STORE_IS_AWAY, BlobNotFound, Blobs, BlobTooLarge
from services.common.errors import FailedPrecondition, InvalidArgument, Unavailable
from services.inference.rows import ASYNC, Job, now
from services.inference.submitting.payload import MAX_BYTES, CheckedPayload, check_json, check_payload

_MAX_IN_ROW_BYTES = 32 * 1024
_STORE_SECONDS = 30.0  # for which a client waits; a store that is cut off would take minutes to be given up


@dataclass(frozen=True)
class Frozen:
    """A checked payload: the arguments of `Job.queue`, and by their keys the objects that are to be there before."""

    arguments: dict[str, Any]
    objects: dict[str, bytes]


class Freezer:
    """Small payloads stay in the job's row, large ones become objects."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def check_json(self, text: str) -> None:
        """Refuses what is no JSON.

        Raises:
            InvalidArgument.
        """
        await asyncio.to_thread(check_json, text)

    async def fetch(self, job: Job) -> bytes:
        """What the client uploaded.

        Raises:
            InvalidArgument: it is too large, or empty. FailedPrecondition: there is nothing. Unavailable: the store is
            away.
        """
        try:
            content: bytes = await _in_time(self._blobs.get(job.input_key, max_bytes=MAX_BYTES))
        except BlobTooLarge as error:
            raise InvalidArgument(
                f"the payload has {error.size_bytes} bytes; at most {MAX_BYTES} are possible"
            ) from None
        except BlobNotFound:
            raise FailedPrecondition(
                f"the payload of inference {job.id} was never uploaded: PUT it to api_params_s3_upload_url first"
            ) from None
        if not content:
            raise InvalidArgument("the payload is empty")
        return content

    async def freeze(self, job: Job, content: bytes | str, submit_time: datetime) -> Frozen:
        """Checks a payload, which is kept where no client can change it.

        Raises:
            InvalidArgument: it cannot be run as it is.
        """
        fetched = now()
        # In a thread: a short text may ask for a plot of many cells, each of which is checked.
        checked = await asyncio.to_thread(_checked, content, job)
        in_row = len(checked.encoded) <= _MAX_IN_ROW_BYTES
        arguments = {
            "payload": checked.fields if in_row else None,
            "payload_sha256": checked.sha256,
            "num_images": checked.num_images,
            "cost_seconds": checked.cost_seconds,
            "submit_time": submit_time,
            "output_id": uuid4() if job.inference_type == ASYNC else None,
            "timings": {"payload_seconds": (fetched - submit_time).total_seconds()},
        }
        return Frozen(arguments, {} if in_row else {job.frozen_key_of(checked.sha256): checked.encoded})

    async def freeze_inline(self, job: Job, payload_string: str, submit_time: datetime) -> Frozen:
        """The same of a payload that came with the job, which is kept as the client wrote it too.

        Raises:
            InvalidArgument: it cannot be run as it is.
        """
        frozen = await self.freeze(job, payload_string, submit_time)
        content = payload_string.encode()
        if len(content) > _MAX_IN_ROW_BYTES:
            return Frozen(frozen.arguments, {**frozen.objects, job.input_key: content})
        job.payload_string = payload_string
        return frozen

    async def put(self, objects: Mapping[str, bytes]) -> None:
        """Writes objects.

        Raises:
            Unavailable: the store is away.
        """
        for key, content in objects.items():
            await _in_time(self._blobs.put(key, content))


async def _in_time(work: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(_STORE_SECONDS):
            return await work
    except TimeoutError:
        raise Unavailable(STORE_IS_AWAY) from None


def _checked(content: bytes | str, job: Job) -> CheckedPayload:
    """The payload, which names no models that the job does not have."""
    checked = check_payload(content, job.task_type, str(job.id))
    payloads.used(checked.request, [(model["type"], model["name"]) for model in job.models])
    return checked
