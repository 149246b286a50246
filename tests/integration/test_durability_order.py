"""Seen by the kernel: each Notify is answered after the log that holds it was synced.

The server runs under strace, with one client that tells one word after another. A word's trade number is in the
bytes that go to the write-ahead log, and its answer in the bytes that go to the client's socket.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from paycore.client import PaycoreClient
from paycore.store.schema import migrate
from paycore.v1 import payment_pb2
from tests.support.facts import AMOUNT_MINOR, CURRENCY, put_payments
from tests.support.server import ServerProcess

WORDS = 30

_CALLS = "write,writev,pwrite64,sendto,sendmsg,fsync,fdatasync"
_LINE = re.compile(r"(?P<thread>\d+) +(?P<rest>.*)")
_BEGUN = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)")
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>")
_FILE = re.compile(r"\d+<(?P<path>[^>]*)>")
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


class Event(NamedTuple):
    """A system call. at, ended: the lines where it began and where it returned. path: of the file that it is about."""

    at: int
    ended: int
    name: str
    path: str
    content: bytes


class Told(NamedTuple):
    """A word that was answered: its trade number, and the answer as it went over the wire."""

    trade_no: str
    answer: bytes


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed (Debian: apt-get install strace): the order is NOT shown here")
    probe = subprocess.run([found, "-o", os.devnull, sys.executable, "-c", ""], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here, the order is NOT shown: {probe.stderr.strip()}")
    return found


def tell_under_strace(folder: Path, strace: str, program: list[str] | None = None) -> tuple[list[Told], list[Event]]:
    """Tell words to a server, one after another; return what was answered and what the kernel saw."""
    trace, server = folder / "trace", ServerProcess(folder / "paycore.db")
    migrate(server.url)
    numbers = put_payments(server.db_path, WORDS)
    # -D: the tracer stands beside, so the process that is started is the server itself.
    tracer = [strace, "-D", "-f", "-y", "-xx", "-s", "1000000", "-e", f"trace={_CALLS}", "-e", "signal=none"]
    server.program = [*tracer, "-o", str(trace), *(program or server.program)]
    with server, PaycoreClient(server.address) as client:
        told = [_tell(client, number, f"durable-{position:04d}-trade") for position, number in enumerate(numbers)]
        assert server.terminate() == 0
    return told, read_trace(trace)


def _tell(client: PaycoreClient, channel_order_no: str, trade_no: str) -> Told:
    answer = client.notify(
        channel="simbank",
        account="bank_a",
        channel_order_no=channel_order_no,
        result=payment_pb2.CHANNEL_RESULT_SUCCESS,
        amount_minor=AMOUNT_MINOR,
        currency=CURRENCY,
        channel_trade_no=trade_no,
        paid_at_ms=None,
    )
    assert answer.outcome == payment_pb2.NOTIFY_OUTCOME_ACCEPTED
    return Told(trade_no, answer.SerializeToString())


def read_trace(trace: Path) -> list[Event]:
    """Read a trace. A call during which others were seen returns where it is resumed."""
    found: list[Event] = []
    running: dict[str, int] = {}
    with trace.open(encoding="ascii") as lines:
        for at, line in enumerate(lines):
            split = _LINE.match(line)
            assert split is not None, line
            if (resumed := _RESUMED.match(split["rest"])) is not None:
                begun = running.pop(split["thread"])
                assert found[begun].name == resumed["name"]
                found[begun] = found[begun]._replace(ended=at)
            elif (call := _BEGUN.match(split["rest"])) is not None:
                if call["arguments"].endswith("<unfinished ...>"):
                    running[split["thread"]] = len(found)
                found.append(_event(at, call["name"], call["arguments"]))
    return found


def _event(at: int, name: str, arguments: str) -> Event:
    file = _FILE.match(arguments)
    path = "" if file is None else _decoded(file["path"]).decode()
    return Event(at, at, name, path, b"".join(map(_decoded, _BYTES.findall(arguments))))


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def hasty_answers(told: list[Told], seen: list[Event]) -> list[str]:
    """Return the words whose answer was on its way before a sync of the log, begun after they were in it, returned."""
    hasty = []
    for word in told:
        answers = [event for event in seen if "socket:" in event.path and word.answer in event.content]
        assert len(answers) == 1, f"{word.trade_no} was answered {len(answers)} times"
        logged = next(event for event in _of_log(seen, "pwrite64") if word.trade_no.encode() in event.content)
        if not any(
            logged.ended < sync.at and sync.ended < answers[0].at for sync in _of_log(seen, "fsync", "fdatasync")
        ):
            hasty.append(word.trade_no)
    return hasty


def _of_log(seen: list[Event], *names: str) -> Iterator[Event]:
    return (event for event in seen if event.name in names and event.path.endswith("-wal"))


def test_notify_is_answered_after_the_sync_of_its_group(tmp_path: Path, strace: str) -> None:
    told, seen = tell_under_strace(tmp_path, strace)
    assert not hasty_answers(told, seen)


def test_server_that_answers_before_it_commits_is_caught(tmp_path: Path, strace: str) -> None:
    told, seen = tell_under_strace(tmp_path, strace, [sys.executable, "-m", "tests.crash.hasty"])
    assert hasty_answers(told, seen) == [word.trade_no for word in told]
