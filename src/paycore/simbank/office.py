"""What the HTTP handlers of one bank process share."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import Request

from paycore.simbank.bank import Bank
from paycore.simbank.desk import Desk
from paycore.simbank.disk import Disk
from paycore.simbank.sender import Sender
from paycore.simbank.signing import Verifier
from paycore.simbank.web import ApiError


@dataclass(frozen=True)
class Office:
    """One bank process. stopping: whether the process is on its way out; banks: their names, in order.

    asked: how often each bank was asked for each operation since the process began, whatever it answered.
    """

    banks: tuple[str, ...]
    bank: Bank
    disk: Disk
    desk: Desk
    sender: Sender
    verifier: Verifier
    stopping: Callable[[], bool]
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def known(self, bank: str) -> str:
        """Return the bank's name. Raises ApiError when there is no such bank."""
        if bank not in self.banks:
            raise ApiError(404, "UNKNOWN_BANK", f"bank: one of {', '.join(self.banks)}")
        return bank


def office_of(request: Request) -> Office:
    """Return the office that a request came to."""
    office: Office = request.app.state.office
    return office
