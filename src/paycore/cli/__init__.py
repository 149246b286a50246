"""The command ``paycore``: one verb a module."""

from typing import Annotated

import typer

from paycore import __version__
from paycore.cli import close, demo, migrate, notify, pay, query, serve, simbank

EPILOG = """
First steps:

  paycore demo                   watch payments go wrong and come right

  paycore migrate                make the database

  paycore serve                  run the server

  paycore pay --help             ask for a payment

Settings are flags or environment variables (PAYCORE_...); each command's --help names both. \
Exit codes: 0 done, 1 refused, 2 wrong usage, 3 not reachable or not able now.
"""

SIMBANK_EPILOG = """
Example:

  export PAYCORE_SIMBANK_SECRETS='{"bank_a": "a secret of bank a", "bank_b": "a secret of bank b"}'

  paycore simbank --books books.db

Next, with the same secrets: paycore forwarder
"""

FORWARDER_EPILOG = """
Example:

  paycore forwarder --server 127.0.0.1:50051

It needs PAYCORE_SIMBANK_SECRETS as the banks have it. Next: paycore serve --simbank-url http://127.0.0.1:8081
"""

app = typer.Typer(
    help="A payment core: every order is charged exactly once or not at all, and any surplus goes back by itself.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    # Rich tracebacks print local variables, secrets among them.
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"paycore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    del version


app.command(epilog=demo.EPILOG)(demo.demo)
app.command(epilog=migrate.EPILOG)(migrate.migrate)
app.command(epilog=serve.EPILOG)(serve.serve)
app.command(epilog=pay.EPILOG)(pay.pay)
app.command(epilog=notify.EPILOG)(notify.notify)
app.command(epilog=query.EPILOG)(query.query)
app.command(epilog=close.EPILOG)(close.close)
app.command(epilog=SIMBANK_EPILOG)(simbank.simbank)
app.command(epilog=FORWARDER_EPILOG)(simbank.forwarder)


def main() -> None:
    """Run the command line; the entry point of the installed script."""
    app()
