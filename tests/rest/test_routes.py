"""Every route of roles, users, keys, checkpoints, datasets and trainings: each field, permission, key and username.

The tables are in routes.py; what a field may be stands in tables.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from deploy.local.home import Home
from deploy.local.postgres import Postgres
from deploy.local.stack import Stack
from tests.e2e.conftest import Answer, Api, new_user
from tests.rest.routes import IMPORTED, ROUTES, Route
from tests.rest.tables import MISSING, fresh, made

pytestmark = pytest.mark.slow

RESOURCES = ("user", "role", "checkpoint", "sagemaker_endpoint", "inference", "train")
PERMISSIONS = [f"{resource}:{action}" for resource in RESOURCES for action in ("all", "list", "create")]
FIELDS = [
    pytest.param(route, name, value, sound, id=f"{route.name}-{name}-{label}")
    for route in ROUTES
    for name, kind in route.fields.items()
    for label, value, sound in kind.cases()
]
by_name = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)


@dataclass(frozen=True)
class World:
    """What requests are about: an open upload and a dataset of everybody's, and users who hold one permission each."""

    admin: Api
    webui: Api
    checkpoint: str
    dataset: str

    def send(self, api: Api, route: Route, changes: dict[str, Any] | None = None, **headers: str) -> Answer:
        """The route's sound request, changed."""
        path = route.path.format(checkpoint=self.checkpoint, dataset=self.dataset)
        body = None if route.body is None else made({**route.body, **(changes or {})})
        if route.name == "import checkpoint" and body is not None:
            body["urls"] = [f"{IMPORTED}{fresh()}.safetensors"]
        if body is not None:
            body = {name: value for name, value in body.items() if value is not MISSING}
        return api.call(route.method, path, body, headers)


@pytest.fixture(scope="session")
def world(admin: Api, webui: Api) -> World:
    """Made once; every user below has the role `everybody`, to which the upload and the dataset belong."""
    admin.ok("POST", "/roles", {"role_name": "nothing", "permissions": ["inference:list"]}, 201)
    admin.ok("POST", "/roles", {"role_name": "everybody", "permissions": ["checkpoint:all", "train:all"]}, 201)
    new_user(admin, "nobody-special", ["inference:list"]).close()
    user = {"username": "owner", "password": "p", "roles": ["everybody"]}
    admin.ok("POST", "/users", user, 201)
    owner = Api(admin.url, admin.key, "owner")
    files = [{"filename": "world.safetensors", "parts_number": 1}]
    opened = owner.ok("POST", "/checkpoints", {"checkpoint_type": "VAE", "filenames": files, "params": {}}, 201)
    content = [{"filename": "a.png", "name": "a.png", "type": "image", "params": {}}]
    owner.ok("POST", "/datasets", {"dataset_name": "world", "content": content, "params": {}}, 201)
    owner.close()
    # From here on the role names an owner and grants nothing.
    admin.ok("POST", "/roles", {"role_name": "everybody", "permissions": ["inference:list"]}, 201)
    for permission in PERMISSIONS:
        admin.ok("POST", "/roles", {"role_name": permission, "permissions": [permission]}, 201)
        user = {"username": f"only {permission}", "password": "p", "roles": [permission, "everybody"]}
        admin.ok("POST", "/users", user, 201)
    return World(admin, webui, opened["checkpoint"]["id"], "world")


def check(answer: Answer, status: int) -> None:
    """The status, and the envelope around it."""
    assert answer.status == status, answer.body
    if status == 204:
        assert answer.body is None
        return
    assert answer.body["statusCode"] == status
    assert isinstance(answer.body["message"], str)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-api-version"] == "1.5.0"
    if status >= 400:
        assert set(answer.body) == {"statusCode", "message"}
        assert len(answer.message) > 3
        assert len(answer.message) < 250_000
        assert "Traceback" not in answer.message


@by_name
@pytest.mark.parametrize("profile", ["document", "webui"])
def test_a_sound_request_has_the_status_of_the_contract(world: World, route: Route, profile: str) -> None:
    api = world.admin if profile == "document" else world.webui
    answer = world.send(api, route, username="api")
    check(answer, route.status)
    if route.status != 204:
        assert answer.message == (route.message or {200: "OK", 201: "Created"}[route.status])
    if route.body is not None:
        check(world.send(api, route, {"unknown_field": {"a": [1]}}, username="api"), route.status)


@pytest.mark.parametrize(("route", "name", "value", "sound"), FIELDS)
def test_a_field_is_taken_or_refused(world: World, route: Route, name: str, value: Any, sound: bool) -> None:
    answer = world.send(world.admin, route, {name: value})
    check(answer, route.status if sound else 400)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.body is not None], ids=lambda route: route.name)
@pytest.mark.parametrize("content", ["", "null", "[]", "5", '"x"', "{", "\xff", '{"a":', "NaN", "[" * 10_000])
def test_a_body_that_is_no_object_is_refused_or_empty(world: World, route: Route, content: str) -> None:
    path = route.path.format(checkpoint=world.checkpoint, dataset=world.dataset)
    answer = world.admin.call(route.method, path, content=content)
    allowed = {400} if route.name != "update checkpoint" else {400, 200}  # all its fields may be absent
    assert answer.status in allowed, answer.body
    check(answer, answer.status)


