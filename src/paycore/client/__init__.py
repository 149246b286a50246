"""What a caller of paycore imports: the clients, their errors, and in ``paycore.client.aio`` the asyncio twins.

``PaycoreClient`` makes one call a method; ``BatchingNotifier`` gathers notifications into few large calls. None of it
needs server code: only gRPC and the generated messages of ``paycore.v1``.
"""

from paycore.client.answers import WordAnswer
from paycore.client.batching import BatchingNotifier
from paycore.client.errors import PaycoreRpcError, Violation
from paycore.client.gathering import BatchLimits
from paycore.client.requests import notify_request
from paycore.client.retrying import NO_RETRY, RetryPolicy
from paycore.client.sync import PaycoreClient

__all__ = [
    "NO_RETRY",
    "BatchLimits",
    "BatchingNotifier",
    "PaycoreClient",
    "PaycoreRpcError",
    "RetryPolicy",
    "Violation",
    "WordAnswer",
    "notify_request",
]
