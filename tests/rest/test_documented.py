"""The examples of the API document, as given, and the queries of the lists."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.conftest import Api
from tests.rest.routes import CHECKPOINT_TYPES
from tests.rest.tables import fresh
from tests.services.models.files import safetensors

pytestmark = pytest.mark.slow

LONG = "x" * 2000
# (path, query, status): what each filter and page of a list may be.
QUERIES = [
    *(("/roles", f"role={value}", 200) for value in ("", "byoc", "nobody", "a%20b", quote("ü"))),
    *(("/roles", f"role={value}", 400) for value in ("a%00b", LONG)),
    *(("/users", f"username={value}", 200) for value in ("", "api", "nobody")),
    *(("/users", f"username={value}", 400) for value in ("a%00b", LONG)),
    *(("/users", f"show_password={value}", 200) for value in ("", "True", "false", "1", "maybe")),
    *(("/keys", f"username={value}", 200) for value in ("", "api", "nobody")),
    *(("/keys", f"username={value}", 400) for value in ("a%00b", LONG)),
    *(
        ("/checkpoints", f"{name}={value}", 200)
        for name, values in {
            "page": ("", "1", "2147483647", "%201"),
            "per_page": ("", "1", "1000"),
            "username": ("", "api"),
            "status": ("", "Active", "Initial", "Nothing"),
            "types": ("", *CHECKPOINT_TYPES, "Nothing"),
            "roles": ("", "byoc", "nobody"),
        }.items()
        for value in values
    ),
    *(
        ("/checkpoints", f"{name}={value}", 400)
        for name, values in {
            "page": ("0", "-1", "x", "1.5", "2147483648", "9" * 50, "1e3", quote("\u0661"), "1%00"),
            "per_page": ("0", "-1", "x", "1001", "9" * 50),
            "username": ("nobody-at-all", "a%00b", LONG),
            "status": ("a%00b",),
            "types": ("a%00b",),
            "roles": ("a%00b",),
        }.items()
        for value in values
    ),
    ("/checkpoints", "types=VAE&types=Lora&status=Active&status=Initial&roles=a&roles=b&page=1&per_page=5", 200),
    ("/checkpoints", "status[]=Active&unknown=1&page=1", 200),
    *(
        ("/datasets", f"{name}={value}", 200)
        for name, values in {
            "limit": ("", "1", "1000", "0", "-1"),
            "exclusive_start_key": ("",),
            "dataset_status": ("", "Enabled", "Nothing"),
        }.items()
        for value in values
    ),
    *(
        ("/datasets", f"{name}={value}", 400)
        for name, values in {
            "limit": ("x", "1.5", "1%00"),
            "exclusive_start_key": ("x", "e30=", "bnVsbA==", "WzFd", "%00", LONG, "a" * 20_000),
            "dataset_status": ("a%00b",),
        }.items()
        for value in values
    ),
]


@pytest.mark.parametrize(
    ("path", "query", "status"), QUERIES, ids=[f"{path} {query}"[:60] for path, query, _ in QUERIES]
)
def test_a_query_is_taken_or_refused(admin: Api, path: str, query: str, status: int) -> None:
    answer = admin.call("GET", f"{path}?{query}")
    assert (answer.status, answer.body["statusCode"]) == (status, status), answer.body
    if status == 400:
        assert query.partition("=")[0] in answer.message or "NUL" in answer.message or "not exist" in answer.message


def test_roles_and_users(admin: Api) -> None:
    for name in ("new_role_name", "Designer"):
        example = {"role_name": name, "permissions": ["train:all", "checkpoint:all"]}
        answer = admin.call("POST", "/roles", example)
        assert (answer.status, answer.body) == (201, {"statusCode": 201, "message": "role created"})
    example = {"username": "username", "password": "XXXXXXXXXXXXX", "roles": ["IT Operator", "Designer"]}
    answer = admin.call("POST", "/users", example)
    assert (answer.status, answer.body) == (201, {"statusCode": 201, "message": "Created"})
    answer = admin.call("GET", "/users", headers={"username": "api"})
    assert answer.body.keys() == {"statusCode", "data", "message"}
    assert answer.data.keys() == {"users", "previous_evaluated_key", "last_evaluated_key"}
    names = [user["username"] for user in answer.data["users"]]
    assert names == sorted(names, reverse=True)
    (user,) = [user for user in answer.data["users"] if user["username"] == "username"]
    assert user == {
        "username": "username",
        "roles": ["IT Operator", "Designer"],
        "creator": "api",
        "permissions": [
            "checkpoint:all",
            "inference:all",
            "role:all",
            "sagemaker_endpoint:all",
            "train:all",
            "user:all",
        ],
        "password": "********",
    }
    for path, example in (
        ("/users", {"user_name_list": ["string"]}),
        ("/users", {"user_name_list": ["username"]}),
        ("/roles", {"role_name_list": ["role_name_1"]}),
        ("/roles", {"role_name_list": ["new_role_name", "Designer"]}),
    ):
        answer = admin.call("DELETE", path, example, headers={"username": "api"})
        assert (answer.status, answer.body) == (204, None)
    assert admin.ok("GET", "/users?username=username")["users"] == []
    assert admin.ok("GET", "/roles?role=Designer")["roles"] == []


def test_a_checkpoint_by_url(admin: Api) -> None:
    example = {
        "checkpoint_type": "ControlNet",
        "params": {"message": "placeholder for chkpts upload test"},
        "urls": ["https://huggingface.co/lllyasviel/ControlNet-v1-1/resolve/main/control_v11p_sd15_canny.pth"],
    }
    answer = admin.call("POST", "/checkpoints", example)
    message = "Checkpoint creation in progress, please check later"
    assert (answer.status, answer.body) == (202, {"statusCode": 202, "message": message})
    listed = admin.ok("GET", "/checkpoints?types=ControlNet&per_page=1000")["checkpoints"]
    (row,) = [row for row in listed if row["name"] == ["control_v11p_sd15_canny.pth"]]
    assert (row["params"]["creator"], row["params"]["message"]) == ("api", "placeholder for chkpts upload test")
    deleted = admin.call("DELETE", "/checkpoints", {"checkpoint_id_list": ["string", row["id"]]})
    assert (deleted.status, deleted.body) == (204, None)


def test_urls_win_over_filenames(admin: Api) -> None:
    names = [f"{fresh()}.pt", f"{fresh()}.pt"]
    both = {"filenames": [{"filename": names[0], "parts_number": 1}], "urls": [f"http://10.0.0.1/{names[1]}"]}
    answer = admin.call("POST", "/checkpoints", {"checkpoint_type": "VAE", "params": {}, **both})
    assert (answer.status, "data" in answer.body) == (202, False)
    listed = [row["name"] for row in admin.ok("GET", "/checkpoints?types=VAE&per_page=1000")["checkpoints"]]
    assert [names[1]] in listed
    assert [names[0]] not in listed


def test_a_checkpoint_by_parts(admin: Api) -> None:
    name = f"{fresh()}.safetensors"
    body = {
        "checkpoint_type": "Stable-diffusion",
        "filenames": [{"filename": name, "parts_number": 1}],
        "params": {"message": "api-test-message", "creator": "admin"},
    }
    opened = admin.call("POST", "/checkpoints", body)
    assert (opened.status, opened.message) == (201, "Created")
    checkpoint = opened.data["checkpoint"]
    (url,) = opened.data["s3PresignUrl"][name]
    etag = admin.put(url, safetensors()).headers["etag"]
    assert etag.startswith('"')
    example = {
        "checkpoint_id": "5b47fc8f-c1b0-47ad-9d85-ad0f08526e28",
        "status": "Active",
        "multi_parts_tags": {name: [{"ETag": etag, "PartNumber": 1}]},
    }
    for _ in range(2):
        answer = admin.call("PUT", f"/checkpoints/{checkpoint['id']}", example)
        assert (answer.status, answer.body["statusCode"], answer.message) == (200, 200, "OK")
        assert answer.body["checkpoint"] == answer.data["checkpoint"]
        shown: dict[str, Any] = answer.body["checkpoint"]
        assert shown.keys() == {"id", "type", "s3_location", "status", "params"}
        assert shown["params"]["message"] == "api-test-message"
        assert shown["params"]["creator"] == "api", "the caller, whoever the body names"
        assert shown["params"]["multipart_upload"][name].keys() == {"upload_id", "bucket", "key"}
    assert shown["status"] == "Active", "the state before the second update"
    renamed = admin.call("PUT", f"/checkpoints/{checkpoint['id']}", {"name": fresh("r")})
    message = "rename is processing, please wait"
    assert (renamed.status, renamed.body) == (202, {"statusCode": 202, "message": message})
