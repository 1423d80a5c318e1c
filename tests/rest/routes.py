"""The routes of roles, users, keys, checkpoints, datasets and trainings: a sound request of each, and its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.rest.tables import Cases, Flag, Fresh, Kind, Number, Object, Text, Texts

NOBODY = "5b47fc8f-c1b0-47ad-9d85-ad0f08526e28"  # an id of the right form
NAME = 255  # characters of a user's or role's name
DATASET_NAME_BAD = ("9a", "-a", "a b", "a.b", "a/b", "ü", "a\n")
FILENAME_BAD = ("a/b.pt", "../a.pt", ".", "..", " ", "a\\b.pt", "a\nb.pt", "ü" * 128, "a\u202etp.pt", "\x9b2J.pt")
URL_BAD = (
    "x", "ftp://example.com/a.pt", "file:///a.pt", "http://", "http://u:p@example.com/a.pt", "http://a:99999/a.pt",
    "http://a\\@b/a.pt", "http://example.com/" + "a" * 5000 + ".pt", "javascript:alert(1)",
)  # fmt: skip
IMPORTED = "http://10.0.0.1/"  # taken into the list at once, and refused when it is looked at


@dataclass(frozen=True)
class Route:
    """`path` and `body` make a sound request for a holder of one of the permissions; `fields` are those of the body.

    `anonymous` is what a webui request without `username` gets: 401 where it must name somebody, else the status.
    """

    name: str
    method: str
    path: str
    status: int
    permissions: tuple[str, ...]
    body: Mapping[str, Any] | None = None
    fields: Mapping[str, Kind] = field(default_factory=dict)
    anonymous: int = 401
    message: str = ""  # where it is not the status's own


def _file(**changes: Any) -> dict[str, Any]:
    return {"filename": Fresh(suffix=".safetensors"), "parts_number": 1} | changes


def _item(**changes: Any) -> dict[str, Any]:
    return {"filename": Fresh(suffix=".png"), "name": "a", "type": "image", "params": {}} | changes


def _entries(entry: Any, key: str, kind: Kind) -> tuple[tuple[str, Any, bool], ...]:
    """The cases of a field of a list's entry, as cases of the list."""
    from tests.rest.tables import MISSING

    cases = []
    for label, value, sound in kind.cases():
        one = {name: kept for name, kept in entry.items() if name != key}
        cases.append((f"{key} {label}", [one if value is MISSING else one | {key: value}], sound))
    return tuple(cases)


def _list(entry: Any, high: int, required: bool) -> tuple[tuple[str, Any, bool], ...]:
    from tests.rest.tables import MISSING

    return (
        ("missing", MISSING, not required),
        ("null", None, not required),
        ("empty", [], not required),
        *((f"wrong type {wrong!r}", wrong, False) for wrong in (5, "x", True, {"a": 1}, [5], ["x"], [[]])),
        ("one", [entry], True),
        ("as many as may be", [entry] * high, True),
        ("too many", [entry] * (high + 1), False),
    )


CHECKPOINT_TYPES = ("Stable-diffusion", "embeddings", "Lora", "hypernetworks", "ControlNet", "VAE", "ESRGAN", "rembg")
_TYPE = Text(longest=None, good=CHECKPOINT_TYPES, bad=("stable-diffusion", "Checkpoint", " VAE", "Stable-diffusion "))
_FILES = Cases(
    (
        *_list(_file(), 20, required=True),
        *_entries(_file(), "filename", Text(bad=FILENAME_BAD, good=(Fresh(255, ".pt"), Fresh(suffix=" ü.pt ")))),
        *_entries(_file(), "parts_number", Number(1, 100, required=True)),
    )
)
_URLS = Cases(
    (
        ("a number", [5], False),
        ("empty text", [""], False),
        ("too many", [f"{IMPORTED}{number}.pt" for number in range(21)], False),
        *((f"bad {url}"[:30], [url], False) for url in URL_BAD),
    )
)
_ITEMS = Cases(
    (
        *_list(_item(), 500, required=True),
        *_entries(_item(), "filename", Text(bad=FILENAME_BAD, good=(Fresh(255, ".png"),))),
        *_entries(_item(), "name", Text(longest=255, good=("ü b/c",))),
        *_entries(_item(), "type", Text(longest=255)),
        *_entries(_item(), "params", Object(required=True)),
    )
)
_IGNORED_TEXT = Text(required=False, may_be_empty=True, is_free=True)

