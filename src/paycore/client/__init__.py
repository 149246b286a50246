"""What a caller of paycore imports: ``PaycoreClient``, its errors, and in ``paycore.client.aio`` the asyncio twin.

It needs no server code: only gRPC and the generated messages of ``paycore.v1``.
"""

from paycore.client.errors import PaycoreRpcError, Violation
from paycore.client.sync import PaycoreClient

__all__ = ["PaycoreClient", "PaycoreRpcError", "Violation"]
