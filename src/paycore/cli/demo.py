"""``paycore demo``: plays every way in which a payment goes wrong, with real processes, and checks the banks' books."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from paycore.cli.demo_banks import Banks, BookEntry, Page
from paycore.cli.demo_scene import (
    KEPT,
    PLAY_ERRORS,
    Scene,
    Story,
    StoryBrokenError,
    changed_payments,
    kept_by_bank,
    kept_text,
)
from paycore.cli.demo_show import BookLine, Screen
from paycore.cli.demo_stage import Stage
from paycore.cli.demo_stories import STORIES
from paycore.cli.output import REFUSED, USAGE, fail
from paycore.v1 import payment_pb2

INTERRUPTED = 130

EPILOG = """
Examples:

  paycore demo                          watch it; about 15 seconds

  paycore demo --json                   one JSON object: {"ok", "stories": [{"name", "expected", "observed", \
"kept_minor", "ok"}]}

  paycore demo --folder /tmp/look       keep databases and logs in a new folder

  paycore demo --server-setting refund_interval_ms=600000 --deadline 2     break it: refunds never come in time

It starts `paycore serve`, `paycore simbank` and `paycore forwarder` on free loopback ports with random secrets and \
ends them. No setting of your environment reaches them. Exit codes: 0 all is as it must be, 1 something differs, \
2 wrong usage, 130 interrupted.
"""

_CALL_TIMEOUT_MS = 10_000
_NOT_SEEN = "not seen"
_AFTERWARDS = "afterwards"


@dataclass
class Result:
    """What came of one story. pages: its orders at banks; payment: as it was when the story ended."""

    story: Story
    observed: dict[str, str] = field(default_factory=dict)
    pages: list[Page] = field(default_factory=list)
    payment: payment_pb2.Payment | None = None
    kept_minor: int = 0

    @property
    def ok(self) -> bool:
        """Whether every fact was seen as expected, and nothing else."""
        return self.observed == self.story.all_expected()

    def as_json(self) -> dict[str, object]:
        """Return the story as the report tells it."""
        expected = self.story.all_expected()
        observed = {name: self.observed.get(name, _NOT_SEEN) for name in expected} | self.observed
        return {
            "name": self.story.name,
            "expected": _facts_text(expected),
            "observed": _facts_text(observed),
            "kept_minor": self.kept_minor,
            "ok": self.ok,
        }


class Demo:
    """One run: plays the stories in order, then reads the books. ``results`` is complete at any time."""

    def __init__(self, screen: Screen, deadline_seconds: float) -> None:
        self.results = [Result(story) for story in STORIES]
        self.books_ok = False
        self._screen = screen
        self._deadline_seconds = deadline_seconds

    @property
    def ok(self) -> bool:
        """Whether every story and the books are as they must be."""
        return self.books_ok and all(result.ok for result in self.results)

    def run(self, stage: Stage) -> None:
        """Play on a stage that is ready. Raises StageError and others of PLAY_ERRORS when the books cannot be read."""
        with Banks(stage.banks_url, stage.secrets) as banks:
            for result in self.results:
                self._play(result, stage, banks)
            self._look_again(stage)
            self._read_books(banks.books())

    def _play(self, result: Result, stage: Stage, banks: Banks) -> None:
        self._screen.story(result.story)
        try:
            scene = Scene(result.story, stage, banks, self._screen, self._deadline_seconds, self._ended_before(result))
        except PLAY_ERRORS as error:
            self._screen.trouble(str(error))
            return
        result.observed, result.pages = scene.observed, scene.pages
        try:
            result.story.play(scene)
            scene.see(KEPT, scene.kept)
            result.payment = scene.payment() if scene.payment_id else None
        except StoryBrokenError:
            return
        except PLAY_ERRORS as error:
            scene.observed["trouble"] = str(error)
            self._screen.trouble(str(error))

    def _ended_before(self, result: Result) -> Mapping[str, payment_pb2.Payment]:
        ended = self.results[: self.results.index(result)]
        return {one.story.name: one.payment for one in ended if one.payment is not None}

    def _look_again(self, stage: Stage) -> None:
        """What was right when a story ended must still be so."""
        payments = {one.story.name: one.payment for one in self.results if one.payment is not None}
        moved = changed_payments(stage, payments)
        for result in self.results:
            if result.story.name in moved:
                result.observed[_AFTERWARDS] = "the payment changed"

    def _read_books(self, entries: list[BookEntry]) -> None:
        lines = book_lines(entries, self.results)
        self.books_ok = all(line.ok for line in lines)
        for result in self.results:
            kept = kept_by_bank(result.pages, entries)
            result.kept_minor = sum(kept.values())
            if KEPT in result.observed:
                result.observed[KEPT] = kept_text(kept, result.story.currency)
        self._screen.books(lines)

    def report(self) -> dict[str, object]:
        """Return the run as ``--json`` prints it."""
        return {"ok": self.ok, "stories": [result.as_json() for result in self.results]}


def book_lines(entries: Iterable[BookEntry], results: Iterable[Result]) -> list[BookLine]:
    """Put what a bank must keep beside each order in its books, in the order of the stories."""
    stories = {(page.bank, page.order_no): result.story for result in results for page in result.pages}
    lines = []
    for entry in entries:
        story = stories.get((entry.bank, entry.order_no))
        name = story.name.partition(":")[0] if story else "none"
        lines.append(BookLine(entry, name, story.keeps.get(entry.bank) if story else None))
    return sorted(lines, key=lambda line: (line.story, line.entry.bank))


def demo(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="A folder for databases and logs, new or empty. It is kept.", show_default="a temporary one"),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary folder even if all went well.")] = False,
    deadline: Annotated[
        float, typer.Option(min=0.1, max=600, help="How many seconds to wait for each fact before it counts as wrong.")
    ] = 10.0,
    server_setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Give the server another setting (`paycore serve --help` lists them), to see what the demo notices.",
        ),
    ] = None,
) -> None:
    """Watch payments go wrong in every way, and the surplus go back by itself.

    A user pays one order at two banks, pays after it was closed, pays twice on one page; a bank repeats itself, is
    late, tells a wrong amount; the server is killed. Each story tells what must come of it and what did. It ends with
    the banks' own books: what they keep must be exactly what was to be paid.
    """
    settings = _settings(server_setting or [])
    home = _home(folder)
    signal.signal(signal.SIGTERM, _interrupt)
    screen = Screen(quiet=json_)
    run = Demo(screen, deadline)
    code = _perform(run, screen, home, settings)
    if json_:
        typer.echo(json.dumps(run.report(), ensure_ascii=False))
    if code or keep or folder:
        typer.echo(f"databases and logs: {home}", err=True)
    else:
        shutil.rmtree(home, ignore_errors=True)
    raise typer.Exit(code)


def _perform(run: Demo, screen: Screen, home: Path, settings: Mapping[str, str]) -> int:
    """Run it and return the exit code. Whatever happens, the processes are ended."""
    started = time.monotonic()
    screen.opening()
    try:
        with Stage(home, settings, _CALL_TIMEOUT_MS) as stage:
            screen.stage(stage)
            run.run(stage)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except PLAY_ERRORS as error:
        typer.echo(f"the demo could not go on: {error}", err=True)
    right = sum(result.ok for result in run.results)
    screen.end(right, len(run.results), time.monotonic() - started, ok=run.ok)
    return 0 if run.ok else REFUSED


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def _settings(texts: Iterable[str]) -> dict[str, str]:
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            fail(f"--server-setting {text}: must be NAME=VALUE, for example refund_interval_ms=1000", USAGE)
        settings[name.lower()] = value
    return settings


def _home(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="paycore-demo-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        fail(f"--folder {folder}: {error.strerror}", USAGE)
    if not empty:
        fail(f"--folder {folder}: must be new or empty", USAGE)
    return folder.resolve()


def _facts_text(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in facts.items())