ROUTES = [
    Route("ping", "GET", "/ping", 200, (), anonymous=200, message="pong"),
    Route("list roles", "GET", "/roles", 200, ("role:all", "role:list")),
    Route(
        "create role",
        "POST",
        "/roles",
        201,
        ("role:all",),  # role:create too, for what its holder holds themselves
        {"role_name": Fresh(), "permissions": ["train:all"]},
        {
            "role_name": Text(longest=NAME, good=("Zoë", "a b", "<script>")),
            "permissions": Texts("train:all", 20, bad=(["train:none"], ["all"], [":"], ["train:all "])),
            "creator": _IGNORED_TEXT,
            "initial": Flag(),
        },
        message="role created",
    ),
    Route(
        "delete roles",
        "DELETE",
        "/roles",
        204,
        ("role:all",),
        {"role_name_list": ["nobody"]},
        {"role_name_list": Texts("nobody", 100, bad=(["IT Operator"],))},
        anonymous=204,
    ),
    Route("list users", "GET", "/users", 200, ("user:all", "user:list")),
    Route(
        "create user",
        "POST",
        "/users",
        201,
        ("user:all",),
        {"username": Fresh(), "password": "secret", "roles": ["nothing"]},
        {
            "username": Text(longest=NAME, good=("Zoë T.",)),
            "password": Text(longest=1024, good=("pässword",)),
            "roles": Texts("nothing", 20, bad=(["no such role"],)),
            "initial": Flag(may_be_true=False),
            "creator": _IGNORED_TEXT,
            "permissions": Cases((("any", ["x"], True), ("other", {"a": 1}, True), ("null", None, True))),
        },
    ),
    Route(
        "delete users",
        "DELETE",
        "/users",
        204,
        ("user:all",),
        {"user_name_list": ["nobody"]},
        {"user_name_list": Texts("nobody", 100)},
    ),
    Route("list keys", "GET", "/keys", 200, ("user:all",)),
    Route(
        "create key",
        "POST",
        "/keys",
        201,
        ("user:all",),
        {"username": "nobody-special"},
        {
            "username": Text(bad=("no such user",)),
            "impersonate": Flag(),
            "expires_in_days": Number(1, 3650),
        },
    ),
    Route(
        "delete keys",
        "DELETE",
        "/keys",
        204,
        ("user:all",),
        {"key_id_list": [NOBODY]},
        {"key_id_list": Texts(NOBODY, 100)},
    ),
    Route("list checkpoints", "GET", "/checkpoints", 200, ("checkpoint:all", "checkpoint:list")),
    Route(
        "upload checkpoint",
        "POST",
        "/checkpoints",
        201,
        ("checkpoint:all", "checkpoint:create"),
        {"checkpoint_type": "VAE", "filenames": [_file()], "params": {"message": "m"}},
        {"checkpoint_type": _TYPE, "filenames": _FILES, "params": Object(required=True), "urls": _URLS},
        anonymous=201,
    ),
    Route(
        "import checkpoint",
        "POST",
        "/checkpoints",
        202,
        ("checkpoint:all", "checkpoint:create"),
        {"checkpoint_type": "ControlNet", "urls": [], "params": {"message": "m"}},
        anonymous=202,
        message="Checkpoint creation in progress, please check later",
    ),
    Route(
        "update checkpoint",
        "PUT",
        "/checkpoints/{checkpoint}",
        200,
        ("checkpoint:all", "checkpoint:create"),
        {},
        {
            "status": Text(required=False, bad=("active", "Done", "Active")),  # sound only with tags
            "name": Text(required=False, bad=("9a", "a.b", "a b", "x" * 21, "ok")),  # sound only when it is Active
            "multi_parts_tags": Cases(
                (
                    ("missing", None, True),
                    ("wrong type", "x", False),
                    ("a list", [], False),
                    ("no list", {"a": 5}, False),
                    ("an object", {"a": {}}, True),  # it counts with a status only
                )
            ),
            "checkpoint_id": Cases((("text", "x", True), ("number", 5, True), ("object", {}, True))),
        },
        anonymous=200,
    ),
    Route(
        "delete checkpoints",
        "DELETE",
        "/checkpoints",
        204,
        ("checkpoint:all",),
        {"checkpoint_id_list": [NOBODY]},
        {"checkpoint_id_list": Texts(NOBODY, 100)},
        anonymous=204,
    ),
    Route("list datasets", "GET", "/datasets", 200, ("train:all",)),
    Route(
        "create dataset",
        "POST",
        "/datasets",
        201,
        ("train:all",),
        {"dataset_name": Fresh(), "content": [_item()], "params": {"description": "d"}, "creator": "c", "prefix": ""},
        {
            "dataset_name": Text(longest=20, bad=DATASET_NAME_BAD, good=("a-b_C9",)),
            "content": _ITEMS,
            "params": Object(required=True),
            "prefix": Text(
                required=False,
                may_be_empty=True,
                good=("10_cat", "/a/b/"),
                bad=("..", "a/../b", "a//b", "a\\b", "a\nb", "a\u202eb"),
            ),
            "creator": _IGNORED_TEXT,
        },
    ),
    Route("get dataset", "GET", "/datasets/{dataset}", 200, ("train:all",)),
    Route(
        "update dataset",
        "PUT",
        "/datasets/{dataset}",
        200,
        ("train:all",),
        {"status": "Enabled"},
        {"status": Text(good=("Initialed", "Disabled"), bad=("enabled", "Active"))},
    ),
    Route(
        "delete datasets",
        "DELETE",
        "/datasets",
        204,
        ("train:all",),
        {"dataset_name_list": ["nothing"]},
        {"dataset_name_list": Texts("nothing", 10, bad=(["9a"], ["a" * 21]))},
        anonymous=204,
    ),
    # A training is its owner's alone and takes a model and a dataset: here nobody gets further than the permission.
    # What becomes of one is in tests/services/training and tests/e2e/test_trainings.py.
    Route("list trainings", "GET", "/trainings", 200, ("train:all",)),
    Route(
        "create training",
        "POST",
        "/trainings",
        400,
        ("train:all",),
        {"lora_train_type": "kohya", "params": {}},
        message="Missing train parameters, fm_type, s3_model_path and s3_data_path should be in training_params",
    ),
    *(
        Route(f"{name} training", method, f"/trainings/{NOBODY}{rest}", 404, ("train:all",), message=words)
        for name, method, rest, words in (
            ("get", "GET", "", f"Job with id {NOBODY} not found"),
            ("watch", "GET", "/events", f"Job with id {NOBODY} not found"),
            ("measure", "GET", "/metrics", f"Job with id {NOBODY} not found"),
            ("stop", "PUT", "/stop", f"no such train job with id({NOBODY})"),
        )
    ),
    Route(
        "delete trainings",
        "DELETE",
        "/trainings",
        204,
        ("train:all",),
        {"training_id_list": [NOBODY]},
        {"training_id_list": Texts(NOBODY, 100)},
    ),
]
