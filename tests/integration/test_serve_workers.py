"""Several workers on one address and one database: each takes calls, and together they are one server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from paycore.domain.ids import format_channel_order_no
from paycore.v1 import payment_pb2
from tests.support.bank import Street
from tests.support.books import rows
from tests.support.databases import KINDS, is_postgresql, make_database
from tests.support.facts import put_payments
from tests.support.server import PAYCORE, ServerProcess, check_health, clean_environment
from tests.support.simbank import wait_for
from tests.support.workers import Crew, Line, alive

COUNT = 3

ACCEPTED = payment_pb2.NOTIFY_OUTCOME_ACCEPTED
DUPLICATE = payment_pb2.NOTIFY_OUTCOME_DUPLICATE

ON_SQLITE = pytest.mark.parametrize("crew", ["sqlite"], indirect=True)
"""What has nothing to do with the store is shown on one."""


@pytest.fixture(scope="module", params=KINDS)
def crew(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, street: Street) -> Iterator[Crew]:
    """Three workers over one database, for every test that leaves three behind."""
    folder = tmp_path_factory.mktemp("crew")
    url = make_database(request.param, folder)
    with Crew(folder / "paycore.db", COUNT, url=url, bank_url=street.bank.url) as crew:
        yield crew


def outcomes_of(crew: Crew, payment_id: int) -> list[tuple[int, str]]:
    return rows(crew.url, f"SELECT attempt, channel_trade_no FROM payment_outcome WHERE payment_id = {payment_id}")


def test_every_worker_takes_calls_and_says_which_one_it_is(crew: Crew) -> None:
    with crew.line_to_each() as lines:
        assert set(lines) == {1, 2, 3}
    assert {one["worker"] for one in crew.events("serving") if "worker" in one} == {1, 2, 3}
    assert check_health(crew.address) == "SERVING"
    assert crew.http("/-/ready")[0] == 200


def test_writes_that_are_serial_are_told_of(crew: Crew) -> None:
    told = [one["level"] for one in crew.events("writes_are_serial")]
    assert told == ([] if is_postgresql(crew.url) else ["warning"])


def test_payment_opened_at_one_worker_is_paid_at_another(crew: Crew) -> None:
    with crew.line_to_each() as lines:
        opened = lines[1].pay("over-two-workers")
        answer = lines[2].notify(format_channel_order_no(opened.payment_id, 1))
        assert (answer.outcome, answer.payment_id) == (ACCEPTED, opened.payment_id)
        assert lines[3].pay("over-two-workers").state == payment_pb2.PAYMENT_STATE_PAID


def test_two_successes_at_two_workers_at_once_keep_one_and_refund_the_other(crew: Crew) -> None:
    with crew.line_to_each() as lines, ThreadPoolExecutor(2) as pool:
        for number in range(10):
            payment_id = lines[1].pay(f"twice-{number}", "bank_a").payment_id
            assert lines[2].pay(f"twice-{number}", "bank_b").attempt.attempt == 2
            words = [(lines[1], 1, "bank_a"), (lines[2 + number % 2], 2, "bank_b")]
            sent = [
                pool.submit(line.notify, format_channel_order_no(payment_id, attempt), account=account)
                for line, attempt, account in words
            ]
            assert sorted(one.result().outcome for one in sent) == [ACCEPTED, DUPLICATE]
            assert len(outcomes_of(crew, payment_id)) == 1
            refunds = rows(crew.url, f"SELECT attempt FROM refund WHERE payment_id = {payment_id}")
            assert refunds == [(3 - outcomes_of(crew, payment_id)[0][0],)]


def test_one_success_at_every_worker_at_once_is_kept_once_and_replayed(crew: Crew) -> None:
    with crew.line_to_each() as lines, ThreadPoolExecutor(COUNT) as pool:
        (number,) = put_payments(crew.url, 1)
        answers = list(pool.map(lambda line: line.notify(number), lines.values()))
    assert [one.outcome for one in answers] == [ACCEPTED] * COUNT
    assert sorted(one.replayed for one in answers) == [False, True, True]
    assert rows(crew.url, f"SELECT * FROM excess_payment WHERE payment_id = {answers[0].payment_id}") == []


def test_dead_worker_is_replaced_and_nothing_acknowledged_or_counted_is_lost(crew: Crew) -> None:
    numbers = put_payments(crew.url, 60)
    victim, others = crew.workers[1], {crew.workers[0], crew.workers[2]}
    restarts = crew.total("paycore_worker_restarts_total")
    accepted = crew.total("paycore_notify_total", outcome="ACCEPTED", replayed="false")
    with crew.line_to_each() as lines:
        answers = [lines[1 + index % COUNT].notify(number) for index, number in enumerate(numbers[:30])]
        indexed = wait_for(lambda: settled(crew, "paycore_index_entries"), "the index's size")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: gone_from_the_sums(crew, indexed), "two workers, and the dead one's index gone")
        # Calls go on meanwhile, on the dead worker's line too: whoever is cut off calls again.
        answers += [lines[1 + index % COUNT].notify_until_answered(number) for index, number in enumerate(numbers[30:])]
    wait_for(lambda: victim not in crew.workers, "the replacement in the ready file")
    assert others < set(crew.workers)
    (died,) = [one for one in crew.events("worker_died") if one["pid"] == victim]
    assert (died["worker"], died["cause"]) == (2, "SIGKILL")
    (replaced,) = [one for one in crew.events("worker_replaced") if one["replaces"] == victim]
    assert (replaced["worker"], replaced["pid"]) == (2, crew.workers[1])
    assert crew.totals("paycore_worker_restarts_total", "paycore_workers") == [restarts + 1, COUNT]
    more = put_payments(crew.url, 5)
    with crew.line_to_each() as lines:
        answers += [lines[2].notify(number) for number in more]
    assert [(one.outcome, one.replayed) for one in answers] == [(ACCEPTED, False)] * 65
    kept = rows(crew.url, "SELECT channel_trade_no FROM payment_outcome")
    assert {f"T-{number}" for number in numbers + more} <= {trade for (trade,) in kept}
    assert crew.total("paycore_notify_total", outcome="ACCEPTED", replayed="false") == accepted + 65


def settled(crew: Crew, gauge: str) -> int:
    """A gauge's value, if it is above 0 and stays for longer than workers take to write it down; otherwise 0."""
    seen = crew.total(gauge)
    time.sleep(0.6)
    return seen if crew.total(gauge) == seen else 0


