"""Which calls a kill has cut off: only those that the server had in hand when it died."""

from __future__ import annotations

import grpc
import pytest

from paycore.client.errors import PaycoreRpcError
from tests.crash.calls import is_answer, is_cut_off

CODE = grpc.StatusCode

FATES = {
    "the connection broke": (CODE.UNAVAILABLE, "UNAVAILABLE", False, True),
    "the caller gave up": (CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", False, False),
    "the caller hung up": (CODE.CANCELLED, "CANCELLED", False, False),
    "paycore could not write": (CODE.UNAVAILABLE, "STORE_UNAVAILABLE", True, False),
    "paycore refused": (CODE.FAILED_PRECONDITION, "PAYMENT_PAID", True, False),
    "paycore had too much to do": (CODE.RESOURCE_EXHAUSTED, "THROTTLED", True, False),
}


@pytest.mark.parametrize(("code", "reason", "answer", "cut_off"), FATES.values(), ids=FATES)
def test_call_that_failed_is_an_answer_or_cut_off_or_neither(
    code: grpc.StatusCode, reason: str, answer: bool, cut_off: bool
) -> None:
    error = PaycoreRpcError(code, reason, "no message", retryable=True)
    assert (is_answer(error), is_cut_off(error)) == (answer, cut_off)
