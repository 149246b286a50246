"""What goes out together and what follows from a failed call, in values: no server, no clock, no chance."""

from __future__ import annotations

from concurrent.futures import Future

import grpc
import pytest

from paycore.client.answers import read_answer
from paycore.client.errors import PaycoreRpcError
from paycore.client.gathering import FAR_MS, Batch, BatchLimits, Gatherer, Word, deadline_error, settle, settle_each
from paycore.client.retrying import NO_RETRY, Attempts, RetryPolicy
from paycore.v1 import payment_pb2
from paycore.v1.payment_service_pb2 import NotifyBatchRequest, NotifyRequest, NotifyResponse

Code = grpc.StatusCode


def highest(bound: int) -> int:
    """Chance that always draws the longest wait."""
    return bound


def error(code: grpc.StatusCode, reason: str = "", retry_after_ms: int | None = None) -> PaycoreRpcError:
    return PaycoreRpcError(code, reason or code.name, "text", retryable=True, retry_after_ms=retry_after_ms)


def word(deadline_ms: int = 1_000, size: int = 0) -> Word:
    return Word(NotifyRequest(raw=bytes(size)), Future[NotifyResponse](), deadline_ms)


def gathered(*words: Word, limits: BatchLimits | None = None, retry: RetryPolicy = NO_RETRY) -> Gatherer:
    gatherer = Gatherer(limits or BatchLimits(), retry, highest)
    for one in words:
        gatherer.add(one)
    return gatherer


def taken(gatherer: Gatherer) -> Batch:
    batch = gatherer.take()
    assert batch is not None
    return batch


# The wait of each retry

# Attempts so far, code of the last, the server's delay, and the longest wait, None where there is no retry.
WAITS = [
    (1, Code.UNAVAILABLE, None, 50),
    (2, Code.UNAVAILABLE, None, 100),
    (3, Code.UNAVAILABLE, None, 200),
    (6, Code.UNAVAILABLE, None, 1_000),
    (10_000, Code.UNAVAILABLE, None, 1_000),
    (1, Code.UNAVAILABLE, 1_500, 1_550),
    *((1, code, 1_500, None) for code in Code if code is not Code.UNAVAILABLE),
]


@pytest.mark.parametrize(("attempts", "code", "asked_ms", "wait_ms"), WAITS)
def test_wait_doubles_up_to_its_bound_and_only_after_unavailable(
    attempts: int, code: grpc.StatusCode, asked_ms: int | None, wait_ms: int | None
) -> None:
    assert RetryPolicy().wait_ms(error(code, retry_after_ms=asked_ms), attempts, highest) == wait_ms


def test_wait_is_drawn_from_zero_to_its_bound() -> None:
    bounds: list[int] = []

    def draw(bound: int) -> int:
        bounds.append(bound)
        return 7

    assert RetryPolicy(80, 300).wait_ms(error(Code.UNAVAILABLE), 2, draw) == 7
    assert bounds == [160]


@pytest.mark.parametrize(("max_attempts", "made", "is_retried"), [(1, 1, False), (3, 2, True), (3, 3, False)])
def test_attempts_end_at_their_bound(max_attempts: int, made: int, is_retried: bool) -> None:
    policy = RetryPolicy(max_attempts=max_attempts)
    assert (policy.wait_ms(error(Code.UNAVAILABLE), made, highest) is not None) is is_retried


