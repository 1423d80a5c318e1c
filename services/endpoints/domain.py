"""Decides what endpoints there may be, who sees them, and which ones a job may run on (contract 5)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from services.common.errors import InvalidArgument, NotFound
from services.common.paging import KeyNames, make_key, parse_key, parse_limit
from services.endpoints.peers import Identity, User
from services.endpoints.store import IN_SERVICE, REAL_TIME, UPDATING, Endpoint, EndpointStore

SERVERLESS = "Serverless"
_KEY_NAMES = KeyNames("EndpointDeploymentJobId", "startTime")
_MAX_EXTENSIONS = 2  # the text says 3, and refuses the third: so does the original


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
class Page:
    """Endpoints, newest first, and the key that continues after them; None at the end."""

    endpoints: list[Endpoint]
    next_key: str | None


class Endpoints:
    """The domain. `max_workers` bounds every count, so that a slip of the finger does not bring the machine down."""

    def __init__(self, store: EndpointStore, identity: Identity, max_workers: int) -> None:
        self._store = store
        self._identity = identity
        self._max_workers = max_workers

    async def list_endpoints(self, sees_all: bool, username: str, endpoint_id: str, limit: str, key: str) -> Page:
        """Endpoints that the caller may see: all, or those that the user of the query may use.

        Raises:
            InvalidArgument: the user is not known, the limit no number, the key none of ours.
        """
        user = await self._find_user(username) if username else None
        num_wanted, position = parse_limit(limit), parse_key(_KEY_NAMES, key)
        after = (-position[0].timestamp(), str(position[1])) if position else None
        rows = [
            row
            for row in await self._store.page_endpoints()
            if (sees_all or (user and row.is_open_to(user.username, user.roles)))
            and (not endpoint_id or row.id == endpoint_id)
            and (after is None or _position(row) > after)
        ]
        page = rows[:num_wanted]
        last = page[-1] if len(page) < len(rows) else None
        return Page(page, make_key(_KEY_NAMES, last.id, last.start_time) if last else None)

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
            name=full_name(new.type, new.name, endpoint_id),
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

    async def delete_endpoints(self, names: list[str]) -> None:
        """Deletes what is found of these: from now on it is not listed, and its name and roles are free."""
        await self._store.mark_deleting(names)

    async def find_endpoints(self, name: str, inference_type: str, username: str, roles: list[str]) -> list[Endpoint]:
        """Endpoints that a job may run on: the pinned one, else the usable ones of the type that the user may use."""
        rows = await self._store.page_endpoints()
        if name:
            return [row for row in rows if row.name == name]
        return [
            row
            for row in rows
            if row.type == inference_type and row.status in (IN_SERVICE, UPDATING) and row.is_open_to(username, roles)
        ]

    async def _find_user(self, username: str) -> User:
        try:
            return await self._identity.get_user(username)
        except NotFound:
            raise InvalidArgument(f'user: "{username}" not exist') from None


def full_name(endpoint_type: str, name: str, endpoint_id: str) -> str:
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
    if new.type == SERVERLESS:
        raise InvalidArgument("Serverless endpoint is not supported yet")
    if new.num_initial < 1:
        raise InvalidArgument(f"initial_instance_count should be at least 1: {new.name}")
    if new.autoscaling and new.type == REAL_TIME and new.num_min < 1:
        raise InvalidArgument(f"min_instance_number should be at least 1 for real-time endpoint: {new.name}")
    if new.num_min < 0:
        raise InvalidArgument(f"min_instance_number should be at least 0 for async endpoint: {new.name}")
    if new.autoscaling and new.num_max < max(1, new.num_min):
        raise InvalidArgument(f"max_instance_number should be at least {max(1, new.num_min)}: {new.name}")
    largest = max(new.num_initial, new.num_max if new.autoscaling else 0)
    if largest > max_workers:
        raise InvalidArgument(f"an endpoint may have at most {max_workers} instances here (asked for: {largest})")
    if len(_split_extensions(new.custom_extensions)) > _MAX_EXTENSIONS:
        raise InvalidArgument("custom_extensions should be at most 3")


def _split_extensions(text: str) -> list[str]:
    return list(dict.fromkeys(part for part in re.split(r"[ ,\n]+", text) if part))


def _position(row: Endpoint) -> tuple[float, str]:
    """Where a row stands in the list, newest first."""
    return -row.start_time.timestamp(), row.id