@by_name
def test_each_permission_alone_opens_or_does_not(world: World, route: Route) -> None:
    for permission in PERMISSIONS:
        answer = world.send(world.admin, route, username=f"only {permission}")
        if not route.permissions or permission in route.permissions:
            granted_more = route.name in {"create role", "create user", "create key"}
            # Whoever grants must hold what they grant, which holders of one permission alone do not.
            assert answer.status in ({route.status, 403} if granted_more else {route.status}), (permission, answer.body)
            assert "has no permissions" not in str(answer.body)
        elif (route.name, permission) == ("create role", "role:create"):
            check(answer, 400)  # they may create roles, but not grant what they do not hold
        else:
            check(answer, 403)
            assert answer.message.startswith(f"User only {permission} has no permissions: ['")
            assert all(f"'{needed}'" in answer.message for needed in route.permissions)


def test_a_user_whose_roles_are_gone_may_nothing(admin: Api) -> None:
    new_user(admin, "roleless", ["checkpoint:all"]).close()
    admin.ok("DELETE", "/roles", {"role_name_list": ["roleless"]}, 204)
    (user,) = admin.ok("GET", "/users?username=roleless")["users"]
    assert (user["roles"], user["permissions"]) == ([], [])
    answer = admin.call("GET", "/checkpoints", headers={"username": "roleless"})
    check(answer, 403)
    assert answer.message == "User roleless has no permissions: ['checkpoint:all', 'checkpoint:list']"


@by_name
@pytest.mark.parametrize("profile", ["document", "webui"])
def test_a_key_that_is_no_key_any_more_is_forbidden_before_all_else(
    world: World, route: Route, profile: str, dead_keys: list[str]
) -> None:
    """Each route is tried with one of them: what a key is worth is decided in one place."""
    url = world.admin.url if profile == "document" else world.webui.url
    api = Api(url, dead_keys[ROUTES.index(route) % len(dead_keys)], "api")
    answer = world.send(api, route)
    assert (answer.status, answer.body) == (403, {"statusCode": 403, "message": "Forbidden"})
    api.close()


@by_name
def test_who_is_named_decides(world: World, route: Route, plain: Api) -> None:
    for api in (world.admin, world.webui):
        unknown = world.send(api, route, username="nobody at all")
        check(unknown, 401 if route.permissions else 200)
        assert world.send(api, route, username="").status == world.send(api, route).status, "empty is absent"
    check(world.send(world.admin, route), route.status)
    check(world.send(world.webui, route), route.anonymous)
    check(world.send(world.admin, route, Authorization="Bearer 617069"), route.status)
    undecodable = world.send(world.admin, route, Authorization="Bearer of a name")
    check(undecodable, 400 if route.permissions else 200)
    if route.permissions:
        assert undecodable.message == "Non-base16 digit found"
    check(world.send(plain, route), route.status)
    check(world.send(plain, route, username="everything"), route.status)
    foreign = world.send(plain, route, username="api")
    check(foreign, 403 if route.permissions else 200)
    if route.permissions:
        assert foreign.message == "the API key of everything may not act for api"


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.fields and route.name != "update checkpoint"], ids=lambda r: r.name
)
def test_a_bad_body_comes_before_a_bad_user(world: World, route: Route) -> None:
    for name in ("nobody at all", "only inference:list"):
        path = route.path.format(checkpoint=world.checkpoint, dataset=world.dataset)
        check(world.admin.call(route.method, path, {}, headers={"username": name}), 400)


@pytest.fixture(scope="session")
def dead_keys(stack: Stack, admin: Api, world: World) -> list[str]:
    """A wrong, an altered, a revoked, an expired and a very long key."""
    revoked = admin.ok("POST", "/keys", {"username": "owner"}, 201)
    expired = admin.ok("POST", "/keys", {"username": "owner", "expires_in_days": 1}, 201)
    admin.ok("DELETE", "/keys", {"key_id_list": [revoked["id"]]}, 204)
    postgres = Postgres(Home(stack.home), stack.ports()["postgres"])
    with psycopg.connect(postgres.url("identity").replace("+psycopg", "")) as connection:
        past = "UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE id = %s"
        assert connection.execute(past, [expired["id"]]).rowcount == 1
    altered = admin.key[:-1] + ("0" if admin.key[-1] != "0" else "1")
    return ["wrong", altered, revoked["key"], expired["key"], "x" * 5000]


@pytest.fixture(scope="session")
def plain(admin: Api, world: World) -> Iterator[Api]:
    """A key without the right to act for others, of a user who may do everything with what is everybody's."""
    admin.ok("POST", "/users", {"username": "everything", "password": "p", "roles": ["IT Operator"]}, 201)
    api = Api(admin.url, admin.ok("POST", "/keys", {"username": "everything"}, 201)["key"])
    yield api
    api.close()
