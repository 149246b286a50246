"""The batching notifiers, both, against real servers: what goes out together, and what becomes of each word."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships stubs without py.typed

from paycore.client import BatchingNotifier, BatchLimits, PaycoreRpcError, RetryPolicy, requests
from paycore.client.aio import AsyncBatchingNotifier
from paycore.domain.ids import parse_channel_order_no
from paycore.store.schema import migrate
from paycore.v1 import payment_pb2
from paycore.v1.payment_service_pb2 import NotifyBatchRequest, NotifyResponse
from tests.support.facts import AMOUNT_MINOR, CURRENCY, now_ms, put_payments, select
from tests.support.proxy import CuttingProxy
from tests.support.relay import Refusal, Relay
from tests.support.server import ServerProcess

Code = grpc.StatusCode
ACCEPTED = payment_pb2.NOTIFY_OUTCOME_ACCEPTED
SECONDS = 20

BANKS = {
    "PAYCORE_SIMBANK_URL": "http://127.0.0.1:9",
    "PAYCORE_SIMBANK_SECRETS": '{"bank_a": "a", "bank_b": "b", "bank_c": "c"}',
}

_T = TypeVar("_T")

Answer = NotifyResponse | BaseException


class Caller:
    """One of the two notifiers, awaited: the thread-safe one's futures are wrapped for the loop of the test."""

    def __init__(self, notifier: BatchingNotifier | AsyncBatchingNotifier) -> None:
        self.notifier = notifier

    def hand(self, word: dict[str, Any], **changes: Any) -> asyncio.Future[NotifyResponse]:
        """Hand a word over."""
        future = self.notifier.notify(**{**word, **changes})
        return future if isinstance(future, asyncio.Future) else asyncio.wrap_future(future)

    async def answers(self, words: list[dict[str, Any]], **changes: Any) -> list[Answer]:
        """Hand words over; return what became of each, errors as values."""
        return await answers([self.hand(word, **changes) for word in words])

    async def close(self, **options: Any) -> None:
        if isinstance(self.notifier, AsyncBatchingNotifier):
            await self.notifier.close(**options)
        else:
            await asyncio.to_thread(self.notifier.close, **options)


async def answers(futures: list[asyncio.Future[NotifyResponse]]) -> list[Answer]:
    return await within(asyncio.gather(*futures, return_exceptions=True))


async def within(awaited: Awaitable[_T]) -> _T:
    async with asyncio.timeout(SECONDS):
        return await awaited


def error_of(answer: Answer) -> PaycoreRpcError:
    assert isinstance(answer, PaycoreRpcError), answer
    return answer


