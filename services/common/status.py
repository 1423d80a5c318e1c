"""How a servicer varies its REST envelope where the proto's reply option is not enough."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class ReplyStatus:
    """The HTTP status and message of the answer under way; None leaves it to the proto option."""

    status: int | None = None
    message: str | None = None


_reply: ContextVar[ReplyStatus] = ContextVar("reply")


def begin_reply() -> ReplyStatus:
    """Starts an answer; the server's interceptor does so before the servicer runs."""
    reply = ReplyStatus()
    _reply.set(reply)
    return reply


def set_reply(status: int | None = None, message: str | None = None) -> None:
    """Sets the HTTP status, one of those that the RPC's proto declares, and the message of the answer under way.

    Native gRPC callers do not see them.
    """
    reply = _reply.get()
    reply.status, reply.message = status, message
