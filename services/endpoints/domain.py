"""Decides what endpoints there may be, who sees them, and which ones a job may run on (contract 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.common.viewer import Viewer
from services.endpoints.event_store import EventStore
from services.endpoints.peers import Identity, Models
from services.endpoints.rows import CREATING, DRAINING, FAILED, IN_SERVICE, REAL_TIME, UPDATING, Endpoint, Event
from services.endpoints.store import EndpointNotFound, EndpointStore

SERVERLESS = "Serverless"
MAX_PINNED = 4  # a GPU's memory ends somewhere
_KEY_NAMES = KeyNames("EndpointDeploymentJobId", "startTime")
_EVENT_KEY_NAMES = KeyNames("id", "time")
_MAX_EXTENSIONS = 3


@dataclass(frozen=True)
class NewEndpoint:
    """What somebody asks for; counts are of workers."""

    name: str
    type: str
    instance_type: str
    num_initial: int
    autoscaling: bool
    num_min: int
    num_max: int
    roles: list[str]
    custom_extensions: str = ""
    custom_docker_image_uri: str = ""


@dataclass(frozen=True)
class Change:
    """What somebody wants of an endpoint; None leaves it as it is. Counts are of workers."""

    autoscaling: bool | None = None
    num_min: int | None = None
    num_max: int | None = None
    drain: bool | None = None
    pinned: tuple[str, ...] | None = None


class Endpoints:
    """The domain. `max_workers` bounds every count, so that a slip of the finger does not bring the machine down."""

    def __init__(
        self, store: EndpointStore, events: EventStore, identity: Identity, models: Models, max_workers: int
    ) -> None:
        self._store = store
        self._events = events
        self._identity = identity
        self._models = models
        self._max_workers = max_workers

    async def list_endpoints(
        self, sees_all: bool, username: str, endpoint_id: str, limit: str, key: str
    ) -> tuple[list[Endpoint], str | None]:
        """Endpoints that the caller may see, newest first, and the next page's key: all, or those that the user of the
        query may use.

        Raises:
            InvalidArgument: the user is not known, the limit no number, the key none of ours.
        """
        user = await self._identity.get_user(username) if username else None
        viewer = Viewer(user.username, user.roles) if user else None
        num_wanted, position = parse_limit(limit), parse_key(_KEY_NAMES, key)
        after = (-position[0].timestamp(), str(position[1])) if position else None
        rows = [
            row
            for row in await self._store.get_all_live()
            if (sees_all or (viewer and viewer.sees(row.owners)))
            and (not endpoint_id or row.id == endpoint_id)
            and (after is None or _position(row) > after)
        ]
        page = rows[:num_wanted]
        last = page[-1] if len(page) < len(rows) else None
        return page, make_key(_KEY_NAMES, last.id, last.start_time) if last else None

    async def create_endpoint(self, new: NewEndpoint, creator: str) -> Endpoint:
        """Adds an endpoint; the control loop starts its workers.

        Raises:
            InvalidArgument: a count or type is wrong. RoleHasEndpoint, NameInUse: something live is in the way.
        """
        _check_new(new, self._max_workers)
        extensions = _split_extensions(new.custom_extensions)
        endpoint_id = str(uuid4())
        endpoint = Endpoint(
            id=endpoint_id,
            name=_full_name(new.type, new.name, endpoint_id),
            type=new.type,
            instance_type=new.instance_type,
            autoscaling=new.autoscaling,
            num_initial=new.num_initial,
            num_min=new.num_min,
            num_max=new.num_max,
            num_workers=min(max(new.num_initial, new.num_min), new.num_max) if new.autoscaling else new.num_initial,
            owners=list(dict.fromkeys(new.roles)),
            creator=creator,
            custom_extensions=",".join(extensions),
            custom_docker_image_uri=new.custom_docker_image_uri,
            start_time=datetime.now(UTC),
        )
        await self._store.add_endpoint(endpoint)
        return endpoint

    async def update_endpoint(self, endpoint_id: str, change: Change, by: Viewer) -> Endpoint:
        """Changes an endpoint; the control loop does what follows from it.

        Raises:
            EndpointNotFound: it is not there. InvalidArgument: the bounds are wrong, a checkpoint is not there or not
            for who asks, or nothing is to be changed. FailedPrecondition: it has failed.
        """
        await self._check_pins(change.pinned or (), by)
        while True:
            before = await self._store.get_live(endpoint_id)
            values = _changed(before, change, self._max_workers)
            words = ", ".join(f"{name} {getattr(before, name)} -> {value}" for name, value in values.items())
            if "pinned" in values:
                values["are_pins_told"] = False
            if await self._store.update_endpoint(before, values, f"by {by.name}: {words or 'nothing'}"):
                return await self._store.get_live(endpoint_id)

    async def list_events(
        self, endpoint_id: str, viewer: Viewer, limit: str, key: str
    ) -> tuple[list[Event], str | None]:
        """What was done with an endpoint that the caller may see, newest first, and the next page's key.

        Raises:
            EndpointNotFound: it is not there, or not for this caller. InvalidArgument: a bad limit or key.
        """
        num_wanted, after = parse_limit(limit), parse_key(_EVENT_KEY_NAMES, key)
        endpoint = await self._store.get_live(endpoint_id)
        if not viewer.sees(endpoint.owners):
            raise EndpointNotFound(f"endpoint with id {endpoint_id} is not found")
        found = await self._events.page_events(endpoint_id, num_wanted + 1, after)
        page = found[:num_wanted]
        last = page[-1] if len(found) > num_wanted else None
        return page, make_key(_EVENT_KEY_NAMES, last.id, last.time) if last else None

    async def delete_endpoints(self, names: list[str]) -> None:
        """Deletes what is found of these: from now on it is not listed, and its name and roles are free."""
        await self._store.mark_deleting(names)

    async def find_endpoints(self, name: str, inference_type: str, user: Viewer) -> list[Endpoint]:
        """Endpoints that a job may run on: the pinned one, else the usable ones of the type that the user may use."""
        rows = await self._store.get_all_live()
        if name:
            return [row for row in rows if row.name == name]
        return [
            row
            for row in rows
            if row.type == inference_type and row.status in (IN_SERVICE, UPDATING) and user.sees(row.owners)
        ]

    async def _check_pins(self, names: tuple[str, ...], viewer: Viewer) -> None:
        if len(names) > MAX_PINNED:
            raise InvalidArgument(f"pinned_checkpoints may have at most {MAX_PINNED} names (given: {len(names)})")
        if names and (missing := await self._models.find_missing(names, viewer)):
            raise InvalidArgument(" ".join(f"checkpoint with name {name} is not found" for name in missing))


def _full_name(endpoint_type: str, name: str, endpoint_id: str) -> str:
    """`esd-<type>-<name>`, with the beginning of the id where no name was given."""
    return f"esd-{endpoint_type.lower()}-{name or endpoint_id[:7]}"


def check_custom(custom_extensions: str, custom_docker_image_uri: str) -> None:
    """Refuses the two ways of customizing together.

    Raises:
        InvalidArgument.
    """
    if custom_extensions and custom_docker_image_uri:
        raise InvalidArgument("custom_extensions and custom_docker_image_uri cannot be used together")


def _check_new(new: NewEndpoint, max_workers: int) -> None:
    """The checks of contract 5.3 in its order; those of `max_instance_number` and of the limit are ours."""
    name = new.name or "an endpoint without a name"
    if new.type == SERVERLESS:
        raise InvalidArgument("Serverless endpoint is not supported yet")
    if new.num_initial < 1:
        raise InvalidArgument(f"initial_instance_count should be at least 1: {name}")
    _check_bounds(name, new.type, new.autoscaling, new.num_min, new.num_max)
    _check_largest(max(new.num_initial, new.num_max if new.autoscaling else 0), max_workers)
    if len(_split_extensions(new.custom_extensions)) > _MAX_EXTENSIONS:
        raise InvalidArgument(f"custom_extensions should be at most {_MAX_EXTENSIONS}")


def _check_bounds(name: str, kind: str, autoscaling: bool, num_min: int, num_max: int) -> None:
    if autoscaling and kind == REAL_TIME and num_min < 1:
        raise InvalidArgument(f"min_instance_number should be at least 1 for real-time endpoint: {name}")
    if num_min < 0:
        raise InvalidArgument(f"min_instance_number should be at least 0 for async endpoint: {name}")
    if autoscaling and num_max < max(1, num_min):
        raise InvalidArgument(f"max_instance_number should be at least {max(1, num_min)}: {name}")


def _check_largest(num_workers: int, max_workers: int) -> None:
    if num_workers > max_workers:
        raise InvalidArgument(f"an endpoint may have at most {max_workers} instances here (asked for: {num_workers})")


def _changed(before: Endpoint, change: Change, max_workers: int) -> dict[str, Any]:
    """The values that a change gives an endpoint.

    Raises:
        InvalidArgument, FailedPrecondition.
    """
    if change == Change():
        known = "autoscaling_enabled, min_instance_number, max_instance_number, pinned_checkpoints or drain"
        raise InvalidArgument(f"nothing to change: give {known}")
    if before.status == FAILED:
        raise FailedPrecondition(f"endpoint {before.name} has failed; delete it and create another one")
    wanted: dict[str, Any] = {
        "autoscaling": change.autoscaling,
        "num_min": change.num_min,
        "num_max": change.num_max,
        "pinned": None if change.pinned is None else list(dict.fromkeys(change.pinned)),
    }
    values: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    after = before.model_copy(update=values)
    _check_bounds(before.name, before.type, after.autoscaling, after.num_min, after.num_max)
    if after.autoscaling:
        _check_largest(after.num_max, max_workers)
    if change.drain and before.status != DRAINING:
        values["status"] = DRAINING
    if change.drain is False and before.status == DRAINING:
        values["status"] = UPDATING if before.end_time else CREATING
    return {name: value for name, value in values.items() if value != getattr(before, name)}


def _split_extensions(text: str) -> list[str]:
    return list(dict.fromkeys(part for part in re.split(r"[ ,\n]+", text) if part))


def _position(row: Endpoint) -> tuple[float, str]:
    """Where a row stands in the list, newest first."""
    return -row.start_time.timestamp(), row.id
