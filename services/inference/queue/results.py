"""What a worker says that it has uploaded, and whether it is so: nothing counts as a result before it was read here."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from services.common.blobs import BlobNotFound, Blobs
from services.inference.rows import Job

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ResultObject:
    """An object below the lease's prefix, as the worker describes it; `sha256` in hex."""

    name: str
    size_bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """For the job's row."""
        return asdict(self)


@dataclass(frozen=True)
class Results:
    """All that a worker has uploaded for a job, and where the job's time went."""

    images: list[ResultObject]
    param: ResultObject
    timings: dict[str, float]


async def find_problem(blobs: Blobs, job: Job, lease_id: UUID, results: Results) -> str:
    """What is wrong with the results, in one sentence, or nothing.

    Raises:
        Unavailable: the object store does not answer.
    """
    expected = job.result_names
    names = [image.name for image in results.images]
    if names != expected or results.param.name != job.param_name:
        return f"the worker's results are {names} with {results.param.name}, not {expected} with {job.param_name}"
    prefix = job.lease_prefix(lease_id)
    checks = [_find_problem_of(blobs, prefix, image, _PNG) for image in results.images]
    checks.append(_find_problem_of(blobs, prefix, results.param, b""))
    return next((problem for problem in await asyncio.gather(*checks) if problem), "")


async def _find_problem_of(blobs: Blobs, prefix: str, told: ResultObject, signature: bytes) -> str:
    result = f"the worker's result {told.name}"
    try:
        found = await blobs.digest(prefix + told.name)
    except BlobNotFound:
        return f"{result} is not in the object store"
    if found.size_bytes != told.size_bytes:
        return f"{result} has {found.size_bytes} bytes in the object store instead of {told.size_bytes}"
    if found.sha256 != told.sha256:
        return f"{result} has the SHA-256 {found.sha256} in the object store instead of {told.sha256}"
    if not found.first_bytes.startswith(signature):
        return f"{result} is no PNG"
    return ""
