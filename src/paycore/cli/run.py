"""``paycore run``: one of the jobs that repair, by hand or beside the servers."""

import asyncio
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paycore.app.run import run_once, run_until_stopped
from paycore.app.serving import StartRefusedError
from paycore.cli.exits import REFUSED, UNAVAILABLE, USAGE, fail, visible
from paycore.cli.logs import configure_logs
from paycore.domain.errors import PaycoreError
from paycore.jobs.runner import Pass
from paycore.settings import JOB_NAMES, JobName, Settings, SettingsRefusedError, describe, load_settings

EPILOG = """
Examples:

  paycore run refunder --once

  paycore run sweeper --db postgresql://paycore@db1/paycore --metrics-listen 127.0.0.1:9465

Settings come from the environment, as those of paycore serve do. Any number of processes may run a job at once, the \
servers among them. Exit codes: 0 done, 1 refused, 2 wrong usage, 3 the database or a channel did not answer.
"""


def run(
    job: Annotated[str, typer.Argument(help=f"Which job: {', '.join(JOB_NAMES)}.", metavar="JOB")],
    once: Annotated[bool, typer.Option("--once", help="Do what is due now, then end.")] = False,
    db: Annotated[str | None, typer.Option(envvar="PAYCORE_DB", help=describe("db"))] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(help=f"{describe('metrics_listen')} Not answered unless given; the environment's is a server's."),
    ] = None,
) -> None:
    """Run a job without a server: until Ctrl-C or SIGTERM, or once."""
    if once and metrics_listen is not None:
        fail("--metrics-listen: nobody reads the metrics of a job that runs --once", USAGE)
    try:
        settings = load_settings({"db": db, "metrics_listen": metrics_listen})
    except SettingsRefusedError as error:
        fail(str(error), USAGE)
    name = _known(job)
    configure_logs(settings.log_format, settings.log_level)
    try:
        if once:
            _print(name, asyncio.run(_watched(settings, name)))
        else:
            asyncio.run(
                run_until_stopped(
                    settings, name, lambda at: _announce(name, at), show_metrics=metrics_listen is not None
                )
            )
    except StartRefusedError as error:
        fail(str(error), REFUSED)
    except PaycoreError as error:
        fail(f"{error.reason}: {error.message}", UNAVAILABLE)


def _announce(name: str, metrics_address: str) -> None:
    typer.echo(
        f"paycore runs the {name}" + (f", metrics at http://{metrics_address}/metrics" if metrics_address else "")
    )


def _known(job: str) -> JobName:
    found = [name for name in JOB_NAMES if name == job]
    if not found:
        fail(f"JOB: {visible(job)} is none; must be one of {', '.join(JOB_NAMES)}", USAGE)
    return found[0]


async def _watched(settings: Settings, name: JobName) -> Pass:
    """Make the passes with a bar on standard error, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=None)
        return await run_once(
            settings, name, lambda looked_at, known: progress.update(bar, completed=looked_at, total=known)
        )


def _print(name: str, result: Pass) -> None:
    lag = f", the oldest due for {result.lag_ms // 1_000} s" if result.lag_ms else ""
    typer.echo(f"{name}: {result.done} done, {result.put_off} put off{lag}")