@pytest.fixture(params=["threads", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def calling(kind: str, address: str, **options: Any) -> AsyncIterator[Caller]:
    """Make one of the notifiers. Waits between retries are short unless told otherwise."""
    options = {"retry": RetryPolicy(max_backoff_ms=100), **options}
    make = BatchingNotifier if kind == "threads" else AsyncBatchingNotifier
    caller = Caller(make(address, **options))
    try:
        yield caller
    finally:
        await caller.close(timeout_ms=SECONDS * 1_000)


def database(path: Path, count: int) -> tuple[Path, list[dict[str, Any]]]:
    """Make a database with so many payments; return one success for each."""
    url = f"sqlite:///{path}"
    migrate(url)
    return path, [success(number) for number in put_payments(url, count)]


def success(order_no: str) -> dict[str, Any]:
    return {
        "channel": "simbank",
        "account": "bank_a",
        "channel_order_no": order_no,
        "result": payment_pb2.CHANNEL_RESULT_SUCCESS,
        "amount_minor": AMOUNT_MINOR,
        "currency": CURRENCY,
        "channel_trade_no": f"T{order_no}",
        "paid_at_ms": now_ms(),
    }


def payment_of(word: dict[str, Any]) -> int:
    parsed = parse_channel_order_no(word["channel_order_no"])
    assert parsed is not None
    return parsed[0]


def assert_each_accepted(words: list[dict[str, Any]], found: Sequence[Answer]) -> None:
    """Each word is accepted, and its answer is about its own payment."""
    assert [one for one in found if not isinstance(one, NotifyResponse)] == []
    responses = [one for one in found if isinstance(one, NotifyResponse)]
    assert [one.payment_id for one in responses] == [payment_of(word) for word in words]
    assert {one.outcome for one in responses} == {ACCEPTED}


def assert_kept_once(db_path: Path, words: list[dict[str, Any]]) -> None:
    """In the database each of the words has paid its payment, and nothing came in excess."""
    paid = {row[0] for row in select(db_path, "SELECT payment_id FROM payment_outcome")}
    assert {payment_of(word) for word in words} <= paid
    assert select(db_path, "SELECT * FROM excess_payment") == []


class Shared:
    """One server for the tests that leave it as it is; each takes payments of its own from it."""

    def __init__(self, server: ServerProcess, words: Iterator[dict[str, Any]]) -> None:
        self.server = server
        self._words = words

    def words(self, count: int) -> list[dict[str, Any]]:
        return list(itertools.islice(self._words, count))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    path, words = database(tmp_path_factory.mktemp("batching") / "paycore.db", 6_000)
    with ServerProcess(path, env={**BANKS, "PAYCORE_MAX_MESSAGE_BYTES": "131072"}) as server:
        yield Shared(server, iter(words))


@pytest.fixture
def relay(shared: Shared) -> Iterator[Relay]:
    with Relay(shared.server.address) as relay:
        yield relay


def is_paid(shared: Shared, word: dict[str, Any]) -> bool:
    statement = "SELECT 1 FROM payment_outcome WHERE payment_id = ?"
    return bool(select(shared.server.db_path, statement, payment_of(word)))


# What goes out together


async def test_word_at_an_idle_notifier_goes_out_at_once_and_alone(kind: str, shared: Shared, relay: Relay) -> None:
    words = shared.words(3)
    async with calling(kind, relay.address) as caller:
        found = [await within(caller.hand(word)) for word in words]
    assert_each_accepted(words, found)
    assert relay.sizes == [1, 1, 1]


async def test_words_gather_while_calls_are_out_and_go_out_as_one(kind: str, shared: Shared, relay: Relay) -> None:
    words = shared.words(502)
    async with calling(kind, relay.address, limits=BatchLimits(max_in_flight=2)) as caller:
        relay.hold()
        futures = []
        for word in words[:2]:
            futures.append(caller.hand(word))
            await asyncio.to_thread(relay.wait_arrived)
        futures += [caller.hand(word) for word in words[2:]]
        await asyncio.sleep(0.05)
        assert relay.sizes == [1, 1]
        relay.release()
        assert_each_accepted(words, await answers(futures))
    assert relay.sizes == [1, 1, 500]


async def test_call_takes_no_more_words_and_bytes_than_its_limits(kind: str, shared: Shared, relay: Relay) -> None:
    words = shared.words(26)
    limits = BatchLimits(max_in_flight=1, max_words=10, max_bytes=30_000)
    async with calling(kind, relay.address, limits=limits) as caller:
        relay.hold()
        futures = [caller.hand(words[0])]
        await asyncio.to_thread(relay.wait_arrived)
        futures += [caller.hand(word) for word in words[1:16]]
        futures += [caller.hand(word, raw=bytes(9_000)) for word in words[16:]]
        relay.release()
        assert_each_accepted(words, await answers(futures))
    # Five small and three large words have 27,000 bytes and some; three large ones alone likewise.
    assert relay.sizes == [1, 10, 8, 3, 3, 1]


async def test_each_future_gets_the_answer_of_its_own_word_whoever_hands_over(kind: str, shared: Shared) -> None:
    words = shared.words(1_000)
    async with calling(kind, shared.server.address) as caller:
        if isinstance(caller.notifier, BatchingNotifier):
            notifier = caller.notifier
            with ThreadPoolExecutor(16) as threads:
                found = list(threads.map(lambda word: notifier.notify(**word).result(SECONDS), words))
        else:
            found = list(await within(asyncio.gather(*(caller.hand(word) for word in words))))
    assert_each_accepted(words, found)
    assert_kept_once(shared.server.db_path, words)


# What becomes of one word alone


async def test_invalid_word_fails_alone_with_its_violations(kind: str, shared: Shared) -> None:
    words = shared.words(20)
    bad = {**words[7], "channel_trade_no": "", "amount_minor": 0}
    async with calling(kind, shared.server.address) as caller:
        found = await caller.answers([*words[:7], bad, *words[8:]])
    error = error_of(found.pop(7))
    assert (error.code, error.reason, error.retryable) == (Code.INVALID_ARGUMENT, "INVALID_NOTIFICATION", False)
    assert {one.field for one in error.violations} == {"channel_trade_no", "amount_minor"}
    assert_each_accepted(words[:7] + words[8:], found)


async def test_value_that_no_message_can_hold_is_a_value_error_and_nothing_goes_out(kind: str, relay: Relay) -> None:
    async with calling(kind, relay.address) as caller:
        with pytest.raises(ValueError, match=r".+"):
            caller.hand(success("101"), amount_minor=2**63)
    assert relay.sizes == []


async def test_throttled_word_fails_alone_and_is_not_sent_again(kind: str, tmp_path: Path) -> None:
    path, words = database(tmp_path / "paycore.db", 60)
    with ServerProcess(path, env={**BANKS, "PAYCORE_QUEUE_LIMIT": "5"}) as server, Relay(server.address) as relay:
        async with calling(kind, relay.address, limits=BatchLimits(max_in_flight=1)) as caller:
            found = await caller.answers(words)
    throttled = [one for one in found if isinstance(one, PaycoreRpcError)]
    assert throttled
    assert {(one.code, one.reason, one.retryable) for one in throttled} == {
        (Code.RESOURCE_EXHAUSTED, "THROTTLED", True)
    }
    assert all((one.retry_after_ms or 0) > 0 for one in throttled)
    kept = [(word, one) for word, one in zip(words, found, strict=True) if isinstance(one, NotifyResponse)]
    assert_each_accepted([word for word, _ in kept], [one for _, one in kept])
    assert len(select(path, "SELECT * FROM payment_outcome")) == len(kept) >= 1
    assert sum(relay.sizes) == len(words)


async def test_cancelled_future_does_not_take_its_word_back(kind: str, shared: Shared, relay: Relay) -> None:
    words = shared.words(3)
    async with calling(kind, relay.address, limits=BatchLimits(max_in_flight=1)) as caller:
        relay.hold()
        futures = [caller.hand(words[0])]
        await asyncio.to_thread(relay.wait_arrived)
        futures += [caller.hand(word) for word in words[1:]]
        futures[0].cancel()
        futures[1].cancel()
        await asyncio.sleep(0)
        relay.release()
        assert_each_accepted(words[2:], await answers(futures[2:]))
    assert_kept_once(shared.server.db_path, words)


# What becomes of a call that fails


def with_reason(reason: str) -> bytes:
    status = status_pb2.Status()
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="paycore", reason=reason))
    data: bytes = status.SerializeToString()
    return data