@pytest.mark.parametrize("values", [(0, 1), (2, 1), (1, 1, 0)])
def test_policy_that_makes_no_sense_is_a_value_error(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        RetryPolicy(*values)


def test_call_is_not_tried_again_where_its_deadline_comes_before_the_attempt() -> None:
    attempts = Attempts(RetryPolicy(100, 100), deadline_ms=1_000, draw=highest)
    assert attempts.left_ms(300) == 700
    assert attempts.wait_ms(error(Code.UNAVAILABLE), 899) == 100
    assert attempts.wait_ms(error(Code.UNAVAILABLE), 900) is None
    assert attempts.left_ms(1_001) == 0


# What goes out together


def test_message_is_what_protobuf_makes_of_the_same_words() -> None:
    # Lengths of one, two and three digits of a varint, and the steps between them.
    requests = [NotifyRequest(raw=bytes(size)) for size in (0, 1, 125, 126, 127, 16_379, 16_380, 16_381, 3_000_000)]
    words = [Word(request, Future[NotifyResponse](), 1) for request in requests]
    assert NotifyBatchRequest.FromString(Batch(words).message()) == NotifyBatchRequest(notifications=requests)
    assert Batch(words).message() == NotifyBatchRequest(notifications=requests).SerializeToString()


def test_everything_that_waits_is_taken_until_as_many_batches_are_out_as_may_be() -> None:
    gatherer = gathered(word(), limits=BatchLimits(max_in_flight=2))
    first = taken(gatherer)
    gatherer.add(word())
    second = taken(gatherer)
    for _ in range(3):
        gatherer.add(word())
    assert gatherer.take() is None
    gatherer.finish(second)
    assert len(taken(gatherer).words) == 3
    assert gatherer.take() is None
    gatherer.finish(first)
    assert gatherer.take() is None
    assert not gatherer.is_idle


@pytest.mark.parametrize(
    ("sizes", "taken_sizes"),
    [
        ([10] * 7, [3, 3, 1]),
        ([40, 40, 40], [2, 1]),
        ([200, 10, 10], [1, 2]),
        ([10, 200, 10], [1, 1, 1]),
    ],
)
def test_batch_holds_what_its_limits_allow_and_at_least_one_word(sizes: list[int], taken_sizes: list[int]) -> None:
    # Of a word with `size` bytes of evidence the message has size + 4, its frames counted.
    gatherer = gathered(*(word(size=size) for size in sizes), limits=BatchLimits(max_words=3, max_bytes=100))
    batches = [batch.words for batch in iter(gatherer.take, None)]
    assert [len(words) for words in batches] == taken_sizes


def test_notifier_is_full_at_its_limit_and_idle_when_everything_is_finished() -> None:
    gatherer = gathered(limits=BatchLimits(max_waiting=2))
    assert gatherer.is_idle
    gatherer.add(word())
    assert (gatherer.is_full, gatherer.is_idle) == (False, False)
    gatherer.add(word())
    assert gatherer.is_full
    batch = taken(gatherer)
    assert (gatherer.is_full, gatherer.is_idle) == (False, False)
    gatherer.finish(batch)
    assert gatherer.is_idle


@pytest.mark.parametrize("name", ["max_in_flight", "max_words", "max_bytes", "max_waiting"])
def test_limit_below_one_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"at least 1"):
        BatchLimits(**{name: 0})


# What follows from a failed call


def test_unavailable_batch_stays_out_and_is_sent_again_after_the_wait() -> None:
    gatherer = gathered(word(), word(), limits=BatchLimits(max_in_flight=1), retry=RetryPolicy())
    batch = taken(gatherer)
    waits = [gatherer.fail(batch, error(Code.UNAVAILABLE), 0).retry_in_ms for _ in range(3)]
    assert waits == [50, 100, 200]
    gatherer.add(word())
    assert gatherer.take() is None


def test_wait_ends_when_the_last_word_is_out_of_time() -> None:
    gatherer = gathered(word(1_000), word(1_030), retry=RetryPolicy())
    failed = gatherer.fail(taken(gatherer), error(Code.UNAVAILABLE), 1_000)
    assert (failed.refused, failed.retry_in_ms) == ([], 30)


def test_batch_sent_again_leaves_out_words_that_are_out_of_time() -> None:
    late, timely = word(1_000), word(1_001)
    gatherer = gathered(late, timely, retry=RetryPolicy())
    batch = taken(gatherer)
    unavailable = error(Code.UNAVAILABLE)
    gatherer.fail(batch, unavailable, 990)
    ((refused, told),) = gatherer.drop_late(batch, 1_000)
    assert refused is late
    assert (told.code, told.__cause__) == (Code.DEADLINE_EXCEEDED, unavailable)
    assert batch.words == [timely]


