"""A server of several worker processes, seen from outside: which they are, what they say, and a line to each."""

from __future__ import annotations

import contextlib
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from prometheus_client.parser import text_string_to_metric_families

from paycore.v1 import payment_pb2, payment_service_pb2
from tests.support.facts import AMOUNT_MINOR, CURRENCY, now_ms
from tests.support.server import ServerProcess
from tests.support.simbank import SECRETS, wait_for

SECONDS = 20
MANY = 60
"""More connections than it takes for the kernel to give each worker one."""

_numbers = itertools.count(1)

_Answer = TypeVar("_Answer", bound=Message)


class Line:
    """One connection of its own, and so one worker as long as both live."""

    def __init__(self, address: str) -> None:
        # Channels to one address would otherwise share one connection.
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])

    def notify(self, number: str, trade: str = "", account: str = "bank_a") -> payment_service_pb2.NotifyResponse:
        """Say that a channel order was paid. Raises grpc.RpcError."""
        word = payment_service_pb2.NotifyRequest(
            channel="simbank",
            account=account,
            channel_order_no=number,
            result=payment_pb2.CHANNEL_RESULT_SUCCESS,
            amount_minor=AMOUNT_MINOR,
            currency=CURRENCY,
            channel_trade_no=trade or f"T-{number}",
        )
        word.paid_at.FromMilliseconds(now_ms())
        return self._call("Notify", word, payment_service_pb2.NotifyResponse)

    def notify_until_answered(self, number: str) -> payment_service_pb2.NotifyResponse:
        """The same by a caller who calls again when he was cut off."""
        return wait_for(lambda: self._try_notify(number), "an answer")

    def _try_notify(self, number: str) -> payment_service_pb2.NotifyResponse | None:
        try:
            return self.notify(number)
        except grpc.RpcError as error:
            if cast(grpc.Call, error).code() is grpc.StatusCode.UNAVAILABLE:
                return None
            raise

    def pay(self, order_no: str, account: str = "bank_a") -> payment_service_pb2.PayResponse:
        """Ask for a payment. Raises grpc.RpcError."""
        command = payment_service_pb2.PayRequest(
            merchant_id="shop",
            merchant_order_no=order_no,
            amount_minor=AMOUNT_MINOR,
            currency=CURRENCY,
            subject="Tea",
            channel="simbank",
            account=account,
            method=payment_pb2.PAY_METHOD_REDIRECT,
        )
        return self._call("Pay", command, payment_service_pb2.PayResponse)

    def _call(self, method: str, request: Message, answer: type[_Answer]) -> _Answer:
        name = f"/paycore.v1.PaymentService/{method}"
        call = self._channel.unary_unary(name, type(request).SerializeToString, answer.FromString)
        return call(request, timeout=SECONDS)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Crew(ServerProcess):
    """A server with workers. Extends a lone server by what there is of several."""

    def __init__(
        self,
        db_path: Path,
        count: int,
        *,
        url: str = "",
        env: Mapping[str, str] | None = None,
        bank_url: str = "http://127.0.0.1:9",
    ) -> None:
        own = {"PAYCORE_SIMBANK_URL": bank_url, "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS)}
        # What the jobs of each worker write would be counted among what the tests send.
        own["PAYCORE_JOBS"] = ""
        super().__init__(db_path, url=url, env={**own, **(env or {})}, arguments=["--workers", str(count)])

    @property
    def workers(self) -> list[int]:
        """The workers' process ids, in the order of their numbers, from 1."""
        said: list[int] = json.loads(self.ready_path.read_text(encoding="utf-8"))["workers"]
        return said

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines of one event."""
        # What stands after the last line's end is still being written.
        lines = [line for line in self.log().split("\n")[:-1] if f'"event": "{name}"' in line]
        return [json.loads(line) for line in lines]

    def http(self, path: str) -> tuple[int, str]:
        """Ask the supervisor over HTTP."""
        try:
            with urllib.request.urlopen(f"http://{self.metrics_address}{path}", timeout=SECONDS) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def totals(self, *samples: str, **labels: str) -> list[int]:
        """Metrics' values at one moment, each summed over the samples that have these labels."""
        _, text = self.http("/metrics")
        all_samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        labelled = [one for one in all_samples if labels.items() <= one.labels.items()]
        return [int(sum(one.value for one in labelled if one.name == name)) for name in samples]

    def total(self, sample: str, **labels: str) -> int:
        """One metric's value, summed over the samples that have these labels."""
        return self.totals(sample, **labels)[0]

    @contextlib.contextmanager
    def line_to_each(self) -> Iterator[dict[int, Line]]:
        """Open lines until every worker has one; yield one to each, by its number."""
        asked: dict[str, Line] = {}
        with contextlib.ExitStack() as stack:
            for _ in range(MANY):
                trade = f"who-{next(_numbers)}"
                asked[trade] = line = stack.enter_context(Line(self.address))
                # A word about no payment of ours is logged, by whoever judged it.
                line.notify("not ours", trade)
            answered = wait_for(lambda: self._who_answered(asked), "every worker's log lines")
            yield {worker: asked[trade] for trade, worker in answered.items()}

    def _who_answered(self, asked: Mapping[str, Line]) -> dict[str, int] | None:
        judged = {one["channel_trade_no"]: one["worker"] for one in self.events("notification_judged")}
        answered = {trade: judged[trade] for trade in asked if trade in judged}
        return answered if len(answered) == len(asked) else None


def alive(pid: int) -> bool:
    """Whether a process that is not our child runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # One that has ended and that nobody has waited for yet is no more either.
    return state != "Z"
