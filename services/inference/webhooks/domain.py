"""Calls the URLs that users gave with their jobs when those have ended, until somebody there says yes.

The calls follow Standard Webhooks (standardwebhooks.com): `webhook-id` is the same at every attempt,
`webhook-timestamp` is in seconds, `webhook-signature` is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`,
with the secret that the user gave. A call that fails is repeated for two hours from the first one, then it is dead
until sent again.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import time
from datetime import timedelta

import structlog

from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable
from services.common.notifications import Notifications
from services.common.outbound import Outbound, Unreachable, UrlRefused, parse_url
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.common.tasks import heard
from services.common.times import time_text
from services.common.viewer import Viewer
from services.inference.channels import WEBHOOKS_DUE
from services.inference.rows import DEAD, DELIVERED, PENDING, Job, Webhook, now
from services.inference.webhooks.store import WebhookStore

log = structlog.get_logger()

TRY_SECONDS = 2 * 3600.0
_FIRST_WAIT_SECONDS = 5.0
_MAX_WAIT_SECONDS = 900.0
_CALL_SECONDS = 30.0
_LEASE_SECONDS = 60.0  # a call whose process died is repeated after
_SWEEP_SECONDS = 30.0
_PAUSE_SECONDS = 0.05  # while another replica takes what is due
_AT_ONCE = 16
_AT_ONCE_OF_ONE = 4  # owner: one whose server is slow leaves the other calls to others
_MAX_REDIRECTS = 3
_SECRET_PREFIX = "whsec_"  # noqa: S105 - a form, no secret
_SECRET_BYTES = (24, 64)
_KEY_NAMES = KeyNames("InferenceJobId", "createTime")


def check_webhook(url: str, secret: str) -> None:
    """Checks what came with a job.

    Raises:
        InvalidArgument: the URL is none that may be called, or the secret none to sign with.
    """
    if not url:
        if secret:
            raise InvalidArgument("webhook_secret is of no use without webhook")
        return
    parse_url(url)
    low, high = _SECRET_BYTES
    if not low <= len(_key(secret)) <= high:
        raise InvalidArgument(
            f"webhook_secret, which signs the calls of webhook, must be {_SECRET_PREFIX} followed by {low} to {high} "
            "bytes in base64"
        )


def signature(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()


class Webhooks:
    """The webhooks of jobs that have ended."""

    def __init__(
        self,
        store: WebhookStore,
        outbound: Outbound,
        notifications: Notifications,
        first_wait_seconds: float = _FIRST_WAIT_SECONDS,
        try_seconds: float = TRY_SECONDS,
    ) -> None:
        self._store = store
        self._outbound = outbound
        self._notifications = notifications
        self._first_wait_seconds = first_wait_seconds
        self._try_seconds = try_seconds
        self._calls: list[str] = []  # the owner of each call under way

    # --- what users do ---

    async def list_webhooks(
        self, state: str, limit: str, start_key: str, user: Viewer
    ) -> tuple[list[Webhook], str | None]:
        """A page of the webhooks of the jobs that the user may see, newest first, and the key of the next page.

        Raises:
            InvalidArgument: the state, limit or key is none.
        """
        states = [PENDING, DELIVERED, DEAD]
        if state and state not in states:
            raise InvalidArgument(f'there is no state "{state}" of a webhook; possible: {", ".join(states)}')
        size, after = parse_limit(limit), parse_key(_KEY_NAMES, start_key)
        owner = None if user.sees_everything else user.name
        found = await self._store.page(state, owner, size + 1, after)
        last = found[size - 1] if len(found) > size else None
        return found[:size], make_key(_KEY_NAMES, last.job_id, last.create_time) if last else None

    async def resend_webhook(self, job_id: str, user: Viewer) -> Webhook:
        """Calls a webhook again that was delivered or is dead, with all its attempts.

        Raises:
            NotFound: the job has none, or has not ended. PermissionDenied. FailedPrecondition: it is being called.
        """
        found = await self._store.find(job_id)
        if found is None:
            raise NotFound(f"inference with id {job_id} has no webhook that was called")
        if found.owner != user.name and not user.sees_everything:
            raise PermissionDenied(f"inference {job_id} belongs to another user than {user.name}")
        again = await self._store.resend(found.job_id)
        if again is None:
            raise FailedPrecondition(f"the webhook of inference {job_id} is being called already")
        return again

    # --- the calls ---

    async def run(self) -> None:
        """Calls what is due until cancelled."""
        with self._notifications.subscribed((WEBHOOKS_DUE, "")) as due:
            async with asyncio.TaskGroup() as calls:
                while True:
                    seconds = _SWEEP_SECONDS
                    try:
                        while due_now := await self._store.claim(
                            _AT_ONCE - len(self._calls), _LEASE_SECONDS, self._calls, _AT_ONCE_OF_ONE
                        ):
                            for webhook, job in due_now:
                                self._calls.append(webhook.owner)
                                calls.create_task(self._call(webhook, job, due))
                        if len(self._calls) < _AT_ONCE:
                            until_next = await self._store.seconds_to_next(self._calls, _AT_ONCE_OF_ONE)
                            seconds = min(seconds, max(_PAUSE_SECONDS, until_next))
                    except Unavailable as error:
                        log.warning("webhooks wait", reason=str(error))
                        await asyncio.sleep(1.0)  # nothing tells when a database that is down comes back
                    await heard(due, seconds)

    async def _call(self, webhook: Webhook, job: Job, due: asyncio.Event) -> None:
        try:
            problem, is_final = await self._problem(webhook, job)
            if not problem:
                await self._store.end(webhook, DELIVERED, None)
            elif (again_in := self._wait_seconds(webhook)) is None or is_final:
                log.warning("webhook is dead", job=str(job.id), reason=problem)
                await self._store.end(webhook, DEAD, problem)
            else:
                await self._store.retry(webhook, problem, again_in)
        except Unavailable as error:  # the claim ends by itself, and the call is repeated
            log.warning("the end of a webhook's call is not recorded", job=str(job.id), reason=str(error))
        finally:
            self._calls.remove(webhook.owner)
            due.set()

    async def _problem(self, webhook: Webhook, job: Job) -> tuple[str, bool]:
        """What went wrong with a call, or nothing; and whether it always will."""
        body = _body(job)
        timestamp, message_id = int(time.time()), str(webhook.message_id)
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(job.webhook_secret or "", message_id, timestamp, body),
        }
        try:
            async with (
                asyncio.timeout(_CALL_SECONDS),
                self._outbound.open(job.webhook or "", "POST", headers, body, _MAX_REDIRECTS) as answer,
            ):
                if 200 <= answer.status < 300:
                    return "", False
                return f"{answer.hops[-1].shown} answered {answer.status}", False
        except TimeoutError:
            return f"{parse_url(job.webhook or '').shown} did not answer within {_CALL_SECONDS:g} s", False
        except Unreachable as error:
            return str(error), False
        except UrlRefused as error:
            return str(error), True
        except Exception:  # whatever a user's URL leads to, it is that call which fails, not the service
            log.exception("a webhook's call failed in a way not foreseen", job=str(job.id))
            return "the call failed in the service", False

    def _wait_seconds(self, webhook: Webhook) -> float | None:
        """Seconds until the next attempt, which double; the last one is at the end of the time. None: it is over."""
        left = (webhook.since_time + timedelta(seconds=self._try_seconds) - now()).total_seconds()
        if left <= 0:
            return None
        wanted = self._first_wait_seconds * 2.0 ** min(webhook.num_attempts - 1, 30)
        return min(wanted, _MAX_WAIT_SECONDS, left)


def _key(secret: str) -> bytes:
    """The bytes to sign with; none where the secret is not of the form."""
    if not secret.startswith(_SECRET_PREFIX):
        return b""
    try:
        return base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except binascii.Error:
        return b""


def _body(job: Job) -> bytes:
    """What the receiver is told; it has no URLs of results, which whoever may see them gets from the API."""
    data = {
        "InferenceJobId": str(job.id),
        "status": job.status,
        "taskType": job.task_type,
        "createTime": time_text(job.create_time),
        "completeTime": time_text(job.complete_time),
        "image_names": job.image_names,
        "sagemakerRaw": job.failure,
    }
    told = {"type": f"inference.{job.status}", "timestamp": time_text(job.complete_time), "data": data}
    return json.dumps(told, ensure_ascii=False).encode()
