"""A mistake of a user is one clear sentence, through all layers, and leaves nothing behind. What else may be wrong is
tested where it is checked."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import PICTURE, Api, Studio, create_job, new_user

NOBODY = "5b47fc8f-c1b0-47ad-9d85-ad0f08526e28"  # an id of the right form


def test_all_that_is_wrong_in_a_payload_is_named_and_the_job_stays_as_it_was(studio: Studio) -> None:
    job_id = create_job(studio.api, studio.model, payload=PICTURE | {"steps": 0, "width": 32})
    answer = studio.api.call("PUT", f"/inferences/{job_id}/start")
    assert (answer.status, answer.body["statusCode"]) == (400, 400)
    assert "steps 0 is out of range: 1 to 150 is possible" in answer.message
    assert "width 32 is out of range: 64 to 4096 is possible" in answer.message
    assert studio.api.ok("GET", f"/inferences/{job_id}")["status"] == "created"


@pytest.mark.parametrize("job_id", ["no-uuid", "%00", NOBODY])
def test_an_unknown_or_impossible_job_id_is_not_found(studio: Studio, job_id: str) -> None:
    answer = studio.api.call("GET", f"/inferences/{job_id}")
    assert answer.status in ({404, 400} if job_id == "%00" else {404}), answer.body
    assert studio.api.call("PUT", f"/inferences/{job_id}/start").status == 400


def test_missing_fields_are_listed_as_the_legacy_api_lists_them(admin: Api) -> None:
    answer = admin.call("POST", "/roles", {})
    assert answer.status == 400
    assert answer.message == '[object has missing required properties (["permissions","role_name"])]'
    assert admin.call("POST", "/roles", {"role_name": "", "permissions": ["train:all"]}).status == 400


def test_a_user_without_the_permission_is_told_which_is_missing(admin: Api) -> None:
    reader = new_user(admin, "reader", ["checkpoint:list"])
    answer = reader.call("GET", "/roles")
    assert answer.status == 403
    assert answer.message == "User reader has no permissions: ['role:all', 'role:list']"
    assert reader.call("POST", "/roles", {}).status == 400, "a bad body comes before a missing permission"
    reader.close()
