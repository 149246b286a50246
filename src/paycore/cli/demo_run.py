"""Plays the stories one after another and, at the end, holds the banks' own books against them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
from paycore.cli.demo_stage import Stage, StageError, wait_until
from paycore.cli.demo_stories import STORIES
from paycore.v1 import payment_pb2

_NOT_SEEN = "not seen"
_AFTERWARDS = "afterwards"
_TROUBLE = "trouble"


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
    """One run: plays the stories in order, then reads the books. ``results`` holds every story at any time."""

    def __init__(self, screen: Screen, deadline_seconds: float) -> None:
        self.results = [Result(story) for story in STORIES]
        self.books_ok = False
        self.audit_ok = False
        self._screen = screen
        self._deadline_seconds = deadline_seconds

    @property
    def ok(self) -> bool:
        """Whether every story, the books and the audit are as they must be."""
        return self.books_ok and self.audit_ok and all(result.ok for result in self.results)

    def run(self, stage: Stage) -> None:
        """Play on a stage that is ready.

        Raises StageError when a process is gone, and others of PLAY_ERRORS when the books cannot be read.
        """
        with Banks(stage.banks_url, stage.secrets) as banks:
            for result in self.results:
                stage.check_alive()
                self._play(result, stage, banks)
            ended = self._wait_for_quiet(banks) and self._look_again(stage)
            self.books_ok = self._read_books(banks.books()) and ended
            self.audit_ok = self._audit(stage)

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
            scene.observed[_TROUBLE] = str(error)
            self._screen.trouble(str(error))

    def _ended_before(self, result: Result) -> Mapping[str, payment_pb2.Payment]:
        ended = self.results[: self.results.index(result)]
        return {one.story.name: one.payment for one in ended if one.payment is not None}

    def _wait_for_quiet(self, banks: Banks) -> bool:
        """Wait until no bank has anything left to say that could still move money."""
        quiet = wait_until(banks.has_told_all, self._deadline_seconds)
        if not quiet:
            self._screen.trouble("a bank still has notifications that nobody acknowledged")
        return quiet

    def _look_again(self, stage: Stage) -> bool:
        """What was right when a story ended must still be so; return whether that could be seen."""
        payments = {one.story.name: one.payment for one in self.results if one.payment is not None}
        try:
            moved = changed_payments(stage, payments)
        except PLAY_ERRORS as error:
            self._screen.trouble(str(error))
            return False
        for result in self.results:
            if result.story.name in moved:
                result.observed[_AFTERWARDS] = "the payment changed"
        return True

    def _read_books(self, entries: list[BookEntry]) -> bool:
        """Note what the banks keep of each story's money; return whether the books are as they must be."""
        for result in self.results:
            kept = kept_by_bank(result.pages, entries)
            result.kept_minor = sum(kept.values())
            if kept:
                result.observed[KEPT] = kept_text(kept, result.story.currency)
        lines = book_lines(entries, self.results)
        self._screen.books(lines)
        return all(line.ok for line in lines)

    def _audit(self, stage: Stage) -> bool:
        """Have every capture proven, in the database and against the banks' books; return whether nothing is wrong."""
        try:
            said = stage.audit()
        except StageError as error:
            self._screen.trouble(str(error))
            return False
        self._screen.audit(said)
        return True

    def report(self) -> dict[str, object]:
        """Return the run as ``--json`` prints it."""
        return {"ok": self.ok, "audit_ok": self.audit_ok, "stories": [result.as_json() for result in self.results]}


def book_lines(entries: Iterable[BookEntry], results: Iterable[Result]) -> list[BookLine]:
    """Put what a bank must keep beside each order in its books, in the order of the stories."""
    stories = {(page.bank, page.order_no): result.story for result in results for page in result.pages}
    lines = []
    for entry in entries:
        story = stories.get((entry.bank, entry.order_no))
        name = story.name.partition(":")[0] if story else "none"
        lines.append(BookLine(entry, name, story.keeps.get(entry.bank) if story else None))
    return sorted(lines, key=lambda line: (line.story, line.entry.bank))


def _facts_text(facts: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in facts.items())
