"""Hands a file of notifications over, many in a call, and says what became of them.

    python examples/notify_many.py words.jsonl --server 127.0.0.1:50051

Each line is one NotifyRequest as protobuf JSON:

    {"channel": "simbank", "account": "bank_a", "channel_order_no": "25062884117997568001",
     "result": "CHANNEL_RESULT_SUCCESS", "amount_minor": "1999", "currency": "CNY", "channel_trade_no": "T-1"}

Words that were not kept are named on standard error; the exit code is 1 then, and the file may be handed over again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from google.protobuf.json_format import Parse

from paycore.client import BatchingNotifier, PaycoreRpcError
from paycore.v1.payment_pb2 import NotifyOutcome
from paycore.v1.payment_service_pb2 import NotifyRequest, NotifyResponse

LINES_AHEAD = 50_000
"""How many answers may be outstanding, so that a large file need not fit into memory."""

Answered = tuple[int, Future[NotifyResponse]]


def hand_over(path: Path, notifier: BatchingNotifier) -> Iterator[Answered]:
    """Hand over each line; give back its number and its answer, in the order of the file."""
    outstanding: deque[Answered] = deque()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            outstanding.append((number, notifier.send(Parse(line, NotifyRequest()))))
            if len(outstanding) >= LINES_AHEAD:
                yield outstanding.popleft()
    yield from outstanding


def main() -> int:
    """Hand over a file and print how many words had which outcome."""
    parser = argparse.ArgumentParser(description="Hand a file of notifications over.")
    parser.add_argument("path", type=Path, help="one NotifyRequest a line, as protobuf JSON")
    parser.add_argument("--server", default="127.0.0.1:50051", help="the server's address")
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    failed = 0
    with BatchingNotifier(arguments.server) as notifier:
        for number, future in hand_over(arguments.path, notifier):
            try:
                response = future.result()
            except PaycoreRpcError as error:
                failed += 1
                print(f"line {number}: {error}", file=sys.stderr)
            else:
                name = NotifyOutcome.Name(response.outcome).removeprefix("NOTIFY_OUTCOME_")
                outcomes[f"{name} (replayed)" if response.replayed else name] += 1
    for name, count in sorted(outcomes.items()):
        print(f"{count:>9,} {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
