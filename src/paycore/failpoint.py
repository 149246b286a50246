"""Named places where a test may stop, crash or fail a process. A no-op unless armed by the environment.

``PAYCORE_FAILPOINTS`` holds ``name=action`` pairs separated by commas. Actions:

* ``crash``: the process dies at once, as by ``kill -9``.
* ``error``: raises ``FailpointError``.
* ``pause:DIR``: writes ``DIR/name.reached`` and waits until ``DIR/name.go`` exists.

``name*N=action`` fires at the N-th passage and only then; without it, at every passage.
"""

import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable


class FailpointError(Exception):
    """Raised by an armed failpoint with the action ``error``."""


class _Armed:
    """One armed failpoint with its own count of passages."""

    def __init__(self, name: str, action: str, only_passage: int) -> None:
        self._name = name
        self._action, _, self._directory = action.partition(":")
        if self._action not in {"crash", "error", "pause"}:
            raise ValueError(f"PAYCORE_FAILPOINTS: unknown action {action!r} for {name!r}")
        self._only_passage = only_passage
        self._passages = 0
        self._lock = threading.Lock()

    def hit(self) -> None:
        with self._lock:
            self._passages += 1
            fires = self._only_passage in (0, self._passages)
        if fires:
            self._act()

    def _act(self) -> None:
        if self._action == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._action == "error":
            raise FailpointError(self._name)
        folder = pathlib.Path(self._directory)
        (folder / f"{self._name}.reached").touch()
        while not (folder / f"{self._name}.go").exists():
            time.sleep(0.005)


def _parse(text: str) -> dict[str, _Armed]:
    armed = {}
    for pair in filter(None, text.split(",")):
        place, _, action = pair.partition("=")
        name, _, passage = place.partition("*")
        armed[name] = _Armed(name, action, int(passage or 0))
    return armed


def _pass(name: str) -> None:
    """Do nothing: no failpoint is armed."""


def _build(text: str) -> Callable[[str], None]:
    if not text:
        return _pass
    armed = _parse(text)

    def hit_if_armed(name: str) -> None:
        point = armed.get(name)
        if point is not None:
            point.hit()

    return hit_if_armed


failpoint: Callable[[str], None] = _build(os.environ.get("PAYCORE_FAILPOINTS", ""))
"""Mark a place by name. Which names exist: ``grep -rn 'failpoint(' src``; a crash run kills at each of them."""
