"""What a server says of itself when it has started, and how it says that it cannot."""

from typing import NamedTuple


class StartRefusedError(Exception):
    """The server cannot start; the message is one line that says why and what to do."""


class Serving(NamedTuple):
    """Where a server that has started is to be found. workers: the processes that take the calls, if not ``pid``."""

    address: str
    metrics_address: str
    pid: int
    workers: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Return what a ready file holds: ``workers`` only where there are several."""
        fields = self._asdict()
        if not self.workers:
            del fields["workers"]
        return fields