FINAL: list[Refusal] = [
    (Code.INTERNAL, None),
    (Code.ABORTED, None),
    (Code.CANCELLED, None),
    (Code.UNIMPLEMENTED, None),
    (Code.RESOURCE_EXHAUSTED, with_reason("QUEUE_FULL")),
]


@pytest.mark.parametrize("refusal", FINAL)
async def test_other_code_than_unavailable_fails_the_words_of_the_call_and_is_not_retried(
    kind: str, shared: Shared, relay: Relay, refusal: Refusal
) -> None:
    words = shared.words(3)
    relay.refuse = lambda _request, call: refusal if call == 2 else None
    async with calling(kind, relay.address, limits=BatchLimits(max_in_flight=1)) as caller:
        relay.hold()
        first = caller.hand(words[0])
        await asyncio.to_thread(relay.wait_arrived)
        others = [caller.hand(word) for word in words[1:]]
        relay.release()
        found = await answers([first, *others])
    assert_each_accepted(words[:1], found[:1])
    errors = [error_of(one) for one in found[1:]]
    assert [one.code for one in errors] == [refusal[0]] * 2
    assert errors[0] is not errors[1]
    assert relay.sizes == [1, 2]


async def test_unavailable_call_is_made_again_until_it_is_answered(kind: str, shared: Shared, relay: Relay) -> None:
    words = shared.words(5)
    relay.refuse = lambda _request, call: (Code.UNAVAILABLE, None) if call <= 4 else None
    async with calling(kind, relay.address, retry=RetryPolicy(max_backoff_ms=50)) as caller:
        found = [await within(caller.hand(words[0])), *await caller.answers(words[1:])]
    assert_each_accepted(words, found)
    assert relay.sizes[:5] == [1] * 5


