"""Real bank and forwarder processes for tests, a receiver of notifications, and a driver of both."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, TypeVar

import httpx

from paycore.channels.protocol import ChannelOrder, RefundOrder
from paycore.channels.simbank import SimbankChannel
from paycore.domain.verdicts import PayMethod

SECRETS = {name: f"a secret of {name} for tests" for name in ("bank_a", "bank_b", "bank_c")}
DEADLINE_SECONDS = 20.0

T = TypeVar("T")


class WallClock:
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


CLOCK = WallClock()


def wait_for(look: Callable[[], T | None], what: str, seconds: float = DEADLINE_SECONDS) -> T:
    """Look until something true is seen; fail after the deadline."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not seen within {seconds} s: {what}"
        time.sleep(0.01)
    return seen


class Running(NamedTuple):
    process: subprocess.Popen[str]
    address: str
    log: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@contextmanager
def running(verb: str, folder: Path, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run ``simbank`` or ``forwarder`` as a process until the block ends; it is killed then, where it still lives."""
    ready = folder / f"{verb}.ready"
    ready.unlink(missing_ok=True)
    log = folder / f"{verb}.log"
    with log.open("a") as stderr, start(verb, *flags, "--ready-file", str(ready), env=env, stderr=stderr) as process:
        try:
            wait_for(lambda: ready.exists() or process.poll() is not None, f"{verb} is ready")
            assert process.poll() is None, f"{verb} ended: {log.read_text()}"
            yield Running(process, json.loads(ready.read_text())["address"], log)
        finally:
            process.kill()
            process.communicate()


def start(
    verb: str, *flags: str, env: Mapping[str, str] | None = None, stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start the verb's process without waiting for it."""
    program = f"import typer; from paycore.cli.simbank import {verb}; typer.run({verb})"
    return subprocess.Popen(
        [sys.executable, "-c", program, *flags],
        env={**os.environ, "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def bank_process(
    folder: Path, forwarder_url: str, *flags: str, env: Mapping[str, str] | None = None
) -> AbstractContextManager[Running]:
    """Run the banks with their books in the folder."""
    books = ("--books", str(folder / "books.db"), "--forwarder-url", forwarder_url)
    return running("simbank", folder, "--listen", "127.0.0.1:0", *books, *flags, env=env)


class Received(NamedTuple):
    """One notification as it came over the wire."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        parsed: dict[str, Any] = json.loads(self.raw)
        return parsed


class Receiver:
    """An HTTP server that keeps what it gets and answers as ``answer`` says: (status, body), or None to hang up."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.answer: Callable[[Received], tuple[int, bytes] | None] = lambda _: (200, b'{"code":"OK"}')
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self._handle()

            def do_GET(self) -> None:
                self._handle()

            def _handle(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                headers = {name.lower(): value for name, value in self.headers.items()}
                one = Received(self.path, headers, raw)
                receiver.received.append(one)
                answer = receiver.answer(one)
                self.close_connection = answer is None
                if answer is not None:
                    self.send_response(answer[0])
                    self.send_header("Content-Length", str(len(answer[1])))
                    self.end_headers()
                    self.wfile.write(answer[1])

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """A caller that has hung up is part of the tests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def of_order(self, order_no: str) -> list[dict[str, Any]]:
        """What was told about one order, in the order of arrival."""
        return [one.body for one in list(self.received) if one.body["order_no"] == order_no]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Driver:
    """Plays the user and the auditor of one bank process."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def pay(self, order_no: str, bank: str = "bank_a", **faults: object) -> dict[str, Any]:
        answer = self.http.post(
            f"/banks/{bank}/pay/{order_no}", headers={"Accept": "application/json"}, json={"faults": faults}
        )
        assert answer.status_code in {200, 409}, answer.text
        return self._json(answer)

    def see(self, url: str) -> httpx.Response:
        """Open a page as a browser does."""
        return self.http.get(url, headers={"Accept": "text/html"})

    def press(self, url: str) -> httpx.Response:
        """Press the page's button."""
        return self.http.post(url, headers={"Accept": "text/html"})

    def plant(self, order_no: str = "", subject: str = "", bank: str = "bank_a", **faults: Any) -> None:
        match = {"order_no": order_no} if order_no else {"subject": subject}
        answer = self.http.put("/faults", json={"bank": bank, "match": match, "faults": faults})
        assert answer.status_code == 200, answer.text

    def plant_everywhere(self, bank: str = "bank_a", **faults: Any) -> None:
        """Plant faults for all that the bank is asked; none take back what stood."""
        answer = self.http.put("/faults", json={"bank": bank, "match": {"everything": True}, "faults": faults})
        assert answer.status_code == 200, answer.text

    def give_back(self, order_no: str, trade_no: str, bank: str = "bank_a") -> dict[str, Any]:
        """The bank returns a capture by itself."""
        answer = self.http.post("/returns", json={"bank": bank, "order_no": order_no, "trade_no": trade_no})
        assert answer.status_code == 200, answer.text
        return self._json(answer)

    def asked(self, bank: str = "bank_a") -> Counter[str]:
        """How often the bank was asked for each operation since its process began."""
        return Counter(self._json(self.http.get("/requests"))["banks"][bank])

    def order(self, order_no: str, bank: str = "bank_a") -> dict[str, Any]:
        orders = self._json(self.http.get("/books", params={"bank": bank, "order_no": order_no}))
        (order,) = orders["banks"][bank]["orders"]
        found: dict[str, Any] = order
        return found

    def has_order(self, order_no: str, bank: str = "bank_a") -> bool:
        orders = self._json(self.http.get("/books", params={"bank": bank, "order_no": order_no}))
        return bool(orders["banks"][bank]["orders"])

    def notifications(self, verb: str, **asked: object) -> dict[str, Any]:
        answer = self.http.post(f"/notifications/{verb}", json={"bank": "bank_a", **asked})
        assert answer.status_code == 200, answer.text
        return self._json(answer)

    def settled(self, order_no: str) -> dict[str, Any]:
        """The order once all its notifications are acknowledged, none is held and none will be sent by itself."""

        def look() -> dict[str, Any] | None:
            order = self.order(order_no)
            done = all(one["acknowledged"] and not one["pending"] for one in order["notifications"])
            return order if order["notifications"] and done else None

        return wait_for(look, f"all notifications of {order_no} are acknowledged")

    @staticmethod
    def _json(answer: httpx.Response) -> dict[str, Any]:
        parsed: dict[str, Any] = answer.json()
        return parsed


def adapter(url: str, timeout_ms: int = 10_000) -> SimbankChannel:
    """The real adapter, as paycore uses it."""
    return SimbankChannel(url, SECRETS, timeout_ms, CLOCK)


def an_order(order_no: str, **terms: object) -> ChannelOrder:
    """An order of 12.34 CNY at bank A that is valid for ten minutes."""
    order = ChannelOrder(
        "bank_a", order_no, 1234, "CNY", f"Order {order_no}", "", PayMethod.REDIRECT, CLOCK.now_ms() + 600_000
    )
    return order._replace(**terms)  # type: ignore[arg-type]  # rows of tests name fields


def a_refund(refund_no: str, order_no: str, trade_no: str, **terms: object) -> RefundOrder:
    """A refund of all of ``an_order``."""
    refund = RefundOrder("bank_a", refund_no, order_no, trade_no, 1234, "CNY")
    return refund._replace(**terms)  # type: ignore[arg-type]  # rows of tests name fields
