"""Users who submit jobs as a careful client does: what may be tried again is, until it is answered.

503, 429 and a broken connection mean "again". A creation bears an Idempotency-Key. A start whose answer was lost is
looked up before it is repeated, since a start of an ended job runs it once more.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

_AGAIN = {429, 502, 503, 504}
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.3, 3.0
_POLL_SECONDS = 1.0
_TIMEOUT = httpx.Timeout(120, connect=10)


class Refused(Exception):
    """The service will not have the request, however often it is repeated."""


@dataclass
class Submission:
    """A job as its user knows it; `payload` is what was sent, `is_string` how."""

    number: int
    inference_type: str
    payload: dict[str, Any]
    is_string: bool
    job_id: str = ""
    num_starts: int = 0
    num_retries: int = 0
    accepted_at: datetime | None = None
    ended_at: datetime | None = None
    seen: dict[str, Any] | None = None  # the job as it was when the client first saw its end
    surprises: list[str] = field(default_factory=list)  # answers that no client should get

    @property
    def prompt(self) -> str:
        """What tells this job from every other."""
        return str(self.payload["prompt"])


class User:
    """One user's key at the gateway."""

    def __init__(self, url: str, key: str, model: str, rng: random.Random) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers={"x-api-key": key}, timeout=_TIMEOUT)
        self._store = httpx.AsyncClient(timeout=_TIMEOUT)
        self._model = model
        self._rng = rng

    async def submit(self, wanted: Submission) -> None:
        """Brings the job to where it is accepted.

        Raises:
            Refused.
        """
        body: dict[str, Any] = {
            "task_type": "txt2img",
            "inference_type": wanted.inference_type,
            "models": {"Stable-diffusion": [self._model]},
        }
        if wanted.is_string:
            body["payload_string"] = json.dumps(wanted.payload)
            wanted.num_starts += 1
        headers = {"Idempotency-Key": wanted.prompt}
        created = await self._until_answered(wanted, "POST", "/inferences", json=body, headers=headers)
        receipt = created["inference"]
        wanted.job_id = receipt["inference_id"] if wanted.is_string else receipt["id"]
        if not wanted.is_string:
            url = receipt["api_params_s3_upload_url"]
            await self._until_answered(wanted, "PUT", url, content=json.dumps(wanted.payload))
            await self._start(wanted)
        wanted.accepted_at = datetime.now(UTC)

    async def await_end(self, wanted: Submission) -> None:
        """Polls until the job has ended."""
        while (job := await self.get(wanted))["status"] not in {"succeed", "failed"}:  # noqa: ASYNC110 - another process
            await asyncio.sleep(_POLL_SECONDS)
        wanted.seen, wanted.ended_at = job, datetime.now(UTC)

    async def get(self, wanted: Submission) -> dict[str, Any]:
        """The job as the API shows it."""
        return await self._until_answered(wanted, "GET", f"/inferences/{wanted.job_id}")

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()
        await self._store.aclose()

    async def _start(self, wanted: Submission) -> None:
        while True:
            wanted.num_starts += 1
            refusal = None
            try:
                if await self._once(wanted, "PUT", f"/inferences/{wanted.job_id}/start") is not None:
                    return
            except Refused as error:  # such as: it is under way already, or it was Real-time and failed
                refusal = error
            await self._pause(wanted, 0)
            if (await self.get(wanted))["status"] != "created":
                return
            if refusal is not None:
                raise refusal

    async def _until_answered(self, wanted: Submission, method: str, url: str, **request: Any) -> dict[str, Any]:
        tries = 0
        while (answer := await self._once(wanted, method, url, **request)) is None:
            await self._pause(wanted, tries)
            tries += 1
        return answer

    async def _once(self, wanted: Submission, method: str, url: str, **request: Any) -> dict[str, Any] | None:
        """The envelope's data, None where the request is to be tried again. Raises Refused."""
        http = self._http if url.startswith("/") else self._store
        try:
            answer = await http.request(method, url, **request)
        except httpx.TransportError:
            return None
        if answer.is_success:
            data: dict[str, Any] = answer.json().get("data") or {} if answer.content else {}
            return data
        told = f"{method} {httpx.URL(url).path}: {answer.status_code} {answer.text[:200]}"
        if answer.is_client_error and answer.status_code not in _AGAIN:
            raise Refused(told)
        if answer.status_code not in _AGAIN:
            wanted.surprises.append(told)
        return None

    async def _pause(self, wanted: Submission, tries: int) -> None:
        wanted.num_retries += 1
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2**tries)
        await asyncio.sleep(longest * self._rng.uniform(0.5, 1.0))
