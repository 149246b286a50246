"""What a stretch of notifications has to come to, and whether it did: of the answers, the metrics and the database."""

from collections.abc import Mapping
from typing import NamedTuple

from paycore.bench.databases import COUNTED, Database
from paycore.bench.load import Loaded, Messages
from paycore.bench.processes import Server
from paycore.bench.result import CountError
from paycore.bench.words import DUPLICATES, LATE, PAYMENTS_A_BLOCK, REPLAYS, UNKNOWN


class Expected(NamedTuple):
    """What a phase has to come to: words by (outcome, replayed), and new rows by table."""

    outcomes: Mapping[tuple[str, str], int]
    rows: Mapping[str, int]


class Phase(NamedTuple):
    """One stretch of load and what must come of it."""

    name: str
    meaning: str
    messages: Messages
    expected: Expected


class Counted(NamedTuple):
    """What a server says it has done, and what its database holds."""

    outcomes: dict[tuple[str, str], int]
    commits: float
    cpu_seconds: float | None
    rows: dict[str, int]

    @classmethod
    def now(cls, server: Server, database: Database) -> "Counted":
        """Ask."""
        outcomes: dict[tuple[str, str], int] = {}
        commits = 0.0
        for (name, labels), value in server.metrics().items():
            if name == "paycore_notify_total":
                by = dict(labels)
                key = by["outcome"], by["replayed"]
                outcomes[key] = outcomes.get(key, 0) + int(value)
            elif name == "paycore_commit_group_size_count":
                commits += value
        return cls(outcomes, commits, server.cpu_seconds(), database.counts())


def check(phase: Phase, loaded: Loaded, before: Counted, after: Counted) -> None:
    """Raise CountError unless answers, metrics and database all say that exactly what is expected was done."""
    expected = {key: count for key, count in phase.expected.outcomes.items() if count}
    counted = {key: count - before.outcomes.get(key, 0) for key, count in after.outcomes.items()}
    for who, said in (("the answers say", loaded.outcomes), ("the server counted", counted)):
        if {key: count for key, count in said.items() if count} != expected:
            raise CountError(f"{phase.name}: {who} {said}, not {expected}")
    written = {table: count - before.rows[table] for table, count in after.rows.items()}
    if written != dict(phase.expected.rows):
        raise CountError(f"{phase.name}: the database got {written}, not {phase.expected.rows}")


def accepted(words: int) -> Expected:
    """Every word is the first about its payment and in time."""
    rows = {table: words if table == "payment_outcome" else 0 for table in COUNTED}
    return Expected({("ACCEPTED", "false"): words}, rows)


def mixed(blocks: int) -> Expected:
    """What so many blocks of the stream that is not clean come to."""
    outcomes = {
        ("ACCEPTED", "false"): blocks * (PAYMENTS_A_BLOCK - LATE),
        ("ACCEPTED", "true"): blocks * REPLAYS,
        ("DUPLICATE", "false"): blocks * DUPLICATES,
        ("LATE", "false"): blocks * LATE,
        ("UNKNOWN", "false"): blocks * UNKNOWN,
    }
    surplus = blocks * (DUPLICATES + LATE)
    rows = {"payment_outcome": blocks * PAYMENTS_A_BLOCK, "excess_payment": surplus, "refund": surplus}
    return Expected(outcomes, rows | {"quarantine": blocks * UNKNOWN})
