"""The bank's look at what is due, under a clock that moves while it looks."""

from itertools import count
from pathlib import Path

from paycore.simbank.bank import Bank
from paycore.simbank.books import Refund, RefundState
from paycore.simbank.desk import Desk
from paycore.simbank.disk import Disk
from paycore.simbank.sender import Sender, SenderConfig

NOW_MS = 1_800_000_000_000


class SteppingClock:
    """A millisecond later each time it is read."""

    def __init__(self) -> None:
        self._readings = count(NOW_MS)

    def now_ms(self) -> int:
        return next(self._readings)


async def test_refund_that_falls_due_while_the_bank_looks_is_settled_or_waited_for(tmp_path: Path) -> None:
    clock, desk, disk = SteppingClock(), Desk(), Disk(tmp_path / "books.db")
    due = Refund("bank_a", "R1", "1001", "T1", 1, "CNY", NOW_MS, RefundState.ACCEPTED, "", NOW_MS + 1, 1)
    with disk.transaction():
        disk.put_refund(due)
    sender = Sender(disk, Bank(disk, clock, "http://bank"), desk, clock, SenderConfig("http://nobody", {}, (), 1))
    try:
        assert await sender._start_due() is not None
        await sender._start_due()
        settled = disk.refund("bank_a", "R1")
        assert settled is not None
        assert settled.state == RefundState.REFUNDED
    finally:
        await sender._http.aclose()
        desk.close()
        disk.close()
