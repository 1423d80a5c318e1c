"""Owns what all RPCs have in common, in one interceptor.

The order for a request: token → request rules → acting user and permission → servicer → reply metadata. A bad body is
400 before a bad user is 401 or 403, as the legacy API has it (contract 1.5).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, unquote
from uuid import uuid4

import grpc
import structlog
from google.api import annotations_pb2
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message

from esd.options.v1 import options_pb2 as options
from services.common import errors, validation
from services.common.auth import (
    TOKEN_METADATA,
    Absence,
    Caller,
    Kind,
    Origin,
    Profile,
    Verifier,
    set_caller,
    set_judgement,
    set_origin,
)
from services.common.rpc_errors import STATUS_OF
from services.common.status import ReplyStatus, begin_reply
from services.common.streams import OpenStreams

log = structlog.get_logger()

INTERNAL = "an internal error occurred; the service's log has the details under this request's id"
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # of what becomes JSON: the gateway makes it in memory
_MAX_MESSAGE = 4000  # characters of an error's sentence

_KINDS = {
    options.CALLER_KEY: Kind.USER,
    options.CALLER_SERVICE: Kind.SERVICE,
    options.CALLER_WORKER: Kind.WORKER,
    options.CALLER_TRAINER: Kind.TRAINER,
}
_ABSENCES = {
    options.WITHOUT_USERNAME_UNSPECIFIED: Absence.REFUSED_IN_WEBUI,
    options.WITHOUT_USERNAME_OWNER: Absence.OWNER,
    options.WITHOUT_USERNAME_ALLOWED: Absence.ALLOWED,
}
_MESSAGES = {200: "OK", 201: "Created", 202: "Accepted", 204: "No Content"}


class _Rules:
    """The options of one RPC, read from its descriptor once."""

    def __init__(self, method: MethodDescriptor) -> None:
        # The type stubs do not know extensions that a file of ours declares.
        extensions: Any = method.GetOptions().Extensions
        self.public: bool = extensions[options.public]
        self.permissions = list(extensions[options.permission])
        self.kind = _KINDS.get(extensions[options.caller])
        self.absence = _ABSENCES[extensions[options.without_username]]
        self.enforced_by_servicer: bool = extensions[options.enforced_by_servicer]
        reply: options.Reply = extensions[options.reply]
        status, message = reply.status or 200, reply.message
        self.is_raw = reply.raw
        self.usual = {
            Profile.DOCUMENT: (status, message),
            Profile.WEBUI: (reply.webui_status or status, reply.webui_message or message),
        }
        self.others: dict[int, str] = {other.status: other.message for other in extensions[options.other_reply]}
        self.is_rest = method.GetOptions().HasExtension(annotations_pb2.http)

    def admit(self, caller: Caller) -> None:
        """Refuses a caller whom the RPC is not for."""
        if caller.kind != (self.kind or Kind.USER):
            raise errors.PermissionDenied(f"this is not open to a {caller.kind}")

    def judge(self, caller: Caller) -> None:
        """Refuses a user who may not; where the servicer says when, it is ready for its `auth.enforce()`."""
        if self.enforced_by_servicer:
            set_judgement(lambda: caller.enforce(self.permissions, self.absence))
        elif self.permissions:
            caller.enforce(self.permissions, self.absence)

    def metadata(self, response: Message, caller: Caller | None, reply: ReplyStatus) -> tuple[tuple[str, str], ...]:
        """The initial metadata from which the gateway makes the REST envelope.

        Raises:
            KeyError: the servicer chose a status that the proto does not declare.
        """
        status, message = self.usual[caller.profile if caller else Profile.DOCUMENT]
        if reply.status not in (None, status):
            status, message = reply.status, self.others[reply.status]
        message = reply.message or message or _MESSAGES[status]
        pairs = [("x-esd-status", str(status)), ("x-esd-message", quote(message, safe=" "))]
        if self.is_raw:
            pairs.append(("x-esd-raw", "1"))
        elif any(field.name == "data" for field, _ in response.ListFields()):
            pairs.append(("x-esd-unwrap", "1"))
        return tuple(pairs)


class Interceptor(grpc.aio.ServerInterceptor):
    """What all RPCs have in common."""

    def __init__(self, verifier: Verifier, streams: OpenStreams) -> None:
        self._verifier = verifier
        self._streams = streams
        self._handlers: dict[str, Any] = {}  # the same for all calls of an RPC

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        name = handler_call_details.method
        if name not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None or name.startswith("/grpc."):
                return handler
            self._handlers[name] = self._wrapped(name, handler)
        return self._handlers[name]  # type: ignore[no-any-return]

    def _wrapped(self, name: str, handler: Any) -> Any:  # the stubs type every handler as a synchronous one
        service, method = name.lstrip("/").split("/")
        found = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method]
        rules = _Rules(found)
        rpc = _Rpc(name, rules, self._verifier, self._streams)
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if not handler.request_streaming:
            # Services send each other long lists, and no others may call those RPCs.
            bounded = None if rules.kind is Kind.SERVICE else found.input_type
            codecs["request_deserializer"] = _reading(handler.request_deserializer, bounded)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(rpc.unary(handler.unary_unary), **codecs)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(rpc.stream(handler.unary_stream), **codecs)
        return grpc.stream_stream_rpc_method_handler(rpc.stream(handler.stream_stream, checks_request=False), **codecs)


@dataclass(frozen=True)
class _Unreadable:
    """In the place of a request that is no message of its type, which the transcoder makes from some wrong JSON, or one
    that is not read."""

    reason: str


_OF_ANOTHER_TYPE = _Unreadable("[a field of the request has a value of another type than it should have]")


def _reading(
    deserialize: Callable[[bytes], Message], bounded: Descriptor | None
) -> Callable[[bytes], Message | _Unreadable]:
    def read(data: bytes) -> Message | _Unreadable:
        try:
            if bounded is not None:
                validation.check_structure(data, bounded)
            request = deserialize(data)
        except DecodeError:
            return _OF_ANOTHER_TYPE
        except errors.InvalidArgument as error:
            return _Unreadable(str(error))
        request.DiscardUnknownFields()  # nobody reads them, and the checks would go through them
        return request

    return read


class _Rpc:
    """An RPC: each of its calls on the way to the servicer and back."""

    def __init__(self, name: str, rules: _Rules, verifier: Verifier, streams: OpenStreams) -> None:
        self._name = name
        self._rules = rules
        self._verifier = verifier
        self._streams = streams

    def unary(self, behaviour: Callable[[Any, Any], Awaitable[Message]]) -> Callable[[Any, Any], Awaitable[Message]]:
        async def run(request: Message | _Unreadable, context: grpc.aio.ServicerContext) -> Message:
            began = time.monotonic()
            try:
                caller, _ = self._begin(request, context)
                reply = begin_reply()
                response = await behaviour(request, context)
                if self._rules.is_rest:  # sending it apart from the response has a price
                    _check_size(response)
                    await context.send_initial_metadata(self._rules.metadata(response, caller, reply))
            except Exception as error:  # every failure becomes a status here
                await self._fail(error, context)
            log.debug("rpc", method=self._name, milliseconds=round(1000 * (time.monotonic() - began), 1))
            return response

        return run

    def stream(self, behaviour: Callable[[Any, Any], AsyncIterator[Message]], checks_request: bool = True) -> Any:
        """Of an RPC that answers with a stream; one that reads a stream too checks itself what comes by it."""

        async def run(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Message]:
            try:
                _, token = self._begin(request if checks_request else None, context)
                with self._streams.opened(token, context):
                    async for response in behaviour(request, context):
                        yield response
            except Exception as error:
                await self._fail(error, context)

        return run

    def _begin(
        self, request: Message | _Unreadable | None, context: grpc.aio.ServicerContext
    ) -> tuple[Caller | None, str | None]:
        """Lets the call in; answers who calls, by which token.

        Raises:
            EsdError: it is not let in.
        """
        metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
        request_id = metadata.get("x-request-id") or str(uuid4())
        structlog.contextvars.bind_contextvars(request_id=request_id)
        # A client may write what it likes into this header; the gateway adds the address it saw at the end.
        forwarded_for = str(metadata.get("x-forwarded-for", "")).rpartition(",")[2].strip()
        set_origin(Origin(forwarded_for or _host(context.peer()), request_id))
        token, caller = metadata.get(TOKEN_METADATA), None
        if not self._rules.public:
            if not token:
                raise errors.Unauthenticated("a token is needed; through the gateway, an API key")
            caller = self._verifier.verify(token)
            self._rules.admit(caller)
            set_caller(caller)
        if isinstance(request, _Unreadable):
            raise errors.InvalidArgument(request.reason)
        if request is not None:
            validation.check(request)
        if caller is not None:
            self._rules.judge(caller)
        return caller, token

    async def _fail(self, error: Exception, context: grpc.aio.ServicerContext) -> NoReturn:
        """Ends the call with the status of the error; what is unknown goes to the log, not to the caller."""
        code, message = grpc.StatusCode.INTERNAL, INTERNAL
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, NotImplementedError):
            code, message = grpc.StatusCode.UNIMPLEMENTED, "not implemented yet"
        elif kind := next((kind for kind in type(error).__mro__ if kind in STATUS_OF), None):
            code, message = STATUS_OF[kind], str(error)
        else:
            log.error("rpc failed", method=self._name, exc_info=error)
        # What is quoted from a payload may have half of a surrogate pair, with which the call would never end.
        message = message.encode(errors="backslashreplace").decode()
        # It travels as a header, percent-encoded, and the gateway takes 60 KiB of those.
        message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}…"
        retry_after = error.retry_after_seconds if isinstance(error, errors.ResourceExhausted) else None
        # Of an answer without a message the trailing metadata is all there is, so the gateway makes headers of it.
        await context.abort(code, message, () if retry_after is None else (("retry-after", str(retry_after)),))
        raise AssertionError("abort returns")


def _check_size(response: Message) -> None:
    if (size := response.ByteSize()) > MAX_ANSWER_BYTES:
        megabytes = f"{size / 2**20:.0f} MiB, {MAX_ANSWER_BYTES // 2**20} are possible"
        raise errors.FailedPrecondition(f"the answer would have {megabytes}: ask for fewer at once")


def _host(peer: str) -> str:
    """The address in gRPC's name for the other end: `ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
