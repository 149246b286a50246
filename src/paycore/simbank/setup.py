"""Reads how the simulator is set up, as it stands in flags and the environment."""

import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import SecretStr, TypeAdapter, ValidationError

from paycore.simbank.requests import BankName

MIN_SECRET_CHARACTERS = 16

Secrets = Mapping[str, SecretStr]
"""Bank to secret."""

_BANK_NAME = TypeAdapter(BankName)


class SetupError(ValueError):
    """A setting that cannot be used. The message is one line that names the rule and repeats no secret."""


def read_secrets(text: str) -> dict[str, SecretStr]:
    """Read the banks and their secrets from a JSON object. Raises SetupError."""
    try:
        given = json.loads(text or "{}")
    except ValueError:
        raise SetupError("must be a JSON object of bank names and secrets") from None
    if not (isinstance(given, dict) and given):
        raise SetupError('must name each bank with its secret, for example {"bank_a": "…"}')
    _check_secrets(given)
    return {bank: SecretStr(secret) for bank, secret in given.items()}


def _check_secrets(given: Mapping[str, object]) -> None:
    for bank, secret in given.items():
        try:
            _BANK_NAME.validate_python(bank)
        except ValidationError:
            raise SetupError(f"{bank!r} is no bank name: a-z, then a-z, 0-9 or _, at most 32") from None
        if not (isinstance(secret, str) and secret.isascii() and len(secret) >= MIN_SECRET_CHARACTERS):
            raise SetupError(f"the secret of {bank} must be at least {MIN_SECRET_CHARACTERS} ASCII characters")


def read_ladder(text: str) -> tuple[int, ...]:
    """Read delays in milliseconds separated by commas. Raises SetupError."""
    delays = [part.strip() for part in text.split(",")]
    if not all(delay.isascii() and delay.isdecimal() and len(delay) <= 9 for delay in delays):
        raise SetupError("must be whole milliseconds separated by commas, for example 200,500,1000")
    return tuple(int(delay) for delay in delays)


def read_web_url(text: str) -> str:
    """Check an http or https address. Raises SetupError."""
    try:
        parts = urlsplit(text)
        # Reading the port is what checks it.
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or not text.isprintable() or " " in text:
        raise SetupError(
            "must be an http or https URL without a query, for example http://127.0.0.1:8082/notifications"
        )
    return text.rstrip("/")
