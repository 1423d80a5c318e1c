"""One log line per event, readable on a terminal or as JSON; the service's name and the request id are on each line."""

from __future__ import annotations

import logging
import sys

import structlog

from services.common.settings import Settings

# These libraries describe what they do at INFO, including URLs that carry a signature, or every minute.
_QUIET = ("httpx", "httpcore", "botocore", "boto3", "urllib3", "alembic", "grpc", "s3transfer", "procrastinate")


def configure(service: str, settings: Settings) -> None:
    """Sets up structlog and the standard library's logging for this process."""
    level = getattr(logging, settings.log_level.upper())
    json = settings.log_format == "json"
    # Plain tracebacks: the pretty ones print local variables, and those may be secrets.
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer() if json else console
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    errors = [structlog.processors.format_exc_info] if json else []
    structlog.configure(
        processors=[*shared, *errors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(service=service)