# The code and reason of a failed call, and whether a batch of several words is split.
SPLITS = [
    (Code.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED", True),
    (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", False),
    (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", True),
    (Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", True),
    (Code.UNAVAILABLE, "UNAVAILABLE", False),
    (Code.INTERNAL, "INTERNAL", False),
    (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", False),
]


@pytest.mark.parametrize(("code", "reason", "is_split"), SPLITS)
def test_batch_is_split_where_half_of_it_might_fare_better(code: grpc.StatusCode, reason: str, is_split: bool) -> None:
    words = [word() for _ in range(5)]
    gatherer = gathered(*words, limits=BatchLimits(max_in_flight=1))
    failed = gatherer.fail(taken(gatherer), error(code, reason), 0)
    assert failed.retry_in_ms is None
    if not is_split:
        assert [one for one, _ in failed.refused] == words
        assert {told.code for _, told in failed.refused} == {code}
        assert gatherer.is_idle
        return
    assert failed.refused == []
    first = taken(gatherer)
    gatherer.finish(first)
    assert [*first.words, *taken(gatherer).words] == words


def test_single_word_is_not_split_but_told() -> None:
    only = word()
    gatherer = gathered(only)
    failed = gatherer.fail(taken(gatherer), error(Code.RESOURCE_EXHAUSTED), 0)
    assert [(one, told.code) for one, told in failed.refused] == [(only, Code.RESOURCE_EXHAUSTED)]


def test_later_batches_are_no_larger_than_half_of_what_was_too_large() -> None:
    gatherer = gathered(*(word(size=100_000) for _ in range(8)))
    gatherer.fail(taken(gatherer), error(Code.RESOURCE_EXHAUSTED), 0)
    for _ in range(8):
        gatherer.add(word(size=100_000))
    assert [len(batch.words) for batch in iter(gatherer.take, None)] == [4, 4, 4, 4]


# Words out of time


def test_words_out_of_time_are_told_wherever_they_are() -> None:
    waiting = [word(2_000), word(500), word(1_500)]
    out = [word(400), word(3_000)]
    gatherer = gathered(*out, limits=BatchLimits(max_in_flight=1))
    taken(gatherer)
    for one in waiting:
        gatherer.add(one)
    assert gatherer.next_deadline_ms == 400
    assert gatherer.expire(399) == []
    first = gatherer.expire(500)
    assert [one for one, _ in first] == [waiting[1], out[0]]
    settle_each(first)
    assert gatherer.next_deadline_ms == 1_500
    assert [one for one, _ in gatherer.expire(1_500)] == [waiting[2]]
    assert gatherer.next_deadline_ms == 2_000
    assert [told.code for _, told in gatherer.expire(9_000)] == [Code.DEADLINE_EXCEEDED] * 2
    assert gatherer.next_deadline_ms == FAR_MS


def test_word_that_is_answered_is_not_out_of_time() -> None:
    answered = word(400)
    gatherer = gathered(answered)
    taken(gatherer)
    settle(answered, NotifyResponse())
    assert gatherer.expire(500) == []


def test_size_of_what_waits_is_right_after_words_ran_out_of_time() -> None:
    gatherer = gathered(*(word(500, 90) for _ in range(5)), word(1_000, 10), limits=BatchLimits(max_bytes=100))
    gatherer.expire(500)
    gatherer.add(word(1_000, 10))
    assert len(taken(gatherer).words) == 2


def test_abandoned_words_are_those_without_an_answer() -> None:
    words = [word() for _ in range(4)]
    gatherer = gathered(*words[:2], limits=BatchLimits(max_in_flight=1))
    taken(gatherer)
    for one in words[2:]:
        gatherer.add(one)
    settle(words[0], NotifyResponse())
    assert [(one, told.reason) for one, told in gatherer.abandon()] == [
        (one, "NOTIFIER_CLOSED") for one in (words[2], words[3], words[1])
    ]
    assert gatherer.is_idle


def test_first_to_settle_a_word_is_the_one_that_counts() -> None:
    one = word()
    settle(one, deadline_error(None))
    settle(one, NotifyResponse())
    assert isinstance(one.future, Future)
    assert isinstance(one.future.exception(0), PaycoreRpcError)


# The answer of one word

OUTCOMES = [
    ("INVALID", Code.INVALID_ARGUMENT, False),
    ("THROTTLED", Code.RESOURCE_EXHAUSTED, True),
    *((name, None, None) for name in ("ACCEPTED", "DUPLICATE", "LATE", "SECOND_CAPTURE", "MISMATCH")),
    *((name, None, None) for name in ("CONFLICT", "UNKNOWN", "RECORDED")),
]


@pytest.mark.parametrize(("name", "code", "retryable"), OUTCOMES)
def test_only_invalid_and_throttled_are_errors(name: str, code: grpc.StatusCode | None, retryable: bool | None) -> None:
    answer = NotifyResponse(outcome=payment_pb2.NotifyOutcome.Value(f"NOTIFY_OUTCOME_{name}"))
    found = read_answer(answer)
    if code is None:
        assert found is answer
        return
    assert isinstance(found, PaycoreRpcError)
    assert (found.code, found.retryable) == (code, retryable)


def test_every_outcome_has_a_row_above() -> None:
    names = {name.removeprefix("NOTIFY_OUTCOME_") for name in payment_pb2.NotifyOutcome.keys()}  # noqa: SIM118
    assert names - {"UNSPECIFIED"} == {name for name, _, _ in OUTCOMES}
