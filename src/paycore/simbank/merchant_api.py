"""The bank's API for merchants: signed JSON requests, each idempotent on the merchant's number.

A business answer is a 200 with a ``result`` or ``state``; a number that is not known is a 404 with the code
NOT_EXIST. Every other status says nothing about money.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paycore.failpoint import failpoint
from paycore.simbank.bank import ConflictError, Json
from paycore.simbank.faults import Behaviour
from paycore.simbank.office import Office, office_of
from paycore.simbank.requests import OrderRequest, RefundRequest
from paycore.simbank.signing import SignatureError
from paycore.simbank.web import ApiError, limited_body, parsed, target_of

logger = structlog.get_logger("simbank")

_HANG_TICK_SECONDS = 0.05
_NO_ANSWER = Response(status_code=503)


async def create_order(request: Request) -> Response:
    """POST /banks/{bank}/orders."""
    office, bank, body = await _signed(request)
    asked = parsed(OrderRequest, body)

    async def do() -> Json:
        return await office.desk.do(office.bank.create, bank, asked)

    return await _perform(request, "create", asked.order_no, asked.subject, do)


async def query_order(request: Request) -> Response:
    """GET /banks/{bank}/orders/{order_no}."""
    office, bank, _ = await _signed(request)
    order_no = request.path_params["order_no"]

    async def do() -> Json | None:
        return await office.desk.do(office.bank.query, bank, order_no)

    return await _perform(request, "query", order_no, None, do)


async def close_order(request: Request) -> Response:
    """POST /banks/{bank}/orders/{order_no}/close."""
    office, bank, _ = await _signed(request)
    order_no = request.path_params["order_no"]

    async def do() -> Json | None:
        return await office.desk.do(office.bank.close, bank, order_no)

    return await _perform(request, "close", order_no, None, do)


async def create_refund(request: Request) -> Response:
    """POST /banks/{bank}/refunds."""
    office, bank, body = await _signed(request)
    asked = parsed(RefundRequest, body)

    async def do() -> Json:
        return await office.desk.do(office.bank.refund, bank, asked)

    return await _perform(request, "refund", asked.order_no, None, do)


async def query_refund(request: Request) -> Response:
    """GET /banks/{bank}/refunds/{refund_no}[?order_no=…&trade_no=…]."""
    office, bank, _ = await _signed(request)
    refund_no = request.path_params["refund_no"]
    order_no, trade_no = request.query_params.get("order_no", ""), request.query_params.get("trade_no", "")

    async def do() -> Json | None:
        return await office.desk.do(office.bank.query_refund, bank, refund_no, order_no, trade_no)

    if not order_no:
        refund = await office.desk.do(office.bank.query_refund, bank, refund_no)
        order_no = str(refund["order_no"]) if refund else ""
    return await _perform(request, "query_refund", order_no, None, do)


async def _signed(request: Request) -> tuple[Office, str, bytes]:
    """Return office, bank and body of a request that is proven to come from the bank's merchant."""
    office = office_of(request)
    bank = office.known(request.path_params["bank"])
    body = await limited_body(request)
    try:
        office.verifier.verify(bank, target_of(request), request.headers, body)
    except SignatureError as error:
        logger.warning("request_refused", bank=bank, code=error.code)
        raise ApiError(401, error.code, "the request's signature was not accepted") from None
    return office, bank, body


async def _perform(
    request: Request,
    operation: str,
    order_no: str,
    subject: str | None,
    do: Callable[[], Awaitable[Json | None]],
) -> Response:
    """Do one operation as the faults of its order have it."""
    office, bank = office_of(request), request.path_params["bank"]
    office.asked[bank, operation] += 1
    before = await office.desk.do(office.bank.before, operation, bank, order_no, subject)
    if before.hang or before.error:
        return await _misbehave(request, before)
    try:
        answer = await do()
    except ConflictError as error:
        raise ApiError(409, "CONFLICT", str(error)) from None
    office.sender.wake()
    failpoint(f"simbank.{operation}.done")
    after = await office.desk.do(office.bank.after, operation, bank, order_no, subject)
    if after.hang or after.error:
        return await _misbehave(request, after)
    await asyncio.sleep(after.delay_ms / 1000)
    if after.nonsense:
        return nonsense(after.nonsense, answer or {})
    if answer is None:
        number = request.path_params.get("order_no") or request.path_params["refund_no"]
        raise ApiError(404, "NOT_EXIST", "no such number at this bank", number=number)
    return JSONResponse(answer)


async def _misbehave(request: Request, behaviour: Behaviour) -> Response:
    if behaviour.error:
        raise ApiError(500, "INTERNAL", "a fault that was planted")
    office = office_of(request)
    # Both are flags without an event: uvicorn's that it stops, and the connection's that the client is gone.
    while not (office.stopping() or await request.is_disconnected()):  # noqa: ASYNC110
        await asyncio.sleep(_HANG_TICK_SECONDS)
    return _NO_ANSWER


def nonsense(kind: str, answer: Mapping[str, object]) -> Response:
    """Return an answer with status 200 that no careful reader believes, made from the true one."""
    if kind == "broken_json":
        return Response('{"result": "PAID", "captu', media_type="application/json")
    if kind == "html":
        return Response("<html><body>Welcome back!</body></html>", media_type="text/html")
    if kind == "empty":
        return Response(b"", media_type="application/json")
    if kind == "wrong_types":
        return JSONResponse({key: [value] for key, value in answer.items()})
    if kind == "missing_fields":
        return JSONResponse({})
    if kind == "wrong_number":
        return JSONResponse({**answer, "order_no": "000000", "refund_no": "000000"})
    return JSONResponse({**answer, "result": "PERHAPS", "state": "PERHAPS"})


ROUTES = [
    Route("/banks/{bank}/orders", create_order, methods=["POST"]),
    Route("/banks/{bank}/orders/{order_no}", query_order, methods=["GET"]),
    Route("/banks/{bank}/orders/{order_no}/close", close_order, methods=["POST"]),
    Route("/banks/{bank}/refunds", create_refund, methods=["POST"]),
    Route("/banks/{bank}/refunds/{refund_no}", query_refund, methods=["GET"]),
]
