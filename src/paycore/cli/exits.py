"""How a command ends when it cannot do what it was asked: one line and an exit code. Knows no server and no client."""

from typing import NoReturn

import typer

REFUSED = 1
USAGE = 2
UNAVAILABLE = 3


def fail(line: str, code: int) -> NoReturn:
    """Print one line to standard error and end with an exit code."""
    typer.echo(visible(line), err=True)
    raise typer.Exit(code)


def visible(text: str) -> str:
    """Replace what a terminal would act upon: evidence in quarantine may hold any character."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
