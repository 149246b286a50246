"""``paycore simbank`` and ``paycore forwarder``: the simulated banks and what carries their notifications."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from paycore.simbank import forwarder as forwarding
from paycore.simbank import server
from paycore.simbank.clock import WallClock
from paycore.simbank.disk import Disk, DiskError
from paycore.simbank.serving import Application, Build, ServingError, configure_logs, loopback_socket, serve
from paycore.simbank.setup import Secrets, SetupError, read_ladder, read_secrets, read_web_url
from paycore.simbank.signing import DEFAULT_WINDOW_MS

T = TypeVar("T")

DEFAULT_LADDER = ",".join(str(delay) for delay in server.DEFAULT_LADDER_MS)

SecretsOption = Annotated[
    str,
    typer.Option(
        envvar="PAYCORE_SIMBANK_SECRETS",
        help="The banks and their secrets, a JSON object: "
        """'{"bank_a": "…", "bank_b": "…", "bank_c": "…"}'. Better given by the environment: flags show in ps.""",
        show_default=False,
    ),
]
ReadyFileOption = Annotated[
    Path | None,
    typer.Option(help='Write {"address", "pid"} here once requests are taken.'),
]
WindowOption = Annotated[
    int,
    typer.Option(envvar="PAYCORE_SIMBANK_WINDOW_MS", min=1, help="How old or early a signature's timestamp may be."),
]

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


def simbank(
    books: Annotated[
        Path,
        typer.Option(envvar="PAYCORE_SIMBANK_BOOKS", help="The banks' own books: an SQLite file, made if missing."),
    ],
    secrets: SecretsOption = "",
    listen: Annotated[
        str, typer.Option(envvar="PAYCORE_SIMBANK_LISTEN", help="Loopback address; port 0 takes any free one.")
    ] = "127.0.0.1:8081",
    forwarder_url: Annotated[
        str, typer.Option(envvar="PAYCORE_SIMBANK_FORWARDER_URL", help="Notifications are POSTed to URL/BANK.")
    ] = "http://127.0.0.1:8082/notifications",
    ladder_ms: Annotated[
        str,
        typer.Option(
            envvar="PAYCORE_SIMBANK_LADDER_MS",
            help="Milliseconds between the sendings of a notification that is not acknowledged.",
        ),
    ] = DEFAULT_LADDER,
    notify_timeout_ms: Annotated[
        int, typer.Option(envvar="PAYCORE_SIMBANK_NOTIFY_TIMEOUT_MS", min=1, help="How long to wait for an answer.")
    ] = 5_000,
    window_ms: WindowOption = DEFAULT_WINDOW_MS,
    ready_file: ReadyFileOption = None,
) -> None:
    """Run the simulated banks: an HTTP server with books of its own, and faults to plant.

    It prints one line, "listening on HOST:PORT", when it takes requests. SIGTERM stops it; the books, planted faults
    and notifications that are not acknowledged yet are there again at the next start, after kill -9 too.

    Read the books: curl http://127.0.0.1:8081/books
    """
    config = server.BankConfig(
        books=books,
        forwarder_url=_web_url(forwarder_url),
        secrets=_secrets(secrets),
        ladder_ms=_ladder(ladder_ms),
        notify_timeout_ms=notify_timeout_ms,
        window_ms=window_ms,
    )

    def build(address: str, stopping: Callable[[], bool]) -> Application:
        return server.build(config, Disk(books), WallClock(), f"http://{address}", stopping)

    _run(build, listen, ready_file)


def forwarder(
    secrets: SecretsOption = "",
    listen: Annotated[
        str,
        typer.Option(envvar="PAYCORE_SIMBANK_FORWARDER_LISTEN", help="Loopback address; port 0 takes any free one."),
    ] = "127.0.0.1:8082",
    grpc_server: Annotated[
        str, typer.Option("--server", envvar="PAYCORE_SIMBANK_FORWARDER_SERVER", help="paycore's gRPC address.")
    ] = "127.0.0.1:50051",
    channel: Annotated[
        str, typer.Option(envvar="PAYCORE_SIMBANK_CHANNEL", help="The channel's name in paycore's configuration.")
    ] = "simbank",
    notify_timeout_ms: Annotated[
        int, typer.Option(envvar="PAYCORE_SIMBANK_FORWARDER_TIMEOUT_MS", min=1, help="How long Notify may take.")
    ] = 4_000,
    window_ms: WindowOption = DEFAULT_WINDOW_MS,
    ready_file: ReadyFileOption = None,
) -> None:
    """Take the simulated banks' notifications, verify them and hand them to paycore's Notify.

    A bank is answered 200 only when Notify returned OK: then what the notification means is durable.
    """
    config = forwarding.ForwarderConfig(
        server=grpc_server,
        secrets=_secrets(secrets),
        channel=channel,
        notify_timeout_ms=notify_timeout_ms,
        window_ms=window_ms,
    )
    _run(lambda _address, _stopping: forwarding.build(config, WallClock()), listen, ready_file)


def _run(build: Build, listen: str, ready_file: Path | None) -> None:
    configure_logs()
    try:
        serve(build, loopback_socket(listen), ready_file)
    except (ServingError, DiskError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _secrets(text: str) -> Secrets:
    return _read("--secrets or PAYCORE_SIMBANK_SECRETS", read_secrets, text)


def _ladder(text: str) -> Sequence[int]:
    return _read("--ladder-ms", read_ladder, text)


def _read(option: str, read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except SetupError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def _web_url(text: str) -> str:
    return _read("--forwarder-url", read_web_url, text)
