"""Which priorities a user may give to jobs: the setting names a range for each role."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.errors import PermissionDenied

EVERY_ROLE = "*"
# Whoever likes may let others go first; going before others is for those who run the place.
DEFAULT_RANGES = {EVERY_ROLE: (-10, 0), "IT Operator": (-10, 10)}


class Priorities:
    """The ranges by role; `*` is everybody's. 0, the priority of jobs that name none, is always possible."""

    def __init__(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        self._ranges = ranges

    def check(self, priority: int, username: str, roles: list[str]) -> None:
        """Refuses a priority beyond what the widest of the user's roles allows.

        Raises:
            PermissionDenied.
        """
        own = [self._ranges[role] for role in [EVERY_ROLE, *roles] if role in self._ranges]
        lowest, highest = min([0, *(low for low, _ in own)]), max([0, *(high for _, high in own)])
        if not lowest <= priority <= highest:
            raise PermissionDenied(
                f"priority {priority} is not possible for {username}, whose roles allow {lowest} to {highest}"
            )
