"""Judges evidence out of quarantine again, now that more is known.

UNKNOWN: its order may be here by now, and the word goes through the same decision as when it came, with the time of its
first arrival. SECOND_CAPTURE and MISMATCH: the channel is asked, once an attempt. What comes to no verdict stays as it
is, for a later look or a person: nothing here is ever guessed.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from paycore.channels.protocol import Capture, ChannelUnknownError
from paycore.domain.clock import Clock
from paycore.domain.decision import ABSENT_MS
from paycore.domain.errors import PaycoreError, PreconditionError, StoreUnavailableError, ThrottledError
from paycore.domain.ids import ChannelOrderNo, format_channel_order_no
from paycore.domain.notification import Notification, quarantine_id
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, RefundState
from paycore.failpoint import failpoint
from paycore.metrics import Metrics
from paycore.store import evidence, lookups
from paycore.store.evidence import Glance
from paycore.store.protocol import Store
from paycore.store.rows import ChannelOrderRow, PaymentRecord, QuarantineRow
from paycore.usecases.attempts import Conversations
from paycore.usecases.confirm import (
    CONFIRMABLE,
    ConfirmExcess,
    Resolution,
    ResolutionVerdict,
    ResolveEvidence,
    terms_of,
)
from paycore.usecases.judge import AccountCodes
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.refund import RefundIntent
from paycore.usecases.told import NoteQueriedPaid
from paycore.usecases.words import verdict_at
from paycore.usecases.writer import Writer

_AT_ONCE = 8
"""Attempts that are asked about at the same time."""

_WORDS = 100
"""Words that go through the decision together: each may hold a raw message of 64 KiB."""

NOT_DECIDED = frozenset({NotifyOutcome.UNKNOWN, NotifyOutcome.THROTTLED, NotifyOutcome.INVALID})

_log = QuietLog()


class Weight(Enum):
    """What the channel's answer makes of evidence."""

    STAYS = auto()
    ON_RECORD = auto()
    REFUTED = auto()
    CONFIRMED = auto()


class Weighed(NamedTuple):
    """The same with why, for people."""

    weight: Weight
    why: str


class Looked(NamedTuple):
    """What a look at a row came to. resolved: whether it is closed now; why: by what, or why it stays."""

    quarantine_id: str
    resolved: bool
    why: str


def weigh(row: QuarantineRow, record: PaymentRecord, told: Iterable[Capture]) -> Weighed:
    """Hold evidence of a capture against what is on record and what the channel tells when it is asked."""
    captures = {capture.channel_trade_no: terms_of(capture) for capture in told}
    recorded = {one.channel_trade_no: terms_of(one) for one in record.captures() if one.attempt == row.attempt}
    claimed, number = terms_of(row), row.channel_trade_no
    of_channel, on_record = captures.get(number), recorded.get(number)
    if on_record == claimed:
        return Weighed(Weight.ON_RECORD, "this capture is on record")
    if on_record is not None:
        if of_channel == on_record:
            return Weighed(Weight.REFUTED, "the channel tells of this trade number what is on record, and not this")
        return Weighed(Weight.STAYS, "it contradicts what is on record under its trade number: for a person")
    if of_channel is None:
        return Weighed(Weight.STAYS, "the channel does not tell of this trade number")
    if of_channel != claimed:
        return Weighed(Weight.STAYS, "the channel tells another amount or currency under this trade number")
    if any(captures.get(trade_no) != terms for trade_no, terms in recorded.items()):
        # Some banks report two serials for one capture.
        return Weighed(Weight.STAYS, "the channel does not tell of what is on record for this attempt: for a person")
    if not recorded and claimed == terms_of(record.payment):
        return Weighed(Weight.STAYS, "nothing else is on record for this attempt: for a person")
    return Weighed(Weight.CONFIRMED, "the channel tells of this capture beside all that is on record for its attempt")


def word_of(row: QuarantineRow) -> Notification:
    """The word as it first came: for evidence out of quarantine, receipt is when it was first seen."""
    return Notification(
        row.channel,
        row.account,
        row.channel_order_no,
        ChannelResult(row.result),
        row.amount_minor,
        row.currency,
        row.channel_trade_no,
        ABSENT_MS if row.paid_at_ms is None else row.paid_at_ms,
        row.first_seen_at_ms,
        CaptureSource(row.source),
        raw=row.raw,
        headers=row.headers,
    )


