"""The bank's signature: proven, fresh, and once."""

import pytest
from pydantic import SecretStr

from paycore.simbank.signing import SignatureError, Verifier, sign, signature

SECRET = SecretStr("a secret for these tests")
TARGET = "POST /notifications/bank_a"
NOW_MS = 1_800_000_000_000
WINDOW_MS = 300_000


class FixedClock:
    def __init__(self, now_ms: int = NOW_MS) -> None:
        self.now = now_ms

    def now_ms(self) -> int:
        return self.now


def verifier(clock: FixedClock) -> Verifier:
    return Verifier({"bank_a": SECRET, "bank_b": SecretStr("another secret of theirs")}, clock, WINDOW_MS)


def refusal(bank: str, target: str, headers: dict[str, str], body: bytes, clock: FixedClock) -> str:
    with pytest.raises(SignatureError) as refused:
        verifier(clock).verify(bank, target, headers, body)
    return refused.value.code


def test_signature_of_known_message_is_the_documented_value() -> None:
    # Made with: printf '1800000000000\n00112233445566778899aabbccddeeff\nPOST /notifications/bank_a\n{}' |
    #            openssl dgst -sha256 -hmac 'a secret for these tests'
    expected = "bfb529b59d42a168ae8628321f9f70a248c98e8d596458bda73477ae489099a2"
    assert signature(SECRET, "1800000000000", "00112233445566778899aabbccddeeff", TARGET, b"{}") == expected


def test_verify_signed_message_passes() -> None:
    clock = FixedClock()
    verifier(clock).verify("bank_a", TARGET, sign(SECRET, TARGET, b"{}", NOW_MS), b"{}")


@pytest.mark.parametrize(
    ("bank", "target", "body", "change", "code"),
    [
        ("bank_a", TARGET, b'{"amount_minor":1}', {}, "SIGNATURE_WRONG"),
        ("bank_a", "POST /notifications/bank_b", b"{}", {}, "SIGNATURE_WRONG"),
        ("bank_a", "GET /notifications/bank_a", b"{}", {}, "SIGNATURE_WRONG"),
        ("bank_b", TARGET, b"{}", {}, "SIGNATURE_WRONG"),
        ("bank_z", TARGET, b"{}", {}, "UNKNOWN_BANK"),
        ("bank_a", TARGET, b"{}", {"Simbank-Signature": ""}, "SIGNATURE_WRONG"),
        ("bank_a", TARGET, b"{}", {"Simbank-Signature": "é" * 64}, "SIGNATURE_WRONG"),
        ("bank_a", TARGET, b"{}", {"Simbank-Nonce": "0" * 32}, "SIGNATURE_WRONG"),
        ("bank_a", TARGET, b"{}", {"Simbank-Nonce": "short"}, "SIGNATURE_MISSING"),
        ("bank_a", TARGET, b"{}", {"Simbank-Nonce": "0" * 65}, "SIGNATURE_MISSING"),
        ("bank_a", TARGET, b"{}", {"Simbank-Nonce": "0" * 31 + "\n"}, "SIGNATURE_MISSING"),
        ("bank_a", TARGET, b"{}", {"Simbank-Timestamp": str(NOW_MS + 1)}, "SIGNATURE_WRONG"),
        ("bank_a", TARGET, b"{}", {"Simbank-Timestamp": ""}, "SIGNATURE_MISSING"),
        ("bank_a", TARGET, b"{}", {"Simbank-Timestamp": "１８００"}, "SIGNATURE_MISSING"),
        ("bank_a", TARGET, b"{}", {"Simbank-Timestamp": "9" * 16}, "SIGNATURE_MISSING"),
    ],
)
def test_verify_changed_message_is_refused(
    bank: str, target: str, body: bytes, change: dict[str, str], code: str
) -> None:
    headers = sign(SECRET, TARGET, b"{}", NOW_MS) | change
    assert refusal(bank, target, headers, body, FixedClock()) == code


@pytest.mark.parametrize(
    ("age_ms", "code"),
    [(WINDOW_MS, ""), (WINDOW_MS + 1, "SIGNATURE_EXPIRED"), (-WINDOW_MS, ""), (-WINDOW_MS - 1, "SIGNATURE_EXPIRED")],
)
def test_verify_timestamp_at_the_edge_of_the_window_decides(age_ms: int, code: str) -> None:
    headers, clock = sign(SECRET, TARGET, b"{}", NOW_MS - age_ms), FixedClock()
    if code:
        assert refusal("bank_a", TARGET, headers, b"{}", clock) == code
    else:
        verifier(clock).verify("bank_a", TARGET, headers, b"{}")


@pytest.mark.parametrize("early_ms", [0, WINDOW_MS])
def test_verify_nonce_seen_before_is_refused_for_as_long_as_its_timestamp_would_pass(early_ms: int) -> None:
    clock = FixedClock()
    checker, headers = verifier(clock), sign(SECRET, TARGET, b"{}", NOW_MS + early_ms)
    checker.verify("bank_a", TARGET, headers, b"{}")
    clock.now = NOW_MS + early_ms + WINDOW_MS
    checker.verify("bank_a", TARGET, sign(SECRET, TARGET, b"{}", clock.now), b"{}")
    with pytest.raises(SignatureError, match="SIGNATURE_REPLAYED"):
        checker.verify("bank_a", TARGET, headers, b"{}")


def test_verify_forgotten_nonces_leave_the_memory() -> None:
    clock = FixedClock()
    checker = verifier(clock)
    for _ in range(50):
        checker.verify("bank_a", TARGET, sign(SECRET, TARGET, b"{}", clock.now), b"{}")
    clock.now += 2 * WINDOW_MS + 1
    checker.verify("bank_a", TARGET, sign(SECRET, TARGET, b"{}", clock.now), b"{}")
    assert len(checker._seen) == 1


def test_verify_forged_message_does_not_use_up_the_nonce() -> None:
    clock = FixedClock()
    checker, headers = verifier(clock), sign(SECRET, TARGET, b"{}", NOW_MS)
    with pytest.raises(SignatureError, match="SIGNATURE_WRONG"):
        checker.verify("bank_a", TARGET, headers, b"forged")
    checker.verify("bank_a", TARGET, headers, b"{}")
