"""What makes a notification INVALID where headers are JSON text: NUL itself, not a text that looks like its escape."""

import json

import pytest

from paycore.domain.decision import ABSENT_MS
from paycore.domain.notification import Notification
from paycore.domain.verdicts import ChannelResult
from paycore.usecases.notify import violations

HEADERS = [
    ("a NUL", "\0", True),
    ("a NUL after a backslash", "\\\0", True),
    ("a backslash and u0000", "\\u0000", False),
    ("two backslashes and u0000", "\\\\u0000", False),
    ("nothing of the kind", "signature=abc", False),
]


@pytest.mark.parametrize(("value", "refused"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_headers_with_nul_are_refused_and_only_those(value: str, refused: bool) -> None:
    word = Notification(
        "simbank",
        "bank_a",
        "101",
        ChannelResult.SUCCESS,
        1,
        "CNY",
        "T1",
        ABSENT_MS,
        0,
        headers=json.dumps({"h": value}),
    )
    assert [violation.field for violation in violations(word)] == (["headers"] if refused else [])
