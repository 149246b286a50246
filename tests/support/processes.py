"""Independent servers over one database, held or frozen where a test wants it, and words told to them in batches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, cast

import grpc
from prometheus_client.parser import text_string_to_metric_families

from paycore.bench.payments import CHANNEL, CURRENCY, account, amount_minor, trade_no
from paycore.client import notify_request
from paycore.domain.ids import created_at_ms, format_channel_order_no
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.support.server import START_SECONDS, ServerProcess
from tests.support.simbank import SECRETS, wait_for

NOBODY = "http://127.0.0.1:9"
"""Where no bank is."""

CALL_SECONDS = 120
IN_FLIGHT = 2
"""How many waves are on their way at once, so that no process waits for the slowest of the last wave."""


class Word(NamedTuple):
    """What a channel says of an attempt. trade_no: empty for a failure. paid_at_ms: None where it is not said."""

    payment_id: int
    attempt: int
    trade_no: str
    amount_minor: int
    paid_at_ms: int | None

    @property
    def capture(self) -> tuple[int, int, str]:
        """Which money it tells of."""
        return self.payment_id, self.attempt, self.trade_no


class Answer(NamedTuple):
    """What a server said to a word: the outcome's name."""

    outcome: str
    replayed: bool


def success(payment_id: int, attempt: int, *, late: bool = False, trade: str = "") -> Word:
    """The success of an attempt of a ``paycore.bench.payments.Lot``, paid at once, or two seconds after.

    That is after the validity of those payments whose validity has passed.
    """
    paid_at_ms = created_at_ms(payment_id) + (2_000 if late else 1)
    return Word(payment_id, attempt, trade or trade_no(payment_id, attempt), amount_minor(payment_id), paid_at_ms)


def failure(payment_id: int, attempt: int) -> Word:
    """The failure of an attempt."""
    return Word(payment_id, attempt, "", amount_minor(payment_id), None)


def as_request(word: Word) -> payment_service_pb2.NotifyRequest:
    """The word as it goes over the wire."""
    return notify_request(
        channel=CHANNEL,
        account=account(word.attempt),
        channel_order_no=format_channel_order_no(word.payment_id, word.attempt),
        result=payment_pb2.CHANNEL_RESULT_SUCCESS if word.trade_no else payment_pb2.CHANNEL_RESULT_FAILURE,
        amount_minor=word.amount_minor,
        currency=CURRENCY,
        channel_trade_no=word.trade_no,
        paid_at_ms=word.paid_at_ms,
    )


class Sent:
    """A batch on its way to a server."""

    def __init__(self, peer: Peer, words: Sequence[Word]) -> None:
        self.peer = peer
        self.words = words
        batch = payment_service_pb2.NotifyBatchRequest(notifications=map(as_request, words))
        call = peer.channel.unary_unary(
            "/paycore.v1.PaymentService/NotifyBatch",
            payment_service_pb2.NotifyBatchRequest.SerializeToString,
            payment_service_pb2.NotifyBatchResponse.FromString,
        )
        self._future = call.future(batch, timeout=CALL_SECONDS)

    def is_answered(self) -> bool:
        """Whether it is answered, or failed."""
        return bool(self._future.done())

    def answers(self) -> list[Answer]:
        """Wait for the answers, in the words' order. Raises grpc.RpcError."""
        found = self._future.result().answers
        assert len(found) == len(self.words)
        prefix = len("NOTIFY_OUTCOME_")
        return [Answer(payment_pb2.NotifyOutcome.Name(one.outcome)[prefix:], one.replayed) for one in found]

    def code(self) -> str:
        """Wait for the end of the call; return its gRPC code's name."""
        try:
            self._future.result()
        except grpc.RpcError as error:
            return cast(grpc.Call, error).code().name
        return "OK"


