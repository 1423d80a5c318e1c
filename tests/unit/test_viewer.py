"""Who asks, and whose things they see."""

from __future__ import annotations

import pytest

from services.common.auth import Caller, Kind, Profile, UsernameStatus
from services.common.viewer import Viewer


@pytest.mark.parametrize(
    ("owners", "is_seen"),
    [([], True), (["*"], True), (["ann"], True), (["bob", "designer"], True), (["bob"], False), (["Ann"], False)],
)
def test_what_is_seen_is_nobodys_everybodys_the_users_or_a_roles(owners: list[str], is_seen: bool) -> None:
    assert Viewer("ann", ["designer"]).sees(owners) == is_seen
    assert Viewer("root", [], sees_everything=True).sees(owners)


def test_who_names_nobody_sees_everything_only_where_that_is_said() -> None:
    webui = Caller(
        Kind.USER, "ann", profile=Profile.WEBUI, username_status=UsernameStatus.ABSENT, impersonate=True, roles=["r"]
    )
    assert Viewer.of(webui) == Viewer("ann", ["r"])
    assert Viewer.of(webui, anonymous_sees_everything=True) == Viewer("ann", ["r"], sees_everything=True)
    named = Caller(Kind.USER, "ann", profile=Profile.WEBUI, impersonate=True)
    assert not Viewer.of(named, anonymous_sees_everything=True).sees_everything
    assert Viewer.of(Caller(Kind.USER, "root", permissions=["user:all"])).sees_everything
