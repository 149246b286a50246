"""What a measurement gives, and how it tells how far it is."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol


class BenchError(Exception):
    """There is no figure; the message says why and, where something is missing, what to give."""


class CountError(BenchError):
    """What was measured did other than it was asked: its figures would say nothing."""


class Row(NamedTuple):
    """One line of the table. rate: a second, of what the result counts; None: not measured here."""

    name: str
    meaning: str
    rate: float | None
    p50_ms: float | None = None
    p99_ms: float | None = None
    of_limit: float | None = None
    """The rate by the limit's."""
    more: Mapping[str, float | int | str] = {}


class Result(NamedTuple):
    """What came of a measurement.

    unit: what ``size`` counts, and ``rate``, ``baseline_rate`` and ``limit_rate`` count a second. facts: what it was
    taken on, beside the machine. p50_ms, p99_ms: None where no latency is meant.
    """

    benchmark: str
    unit: str
    rate: float
    baseline_rate: float | None
    limit_rate: float | None
    p50_ms: float | None
    p99_ms: float | None
    size: int
    rows: Sequence[Row]
    facts: Mapping[str, str]
    more: Mapping[str, float | int | str | None] = {}

    def as_object(self, machine: Mapping[str, str]) -> dict[str, object]:
        """The result as one JSON object."""
        return {
            "benchmark": self.benchmark,
            "unit": self.unit,
            "rate": self.rate,
            "baseline_rate": self.baseline_rate,
            "limit_rate": self.limit_rate,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "count": self.size,
            **self.more,
            "machine": {**machine, **self.facts},
            "results": [row._asdict() for row in self.rows],
        }


class Progress(Protocol):
    """Shows how far a measurement is."""

    def phase(self, what: str, total: int) -> None:
        """Begin a phase of so many steps; 0: nobody knows how many."""
        ...

    def done(self, steps: int) -> None:
        """Tell how many steps of the phase are done."""
        ...


class NoProgress:
    """Shows nothing."""

    def phase(self, what: str, total: int) -> None:
        """Say nothing."""

    def done(self, steps: int) -> None:
        """Say nothing."""


def percentile_ms(latencies_ns: Sequence[int], share: float) -> float:
    """The latency that this share of them, given sorted, did not exceed."""
    return latencies_ns[min(int(share * len(latencies_ns)), len(latencies_ns) - 1)] / 1e6
