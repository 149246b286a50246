"""``paycore serve``: the server, with a flag for each setting."""

import asyncio
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from paycore.app.seat import Seat, SupervisorTie, Word
from paycore.app.serving import Serving, StartRefusedError
from paycore.app.supervisor import supervise
from paycore.cli.exits import REFUSED, USAGE, fail
from paycore.cli.logs import configure_logs
from paycore.settings import ENV_PREFIX, Settings, SettingsRefusedError, describe, load_settings

try:
    import uvloop

    _new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
except ImportError:  # it has no build for this platform; asyncio's own loop is slower and does the same
    _new_event_loop = asyncio.new_event_loop

EPILOG = """
Examples:

  paycore migrate --db sqlite:///paycore.db

  paycore serve --db sqlite:///paycore.db

  paycore serve --workers 4

  PAYCORE_SIMBANK_SECRETS='{"bank_a": "..."}' paycore serve --simbank-url http://127.0.0.1:8081 \
--simbank-accounts bank_a

It stops on Ctrl-C or SIGTERM, after the calls in flight have been answered. \
Next, in another terminal: paycore pay --help
"""


def _flag(name: str) -> Any:
    default = Settings.model_fields[name].get_default()
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=f"{ENV_PREFIX}{name.upper()}",
        help=describe(name) + (f" Default: {shown}." if isinstance(shown, str | int) else ""),
        show_default=False,
        metavar="TEXT",
    )


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes **flags one flag for each setting, so that none can be forgotten."""
    signature = inspect.signature(command)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, _flag(name)]
        )
        for name in Settings.model_fields
    ]
    parameters = [*own, *flags]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by inspect
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return command


@_with_flags
def serve(
    *,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            envvar=f"{ENV_PREFIX}READY_FILE",
            help='Write {"address", "metrics_address", "pid"} here, as JSON, once calls are taken;'
            ' with several workers "workers" too, their process ids.',
        ),
    ] = None,
    **flags: str | None,
) -> None:
    """Run the server: gRPC on loopback, metrics and readiness over HTTP beside it."""
    try:
        settings = load_settings(flags)
    except SettingsRefusedError as error:
        fail(str(error), USAGE)
    seat = Seat.from_environment(os.environ)
    configure_logs(settings.log_format, settings.log_level, None if seat is None else seat.number)
    if seat is not None:
        _work(settings, seat)
        return
    in_peace = True
    try:
        if settings.workers > 1:
            in_peace = asyncio.run(supervise(settings, _announcer(ready_file)))
        else:
            _run(settings, _announcer(ready_file))
    except StartRefusedError as error:
        fail(str(error), REFUSED)
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
    if not in_peace:
        fail("workers that did not end in time were killed; what they had acknowledged is safe", REFUSED)


def _run(settings: Settings, announce: Callable[[Serving], None], tie: SupervisorTie | None = None) -> None:
    # Imported here: a supervisor is to stay small.
    from paycore.app.serve import serve as run_server

    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(run_server(settings, announce, tie))


def _work(settings: Settings, seat: Seat) -> None:
    """Be a worker: the supervisor has made the settings, and tells people what this process tells it."""
    with SupervisorTie(seat, settings.shutdown_grace_ms) as tie:
        try:
            _run(settings, lambda _: tie.tell(Word(serving=True)), tie)
        except StartRefusedError as error:
            tie.tell(Word(refused=str(error)))
            raise typer.Exit(REFUSED) from None


def _announcer(ready_file: Path | None) -> Callable[[Serving], None]:
    announced = False

    def announce(serving: Serving) -> None:
        nonlocal announced
        if not announced:
            typer.echo(f"paycore serves on {serving.address}, metrics on http://{serving.metrics_address}/metrics")
        announced = True
        if ready_file is not None:
            _write_ready_file(ready_file, serving)

    return announce


def _write_ready_file(path: Path, serving: Serving) -> None:
    # Renamed into place: whoever waits for it never reads half of it.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(serving.as_dict()), encoding="utf-8")
    unfinished.replace(path)