class Sorted(NamedTuple):
    """Evidence by what can be done about it. known: ids of words whose order is here; asked: ids by attempt."""

    known: list[str]
    asked: dict[ChannelOrderNo, list[str]]


class JudgeAgain:
    """Judges rows of quarantine again. who: what stands in their resolutions."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        conversations: Conversations,
        accounts: AccountCodes,
        *,
        clock: Clock,
        metrics: Metrics,
        who: str,
    ) -> None:
        self._store = store
        self._writer = writer
        self._conversations = conversations
        self._accounts = accounts
        self._clock = clock
        self._metrics = metrics
        self._who = who

    async def sort(self, glances: Sequence[Glance]) -> Sorted:
        """Tell what can be done; rows that wait for their order, or for a person, are left out."""
        unknown = [one for one in glances if one.reason == NotifyOutcome.UNKNOWN and one.payment_id]
        records = await self._records({one.payment_id for one in unknown if one.payment_id})
        known = [
            one.place.quarantine_id
            for one in unknown
            if (record := records.get(one.payment_id or 0)) and one.attempt in record.attempts
        ]
        asked: dict[ChannelOrderNo, list[str]] = {}
        for one in glances:
            if one.reason in CONFIRMABLE and one.payment_id and one.attempt:
                asked.setdefault(ChannelOrderNo(one.payment_id, one.attempt), []).append(one.place.quarantine_id)
        return Sorted(known, asked)

    async def judge_known(self, quarantine_ids: Sequence[str]) -> list[Looked]:
        """Put words whose attempts exist through the decision. Raises StoreUnavailableError."""
        looked = []
        for start in range(0, len(quarantine_ids), _WORDS):
            rows = await self._open_rows(quarantine_ids[start : start + _WORDS])
            if rows:
                looked += await self._judge_known(rows)
        return looked

    async def _judge_known(self, rows: Sequence[QuarantineRow]) -> list[Looked]:
        batch = self._writer.decoder.of_values([word_of(row) for row in rows])
        await self._writer.take_what_fits(batch)
        failpoint("examiner.judged")
        outcomes = [verdict_at(batch, position).outcome for position in range(len(rows))]
        decided = [
            (row, self._resolution(ResolutionVerdict.JUDGED, f"judged {outcome.name}"))
            for row, outcome in zip(rows, outcomes, strict=True)
            if outcome not in NOT_DECIDED
        ]
        resolved = await self._resolve(decided)
        return [
            Looked(row.quarantine_id, row.quarantine_id in resolved, f"judged {outcome.name}")
            for row, outcome in zip(rows, outcomes, strict=True)
        ]

    async def ask_all(
        self, asked: Mapping[ChannelOrderNo, Sequence[str]], lasts: Callable[[], bool] = lambda: True
    ) -> dict[ChannelOrderNo, list[Looked]]:
        """Ask about attempts, several at a time, and judge their rows.

        Those that were not begun when ``lasts`` ended are left out. Raises StoreUnavailableError, ThrottledError.
        """
        room = asyncio.Semaphore(_AT_ONCE)
        answers: dict[ChannelOrderNo, list[Looked]] = {}

        async def one(order: ChannelOrderNo, quarantine_ids: Sequence[str]) -> None:
            async with room:
                if lasts():
                    answers[order] = await self._ask(order, quarantine_ids)

        for error in await asyncio.gather(*(one(*item) for item in asked.items()), return_exceptions=True):
            if error is not None:
                raise error
        return answers

    async def _ask(self, order: ChannelOrderNo, quarantine_ids: Sequence[str]) -> list[Looked]:
        """Judge the rows of one attempt. An answer that does not come leaves them as they are."""
        rows = await self._open_rows(quarantine_ids)
        record = (await self._records({order.payment_id})).get(order.payment_id)
        if not rows:
            return []
        if record is None or order.attempt not in record.attempts:
            return [Looked(row.quarantine_id, resolved=False, why="its order is not here") for row in rows]
        try:
            told = await self._told(record.attempts[order.attempt], record)
        except (StoreUnavailableError, ThrottledError):
            raise
        except (ChannelUnknownError, PaycoreError) as error:
            _log.info("quarantine_not_answered", payment_id=order.payment_id, attempt=order.attempt, why=str(error))
            return [Looked(row.quarantine_id, resolved=False, why=str(error)) for row in rows]
        return [await self._weigh(row, told) for row in rows]

    async def _told(self, attempt: ChannelOrderRow, record: PaymentRecord) -> Sequence[Capture]:
        """Ask the channel; what it tells and nobody has heard of yet goes through the decision first."""
        queried = await self._conversations.ask(attempt)
        on_record = {(one.attempt, one.channel_trade_no, *terms_of(one)) for one in record.captures()}
        news = [
            one for one in queried.captures if (attempt.attempt, one.channel_trade_no, *terms_of(one)) not in on_record
        ]
        there = await self._in_quarantine({id_ for one in news for id_ in _ids_of(attempt, one)})
        fresh = [one for one in news if not there & _ids_of(attempt, one)]
        if fresh:
            await self._writer.run(NoteQueriedPaid(attempt))
            await self._conversations.take_captures(attempt, fresh, CaptureSource.QUERY)
        return queried.captures

    async def _weigh(self, row: QuarantineRow, told: Sequence[Capture]) -> Looked:
        # Read anew for each row: what the last one was confirmed as is on record by now.
        record = (await self._records({row.payment_id or 0}))[row.payment_id or 0]
        weight, why = weigh(row, record, told)
        match weight:
            case Weight.STAYS:
                return Looked(row.quarantine_id, resolved=False, why=why)
            case Weight.CONFIRMED:
                return await self._confirm(row, why)
            case Weight.ON_RECORD | Weight.REFUTED:
                verdict = ResolutionVerdict[weight.name]
                resolved = await self._resolve([(row, self._resolution(verdict, why))])
                return Looked(row.quarantine_id, row.quarantine_id in resolved, why)

    async def _confirm(self, row: QuarantineRow, why: str) -> Looked:
        failpoint("examiner.before_confirm")
        resolution = self._resolution(ResolutionVerdict.CONFIRMED, why)
        try:
            confirmed = await self._writer.run(ConfirmExcess(row, resolution, self._accounts))
        except PreconditionError as refusal:
            # Another word about this capture was judged meanwhile.
            return Looked(row.quarantine_id, resolved=False, why=refusal.message)
        if confirmed.resolved:
            count_refunds(self._metrics, confirmed.refunds)
            log_resolved(row, resolution)
        return Looked(row.quarantine_id, confirmed.resolved, why)

    async def _resolve(self, decided: Sequence[tuple[QuarantineRow, Resolution]]) -> set[str]:
        if not decided:
            return set()
        resolved = await self._writer.run(ResolveEvidence(decided))
        for row, resolution in decided:
            if row.quarantine_id in resolved:
                log_resolved(row, resolution)
        return resolved

    def _resolution(self, verdict: ResolutionVerdict, why: str) -> Resolution:
        return Resolution(verdict, why, self._who, self._clock.now_ms())

    async def _open_rows(self, quarantine_ids: Sequence[str]) -> list[QuarantineRow]:
        rows = await asyncio.to_thread(self._store.read, lambda connection: evidence.by_ids(connection, quarantine_ids))
        return [row for row in rows if row.is_open]

    async def _in_quarantine(self, quarantine_ids: set[str]) -> set[str]:
        found = await asyncio.to_thread(
            self._store.read, lambda connection: lookups.evidence_on_record(connection, quarantine_ids)
        )
        return set(found)

    async def _records(self, payment_ids: set[int]) -> dict[int, PaymentRecord]:
        if not payment_ids:
            return {}
        return await asyncio.to_thread(self._store.load_records, payment_ids)


def _ids_of(attempt: ChannelOrderRow, capture: Capture) -> set[str]:
    """The ids under which this capture may lie in quarantine already."""
    word = Notification(
        attempt.channel,
        attempt.account,
        format_channel_order_no(attempt.payment_id, attempt.attempt),
        ChannelResult.SUCCESS,
        capture.amount_minor,
        capture.currency,
        capture.channel_trade_no,
        ABSENT_MS,
        0,
    )
    return {quarantine_id(word, reason) for reason in CONFIRMABLE}


def count_refunds(metrics: Metrics, refunds: Iterable[RefundIntent]) -> None:
    """Count refunds that a confirmation made."""
    for intent in refunds:
        metrics.count_refunds(NotifyOutcome(intent.refund.reason).name, RefundState.PENDING.name)


def log_resolved(row: QuarantineRow, resolution: Resolution) -> None:
    """Say in the log what was decided."""
    _log.info(
        "quarantine_resolved",
        quarantine_id=row.quarantine_id,
        judged_first=NotifyOutcome(row.reason).name,
        payment_id=row.payment_id,
        attempt=row.attempt,
        verdict=resolution.verdict.value,
        reason=resolution.reason,
        who=resolution.who,
    )