class Peer(ServerProcess):
    """One of several servers over a database. gates: failpoints where it can be held; all are open at first.

    It runs no jobs, so that nothing which a decision forgot is mended behind the test's back.
    """

    def __init__(self, url: str, folder: Path, *, gates: Sequence[str] = (), bank_url: str = NOBODY) -> None:
        folder.mkdir()
        own = {
            "PAYCORE_SIMBANK_URL": bank_url,
            "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
            "PAYCORE_JOBS": "",
            "PAYCORE_LOG_LEVEL": "warning",
        }
        if gates:
            own["PAYCORE_FAILPOINTS"] = ",".join(f"{gate}=pause:{folder}" for gate in gates)
        for gate in gates:
            (folder / f"{gate}.go").touch()
        super().__init__(folder / "server", url=url, env=own)
        self._folder = folder
        self._channel: grpc.Channel | None = None

    @property
    def channel(self) -> grpc.Channel:
        """A connection of this server's own; after a restart it is made anew by itself."""
        assert self._channel is not None, "the server has not been started"
        return self._channel

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        super().wait_ready(seconds)
        if self._channel is None:
            options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
            options += [("grpc.min_reconnect_backoff_ms", 5_000), ("grpc.use_local_subchannel_pool", 1)]
            self._channel = grpc.insecure_channel(self.address, options=options)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._channel is not None:
            self._channel.close()

    def send(self, words: Sequence[Word]) -> Sent:
        """Send a batch; do not wait."""
        return Sent(self, words)

    def tell(self, *words: Word) -> list[Answer]:
        """Send a batch and wait for its answers. Raises grpc.RpcError."""
        return self.send(words).answers()

    def failed_commits(self) -> dict[str, int]:
        """How often it decided a group again or gave it up, by cause."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=CALL_SECONDS) as page:
            families = text_string_to_metric_families(page.read().decode())
        samples = [sample for family in families for sample in family.samples]
        failed = [sample for sample in samples if sample.name == "paycore_commit_failures_total"]
        return {sample.labels["cause"]: int(sample.value) for sample in failed if sample.value}

    def shut(self, gate: str) -> None:
        """Hold the server when it comes by."""
        (self._folder / f"{gate}.reached").unlink(missing_ok=True)
        (self._folder / f"{gate}.go").unlink()

    def open(self, gate: str) -> None:
        """Let the server pass from now on."""
        (self._folder / f"{gate}.go").touch()

    def wait_held(self, gate: str) -> None:
        """Wait until the server is held there."""
        wait_for((self._folder / f"{gate}.reached").exists, f"the server at {gate}")

    def freeze(self) -> None:
        """Stop the process where it stands (SIGSTOP); return when it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the process stopped")

    def thaw(self) -> None:
        """Let a frozen process go on (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def peers(
    url: str, folder: Path, count: int, *, gates: Sequence[str] = (), bank_url: str = NOBODY
) -> Iterator[list[Peer]]:
    """Run so many servers on one database, started together."""
    running = [Peer(url, folder / f"server-{number}", gates=gates, bank_url=bank_url) for number in range(count)]
    with contextlib.ExitStack() as stack:
        for peer in running:
            stack.push(peer)
            peer.launch()
        for peer in running:
            peer.wait_ready()
        yield running


class Told(NamedTuple):
    """Every word with its answer, in no order; and how many batches were refused with UNAVAILABLE and sent again."""

    answers: list[tuple[Word, Answer]]
    refused: int


def tell_in_waves(servers: Sequence[Peer], waves: Iterable[Sequence[Sequence[Word]]]) -> Told:
    """Tell waves of words, to each server its batch of a wave, all at the same moment.

    A batch that is refused as a whole with UNAVAILABLE is sent again to the same server until it is answered.
    """
    flying: deque[list[Sent]] = deque()
    answers: list[tuple[Word, Answer]] = []
    refused = 0

    def land() -> None:
        nonlocal refused
        for sent in flying.popleft():
            while (code := sent.code()) == "UNAVAILABLE":
                refused += 1
                sent = sent.peer.send(sent.words)  # noqa: PLW2901 - the same batch, once more
            assert code == "OK", code
            answers.extend(zip(sent.words, sent.answers(), strict=True))

    for wave in waves:
        flying.append([peer.send(words) for peer, words in zip(servers, wave, strict=True) if words])
        if len(flying) == IN_FLIGHT:
            land()
    while flying:
        land()
    return Told(answers, refused)
