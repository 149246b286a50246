"""Redis ``SET NX`` for the duplicate check, plus one insert into the database a notification.

A private redis-server with its append-only file synced at every write, as a duplicate check in front of money needs.
What it gets wrong, however fast: a process that ends between the two steps leaves a payment marked as heard that no
database knows of, and its replay is then taken for a duplicate.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import insert

from benchmarks.peers.common import (
    Options,
    Result,
    SkippedError,
    Success,
    engine_on,
    expect,
    lot,
    main,
    pay,
    successes,
)
from paycore.bench.bare_rows import outcomes
from paycore.bench.databases import Database
from paycore.bench.result import BenchError
from paycore.store import tables

if TYPE_CHECKING:
    import redis

START_SECONDS = 20


@contextmanager
def redis_server(folder: Path) -> Iterator[Path]:
    """Run a Redis whose every write is durable; hand out its socket. Raises SkippedError where there is none."""
    if shutil.which("redis-server") is None:
        raise SkippedError("redis-server is not installed (Debian: redis-server)")
    # A socket's path may have about a hundred characters, and a folder's may be longer.
    with tempfile.TemporaryDirectory(prefix="paycore-redis-") as home, (folder / "redis.log").open("ab") as log:
        socket = Path(home) / "redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"redis-server did not start: {(folder / 'redis.log').read_text()[-2000:]}")
                time.sleep(0.02)
            yield socket
        finally:
            process.terminate()
            process.wait()


def connect(socket: Path, threads: int) -> redis.Redis:
    """A client with a pool. Raises SkippedError where the client is not installed."""
    try:
        import redis
    except ImportError:
        raise SkippedError("the Python client of Redis is not installed: pip install 'paycore[bench]'") from None
    return redis.Redis(unix_socket_path=str(socket), max_connections=threads)


def measure(options: Options, database: Database) -> Result:
    """Mark and insert all notifications."""
    payments = lot(options.size)
    words = successes(payments)
    rows = {row.payment_id: row._asdict() for row in outcomes(payments)}
    with redis_server(options.folder) as socket, engine_on(database, options.threads) as engine:
        client = connect(socket, options.threads)
        told = client.config_get("append*")
        assert (told["appendonly"], told["appendfsync"]) == ("yes", "always"), told
        database.settle()

        def accept(word: Success) -> None:
            first = client.set(f"heard:{word.payment_id}", word.channel_trade_no, nx=True)
            assert first, "no notification comes twice here"
            with engine.begin() as connection:
                connection.execute(insert(tables.payment_outcome), rows[word.payment_id])

        timed = pay(options.threads, words, accept)
        expect("keys in Redis", int(client.dbsize()), options.size)
        facts = {**database.facts(), "redis": f"{client.info('server')['redis_version']}, appendfsync=always"}
        client.close()
    expect("outcomes", database.counts()["payment_outcome"], options.size)
    meaning = f"SET NX, then a transaction with one insert, {options.threads} at a time"
    return timed.result("Redis SET NX + insert", meaning, options.size, facts)


if __name__ == "__main__":
    sys.exit(main(measure))
