"""The bank's signature on requests and notifications: HMAC-SHA256 with one secret for each bank.

What is signed is ``timestamp_ms \\n nonce \\n METHOD path \\n body``, with the path as it stands in the request line.
It travels in the headers ``Simbank-Timestamp``, ``Simbank-Nonce`` and ``Simbank-Signature`` (hexadecimal).
A verifier accepts a timestamp within its window, and each nonce once.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping

from pydantic import SecretStr

from paycore.simbank.clock import Clock

TIMESTAMP_HEADER = "Simbank-Timestamp"
NONCE_HEADER = "Simbank-Nonce"
SIGNATURE_HEADER = "Simbank-Signature"
DEFAULT_WINDOW_MS = 300_000

_TIMESTAMP = re.compile(r"[0-9]{1,15}", re.ASCII)
_NONCE = re.compile(r"[0-9A-Za-z]{16,64}", re.ASCII)


class SignatureError(Exception):
    """A message that is not proven to come from who it says. ``code`` is a word for the answer; it tells no secret."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def signature(secret: SecretStr, timestamp: str, nonce: str, target: str, body: bytes) -> str:
    """Return the signature in hexadecimal. ``target``: method, one space, path."""
    message = f"{timestamp}\n{nonce}\n{target}\n".encode() + body
    return hmac.new(secret.get_secret_value().encode(), message, hashlib.sha256).hexdigest()


def sign(secret: SecretStr, target: str, body: bytes, now_ms: int) -> dict[str, str]:
    """Return the three headers for one message, with a fresh nonce."""
    timestamp, nonce = str(now_ms), secrets.token_hex(16)
    return {
        TIMESTAMP_HEADER: timestamp,
        NONCE_HEADER: nonce,
        SIGNATURE_HEADER: signature(secret, timestamp, nonce, target, body),
    }


class Verifier:
    """Checks signatures against the secret of each bank and refuses what it has seen.

    Nonces are remembered in memory for twice the window, which outlasts every timestamp that would still be
    accepted. A restart forgets them: until the window has passed, what follows must bear a repetition, and both the
    bank's operations and paycore's Notify do. Not safe for several threads: each server uses one from its event loop.
    """

    def __init__(self, secrets_by_bank: Mapping[str, SecretStr], clock: Clock, window_ms: int) -> None:
        self._secrets = dict(secrets_by_bank)
        self._clock = clock
        self._window_ms = window_ms
        self._seen: dict[tuple[str, str], int] = {}

    def verify(self, bank: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        """Return when the message is the bank's, fresh and new. Raises SignatureError.

        ``headers``: looked up by the names above; a mapping that ignores case, or one in lower case, will do.
        """
        timestamp, nonce, given = (
            headers.get(name, headers.get(name.lower(), ""))
            for name in (TIMESTAMP_HEADER, NONCE_HEADER, SIGNATURE_HEADER)
        )
        secret = self._secrets.get(bank)
        if secret is None:
            raise SignatureError("UNKNOWN_BANK")
        if not (_TIMESTAMP.fullmatch(timestamp) and _NONCE.fullmatch(nonce)):
            raise SignatureError("SIGNATURE_MISSING")
        expected = signature(secret, timestamp, nonce, target, body)
        if not hmac.compare_digest(expected.encode(), given.encode()):
            raise SignatureError("SIGNATURE_WRONG")
        now_ms = self._clock.now_ms()
        if abs(now_ms - int(timestamp)) > self._window_ms:
            raise SignatureError("SIGNATURE_EXPIRED")
        self._remember(bank, nonce, now_ms)

    def _remember(self, bank: str, nonce: str, now_ms: int) -> None:
        # Only signed messages get here, so a stranger cannot fill the memory.
        while self._seen and (oldest := next(iter(self._seen.items())))[1] < now_ms:
            del self._seen[oldest[0]]
        if (bank, nonce) in self._seen:
            raise SignatureError("SIGNATURE_REPLAYED")
        self._seen[bank, nonce] = now_ms + 2 * self._window_ms
