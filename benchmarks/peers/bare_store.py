"""The limit: the same rows into the same table, keys and indexes, ``--batch`` in a commit, alone in a process."""

from __future__ import annotations

import sys

from benchmarks.peers.common import Options, Result, lot, main
from paycore.bench import bare_store
from paycore.bench.databases import Database


def measure(options: Options, database: Database) -> Result:
    """Insert all rows."""
    database.settle()
    rate = bare_store.measure(database.url, lot(options.size), options.batch)
    a_commit_ms = options.batch / rate * 1_000
    meaning = f"the accepted path's rows, {options.batch:,} in a commit, nothing else"
    return Result("bare store", meaning, rate, a_commit_ms, a_commit_ms, options.size, database.facts())


if __name__ == "__main__":
    sys.exit(main(measure, batch=4_000))
