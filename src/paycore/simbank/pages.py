"""The bank's page, where the user pays. The same address takes a driver's payment as JSON.

The way back to the merchant proves nothing and says nothing: only the notification or a query decides.
"""

import time
from http import HTTPStatus

import segno
from jinja2 import Environment, PackageLoader
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from paycore.failpoint import failpoint
from paycore.simbank.amounts import in_major_units
from paycore.simbank.bank import Paid, capture_json
from paycore.simbank.books import Order, OrderState
from paycore.simbank.faults import Fault, FaultError, parse
from paycore.simbank.office import office_of
from paycore.simbank.requests import UserPayment
from paycore.simbank.web import ApiError, limited_body, parsed

_TEMPLATES = Environment(loader=PackageLoader("paycore.simbank"), autoescape=True)
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_WORDS = {
    "ALREADY_PAID": "This order is paid. No money was taken again.",
    "CLOSED": "This order was closed by the merchant. No money was taken.",
    "EXPIRED": "The time to pay this order is over. No money was taken.",
    "FAILED": "This order was refused. No money was taken.",
    "IN_PROGRESS": "The bank is working on this order.",
}


async def show(request: Request) -> Response:
    """GET /banks/{bank}/pay/{order_no}."""
    office = office_of(request)
    bank, order_no = office.known(request.path_params["bank"]), request.path_params["order_no"]
    order = await office.desk.do(office.bank.order, bank, order_no)
    if order is None:
        return _result(bank, None, "The bank knows no such order.", HTTPStatus.NOT_FOUND)
    if order.state is OrderState.PAID:
        return _result(bank, order, _WORDS["ALREADY_PAID"], HTTPStatus.OK)
    return _page("pay.html", HTTPStatus.OK, bank=bank, order=order, qr=_qr(order, office.bank.page_url(bank, order_no)))


async def pay(request: Request) -> Response:
    """POST /banks/{bank}/pay/{order_no}: the user presses the button, or a driver does."""
    office = office_of(request)
    bank, order_no = office.known(request.path_params["bank"]), request.path_params["order_no"]
    wants_json = "application/json" in request.headers.get("accept", "")
    once = await _once(request) if wants_json else []
    paid = await office.desk.do(office.bank.pay, bank, order_no, once)
    office.sender.wake()
    failpoint("simbank.pay.done")
    if wants_json:
        return _json_answer(paid)
    return _page_answer(bank, paid)


async def _once(request: Request) -> list[Fault]:
    body = await limited_body(request)
    try:
        return parse(parsed(UserPayment, body or b"{}").faults)
    except FaultError as error:
        raise ApiError(400, "INVALID_REQUEST", str(error)) from None


def _json_answer(paid: Paid | None) -> Response:
    if paid is None:
        raise ApiError(404, "NOT_EXIST", "no such order at this bank")
    answer = {
        "order_no": paid.order.order_no,
        "result": "REFUSED" if paid.code else "PAID",
        "code": paid.code,
        "captures": [capture_json(one) for one in paid.captures],
    }
    return JSONResponse(answer, HTTPStatus.CONFLICT if paid.code else HTTPStatus.OK)


def _page_answer(bank: str, paid: Paid | None) -> Response:
    if paid is None:
        return _result(bank, None, "The bank knows no such order.", HTTPStatus.NOT_FOUND)
    if paid.code:
        return _result(bank, paid.order, _WORDS[paid.code], HTTPStatus.CONFLICT)
    if paid.order.return_url:
        return RedirectResponse(paid.order.return_url, HTTPStatus.SEE_OTHER, headers=_HEADERS)
    return _result(bank, paid.order, "Paid. Thank you.", HTTPStatus.OK)


def _result(bank: str, order: Order | None, words: str, status: HTTPStatus) -> Response:
    return _page("result.html", status, bank=bank, order=order, words=words)


def _page(template: str, status: HTTPStatus, **values: object) -> Response:
    bank = str(values["bank"]).replace("_", " ").title()
    page = _TEMPLATES.get_template(template).render(values, bank_title=bank, major=in_major_units, utc=_utc)
    return HTMLResponse(page, status, headers=_HEADERS)


def _utc(instant_ms: int) -> str:
    """Write an instant for people. An instant that no calendar reaches is written as its number."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(instant_ms // 1000))
    except (OverflowError, ValueError, OSError):
        return f"{instant_ms} ms"


def _qr(order: Order, url: str) -> str | None:
    """Draw the page's own address, as SVG markup, for the orders that are paid by scanning."""
    if order.method != "qr":
        return None
    return segno.make(url, error="m").svg_inline(omitsize=True)


ROUTES = [
    Route("/banks/{bank}/pay/{order_no}", show, methods=["GET"]),
    Route("/banks/{bank}/pay/{order_no}", pay, methods=["POST"]),
]
