"""The states of a job and what leads from one to another. ARCHITECTURE.md tells the same; a test compares them."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a job is in its life. On the wire the three in the middle are all `inprogress`."""

    CREATED = "created"  # waits for its payload, or for its start
    QUEUED = "queued"  # waits for a worker
    HELD = "held"  # a worker has it under a lease
    RUNNING = "running"  # and has begun
    SUCCEED = "succeed"
    FAILED = "failed"


_ENDED = frozenset({State.SUCCEED, State.FAILED})
_LEASED = frozenset({State.HELD, State.RUNNING})

# What happens to a job: from which states, and to which. The names are those of the row's methods; `claim` and `start`
# are statements (queue/claim.py, queue/store.py: `entrust` starts too). Deleting is possible in every state.
TRANSITIONS: dict[str, tuple[frozenset[State], frozenset[State]]] = {
    "queue": (_ENDED | {State.CREATED}, frozenset({State.QUEUED})),
    "claim": (frozenset({State.QUEUED}), frozenset({State.HELD})),
    "move": (frozenset({State.QUEUED}), frozenset({State.QUEUED})),
    "start": (_LEASED, frozenset({State.RUNNING})),
    "lose": (_LEASED, frozenset({State.QUEUED, State.FAILED})),
    "give_back": (_LEASED, frozenset({State.QUEUED})),
    "decline": (_LEASED, frozenset({State.QUEUED, State.FAILED})),
    "postpone": (_LEASED, frozenset({State.QUEUED, State.FAILED})),
    "succeed": (_LEASED, frozenset({State.SUCCEED})),
    "fail": (_LEASED | {State.QUEUED}, frozenset({State.FAILED})),
    "cancel": (_LEASED | {State.CREATED, State.QUEUED}, frozenset({State.FAILED})),
}


def allows(change: str, state: State) -> bool:
    """Whether the change is possible in the state."""
    return state in TRANSITIONS[change][0]
