"""Shows a demo to a person while it runs."""

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from paycore.cli.demo_banks import BookEntry
from paycore.cli.demo_scene import Story
from paycore.cli.demo_stage import Stage
from paycore.cli.exits import visible
from paycore.cli.output import amount

_NAME_WIDTH = 22
_TEXT_WIDTH = 100
_BOOKS_TITLE = "The banks' own books, read over HTTP\n"


class BookLine(NamedTuple):
    """One order in a bank's books, and what the bank must keep of it. must_keep_minor: None when no story has it."""

    entry: BookEntry
    story: str
    must_keep_minor: int | None

    @property
    def ok(self) -> bool:
        """Whether the bank keeps exactly what it must, and counts as we do."""
        entry = self.entry
        return entry.kept_minor == self.must_keep_minor == entry.captured_minor - entry.refunded_minor


class Screen:
    """Prints what happens; nothing at all when it is quiet."""

    def __init__(self, *, quiet: bool) -> None:
        # Texts are printed as they are: what looks like markup in them is none.
        self._console = Console(highlight=False, markup=False, quiet=quiet, emoji=False)

    def opening(self) -> None:
        """Tell that processes are being started."""
        self._console.print("Starting a server, three banks and what carries the banks' notifications ...", style="dim")

    def stage(self, stage: Stage) -> None:
        """Tell what runs and where."""
        self._line(f"  server     gRPC {stage.grpc_address}, {stage.metrics_url}, pid {stage.server.pid}", "dim")
        self._line(f"  banks      {stage.banks_url}/books, pid {stage.banks.pid}", "dim")
        self._line(f"  forwarder  hands the banks' words to Notify, pid {stage.forwarder.pid}", "dim")
        self._line(f"  folder     {stage.folder}", "dim")

    def story(self, story: Story) -> None:
        """Begin a story."""
        self._console.print()
        self._line(f"{story.name}  ({amount(story.amount_minor, story.currency)})", "bold")
        text = Text(story.happens, style="dim")
        self._console.print(Padding(text, (0, 0, 0, 2), expand=False), width=min(_TEXT_WIDTH, self._console.width))

    def fact(self, name: str, expected: str, seen: str) -> None:
        """Tell one fact, and where it is not as expected, what was."""
        ok = seen == expected
        mark = Text("  ok     " if ok else "  WRONG  ", style="green" if ok else "bold red")
        line = mark + Text(f"{name:<{_NAME_WIDTH}} {visible(seen) or 'nothing seen'}")
        self._console.print(line, soft_wrap=True)
        if not ok:
            self._line(f"         {'expected':<{_NAME_WIDTH}} {expected}", "red")

    def trouble(self, text: str) -> None:
        """Tell why a story did not go on."""
        self._line(f"  WRONG  {visible(text)}", "bold red")

    def books(self, lines: Iterable[BookLine]) -> None:
        """Print the banks' own books."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=_BOOKS_TITLE, title_justify="left")
        for name in ("story", "bank", "order"):
            table.add_column(name, overflow="fold")
        for name in ("captured", "refunded", "kept", "must keep"):
            table.add_column(name, justify="right", overflow="fold")
        table.add_column("")
        table.add_column("")
        for line in lines:
            table.add_row(*_book_cells(line))
        self._console.print()
        self._console.print(table)

    def audit(self, said: Iterable[str]) -> None:
        """Print what ``paycore audit`` says of it all."""
        self._console.print()
        self._line("paycore audit, over the database and the banks' books", "bold")
        for line in said:
            self._line(f"  {visible(line)}", "dim")

    def end(self, right: int, stories: int, seconds: float, *, ok: bool) -> None:
        """Tell how it ended."""
        self._console.print()
        if ok:
            self._line(
                f"All {stories} stories ended as they must, and so did the books: {seconds:.1f} s.", "bold green"
            )
        else:
            self._line(f"{right} of {stories} stories ended as they must. Something is WRONG.", "bold red")

    def _line(self, text: str, style: str) -> None:
        self._console.print(text, style=style, soft_wrap=True)


def _book_cells(line: BookLine) -> list[Text]:
    entry, must = line.entry, line.must_keep_minor
    amounts = (entry.captured_minor, entry.refunded_minor, entry.kept_minor, must)
    return [
        Text(line.story),
        Text(entry.bank),
        Text(visible(entry.order_no)),
        *(Text("?" if minor is None else amount(minor, entry.currency).rpartition(" ")[0]) for minor in amounts),
        Text(visible(entry.currency)),
        Text("ok", style="green") if line.ok else Text("WRONG", style="bold red"),
    ]
