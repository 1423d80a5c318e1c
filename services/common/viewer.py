"""Who asks, as far as it decides what they see (contract 1.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.common.auth import Caller

EVERYTHING = "user:all"


@dataclass(frozen=True)
class Viewer:
    """A user for whom something is asked; one who `sees_everything`, as holders of user:all do, is among all owners."""

    name: str
    roles: list[str]
    sees_everything: bool = False

    @classmethod
    def of(cls, caller: Caller, anonymous_sees_everything: bool = False) -> Viewer:
        """The acting user of a request. Where the WebUI client names nobody, that is the key's owner, or with
        `anonymous_sees_everything` somebody who sees everything (contract 0.15)."""
        sees_everything = caller.may(EVERYTHING) or (anonymous_sees_everything and caller.is_anonymous_webui)
        return cls(caller.name, list(caller.roles), sees_everything)

    @property
    def owner_words(self) -> list[str]:
        """The words that make an object this user's when one of them is among its owners."""
        return sorted({self.name, "*", *self.roles})

    def sees(self, owners: Sequence[str]) -> bool:
        """The owner test: what nobody owns is everybody's."""
        return self.sees_everything or not owners or not set(owners).isdisjoint(self.owner_words)
