"""Everything that paycore refuses or fails to do, as one tree.

    PaycoreError
    +-- InvalidArgumentError     a field breaks a rule; never written
    +-- NotFoundError            no such payment
    +-- AlreadyExistsError       the same number with other terms
    +-- PreconditionError        the payment's state does not allow it
    +-- ThrottledError           too much is waiting; send again later
    +-- StoreUnavailableError    the database cannot be written now; nothing was kept
    +-- ChannelUnavailableError  the channel gave no answer that can be used

``reason`` is UPPER_SNAKE and stable: callers may branch on it. ``retryable`` says whether the same call
can succeed later without anybody changing something.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class FieldViolation(NamedTuple):
    """Which field breaks which rule."""

    field: str
    rule: str


class PaycoreError(Exception):
    """Base of the tree. ``metadata`` holds texts that may be shown to the caller, never secrets."""

    retryable = False

    def __init__(self, reason: str, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = metadata or {}


class InvalidArgumentError(PaycoreError):
    """At least one field breaks a rule; every violation found is named."""

    def __init__(self, violations: Sequence[FieldViolation], reason: str = "INVALID_ARGUMENT") -> None:
        super().__init__(reason, "; ".join(f"{field}: {rule}" for field, rule in violations))
        self.violations = tuple(violations)


class NotFoundError(PaycoreError):
    """No such payment."""


class AlreadyExistsError(PaycoreError):
    """The merchant order exists with other terms; ``fields`` names those that differ."""

    def __init__(self, fields: Sequence[str]) -> None:
        named = ", ".join(fields)
        super().__init__(
            "TERMS_DIFFER",
            f"this merchant order exists with other terms: {named}",
            metadata={"fields": named},
        )
        self.fields = tuple(fields)


class PreconditionError(PaycoreError):
    """The payment's state does not allow the call. Retryable where the state may move on by itself."""

    def __init__(
        self, reason: str, message: str, *, retryable: bool = False, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(reason, message, metadata=metadata)
        self.retryable = retryable


class ThrottledError(PaycoreError):
    """Too much is waiting; nothing was taken in."""

    retryable = True


class StoreUnavailableError(PaycoreError):
    """The database cannot be read or written now; nothing was kept."""

    retryable = True


class ChannelUnavailableError(PaycoreError):
    """The channel gave no answer that can be used; what it did is unknown."""

    retryable = True
