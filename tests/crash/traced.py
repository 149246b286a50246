"""What the kernel saw of a server under strace: its writes, its syncs and its answers, in their order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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


class Answered(NamedTuple):
    """A call that was answered. marks: what must be in the log for it. answer: as it went over the wire."""

    what: str
    marks: Sequence[bytes]
    answer: bytes


def tracer(strace: str, trace: Path) -> list[str]:
    """The command before a program that has it traced."""
    # -D: the tracer stands beside, so the process that is started is the program itself.
    command = [strace, "-D", "-f", "-y", "-xx", "-s", "1000000", "-e", f"trace={_CALLS}", "-e", "signal=none"]
    return [*command, "-o", str(trace)]


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


def hasty_answers(answered: Sequence[Answered], seen: Sequence[Event]) -> list[str]:
    """Return the calls whose answer was on its way before a sync of the log, begun after all was in it, returned."""
    sent = [event for event in seen if "socket:" in event.path]
    logged, syncs = [*_of_log(seen, "pwrite64")], [*_of_log(seen, "fsync", "fdatasync")]
    hasty = []
    for one in answered:
        answers = [event for event in sent if one.answer in event.content]
        assert len(answers) == 1, f"{one.what} was answered {len(answers)} times"
        written = max(next(event.ended for event in logged if mark in event.content) for mark in one.marks)
        if not any(written < sync.at and sync.ended < answers[0].at for sync in syncs):
            hasty.append(one.what)
    return hasty


def _of_log(seen: Sequence[Event], *names: str) -> Iterator[Event]:
    return (event for event in seen if event.name in names and event.path.endswith("-wal"))
