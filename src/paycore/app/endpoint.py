"""HTTP for those who watch: /metrics, /-/ready and /-/healthy, on a loopback port of its own and in a thread."""

import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from paycore.rpc.listen import ListenRefusedError, TcpAddress, UnixAddress, taken

SETTING = "PAYCORE_METRICS_LISTEN"

_SLOW_CLIENT_SECONDS = 10
_POLL_SECONDS = 0.05


class MetricsEndpoint:
    """Serves from ``start`` to ``stop``. ready: asked from other threads."""

    def __init__(
        self, address: TcpAddress | UnixAddress, registry: CollectorRegistry, ready: Callable[[], bool]
    ) -> None:
        """Take the address. Raises ListenRefusedError."""
        if isinstance(address, UnixAddress):
            raise ListenRefusedError(f"{SETTING} {address}: must be host:port, for example 127.0.0.1:9464")
        try:
            self._server = _Server(address, _handler(registry, ready))
        except OSError as error:
            raise taken(SETTING, address, error.strerror or "cannot be bound") from None
        self.address = address._replace(port=self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="paycore-metrics", daemon=True
        )

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more and let the port go."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """An HTTP server that binds without asking a name service who it is."""

    def __init__(self, address: TcpAddress, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        super().__init__((address.host, address.port), handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)


def _handler(registry: CollectorRegistry, ready: Callable[[], bool]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET; knows no other method."""

        timeout = _SLOW_CLIENT_SECONDS

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, encode(registry), content_type)
            elif path == "/-/healthy":
                self._say(HTTPStatus.OK, "healthy")
            elif path == "/-/ready":
                is_ready = ready()
                status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
                self._say(status, "ready" if is_ready else "not ready: the database cannot be written")
            else:
                self._say(HTTPStatus.NOT_FOUND, "ask for /metrics, /-/ready or /-/healthy")

        def _say(self, status: HTTPStatus, text: str) -> None:
            self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8")

        def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in http.server
            """Say nothing: a scrape every few seconds is no news."""

    return Handler
