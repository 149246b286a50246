"""Where a server is killed by name, and the account of it: each place often enough, or the run has failed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

POINTS: Mapping[str, int] = {
    # Each commit, seen from the writer and from the store.
    "writer.taken": 12,
    "store.begun": 12,
    "judge.outcomes_inserted": 12,
    "store.before_commit": 12,
    "store.committed": 12,
    "writer.before_answer": 12,
    # Each answer.
    "rpc.Pay.before_answer": 5,
    "rpc.Notify.before_answer": 5,
    "rpc.NotifyBatch.before_answer": 2,
    "rpc.Query.before_answer": 5,
    "rpc.Close.before_answer": 2,
    # Each call of a channel, and what its callers do with the answer.
    "channel.create.before": 5,
    "channel.create.after": 5,
    "channel.query.before": 4,
    "channel.query.after": 4,
    "channel.close.before": 2,
    "channel.close.after": 2,
    "channel.refund.before": 3,
    "channel.refund.after": 3,
    "channel.query_refund.before": 3,
    "channel.query_refund.after": 3,
    "close.attempts_ended": 2,
    # The jobs, between their steps.
    "slices.claimed": 6,
    "refunder.claimed": 3,
    "refunder.looked": 4,
    "closer.looked": 2,
    "recoverer.looked": 3,
    "ender.leased": 1,
    "ender.looked": 1,
    "conversation.paid_noted": 2,
    "sweeper.before_mark": 2,
    "examiner.looked": 1,
    "confirm.written": 1,
}
"""Name -> up to which passage after a start it may strike; the passage itself is drawn anew at each start."""

SAME: Mapping[str, tuple[str, ...]] = {
    "pay.before_create": ("channel.create.before",),
    "pay.after_create": ("channel.create.after",),
    # The ender takes its lease between here and the call; what it comes from is the claim, or the answer before.
    "conversation.before_query": ("channel.query.before", "slices.claimed", "channel.close.after"),
    "conversation.after_query": ("channel.query.after",),
    "conversation.before_close": ("channel.close.before", "channel.query.after"),
    "conversation.after_close": ("channel.close.after",),
    "ender.before_lease": ("slices.claimed", "channel.query.after", "channel.close.after"),
    "examiner.judged": ("writer.before_answer",),
    "examiner.before_confirm": ("channel.query.after",),
    "sweeper.before_full_mark": ("sweeper.before_mark",),
    "refunder.before_send": ("channel.refund.before",),
    "refunder.after_send": ("channel.refund.after",),
}
"""Points between which and one of those named, by whichever way they are come to, nothing is written or sent.

To be killed at either is the same.
"""

ELSEWHERE = ("simbank.",)
"""Points of other processes than the server's."""

ENOUGH = 3
"""How often each point must have struck in a run."""

_IDLE_TOO = ("rpc.", "writer.", "store.", "judge.", "slices.", "sweeper.")
"""Points that an idle server passes as well, for its heartbeat and for passes that find nothing to do.

To die there means something only where somebody waits. At any other point a piece of a job's work is in hand.
"""

_MOMENT_EVERY = 5
"""Every so many kills one comes at a random moment from outside, whatever the points still need."""

_SHORTEST_MS, _LONGEST_MS = 20, 600


class Plan(NamedTuple):
    """How one life of the server ends. point: empty where it is killed from outside, after so many milliseconds."""

    point: str
    passage: int
    after_ms: int

    @property
    def failpoints(self) -> str:
        """The server's PAYCORE_FAILPOINTS."""
        return f"{self.point}*{self.passage}=crash" if self.point else ""


class Tally:
    """Draws the plans and counts what struck. One seed draws the same plans as long as the same points strike.

    enough: how often each point must strike.
    """

    def __init__(self, draw: random.Random, enough: int = ENOUGH, points: Mapping[str, int] = POINTS) -> None:
        self._draw = draw
        self._enough = enough
        self._points = points
        self._plans = 0
        self._missed: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.moments = 0
        self.idle = 0
        self.cut_calls = 0

    @property
    def kills(self) -> int:
        """How often a server was killed that was at work."""
        return self.moments + self.hits.total()

    def missing(self) -> dict[str, int]:
        """The points that have not struck often enough, with how often they have."""
        return {name: self.hits[name] for name in self._points if self.hits[name] < self._enough}

    def strikes(self) -> list[int]:
        """How often each point has struck."""
        return [self.hits[name] for name in self._points]

    def plan(self) -> Plan:
        """Draw how the next life ends."""
        self._plans += 1
        after_ms = self._draw.randint(_SHORTEST_MS, _LONGEST_MS)
        if self._plans % _MOMENT_EVERY == 0:
            return Plan("", 0, after_ms)
        point = self._draw.choice(sorted(self.missing() or self._points))
        # Where it did not strike in time, it is looked for earlier and earlier.
        latest = max(1, self._points[point] >> self._missed[point])
        # Early ones more often than late ones: a life is short, and its start costs the most.
        passage = min(self._draw.randint(1, latest), self._draw.randint(1, latest))
        return Plan(point, passage, after_ms)

    def note(self, plan: Plan, *, struck: bool, cut_calls: int) -> None:
        """Count the end of a life. struck: by its point, not from outside. cut_calls: how many lost their answer."""
        self.cut_calls += cut_calls
        if plan.point and not struck:
            self._missed[plan.point] += 1
        if not cut_calls and (not struck or plan.point.startswith(_IDLE_TOO)):
            self.idle += 1
        elif struck:
            self.hits[plan.point] += 1
        else:
            self.moments += 1

    def table(self) -> str:
        """The account for people: one line a point."""
        width = max(map(len, self._points))
        lines = [f"{name:{width}}  {self.hits[name]:5}" for name in self._points]
        lines.append(f"{'at a random moment':{width}}  {self.moments:5}")
        lines.append(
            f"{'kills':{width}}  {self.kills:5}  ({self.cut_calls} calls cut off; {self.idle} more hit nobody)"
        )
        return "\n".join(lines)


def is_covered(name: str, points: Iterable[str] = POINTS) -> bool:
    """Whether a failpoint found in the source is killed at, or belongs to another process."""
    return name in points or name in SAME or name.startswith(ELSEWHERE)
