"""Looks at payments closely: puts right what is missing, asks channels, and says what it cannot put right."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from paycore.channels.protocol import ChannelUnknownError
from paycore.domain.clock import Clock
from paycore.domain.errors import PreconditionError, StoreUnavailableError, ThrottledError
from paycore.domain.verdicts import NotifyOutcome, RefundState
from paycore.failpoint import failpoint
from paycore.jobs.gate import ChannelGate
from paycore.jobs.sweep_contradictions import Contradiction, contradiction
from paycore.jobs.sweep_findings import Finding, Moment, Owed, Unjudged, Untasked, Untried, find, waits
from paycore.jobs.sweep_units import Repair
from paycore.metrics import Metrics
from paycore.store import sweeps
from paycore.store.protocol import Store
from paycore.store.rows import PaymentRecord
from paycore.store.sweeps import SweepCase
from paycore.usecases.attempts import Conversations
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

_TOGETHER = 100
"""Payments that are read, and put right, together."""

_NO_PAYMENT = "rows of a payment that there is not"

_log = QuietLog()


class Looked(NamedTuple):
    """What came of a look at payments.

    waiting: those that have to be looked at again. done: findings that were put right. put_off: attempts whose channel
    gave no usable answer. lag_ms: how long the oldest of these has been due.
    """

    waiting: Mapping[int, PaymentRecord]
    done: int
    put_off: int
    lag_ms: int

    def and_also(self, other: "Looked") -> "Looked":
        """Both together."""
        waiting = {**self.waiting, **other.waiting}
        lag_ms = max(self.lag_ms, other.lag_ms)
        return Looked(waiting, self.done + other.done, self.put_off + other.put_off, lag_ms)


NOTHING = Looked({}, 0, 0, 0)


class Looker:
    """Looks at payments for one sweeper."""

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        conversations: Conversations,
        schedule: Schedule,
        gate: ChannelGate,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._writer = writer
        self._conversations = conversations.behind(gate.call)
        self._schedule = schedule
        self._gate = gate
        self._clock = clock
        self._metrics = metrics

    async def look(self, payment_ids: Iterable[int], moment: Moment, again: Collection[int] = ()) -> Looked:
        """Put right what is missing on these payments. again: those whose contradictions were told of before.

        Raises StoreUnavailableError, ThrottledError; what was put right until then stays so.
        """
        looked, ids = NOTHING, sorted(set(payment_ids))
        for start in range(0, len(ids), _TOGETHER):
            looked = looked.and_also(await self._look(ids[start : start + _TOGETHER], moment, again))
        return looked

    async def tell(self, payment_ids: Iterable[int], moment: Moment) -> None:
        """Say what contradicts itself on these payments, and leave the rest. Raises StoreUnavailableError."""
        ids = sorted(payment_ids)
        for start in range(0, len(ids), _TOGETHER):
            for payment_id, case in (await self._load(ids[start : start + _TOGETHER])).items():
                self._tell_of_contradictions(payment_id, find(case, moment))

    async def _look(self, ids: list[int], moment: Moment, again: Collection[int]) -> Looked:
        cases = await self._load(ids)
        found = {payment_id: find(case, moment) for payment_id, case in cases.items()}
        for payment_id in sorted(set(ids) - set(again)):
            self._tell_of_contradictions(payment_id, found.get(payment_id))
        done = await self._repair([payment_id for payment_id in found if _is_repairable(found[payment_id])], moment)
        unjudged = [(key, one) for key in found for one in found[key] if isinstance(one, Unjudged)]
        answers = await self._ask_all(unjudged)
        # What the channels said has been written meanwhile.
        cases |= await self._load(sorted({payment_id for payment_id, _ in unjudged}))
        settled = {payment_id for (payment_id, _), answer in zip(unjudged, answers, strict=True) if answer}
        waiting = {key: case.record for key, case in cases.items() if key not in settled and waits(case)}
        put_off = [one for (_, one), answer in zip(unjudged, answers, strict=True) if answer is None]
        lag_ms = max((moment.now_ms - one.due_at_ms for one in put_off), default=0)
        return Looked(waiting, done + len(answers) - len(put_off), len(put_off), lag_ms)

    async def _load(self, ids: list[int]) -> dict[int, SweepCase]:
        return await asyncio.to_thread(self._store.read, lambda connection: sweeps.load_cases(connection, ids))

    def _tell_of_contradictions(self, payment_id: int, found: list[Finding] | None) -> None:
        if found is None:
            found = [contradiction(_NO_PAYMENT, 0, "")]
        for one in found:
            if isinstance(one, Contradiction):
                self._tell(payment_id, one)

    async def _repair(self, payment_ids: list[int], moment: Moment) -> int:
        """Put right what can be; return how many findings were. One payment that breaks keeps no other waiting."""
        if not payment_ids:
            return 0
        try:
            return await self._repair_together(payment_ids, moment)
        except (StoreUnavailableError, ThrottledError):
            raise
        except Exception:  # noqa: BLE001 - a refused row, or a defect that one payment's rows bring out
            if len(payment_ids) > 1:
                return sum([await self._repair([payment_id], moment) for payment_id in payment_ids])
            _log.exception("sweep_broke", payment_id=payment_ids[0])
            return 0

    async def _repair_together(self, payment_ids: list[int], moment: Moment) -> int:
        failpoint("sweeper.before_repair")
        repaired = await self._writer.run(Repair(payment_ids, self._schedule, moment))
        for payment_id, finding in repaired:
            self._tell(payment_id, finding)
            if isinstance(finding, Owed):
                self._metrics.count_refunds(NotifyOutcome(finding.excess.reason).name, RefundState.PENDING.name)
        return len(repaired)

    async def _ask_all(self, unjudged: Sequence[tuple[int, Unjudged]]) -> list[bool | None]:
        asks = (self._ask(payment_id, finding) for payment_id, finding in unjudged)
        answers = await asyncio.gather(*asks, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _ask(self, payment_id: int, finding: Unjudged) -> bool | None:
        """Ask the channel again, and let the decision judge the money that it names.

        Return whether that settles it: True where the channel now says otherwise, which only a person can make out;
        False where money was judged; None where there was no usable answer.
        """
        attempt = finding.attempt
        if self._gate.resting(attempt.channel, attempt.account):
            return None
        try:
            queried = await self._conversations.query(attempt)
        except (ChannelUnknownError, PreconditionError) as unknown:
            _log.info("sweep_asks_again", payment_id=payment_id, attempt=attempt.attempt, why=str(unknown))
            return None
        if not queried.captures:
            what = f"the channel called it paid, and now {queried.state.name}"
            self._tell(payment_id, contradiction(what, attempt.attempt, ""))
            return True
        self._tell(payment_id, finding)
        return False

    def _tell(self, payment_id: int, finding: Finding) -> None:
        self._metrics.count_sweep_found(finding.kind)
        _log.error("sweep_found", kind=finding.kind.value, payment_id=payment_id, **_described(finding))


def _is_repairable(found: Iterable[Finding]) -> bool:
    return any(isinstance(one, Owed | Untried | Untasked) for one in found)


def _described(finding: Finding) -> dict[str, int | str]:
    match finding:
        case Owed(_, excess):
            return {"attempt": excess.attempt, "channel_trade_no": excess.channel_trade_no}
        case Untried(_, refund, seq):
            return {"refund_no": refund.refund_no, "seq": seq}
        case Untasked(_, attempt):
            return {} if attempt is None else {"attempt": attempt.attempt}
        case Unjudged(_, attempt, _):
            return {"attempt": attempt.attempt}
        case Contradiction(_, what, number, reference):
            return {"what": what, "attempt": number, "reference": reference}
