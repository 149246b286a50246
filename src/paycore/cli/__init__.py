"""The command ``paycore``: one verb a module."""

import importlib
import sys
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import typer

from paycore import __version__

EPILOG = """
First steps:

  paycore demo                   watch payments go wrong and come right

  paycore migrate                make the database

  paycore serve                  run the server

  paycore pay --help             ask for a payment

Settings are flags or environment variables (PAYCORE_...); each command's --help names both. \
Exit codes: 0 done, 1 refused, 2 wrong usage, 3 not reachable or not able now.
"""


class Verb(NamedTuple):
    """Where a verb lives: the module in this folder, and the names of its function and of its help's last words.

    In place of a function there may be a ``typer.Typer``, which has verbs of its own.
    """

    module: str
    function: str
    epilog: str = "EPILOG"


VERBS = {
    "demo": Verb("demo", "demo"),
    "migrate": Verb("migrate", "migrate"),
    "serve": Verb("serve", "serve"),
    "pay": Verb("pay", "pay"),
    "notify": Verb("notify", "notify"),
    "query": Verb("query", "query"),
    "close": Verb("close", "close"),
    "run": Verb("run", "run"),
    "audit": Verb("audit", "audit"),
    "quarantine": Verb("quarantine", "app"),
    "simbank": Verb("simbank", "simbank", "SIMBANK_EPILOG"),
    "forwarder": Verb("simbank", "forwarder", "FORWARDER_EPILOG"),
    "bench": Verb("bench", "app"),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paycore {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    del version


def build(verbs: Iterable[str]) -> typer.Typer:
    """Make the command line of these verbs; each module is imported only for its own."""
    app = typer.Typer(
        help="A payment core: every order is charged exactly once or not at all, and any surplus goes back by itself.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        # Rich tracebacks print local variables, secrets among them.
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in verbs:
        verb = VERBS[name]
        module = importlib.import_module(f"paycore.cli.{verb.module}")
        function, epilog = getattr(module, verb.function), getattr(module, verb.epilog)
        if isinstance(function, typer.Typer):
            app.add_typer(function, name=name, epilog=epilog)
        else:
            app.command(name, epilog=epilog)(function)
    return app


def main() -> None:
    """Run the command line; the entry point of the installed script."""
    # A server, a bank and a database take a second to import: whoever asks for one verb waits for that one only.
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    build([asked] if asked in VERBS else VERBS)()
