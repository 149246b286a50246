"""Where log lines go and what they look like: one line each, to standard error, no secrets in them."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

HIDDEN = "**********"

_SECRET_WORDS = ("secret", "password", "passphrase", "private_key", "authorization", "api_key")


def configure_logs(log_format: str, log_level: str, worker: int | None = None) -> None:
    """Set up structlog and the standard library's logging, which gRPC uses. log_format: json or console.

    worker: which of several processes writes the lines; each of its lines says so.
    """
    level = logging.getLevelNamesMapping()[log_level.upper()]
    renderer: Processor = structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    if log_format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_plain_traceback)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if worker is None else [_name_worker(worker)]),
            hide_secrets,
            *([] if log_format == "console" else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(max(level, logging.WARNING))


def _name_worker(worker: int) -> Processor:
    # Not by structlog's context variables: threads start without them.
    def name_worker(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        del logger, method
        return {"worker": worker, **event}

    return name_worker


def hide_secrets(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Blank every value that hides itself (pydantic's SecretStr) or stands under a name that says secret."""
    del logger, method
    return {name: _hidden(name, value) for name, value in event.items()}


def _hidden(name: object, value: Any) -> Any:
    if hasattr(value, "get_secret_value") or any(word in str(name).lower() for word in _SECRET_WORDS):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: _hidden(key, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_hidden("", inner) for inner in value]
    return value


# Rich tracebacks print local variables, and with them whatever a request held.
_plain_traceback = structlog.dev.plain_traceback


class _ToStructlog(logging.Handler):
    """Turns the standard library's records into lines like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        structlog.get_logger().log(record.levelno, message, logger=record.name, exc_info=record.exc_info or None)
