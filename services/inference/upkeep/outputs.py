"""The raw answer of an Async job, an object of its own (contract 9), written once the job has succeeded.

Nobody waits for it. The row remembers until it is there, so that a process that dies in between owes it to nobody.
"""

from __future__ import annotations

import asyncio
import json

import structlog

from services.common.blobs import Blobs
from services.common.errors import Unavailable
from services.inference.rows import Job
from services.inference.store import JobStore

log = structlog.get_logger()

_SWEEP_SECONDS = 30.0


class Outputs:
    """Writes raw answers. Two replicas may write the same one: it has the same bytes."""

    def __init__(self, store: JobStore, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs

    async def write(self, job: Job) -> None:
        """Writes the answer of a job that has succeeded, if it is an Async one.

        Raises:
            Unavailable: the object store or the database does not answer; the sweep tries again.
        """
        if job.output_key is None or job.result_lease is None:
            return
        answer = {
            "inference_id": str(job.id),
            "image_names": job.image_names,
            "result": self._blobs.url(job.result_prefix),
        }
        await self._blobs.put(job.output_key, json.dumps(answer).encode())
        await self._store.note_output(job.id, job.result_lease)

    async def sweep(self, age_seconds: float = _SWEEP_SECONDS) -> None:
        """Writes the answers that are missing of jobs that succeeded so long ago.

        Raises:
            Unavailable: the object store or the database does not answer.
        """
        while jobs := await self._store.without_output(age_seconds):
            for job in jobs:
                await self.write(job)

    async def run(self) -> None:
        """Sweeps until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                await self.sweep()
            except Unavailable as error:
                log.warning("outputs wait", reason=str(error))
