"""Runs one of the simulator's HTTP servers: on loopback only, announced when ready, stopped by SIGTERM."""

import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import structlog
import uvicorn
from starlette.applications import Starlette

Application = Starlette
Build = Callable[[str, Callable[[], bool]], Application]
"""Makes an application from the address it is reached at and a function that tells whether it is stopping."""


class ServingError(Exception):
    """The server cannot start. The message is one line that says what to do."""


def loopback_socket(listen: str) -> socket.socket:
    """Bind ``host:port`` (port 0: any free one; IPv6 in brackets). Raises ServingError."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and port.isascii() and port.isdecimal() and int(port) <= 65_535):
        raise ServingError(f"--listen {listen}: must be host:port, for example 127.0.0.1:8081")
    address = _loopback(host, listen)
    bound = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((str(address), int(port)))
    except OSError as error:
        bound.close()
        raise ServingError(f"--listen {listen}: {error.strerror}; stop what listens there, or use port 0") from error
    return bound


def _loopback(host: str, listen: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ServingError(f"--listen {listen}: must be a loopback address, for example 127.0.0.1:8081") from None
    if not address.is_loopback:
        raise ServingError(f"--listen {listen}: loopback only, for example 127.0.0.1:8081; it has no access control")
    return address


def address_of(bound: socket.socket) -> str:
    """Return ``host:port`` as bound, with the real port."""
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if bound.family == socket.AF_INET6 else f"{host}:{port}"


def configure_logs() -> None:
    """Send structured lines to standard error: standard output holds the ready line alone."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)


class _AnnouncingServer(uvicorn.Server):
    """Tells when connections are taken."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then announce."""
        await super().startup(sockets)
        self._announce()


def serve(build: Build, bound: socket.socket, ready_file: Path | None) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is under way and return."""
    address = address_of(bound)
    if ready_file is not None:
        _clear(ready_file)

    def announce() -> None:
        if ready_file is not None:
            write_ready_file(ready_file, address)
        sys.stdout.write(f"listening on {address}\n")
        sys.stdout.flush()

    def stopping() -> bool:
        return server.should_exit

    app = build(address, stopping)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5)
    server = _AnnouncingServer(config, announce)
    # uvicorn raises the signal again once it has shut down; by then there is nothing left to do.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[bound])


def _clear(ready_file: Path) -> None:
    """Take away what an earlier run left, and make sure that the new one can be written."""
    if not ready_file.parent.is_dir():
        raise ServingError(f"--ready-file {ready_file}: its folder does not exist")
    ready_file.unlink(missing_ok=True)


def write_ready_file(path: Path, address: str) -> None:
    """Write ``{"address", "pid"}`` in one step: who sees the file sees all of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    fresh.replace(path)
