"""`paycore bench` with tiny counts: every verb gives what it promises, and no figure where counts are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from paycore.bench import bare_store, postgresql_server
from paycore.bench.bare_rows import outcomes
from paycore.bench.counts import Counted, Phase, accepted, check, mixed
from paycore.bench.databases import COUNTED, SqliteDatabase, count_sql, now_ms
from paycore.bench.empty_server import BATCH_METHOD
from paycore.bench.load import Load, Loaded, LoadError, Messages
from paycore.bench.payments import Cycle, Lot, amount_minor, trade_no
from paycore.bench.processes import empty_server
from paycore.bench.result import CountError, percentile_ms
from paycore.bench.words import BLOCK, PAYMENTS_A_BLOCK, Said, Writer, first_words, mixed_words
from paycore.store import sqlite
from paycore.store.engine import parse_database_url
from paycore.store.schema import open_store
from paycore.v1 import payment_service_pb2

pytestmark = pytest.mark.slow

SECONDS = 300
KEYS = {"rate", "baseline_rate", "limit_rate", "p50_ms", "p99_ms", "count", "machine", "unit", "results"}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paycore.cli", "bench", *arguments]
    return subprocess.run(command, timeout=SECONDS, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def bench_json(*arguments: str) -> dict[str, Any]:
    ended = bench(*arguments, "--json")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others than root may pass: PostgreSQL does not run as root, and pytest's own are closed."""
    with tempfile.TemporaryDirectory(prefix="paycore-bench-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def assert_sane(told: dict[str, Any]) -> None:
    assert told.keys() >= KEYS
    assert told["rate"] > 0
    assert told["baseline_rate"] > 0
    assert told["limit_rate"] > 0
    assert 0 < told["p50_ms"] <= told["p99_ms"]


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_bench_notify_of_everything_gives_a_row_each(store: str, open_folder: Path) -> None:
    told = bench_json(
        *("notify", "--store", store, "--count", "2000", "--batch", "100", "--folder", str(open_folder)),
        *("--mix", "dirty", "--open-loop", "half", "--idle", "--existing", "1000"),
    )
    assert_sane(told)
    assert (told["store"], told["batch"], told["count"], told["existing"]) == (store, 100, 2_000, 1_000)
    rows = {row["name"]: row for row in told["results"]}
    assert list(rows) == [*("empty handler", "first words", "not clean", "open loop", "idle", "alone", "bare store")]
    assert all(row["rate"] > 0 and row["meaning"] for row in rows.values())
    assert rows["bare store"]["of_limit"] == 1
    assert told["open_loop_asked_rate"] == pytest.approx(told["rate"] / 2)
    # A message's latency counts from its moment, so it holds what the load itself was late by.
    assert 0 <= told["open_loop_client_late_p50_ms"] <= told["open_loop_client_late_p99_ms"] < told["open_loop_p99_ms"]
    assert 0 < told["alone_p50_ms"] <= told["alone_p99_ms"]
    assert told["alone_rate"] > 0
    assert list(open_folder.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_bench_notify_on_a_database_of_ones_own_leaves_what_was_measured_in_it(store: str, open_folder: Path) -> None:
    url = f"sqlite:///{open_folder}/own.db"
    with ExitStack() as stack:
        if store == "postgresql":
            url = stack.enter_context(postgresql_server.running(open_folder))
        told = bench_json("notify", "--db", url, "--count", "300", "--batch", "100", "--folder", str(open_folder))
        assert_sane(told)
        # The words themselves, and the rows of the limit: on SQLite, of each shape of statement that was tried.
        shapes = len(bare_store.SHAPES) if store == "sqlite" else 1
        assert database_counts(url)["payment_outcome"] == 300 + shapes * 300
        again = bench("notify", "--db", url, "--count", "300", "--folder", str(open_folder))
        assert (again.returncode, again.stdout) == (1, "")
        assert "is there already" in again.stderr or "has payments in it" in again.stderr


def database_counts(url: str) -> dict[str, int]:
    engine = parse_database_url(url).engine(writes=False)
    with engine.connect() as connection, connection.begin():
        counts = {name: int(connection.execute(text(count_sql(name))).scalar_one()) for name in COUNTED}
    engine.dispose()
    return counts


@pytest.mark.parametrize("size", [1, 49, 50, 1_303])
def test_bare_store_inserts_every_row_in_every_shape(size: int, lot: Lot, database: SqliteDatabase) -> None:
    rows = lot._replace(size=3 * size)
    for shape in bare_store.SHAPES:
        assert bare_store.run_sqlite(str(database.path), rows, size, shape) > 0
        rows = rows._replace(first_ms=rows.end_ms)
    assert database.counts()["payment_outcome"] == len(bare_store.SHAPES) * 3 * size


def test_bare_store_tries_the_statements_of_the_store() -> None:
    assert {max(shape) for shape in bare_store.SHAPES} == {50, 500}
    (statement, values) = bare_store._sqlite_runs(list(outcomes(Lot(now_ms(), 500, 1))), bare_store.SHAPES[0])[0]
    assert statement.split(" VALUES ")[0] == sqlite._INSERT_FIRST_OUTCOMES[500].split(" VALUES ")[0]
    assert (statement.count("("), len(values)) == (sqlite._INSERT_FIRST_OUTCOMES[500].count("("), 1)


def test_bench_wire_gives_the_baseline_and_the_limit() -> None:
    told = bench_json("wire", "--count", "2000", "--rounds", "3")
    assert_sane(told)
    assert told["decode_times_baseline"] > 1


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_bench_startup_reads_every_payment(store: str, open_folder: Path) -> None:
    folder = ("--folder", str(open_folder))
    told = bench_json("startup", "--store", store, "--count", "1001", "--rounds", "1", *folder)
    assert_sane(told)
    assert [row["name"] for row in told["results"]] == ["record by record", "warm start", "paycore serve", "bare scan"]


def test_bench_index_gives_the_baseline_and_the_limit(tmp_path: Path) -> None:
    told = bench_json("index", "--count", "1000", "--checks", "1000", "--rounds", "5", "--folder", str(tmp_path))
    assert told.keys() >= KEYS
    assert (told["benchmark"], told["count"]) == ("index", 1_000)
    assert told["rate"] > 0


def test_bench_for_people_says_machine_versions_and_what_each_row_means(tmp_path: Path) -> None:
    ended = bench("notify", "--batch", "1", "--count", "200", "--folder", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stderr == "", "no bars where nobody looks"
    for fact in ("cpu", "python", "grpcio", "database", "fsync", "words", "load"):
        assert f" {fact} " in ended.stdout
    assert "128 messages in flight" in ended.stdout, "single words are unary calls, many at once"
    for name in ("empty handler", "first words", "bare store"):
        assert f"\n{name}: " in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--db", "sqlite:///{taken}"], 1, "is there already"),
        (["--db", "mysql://nobody"], 1, "mysql: not supported"),
        (["--open-loop", "fast"], 2, "--open-loop fast: must be a whole number"),
    ],
)
def test_bench_notify_that_cannot_be_says_what_to_give(
    arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    taken = tmp_path / "taken.db"
    taken.touch()
    given = [argument.format(taken=taken) for argument in arguments]
    ended = bench("notify", "--count", "10", "--folder", str(tmp_path), *given)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert said in ended.stderr


def test_bench_notify_on_a_server_that_loses_words_gives_no_figure(tmp_path: Path) -> None:
    """A queue of one word refuses most of a batch: nothing wrong with the server, and nothing to be reported."""
    told = bench("notify", "--count", "500", "--folder", str(tmp_path), "--server-flag", "queue-limit=1", "--json")
    assert (told.returncode, told.stdout) == (1, "")
    assert "no figures: " in told.stderr


# ---- What is written and said ------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> SqliteDatabase:
    return SqliteDatabase(tmp_path / "bench.db")


@pytest.fixture
def lot() -> Lot:
    return Lot(now_ms() - 100_000, 3 * PAYMENTS_A_BLOCK, 7, cycle=Cycle(PAYMENTS_A_BLOCK, 10, 5))


def test_payments_written_in_bulk_are_what_the_store_reads(database: SqliteDatabase, lot: Lot) -> None:
    told: list[int] = []
    database.write(lot._replace(paid=True), told.append)
    database.settle()
    assert told == [lot.size]
    ids = list(lot.ids())
    assert ids == sorted(set(ids))
    store = open_store(database.url)
    try:
        for place in (0, 9, 10, PAYMENTS_A_BLOCK - 6, PAYMENTS_A_BLOCK - 5, lot.size - 1):
            record = store.load_record(ids[place])
            assert record is not None
            assert record.payment.amount_minor == amount_minor(ids[place])
            twice, expired = place % PAYMENTS_A_BLOCK < 10, place % PAYMENTS_A_BLOCK >= PAYMENTS_A_BLOCK - 5
            assert sorted(record.attempts) == ([1, 2] if twice else [1])
            assert (record.payment.expire_at_ms - record.payment.recorded_at_ms == 1) == expired
            assert record.outcome is not None
            assert record.outcome.channel_trade_no == trade_no(ids[place], 1)
    finally:
        store.dispose()
    assert database.counts() == dict.fromkeys(COUNTED, 0) | {"payment_outcome": lot.size}


@pytest.mark.parametrize("evidence", [False, True])
def test_words_of_templates_are_what_protobuf_writes(lot: Lot, evidence: bool) -> None:
    writer = Writer(lot.end_ms // 1_000 + 1, evidence=evidence)
    for said in (list(first_words(lot)), [Said(payment_id, 2) for payment_id in lot.ids()]):
        message = payment_service_pb2.NotifyBatchRequest.FromString(writer.batch(said))
        words = list(message.notifications)
        assert [payment_service_pb2.NotifyRequest.FromString(writer.word(one)) for one in said] == words
        # A map's entries come in any order; what is filled into a template has none.
        assert evidence or list(map(writer.word, said)) == [word.SerializeToString() for word in words]
        assert [word.channel_order_no for word in words] == [f"{one.payment_id}{one.attempt:02d}" for one in said]
        assert [word.amount_minor for word in words] == [amount_minor(one.payment_id) for one in said]
        assert len({len(word.SerializeToString()) for word in words}) == 1


def test_stream_that_is_not_clean_has_its_shares(lot: Lot) -> None:
    unknown = Lot(lot.end_ms, 3, 8)
    said = list(mixed_words(lot, unknown))
    assert len(said) == 3 * BLOCK
    ids = set(lot.ids())
    assert sum(word.payment_id not in ids for word in said) == 3
    assert sum(word.attempt == 2 for word in said) == 30
    assert len(said) - len(set(said)) == 30, "words told again"
    assert {word.payment_id for word in said} >= ids


# ---- No figure without right counts ------------------------------------------------------------------------

PHASE = Phase("three", "", Messages(Path("unused"), BATCH_METHOD, 1, 3), accepted(3))
ANSWERED = Loaded(1.0, 3, 1, 60, {("ACCEPTED", "false"): 3}, [1_000])
BEFORE = Counted({("ACCEPTED", "false"): 5}, 1.0, None, dict.fromkeys(COUNTED, 5))
AFTER = Counted({("ACCEPTED", "false"): 8}, 2.0, None, {**BEFORE.rows, "payment_outcome": 8})


def test_counts_that_are_what_was_sent_pass() -> None:
    check(PHASE, ANSWERED, BEFORE, AFTER)


@pytest.mark.parametrize(
    ("loaded", "after", "complaint"),
    [
        (ANSWERED._replace(outcomes={("ACCEPTED", "false"): 2}), AFTER, "the answers say"),
        (ANSWERED._replace(outcomes={("ACCEPTED", "false"): 2, ("ACCEPTED", "true"): 1}), AFTER, "the answers say"),
        (ANSWERED, AFTER._replace(outcomes={("ACCEPTED", "false"): 7}), "the server counted"),
        (ANSWERED, AFTER._replace(outcomes={**AFTER.outcomes, ("LATE", "false"): 1}), "the server counted"),
        (ANSWERED, AFTER._replace(rows={**AFTER.rows, "payment_outcome": 7}), "the database got"),
        (ANSWERED, AFTER._replace(rows={**AFTER.rows, "refund": 6}), "the database got"),
    ],
)
def test_counts_that_are_not_what_was_sent_give_no_figure(loaded: Loaded, after: Counted, complaint: str) -> None:
    with pytest.raises(CountError, match=complaint):
        check(PHASE, loaded, BEFORE, after)


def test_blocks_that_are_not_clean_expect_a_row_for_each_word_that_writes() -> None:
    expected = mixed(2)
    assert sum(expected.outcomes.values()) == 2 * BLOCK
    assert expected.rows == {"payment_outcome": 1_958, "excess_payment": 30, "refund": 30, "quarantine": 2}


# ---- Load --------------------------------------------------------------------------------------------------


@pytest.fixture
def messages(tmp_path: Path) -> Messages:
    said = [Said(payment_id, 1) for payment_id in range(10**17, 10**17 + 40)]
    writer = Writer(1_800_000_000, evidence=False)
    return Messages.write(tmp_path / "words", BATCH_METHOD, (writer.batch(said) for _ in range(40)), 40 * 40)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with empty_server(tmp_path, None, 40) as running:
        yield running.address


def test_load_in_closed_loop_reads_every_answer(server: str, messages: Messages) -> None:
    loaded = Load(in_flight=4, connections=2).run(server, messages, lambda _done: None)
    assert loaded.late_ns == [], "no message has a moment of its own"
    assert loaded.outcomes == {("ACCEPTED", "false"): 40 * 40}
    assert (loaded.answers, loaded.words, len(loaded.latencies_ns)) == (40, 1_600, 40)


def test_load_in_open_loop_keeps_the_rate_that_was_asked_for(server: str, messages: Messages) -> None:
    loaded = Load(in_flight=1, rate=40).run(server, messages, lambda _done: None)
    # 40 messages at moments drawn for 40 a second: never in no time, whatever the server does.
    assert 0.3 < loaded.seconds < 5
    assert len(loaded.late_ns) == 40
    assert loaded.late_ns[0] >= 0, "no message leaves before its moment"
    assert all(late < latency for late, latency in zip(loaded.late_ns, loaded.latencies_ns, strict=True))


def test_load_without_a_server_fails_aloud(messages: Messages) -> None:
    with pytest.raises(LoadError):
        Load(in_flight=1, connect_seconds=1).run("127.0.0.1:9", messages, lambda _done: None)


def test_percentile_is_a_latency_that_was_seen() -> None:
    latencies_ns = [1_000_000 * milliseconds for milliseconds in range(1, 101)]
    assert percentile_ms(latencies_ns, 0.5) == 51
    assert percentile_ms(latencies_ns, 0.99) == 100
    assert percentile_ms(latencies_ns[:1], 0.99) == 1
