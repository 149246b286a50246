"""A logger that never raises: where a line cannot be written, the money work it tells of goes on."""

import contextlib
from typing import Any

import structlog


class QuietLog:
    """Writes lines as structlog does. A stream that is closed, full or gone costs the line and nothing else."""

    def __init__(self) -> None:
        self._log = structlog.get_logger()

    def debug(self, event: str, **fields: Any) -> None:
        """Write a line of level debug."""
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Write a line of level info."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Write a line of level warning."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Write a line of level error."""
        self._write("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Write a line of level error with the traceback of the exception that is being handled."""
        self._write("exception", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        # There is nowhere left to say that it failed.
        with contextlib.suppress(Exception):
            getattr(self._log, level)(event, **fields)
