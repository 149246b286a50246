"""A TCP proxy that a test stands between a client and a server, to cut, hold or count what goes through."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Forwards connections to an address; entered and left like a file. `address` is where clients go."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._passes_back = threading.Event()
        self._passes_back.set()
        self._held_back = threading.Event()
        self.connections = 0

    def __enter__(self) -> Self:
        self._run(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread that waits in accept wakes up by this, not by close.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._passes_back.set()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def cut(self) -> None:
        """End every connection at once, with whatever is on its way."""
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def hold_answers(self) -> None:
        """Let requests through and keep what the server says to them."""
        self._held_back.clear()
        self._passes_back.clear()

    def wait_answer_held(self, seconds: float = 20) -> None:
        """Return when the server has said something that is held."""
        assert self._held_back.wait(seconds), "the server said nothing"

    def drop_held(self) -> None:
        """Lose what is held, with its connection, and let later answers through."""
        self.cut()
        self._passes_back.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._open |= {client, server}
                self._run(self._forward, client, server, False)
                self._run(self._forward, server, client, True)

    def _forward(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if is_answer and not self._passes_back.is_set():
                    self._held_back.set()
                    self._passes_back.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
        source.close()

    def _run(self, function: object, *arguments: object) -> None:
        assert callable(function)
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