async def test_bad_word_that_spoils_the_whole_call_is_found_and_fails_alone(
    kind: str, shared: Shared, relay: Relay
) -> None:
    words = shared.words(20)

    def refuse(request: NotifyBatchRequest, _call: int) -> Refusal | None:
        spoilt = any(one.channel_order_no == words[13]["channel_order_no"] for one in request.notifications)
        return (Code.INVALID_ARGUMENT, with_reason("MALFORMED_MESSAGE")) if spoilt else None

    relay.refuse = refuse
    async with calling(kind, relay.address) as caller:
        found = await caller.answers(words)
    assert error_of(found.pop(13)).reason == "MALFORMED_MESSAGE"
    assert_each_accepted(words[:13] + words[14:], found)


async def test_answer_with_another_number_of_words_resolves_none_of_them(
    kind: str, shared: Shared, relay: Relay
) -> None:
    relay.answer = b""
    async with calling(kind, relay.address) as caller:
        found = await caller.answers(shared.words(2))
    assert [error_of(one).reason for one in found] == ["ANSWERS_DIFFER"] * 2


async def test_message_over_the_servers_limit_is_split_and_a_word_over_it_fails_alone(
    kind: str, shared: Shared
) -> None:
    words = shared.words(33)
    async with calling(kind, shared.server.address, limits=BatchLimits(max_in_flight=1)) as caller:
        futures = [caller.hand(word, raw=bytes(20_000)) for word in words[:32]]
        futures.insert(16, caller.hand(words[32], raw=bytes(200_000)))
        found = await answers(futures)
    too_large = error_of(found.pop(16))
    assert (too_large.code, too_large.reason, too_large.retryable) == (
        Code.RESOURCE_EXHAUSTED,
        "RESOURCE_EXHAUSTED",
        False,
    )
    assert_each_accepted(words[:32], found)
    assert_kept_once(shared.server.db_path, words[:32])


# Servers and connections that go away


