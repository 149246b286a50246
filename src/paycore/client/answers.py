"""Reads the answers of NotifyBatch: each word's own, as Notify alone would have given it."""

from collections.abc import Iterable

import grpc

from paycore.client.errors import PaycoreRpcError, Violation
from paycore.v1 import payment_pb2, payment_service_pb2

WordAnswer = payment_service_pb2.NotifyResponse | PaycoreRpcError
"""What became of one word: what it turned out to be, or the error that Notify would have raised."""

THROTTLED_RETRY_AFTER_MS = 1_000
"""What Notify's RetryInfo asks for; an answer within a batch has no room to say it."""

_INVALID = payment_pb2.NOTIFY_OUTCOME_INVALID
_THROTTLED = payment_pb2.NOTIFY_OUTCOME_THROTTLED


def read_answer(answer: payment_service_pb2.NotifyResponse) -> WordAnswer:
    """Turn INVALID and THROTTLED into the error that they are; return every other answer as it is."""
    if answer.outcome == _INVALID:
        return invalid_error([Violation(one.field, one.rule) for one in answer.violations])
    if answer.outcome == _THROTTLED:
        return PaycoreRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "THROTTLED",
            "too much is waiting; the word was not kept",
            retryable=True,
            retry_after_ms=THROTTLED_RETRY_AFTER_MS,
        )
    return answer


def read_answers(response: payment_service_pb2.NotifyBatchResponse, count: int) -> list[WordAnswer]:
    """Return one answer for each of ``count`` words. Raises PaycoreRpcError (INTERNAL) when the numbers differ."""
    answers: Iterable[payment_service_pb2.NotifyResponse] = response.answers
    if len(response.answers) != count:
        raise PaycoreRpcError(
            grpc.StatusCode.INTERNAL,
            "ANSWERS_DIFFER",
            f"{count} words got {len(response.answers)} answers",
            retryable=False,
        )
    return [read_answer(answer) for answer in answers]


def invalid_error(violations: Iterable[Violation]) -> PaycoreRpcError:
    """The error of a word that cannot be evidence."""
    found = tuple(violations)
    text = "; ".join(f"{field}: {rule}" for field, rule in found)
    return PaycoreRpcError(
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NOTIFICATION", text or "refused", retryable=False, violations=found
    )
