"""What can go wrong, in the words of the domain.

    EsdError
    ├── InvalidArgument      the request contradicts itself or its rules          400
    ├── Unauthenticated      nobody is known to be asking                         401
    ├── PermissionDenied     somebody is, and may not                             403
    ├── NotFound             the thing named does not exist                       404
    ├── AlreadyExists        the same request was made before, with other content 409
    ├── FailedPrecondition   the request is fine, the state of things is not      400
    ├── ResourceExhausted    a limit is reached for now                           429
    └── Unavailable          a part is down for now                               503

The message of each is one sentence for the caller. `services/common/rpc_errors.py` turns them into gRPC statuses, the
gateway turns those into HTTP. Anything else that is raised becomes INTERNAL with a fixed sentence, and its details go
to the log.
NOTE: what REST clients know as a conflict of names is a 400 in this API, hence FailedPrecondition.
"""


class EsdError(Exception):
    """The root; raise one of the eight kinds, or a subclass of one that names the thing."""


class InvalidArgument(EsdError):
    """The request contradicts itself or its rules."""


class Unauthenticated(EsdError):
    """Nobody is known to be asking."""


class PermissionDenied(EsdError):
    """Somebody is asking who may not."""


class NotFound(EsdError):
    """The thing named does not exist."""


class AlreadyExists(EsdError):
    """The same request was made before, with other content."""


class FailedPrecondition(EsdError):
    """The request is fine, the state of things is not."""


class ResourceExhausted(EsdError):
    """A limit is reached for now; after so many seconds it may not be any more, if anybody knows."""

    def __init__(self, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(EsdError):
    """A part is down for now."""