def gone_from_the_sums(crew: Crew, indexed: int) -> bool:
    workers, entries = crew.totals("paycore_workers", "paycore_index_entries")
    return workers == COUNT - 1 and entries < indexed


def test_metrics_of_all_workers_add_up_to_what_was_sent_and_to_what_is_kept(crew: Crew) -> None:
    numbers = put_payments(crew.url, 30)
    with crew.line_to_each() as lines:
        before = crew.total("paycore_notify_total")
        for line in lines.values():
            for number in numbers:
                assert line.notify(number).outcome == ACCEPTED
    sent, timed = crew.totals("paycore_notify_total", "paycore_notify_seconds_count")
    assert (sent, timed) == (before + COUNT * len(numbers), sent)
    fresh = crew.total("paycore_notify_total", outcome="ACCEPTED", replayed="false")
    assert [(fresh,)] == rows(crew.url, "SELECT count(*) FROM payment_outcome")


@ON_SQLITE
def test_worker_that_hangs_is_seen_and_the_others_go_on(crew: Crew) -> None:
    numbers = put_payments(crew.url, 4)
    with crew.line_to_each() as lines:
        assert crew.total("paycore_worker_silence_seconds") < 3
        os.kill(crew.workers[0], signal.SIGSTOP)
        try:
            answers = [lines[2 + index % 2].notify(number) for index, number in enumerate(numbers)]
            wait_for(lambda: crew.total("paycore_worker_silence_seconds") >= 3, "the silence of the one that hangs")
            assert crew.http("/-/ready")[0] == 200
        finally:
            os.kill(crew.workers[0], signal.SIGCONT)
        wait_for(lambda: crew.total("paycore_worker_silence_seconds") < 3, "its words again")
        assert lines[1].notify(numbers[0]).replayed
    assert [one.outcome for one in answers] == [ACCEPTED] * 4


@ON_SQLITE
def test_metrics_of_all_workers_pass_prometheus_own_check(crew: Crew) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    with crew.line_to_each():
        pass
    _, text = crew.http("/metrics")
    assert 'paycore_notify_total{channel="simbank"' in text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@ON_SQLITE
