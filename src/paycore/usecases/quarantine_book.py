"""The quarantine as a person works on it: looked up, judged again, confirmed or dismissed, with a reason and a name."""

import asyncio
import re
from collections.abc import Sequence
from typing import NamedTuple

from paycore.domain.clock import Clock
from paycore.domain.errors import FieldViolation, InvalidArgumentError, NotFoundError, PreconditionError
from paycore.domain.texts import broken_rule
from paycore.domain.verdicts import QUARANTINE_REASONS, NotifyOutcome
from paycore.metrics import Metrics
from paycore.store import evidence
from paycore.store.evidence import Glance, Place
from paycore.store.protocol import Store
from paycore.store.rows import QuarantineRow
from paycore.usecases.confirm import ConfirmExcess, Resolution, ResolutionVerdict, ResolveEvidence
from paycore.usecases.judge import AccountCodes
from paycore.usecases.judge_again import JudgeAgain, Looked, count_refunds, log_resolved
from paycore.usecases.writer import Writer

MAX_PAGE = 1_000
MAX_REASON = 500
MAX_WHO = 64

BY_A_PERSON = {"confirmed": ResolutionVerdict.CONFIRMED, "dismissed": ResolutionVerdict.DISMISSED}
"""What a person may decide."""

BEGINNING = Place(0, "")

_ID = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_REASONS = {reason.name: reason for reason in sorted(QUARANTINE_REASONS)}


class Wanted(NamedTuple):
    """Which evidence a person asks for. reason: a name, any case; empty for every reason."""

    only_open: bool = True
    reason: str = ""
    limit: int = 100


class QuarantineReader:
    """Looks things up; writes nothing and asks nobody. Blocks on the database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def page(self, wanted: Wanted, after: Place = BEGINNING) -> list[QuarantineRow]:
        """Rows beyond a place, oldest first. Raises InvalidArgumentError, StoreUnavailableError."""
        reason = _parse_reason(wanted.reason)
        if not 1 <= wanted.limit <= MAX_PAGE:
            raise InvalidArgumentError([FieldViolation("limit", f"must be 1 to {MAX_PAGE}, not {wanted.limit}")])
        return self._store.read(
            lambda connection: evidence.page(
                connection, after=after, limit=wanted.limit, reason=reason, only_open=wanted.only_open
            )
        )

    def find(self, quarantine_id: str) -> QuarantineRow:
        """Return a row by its id, or by the beginning of it where that fits one only.

        Raises InvalidArgumentError, NotFoundError, StoreUnavailableError.
        """
        if not _ID.fullmatch(quarantine_id):
            raise InvalidArgumentError([FieldViolation("id", "must be 8 to 64 hexadecimal digits")])
        found = self._store.read(lambda connection: evidence.by_prefix(connection, quarantine_id))
        if not found:
            raise NotFoundError("QUARANTINE_NOT_FOUND", "no evidence has this id")
        if len(found) > 1:
            raise InvalidArgumentError([FieldViolation("id", "fits several entries: give more digits")])
        return found[0]


class QuarantineBook:
    """Decides about evidence on a person's word."""

    def __init__(
        self,
        reader: QuarantineReader,
        writer: Writer,
        judge: JudgeAgain,
        accounts: AccountCodes,
        *,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.reader = reader
        self._writer = writer
        self._judge = judge
        self._accounts = accounts
        self._clock = clock
        self._metrics = metrics

    async def retry(self, rows: Sequence[QuarantineRow]) -> list[Looked]:
        """Judge rows again, now; one answer a row, in the rows' order.

        A row that nothing can be done about yet is answered too. Raises StoreUnavailableError, ThrottledError.
        """
        glances = [
            Glance(Place(row.first_seen_at_ms, row.quarantine_id), row.reason, row.payment_id, row.attempt)
            for row in rows
            if row.is_open
        ]
        work = await self._judge.sort(glances)
        known, asked = await self._judge.judge_known(work.known), await self._judge.ask_all(work.asked)
        answered = {one.quarantine_id: one for looked in (known, *asked.values()) for one in looked}
        return [answered.get(row.quarantine_id) or _untouched(row) for row in rows]

    async def resolve(self, quarantine_id: str, *, verdict: str, reason: str, who: str) -> QuarantineRow:
        """Decide about a row; return it as it is then.

        Raises InvalidArgumentError naming each field that breaks a rule, NotFoundError, StoreUnavailableError, and
        PreconditionError: RESOLVED_ALREADY, NOT_CONFIRMABLE, CAPTURE_KEPT, OTHER_TERMS_ON_RECORD, NOT_YET_JUDGED, or
        EVIDENCE_MOVED (retryable) where a word arrived meanwhile.
        """
        _check(verdict, reason, who)
        row = await asyncio.to_thread(self.reader.find, quarantine_id)
        resolution = Resolution(BY_A_PERSON[verdict], reason, who, self._clock.now_ms())
        if not await self._decide(row, resolution):
            raise PreconditionError(
                "EVIDENCE_MOVED", "another word or verdict arrived meanwhile: look at it again", retryable=True
            )
        log_resolved(row, resolution)
        return await asyncio.to_thread(self.reader.find, row.quarantine_id)

    async def _decide(self, row: QuarantineRow, resolution: Resolution) -> bool:
        if resolution.verdict == ResolutionVerdict.CONFIRMED:
            # Also what was dismissed in error: that names money which nobody would send back otherwise.
            confirmed = await self._writer.run(ConfirmExcess(row, resolution, self._accounts))
            count_refunds(self._metrics, confirmed.refunds)
            return confirmed.resolved
        if not row.is_open:
            raise PreconditionError("RESOLVED_ALREADY", "it is resolved; the same word opens it again")
        return row.quarantine_id in await self._writer.run(ResolveEvidence([(row, resolution)]))


def _untouched(row: QuarantineRow) -> Looked:
    if not row.is_open:
        return Looked(row.quarantine_id, resolved=True, why="it is resolved already")
    if row.reason == NotifyOutcome.CONFLICT:
        return Looked(row.quarantine_id, resolved=False, why="not its order's channel or account: for a person")
    return Looked(row.quarantine_id, resolved=False, why="its order is not here")


def _parse_reason(name: str) -> NotifyOutcome | None:
    if not name:
        return None
    reason = _REASONS.get(name.upper())
    if reason is None:
        raise InvalidArgumentError([FieldViolation("reason", f"must be one of {', '.join(_REASONS)}")])
    return reason


def _check(verdict: str, reason: str, who: str) -> None:
    found = []
    if verdict not in BY_A_PERSON:
        found.append(FieldViolation("verdict", f"must be {' or '.join(BY_A_PERSON)}"))
    for field, text, limit in (("reason", reason, MAX_REASON), ("who", who, MAX_WHO)):
        rule = broken_rule(text, min_length=1, max_length=limit)
        if rule is None and not text.strip():
            rule = "must not be blank"
        if rule is not None:
            found.append(FieldViolation(field, rule))
    if found:
        raise InvalidArgumentError(found)
