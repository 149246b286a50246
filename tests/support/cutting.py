"""A link to a PostgreSQL server that breaks where a test wants it to: both ends find their connection closed."""

from __future__ import annotations

import contextlib
import itertools
import selectors
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from sqlalchemy import make_url

When = Literal["instead", "sent", "answered"]
"""instead: the word is swallowed. sent: it reaches the server, which cannot answer. answered: its answer is lost."""

_SOCKET = ".s.PGSQL.5432"


class CuttingLink:
    """Passes bytes both ways until a word that the client sends is one to break at; later connections are whole again.

    url: a database on a Unix socket; ``self.url`` is the same database through the link.
    """

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self._folder = Path(tempfile.mkdtemp(prefix="paycore-link-"))
        self._target = str(Path(str(target.query["host"])) / _SOCKET)
        self.url = target.set(query={"host": str(self._folder)}).render_as_string(hide_password=False)
        self.cuts = 0
        self._word = b""
        self._when: When = "instead"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self._folder / _SOCKET))
        self._listening.listen()
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._doomed: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, word: bytes, when: When) -> None:
        """Break the next connection that sends this word, once."""
        self._when, self._word = when, word

    def cut_all(self) -> None:
        """Break every connection now."""
        for one in itertools.chain.from_iterable(self._links):
            # Whoever passes on its bytes wakes up and closes it.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.cuts += len(self._links)
        self._links = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut_all()
        (self._folder / _SOCKET).unlink()
        self._folder.rmdir()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:
                client.close()
                server.close()
                continue
            self._links.append((client, server))
            threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        link = client, server
        with selectors.DefaultSelector() as ready:
            try:
                ready.register(client, selectors.EVENT_READ)
                ready.register(server, selectors.EVENT_READ)
                while all(self._pass(link, key.fileobj is client) for key, _ in ready.select()):
                    pass
            except (OSError, ValueError):
                # One of the two ends has gone, or ``cut_all`` has closed both.
                return
            finally:
                _close(link)

    def _pass(self, link: tuple[socket.socket, socket.socket], from_client: bool) -> bool:
        """Hand on what one side has sent; False when the link is to end."""
        source, target = link if from_client else link[::-1]
        data = source.recv(1 << 16)
        if not data:
            return False
        if not from_client and link[0] in self._doomed:
            return False
        if not from_client or not self._word or self._word not in data:
            target.sendall(data)
            return True
        self._word = b""
        self.cuts += 1
        if self._when != "instead":
            target.sendall(data)
        if self._when == "answered":
            # The server may wait for more before it answers.
            self._doomed.add(source)
        return self._when == "answered"


def _close(link: tuple[socket.socket, socket.socket]) -> None:
    for one in link:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
