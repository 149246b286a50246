"""``paycore demo``: plays every way in which a payment goes wrong, with real processes, and checks the banks' books."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from paycore.cli.demo_run import Demo
from paycore.cli.demo_scene import PLAY_ERRORS
from paycore.cli.demo_show import Screen
from paycore.cli.demo_stage import OWN_SETTINGS, Stage
from paycore.cli.exits import REFUSED, USAGE, fail
from paycore.settings import Settings

INTERRUPTED = 130

EPILOG = """
Examples:

  paycore demo                          watch it; about 15 seconds

  paycore demo --json                   one JSON object: {"ok", "audit_ok", "stories": [{"name", "expected", \
"observed", "kept_minor", "ok"}]}

  paycore demo --folder /tmp/look       keep databases and logs in a new folder

  paycore demo --server-setting refund_interval_ms=600000 --deadline 2     break it: refunds never come in time

It starts `paycore serve`, `paycore simbank` and `paycore forwarder` on free loopback ports with random secrets and \
ends them. No setting of your environment reaches them. Exit codes: 0 all is as it must be, 1 something differs, \
2 wrong usage, 130 interrupted.
"""

_CALL_TIMEOUT_MS = 10_000
# Failpoints are no setting of a server in earnest; here they show what the demo notices.
_SETTABLE = (Settings.model_fields.keys() | {"failpoints"}) - OWN_SETTINGS


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
            help="Give the server another setting, a flag of `paycore serve` with _ for -; more than once if need be.",
        ),
    ] = None,
) -> None:
    """Watch payments go wrong in every way, and the surplus go back by itself.

    A user pays one order at two banks, pays after it was closed, pays twice
    on one page; a bank repeats itself, is late, tells a wrong amount; the
    server is killed. Each story tells what must come of it and what did.

    It ends with the banks' own books: what they keep must be exactly what
    must be kept.
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
        if not equals or name not in _SETTABLE:
            fail(f"--server-setting {text}: must be NAME=VALUE, NAME one of {', '.join(sorted(_SETTABLE))}", USAGE)
        settings[name] = value
    return settings


def _home(folder: Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="paycore-demo-"))
    if "?" in str(folder.resolve()):
        fail(f"--folder {folder}: must have no ? in its path, which ends the path in a database's URL", USAGE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        fail(f"--folder {folder}: {error.strerror}", USAGE)
    if not empty:
        fail(f"--folder {folder}: must be new or empty", USAGE)
    return folder.resolve()