async def test_server_that_is_killed_and_comes_back_keeps_every_word_once(kind: str, shared: Shared) -> None:
    words = shared.words(1_000)
    async with calling(kind, shared.server.address, limits=BatchLimits(max_words=20)) as caller:
        futures = [caller.hand(word) for word in words]
        await asyncio.wait(futures, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
        shared.server.kill()
        assert not all(future.done() for future in futures)
        futures.append(caller.hand(words[0]))
        await asyncio.to_thread(shared.server.restart)
        found = await answers(futures)
    assert_each_accepted([*words, words[0]], found)
    assert_kept_once(shared.server.db_path, words)


async def test_answer_that_is_lost_with_its_connection_is_asked_for_again_and_replayed(
    kind: str, shared: Shared
) -> None:
    words = shared.words(2)
    with CuttingProxy(shared.server.address) as proxy:
        async with calling(kind, proxy.address) as caller:
            first = await within(caller.hand(words[0]))
            proxy.hold_answers()
            second = caller.hand(words[1])
            await asyncio.to_thread(proxy.wait_answer_held)
            while not is_paid(shared, words[1]):
                await asyncio.sleep(0.005)
            proxy.drop_held()
            found = await within(second)
    assert_each_accepted(words, [first, found])
    assert (first.replayed, found.replayed) == (False, True)
    assert_kept_once(shared.server.db_path, words)


async def test_connection_that_fell_silent_is_given_up_by_keepalive_and_replaced(
    kind: str, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same options, fifty times as fast.
    keepalive = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    options = {name: value // 50 if name in keepalive else value for name, value in requests.CHANNEL_OPTIONS}
    monkeypatch.setattr(requests, "CHANNEL_OPTIONS", tuple(options.items()))
    words = shared.words(2)
    with CuttingProxy(shared.server.address) as proxy:
        async with calling(kind, proxy.address) as caller:
            assert_each_accepted(words[:1], [await within(caller.hand(words[0]))])
            proxy.hold_answers()
            second = caller.hand(words[1])
            async with asyncio.timeout(SECONDS):
                while proxy.connections < 2:
                    await asyncio.sleep(0.01)
            proxy.drop_held()
            assert_each_accepted(words[1:], [await within(second)])


async def test_word_out_of_time_fails_and_the_others_go_on(kind: str, shared: Shared) -> None:
    words = shared.words(4)
    async with calling(kind, shared.server.address, limits=BatchLimits(max_in_flight=1)) as caller:
        shared.server.process.send_signal(signal.SIGSTOP)
        try:
            out = caller.hand(words[0], timeout_ms=300)
            await asyncio.sleep(0.05)
            waiting = [caller.hand(words[1]), caller.hand(words[2], timeout_ms=200), caller.hand(words[3])]
            late = await answers([out, waiting[1]])
            assert not waiting[0].done()
        finally:
            shared.server.process.send_signal(signal.SIGCONT)
        assert_each_accepted([words[1], words[3]], await answers([waiting[0], waiting[2]]))
    assert [error_of(one).code for one in late] == [Code.DEADLINE_EXCEEDED] * 2
    assert not is_paid(shared, words[2])


async def test_word_out_of_time_within_a_call_fails_and_its_neighbour_is_answered(
    kind: str, shared: Shared, relay: Relay
) -> None:
    words = shared.words(3)
    async with calling(kind, relay.address, limits=BatchLimits(max_in_flight=1)) as caller:
        relay.hold()
        first = caller.hand(words[0])
        await asyncio.to_thread(relay.wait_arrived)
        short, long = caller.hand(words[1], timeout_ms=400), caller.hand(words[2])
        relay.release(1)
        await asyncio.to_thread(relay.wait_arrived)
        (late,) = await answers([short])
        assert not long.done()
        relay.release()
        assert_each_accepted([words[0], words[2]], await answers([first, long]))
    assert error_of(late).code is Code.DEADLINE_EXCEEDED
    assert relay.sizes == [1, 2]


async def test_server_that_stays_away_fails_each_word_at_its_own_deadline_with_the_cause(
    kind: str, shared: Shared
) -> None:
    words = shared.words(2)
    async with calling(kind, shared.server.address) as caller:
        shared.server.kill()
        short, long = caller.hand(words[0], timeout_ms=300), caller.hand(words[1])
        (late,) = await answers([short])
        assert not long.done()
        await asyncio.to_thread(shared.server.restart)
        assert_each_accepted(words[1:], [await within(long)])
    error = error_of(late)
    assert error.code is Code.DEADLINE_EXCEEDED
    assert error_of(error.__cause__ or KeyError()).code is Code.UNAVAILABLE
    assert not is_paid(shared, words[0])


# Room, and the end


async def test_close_sends_what_waits_and_takes_nothing_more(kind: str, shared: Shared) -> None:
    words = shared.words(300)
    async with calling(kind, shared.server.address, limits=BatchLimits(max_in_flight=1, max_words=20)) as caller:
        futures = [caller.hand(word) for word in words]
        await caller.close()
        # The thread-safe notifier's answers reach this loop by its next turns.
        assert_each_accepted(words, await answers(futures))
        with pytest.raises(PaycoreRpcError) as caught:
            caller.hand(words[0])
    assert (caught.value.code, caught.value.reason) == (Code.CANCELLED, "NOTIFIER_CLOSED")


async def test_close_gives_up_after_its_timeout_and_every_word_is_told(kind: str, shared: Shared, relay: Relay) -> None:
    words = shared.words(3)
    async with calling(kind, relay.address, limits=BatchLimits(max_in_flight=1)) as caller:
        relay.hold()
        futures = [caller.hand(words[0])]
        await asyncio.to_thread(relay.wait_arrived)
        futures += [caller.hand(word) for word in words[1:]]
        await caller.close(timeout_ms=100)
        found = await answers(futures)
    assert [error_of(one).reason for one in found] == ["NOTIFIER_CLOSED"] * 3
    assert relay.sizes == [1]


async def test_asyncio_notifier_that_is_full_refuses_and_tells_when_there_is_room(shared: Shared, relay: Relay) -> None:
    words = shared.words(4)
    limits = BatchLimits(max_in_flight=1, max_waiting=2)
    async with AsyncBatchingNotifier(relay.address, limits=limits) as notifier:
        relay.hold()
        futures = [notifier.notify(**words[0])]
        await asyncio.to_thread(relay.wait_arrived)
        futures += [notifier.notify(**word) for word in words[1:3]]
        with pytest.raises(PaycoreRpcError) as caught:
            notifier.notify(**words[3])
        room = asyncio.create_task(notifier.room())
        await asyncio.sleep(0.02)
        assert not room.done()
        relay.release()
        await within(room)
        futures.append(notifier.notify(**words[3]))
        assert_each_accepted(words, await answers(futures))
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "NOTIFIER_FULL")
    with pytest.raises(PaycoreRpcError, match="NOTIFIER_CLOSED"):
        await notifier.room()


def test_thread_at_a_full_notifier_waits_for_room_until_its_words_deadline(shared: Shared, relay: Relay) -> None:
    words = shared.words(4)
    limits = BatchLimits(max_in_flight=1, max_waiting=2)
    with BatchingNotifier(relay.address, limits=limits) as notifier, ThreadPoolExecutor(1) as thread:
        relay.hold()
        futures = [notifier.notify(**words[0])]
        relay.wait_arrived()
        futures += [notifier.notify(**word) for word in words[1:3]]
        with pytest.raises(PaycoreRpcError, match="NOTIFIER_FULL"):
            notifier.notify(**words[3], timeout_ms=50)
        handed = thread.submit(notifier.notify, **words[3])
        with pytest.raises(TimeoutError):
            handed.result(0.05)
        relay.release()
        futures.append(handed.result(SECONDS))
        assert_each_accepted(words, [future.result(SECONDS) for future in futures])


def test_callback_at_a_full_notifier_is_refused_at_once(shared: Shared, relay: Relay) -> None:
    """It runs in the thread that would make room, so waiting there would be for ever."""
    words = shared.words(4)
    refused: list[BaseException | None] = []
    with BatchingNotifier(relay.address, limits=BatchLimits(max_in_flight=1, max_waiting=2)) as notifier:
        relay.hold()
        first = notifier.notify(**words[0])
        relay.wait_arrived()

        def hand_over(_answered: object) -> None:
            try:
                notifier.notify(**words[3])
            except PaycoreRpcError as error:
                refused.append(error)

        first.add_done_callback(hand_over)
        futures = [first, *(notifier.notify(**word) for word in words[1:3])]
        relay.release()
        assert_each_accepted(words[:3], [future.result(5) for future in futures])
    assert [error_of(one or KeyError()).reason for one in refused] == ["NOTIFIER_FULL"]


def test_future_of_the_thread_safe_notifier_cannot_be_cancelled(shared: Shared) -> None:
    (word,) = shared.words(1)
    with BatchingNotifier(shared.server.address) as notifier:
        future = notifier.notify(**word)
        assert not future.cancel()
        assert_each_accepted([word], [future.result(SECONDS)])
