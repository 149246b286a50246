"""For whoever drives the simulation: books to read, faults to plant, notifications to hold and send.

Not signed: the process listens on loopback only. A body must be declared as JSON, so that a page in a browser on
the same machine cannot send one unasked.
"""

from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paycore.simbank.bank import ConflictError
from paycore.simbank.faults import FaultError, parse
from paycore.simbank.office import office_of
from paycore.simbank.requests import FaultsRequest, HoldRequest, ReleaseRequest, ResendRequest, ReturnRequest
from paycore.simbank.sender import Sent
from paycore.simbank.web import ApiError, limited_body, parsed

MAX_PAGE = 1_000

Body = TypeVar("Body", bound=BaseModel)


async def read_books(request: Request) -> Response:
    """GET /books[?bank=…][&order_no=… …], or a page of one bank's in the order of their numbers: &limit=…[&after=…]."""
    office, query = office_of(request), request.query_params
    bank, order_nos = query.get("bank"), query.getlist("order_no")
    banks = office.banks if bank is None else (office.known(bank),)
    if "limit" in query:
        limit = query["limit"]
        if bank is None or not (
            limit.isascii() and limit.isdecimal() and len(limit) < 5 and 0 < int(limit) <= MAX_PAGE
        ):
            raise ApiError(400, "INVALID_REQUEST", f"limit: 1 to {MAX_PAGE}, of one bank")
        return JSONResponse(await office.desk.do(office.bank.books_page, bank, query.get("after", ""), int(limit)))
    return JSONResponse(await office.desk.do(office.bank.books, banks, order_nos or None))


async def plant_faults(request: Request) -> Response:
    """PUT /faults."""
    office, asked = office_of(request), await _asked(request, FaultsRequest)
    bank, match = office.known(asked.bank), asked.match
    if sum(given is not None for given in (match.order_no, match.subject, match.everything)) != 1:
        raise ApiError(400, "INVALID_REQUEST", "match: exactly one of order_no, subject and everything")
    try:
        faults = parse(asked.faults)
    except FaultError as error:
        raise ApiError(400, "INVALID_REQUEST", str(error)) from None

    def plant() -> None:
        with office.disk.transaction():
            office.disk.plant(bank, match.order_no, match.subject, faults)

    await office.desk.do(plant)
    return JSONResponse({"planted": [fault.name for fault in faults]})


async def list_faults(request: Request) -> Response:
    """GET /faults?bank=…."""
    office = office_of(request)
    bank = office.known(request.query_params.get("bank", ""))
    planted = await office.desk.do(office.disk.planted, bank)
    return JSONResponse({"faults": [one._asdict() for one in planted]})


async def count_requests(request: Request) -> Response:
    """GET /requests."""
    office = office_of(request)
    asked = {bank: {what: count for (of, what), count in office.asked.items() if of == bank} for bank in office.banks}
    return JSONResponse({"banks": asked})


async def return_capture(request: Request) -> Response:
    """POST /returns."""
    office, asked = office_of(request), await _asked(request, ReturnRequest)
    bank = office.known(asked.bank)
    try:
        returned = await office.desk.do(office.bank.return_capture, bank, asked.order_no, asked.trade_no)
    except ConflictError as error:
        raise ApiError(409, "CONFLICT", str(error)) from None
    return JSONResponse(returned)


async def hold(request: Request) -> Response:
    """POST /notifications/hold."""
    office, asked = office_of(request), await _asked(request, HoldRequest)
    await office.sender.hold(office.known(asked.bank))
    return JSONResponse({"held": asked.bank})


async def release(request: Request) -> Response:
    """POST /notifications/release: answered when all that is released was sent once."""
    office, asked = office_of(request), await _asked(request, ReleaseRequest)
    sent = await office.sender.release(office.known(asked.bank), asked.order_no, asked.notification_ids)
    return _sent_answer(sent)


async def resend(request: Request) -> Response:
    """POST /notifications/resend: answered when all was sent."""
    office, asked = office_of(request), await _asked(request, ResendRequest)
    sent = await office.sender.resend(office.known(asked.bank), asked.order_no, asked.trade_no, asked.times)
    return _sent_answer(sent)


def _sent_answer(sent: list[Sent]) -> Response:
    return JSONResponse({"sent": [{**one._asdict(), "acknowledged": one.acknowledged} for one in sent]})


async def _asked(request: Request, model: type[Body]) -> Body:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "NOT_JSON", "Content-Type: must be application/json")
    return parsed(model, await limited_body(request))


ROUTES = [
    Route("/books", read_books, methods=["GET"]),
    Route("/faults", plant_faults, methods=["PUT"]),
    Route("/faults", list_faults, methods=["GET"]),
    Route("/requests", count_requests, methods=["GET"]),
    Route("/returns", return_capture, methods=["POST"]),
    Route("/notifications/hold", hold, methods=["POST"]),
    Route("/notifications/release", release, methods=["POST"]),
    Route("/notifications/resend", resend, methods=["POST"]),
]