@pytest.mark.parametrize("more", [(), ("--workers", "2")])
def test_second_server_on_the_workers_port_is_refused(crew: Crew, more: tuple[str, ...]) -> None:
    command = [str(PAYCORE), "serve", "--db", crew.url, "--listen", crew.address, "--metrics-listen", "127.0.0.1:0"]
    ended = subprocess.run([*command, *more], env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert f"PAYCORE_LISTEN {crew.address}: Address already in use" in ended.stderr


@ON_SQLITE
def test_workers_on_the_port_of_a_lone_server_are_refused(crew: Crew, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "lone.db") as lone:
        command = [str(PAYCORE), "serve", "--db", crew.url, "--listen", lone.address, "--workers", "2"]
        ended = subprocess.run(
            [*command, "--metrics-listen", "127.0.0.1:0"], env=clean_environment(), capture_output=True, text=True
        )
        assert (ended.returncode, lone.address in ended.stderr) == (1, True)
        assert check_health(lone.address) == "SERVING"


@ON_SQLITE
def test_secrets_are_on_no_command_line(crew: Crew) -> None:
    for pid in (crew.pid, *crew.workers):
        assert "a secret of" not in Path(f"/proc/{pid}/cmdline").read_text()
    for pid in crew.workers:
        assert "a secret of bank_a" in Path(f"/proc/{pid}/environ").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_ends_all_workers_with_exit_code_zero(kind: str, tmp_path: Path) -> None:
    with Crew(tmp_path / "paycore.db", 2, url=make_database(kind, tmp_path)) as crew:
        pids = crew.workers
        assert crew.terminate() == 0
        assert not any(map(alive, pids))
        assert not crew.ready_path.exists()
        assert "Traceback" not in crew.log()
        assert {one.get("worker") for one in crew.events("stopped")} == {None, 1, 2}
        assert check_health(crew.address) == "UNAVAILABLE"


class Held:
    """Two workers, one of which stands between the commit of a notification and its answer."""

    def __init__(self, folder: Path, *, url: str = "", **env: str) -> None:
        place = "writer.before_answer"
        self.go = folder / f"{place}.go"
        self.go.touch()
        self._reached = folder / f"{place}.reached"
        own = {"PAYCORE_FAILPOINTS": f"{place}=pause:{folder}"}
        self.crew = Crew(folder / "paycore.db", 2, url=url, env={**own, **env})
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self.crew.start()
        (self._number,) = put_payments(self.crew.url, 1)
        self._line = Line(self.crew.address)
        self.go.unlink()
        self._reached.unlink(missing_ok=True)
        self.answer = self._pool.submit(self._line.notify, self._number)
        wait_for(lambda: rows(self.crew.url, "SELECT * FROM payment_outcome"), "the outcome is committed")
        return self

    def __exit__(self, *raised: object) -> None:
        self.go.touch()
        self.crew.kill()
        self._line.close()
        self._pool.shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_with_a_call_in_flight_answers_it(kind: str, tmp_path: Path) -> None:
    with Held(tmp_path, url=make_database(kind, tmp_path)) as held:
        pids = held.crew.workers
        held.crew.process.send_signal(signal.SIGTERM)
        wait_for(lambda: len(held.crew.events("stopping")) == 3, "all are stopping")
        assert not held.answer.done()
        held.go.touch()
        assert held.answer.result(20).outcome == ACCEPTED
        assert held.crew.wait() == 0
        assert not any(map(alive, pids))


def test_second_signal_kills_what_has_not_ended(tmp_path: Path) -> None:
    with Held(tmp_path) as held:
        pids = held.crew.workers
        held.crew.process.send_signal(signal.SIGTERM)
        wait_for(lambda: len(held.crew.events("stopping")) == 3, "all are stopping")
        began = time.monotonic()
        held.crew.process.send_signal(signal.SIGINT)
        assert held.crew.wait() == 1
        assert time.monotonic() - began < 5
        assert not any(map(alive, pids))
        assert len(held.crew.events("worker_killed")) >= 1
        assert "killed" in held.crew.log().splitlines()[-1]


@pytest.mark.slow
def test_killed_supervisor_leaves_no_worker_behind_not_even_one_that_hangs(tmp_path: Path) -> None:
    with Held(tmp_path, PAYCORE_SHUTDOWN_GRACE_MS="0") as held:
        pids = held.crew.workers
        (folder,) = {Path(name).parent for pid in pids for name in mapped_files(pid) if "paycore-workers-" in name}
        held.crew.kill()
        wait_for(lambda: sum(map(alive, pids)) == 1, "the end of the worker that does not hang", 4)
        wait_for(lambda: not any(map(alive, pids)), "the end of the one that hangs", 15)
        assert len(held.crew.events("supervisor_gone")) == 2
        assert not folder.exists()
        # The port is free again, for one and for several.
        held.go.touch()
        held.crew.arguments = []
        held.crew.start()
        assert check_health(held.crew.address) == "SERVING"


def mapped_files(pid: int) -> list[str]:
    return [line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line]
