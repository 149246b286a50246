"""``paycore migrate``: brings a database up to this version."""

from typing import Annotated

import typer

from paycore.cli.exits import REFUSED, fail
from paycore.settings import Settings, describe
from paycore.store.engine import DatabaseRefusedError
from paycore.store.schema import migrate as migrate_database

EPILOG = """
Example:

  paycore migrate --db sqlite:///paycore.db

It may run again at any time; a database that is up to date is left alone. Next: paycore serve --db sqlite:///paycore.db
"""


def migrate(
    db: Annotated[str, typer.Option(envvar="PAYCORE_DB", help=describe("db"))] = str(
        Settings.model_fields["db"].default
    ),
) -> None:
    """Bring a database up to this version of paycore; make the file where there is none."""
    try:
        before, after = migrate_database(db)
    except DatabaseRefusedError as error:
        fail(str(error), REFUSED)
    typer.echo(f"{db}: {before or 'empty'} -> {after}" + (" (nothing to do)" if before == after else ""))
