"""The bank's operations: each reads and writes the books in one transaction and returns the answer as JSON.

Nothing is answered before it is on disk. Called from one thread at a time (``desk.Desk``).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paycore.simbank import books
from paycore.simbank.books import Capture, Order, OrderState, Refund, RefundState
from paycore.simbank.clock import Clock
from paycore.simbank.disk import Disk, Notification
from paycore.simbank.faults import Behaviour, Fault, FaultBox, after_doing, before_doing
from paycore.simbank.requests import OrderRequest, RefundRequest

Json = dict[str, object]


class ConflictError(Exception):
    """A number came again with other content. The message names the fields that differ."""


class Paid(NamedTuple):
    """What a user's payment came to. code: why no money was taken, or ""."""

    order: Order
    code: str
    captures: Sequence[Capture]


class Bank:
    """Several banks over one set of books. Methods raise sqlite3.Error when nothing could be written."""

    def __init__(self, disk: Disk, clock: Clock, base_url: str) -> None:
        self._disk = disk
        self._clock = clock
        self._base_url = base_url

    # Behaviour of an operation, apart from what it does

    def before(self, operation: str, bank: str, order_no: str, subject: str | None) -> Behaviour:
        """Return what keeps the operation from being done."""
        with self._disk.transaction():
            box = self._disk.fault_box(bank, order_no, self._subject(bank, order_no, subject))
            behaviour = before_doing(box, operation)
            self._disk.count_down(box)
        return behaviour

    def after(self, operation: str, bank: str, order_no: str, subject: str | None) -> Behaviour:
        """Return how the operation, now done, is answered."""
        with self._disk.transaction():
            box = self._disk.fault_box(bank, order_no, self._subject(bank, order_no, subject))
            behaviour = after_doing(box, operation)
            self._disk.count_down(box)
        return behaviour

    def _subject(self, bank: str, order_no: str, subject: str | None) -> str | None:
        order = None if subject is not None else self._disk.order(bank, order_no)
        return order.subject if order else subject

    # The merchant's operations

    def create(self, bank: str, asked: OrderRequest) -> Json:
        """Open an order, or charge at once. Raises ConflictError."""
        with self._disk.transaction():
            order = self._disk.order(bank, asked.order_no)
            if order is None:
                order = self._open(bank, asked)
            elif differing := books.differing_terms(order, asked, books.ORDER_TERMS):
                raise ConflictError(f"order {asked.order_no} is on record with other terms: {', '.join(differing)}")
            captures = self._disk.captures(bank, asked.order_no)
        return self._create_answer(order, captures)

    def _open(self, bank: str, asked: OrderRequest) -> Order:
        now_ms = self._clock.now_ms()
        box = self._disk.fault_box(bank, asked.order_no, asked.subject)
        order = books.open_order(bank, asked, now_ms, box)
        self._disk.put_order(order)
        if order.method == "charge" and order.state is OrderState.NOT_PAID:
            order = self._take(order, 1, now_ms, box).order
        self._disk.count_down(box)
        return order

    def _take(self, order: Order, times: int, now_ms: int, box: FaultBox) -> Paid:
        paid_at_ms = box.take_int("paid_at_ms")
        taken = order._replace(amount_minor=box.take_int("captured_amount_minor") or order.amount_minor)
        captures = [self._disk.add_capture(taken, now_ms if paid_at_ms is None else paid_at_ms) for _ in range(times)]
        order = order._replace(state=OrderState.PAID, code="", settle_at_ms=None, settle_succeeds=None)
        self._disk.put_order(order)
        notices = books.success_notices(captures, now_ms, box)
        self._disk.add_notifications(order.bank, order.order_no, notices)
        return Paid(order, "", captures)

    def _create_answer(self, order: Order, captures: Sequence[Capture]) -> Json:
        page = self.page_url(order.bank, order.order_no)
        answer: Json = {"order_no": order.order_no, "pay_url": "", "qr_text": "", "capture": None, "code": order.code}
        if order.state is OrderState.FAILED:
            answer["result"] = "REFUSED"
        elif order.method != "charge":
            answer |= {"result": "OPEN", "pay_url" if order.method == "redirect" else "qr_text": page}
        elif captures:
            answer |= {"result": "PAID", "capture": capture_json(captures[0])}
        else:
            answer["result"] = "ACCEPTED"
        return answer

    def page_url(self, bank: str, order_no: str) -> str:
        """Return where the user pays an order."""
        return f"{self._base_url}/banks/{bank}/pay/{order_no}"

    def query(self, bank: str, order_no: str) -> Json | None:
        """Tell how an order stands; None when it does not exist."""
        with self._disk.transaction():
            order, captures = self._disk.order(bank, order_no), self._disk.captures(bank, order_no)
        if order is None:
            return None
        return {
            "order_no": order_no,
            "state": order.state,
            "code": order.code,
            "captures": [capture_json(one) for one in captures],
        }

    def close(self, bank: str, order_no: str) -> Json | None:
        """Close an order; None when it does not exist. The fault ``refuse`` makes the bank say that it is at it."""
        with self._disk.transaction():
            order = self._disk.order(bank, order_no)
            if order is None:
                return None
            box = self._disk.fault_box(bank, order_no, order.subject)
            refused = box.take("refuse.close")
            self._disk.count_down(box)
            if not refused and order.state is OrderState.NOT_PAID:
                self._disk.put_order(order._replace(state=OrderState.CLOSED))
        return {"order_no": order_no, "result": "IN_PROGRESS" if refused else books.close_answer(order.state)}

    def refund(self, bank: str, asked: RefundRequest) -> Json:
        """Send money back, once for each number. Raises ConflictError."""
        with self._disk.transaction():
            refund = self._disk.refund(bank, asked.refund_no)
            if refund is None:
                refund = self._open_refund(bank, asked)
            elif differing := books.differing_terms(refund, asked, books.REFUND_TERMS):
                raise ConflictError(f"refund {asked.refund_no} is on record with other terms: {', '.join(differing)}")
        return refund_json(refund)

    def _open_refund(self, bank: str, asked: RefundRequest) -> Refund:
        order = self._disk.order(bank, asked.order_no)
        box = self._disk.fault_box(bank, asked.order_no, order.subject if order else None)
        captures, refunds = self._disk.captures(bank, asked.order_no), self._disk.refunds(bank, asked.order_no)
        refund = books.open_refund(bank, asked, captures, refunds, self._clock.now_ms(), box)
        self._disk.put_refund(refund)
        self._disk.count_down(box)
        return refund

    def query_refund(self, bank: str, refund_no: str, order_no: str = "", trade_no: str = "") -> Json | None:
        """Tell how a refund stands; None when it does not exist.

        order_no and trade_no: the capture that it is about. Where no refund of this number moved money and the bank
        sent that capture back by itself, the answer is RETURNED.
        """
        with self._disk.transaction():
            refund = self._disk.refund(bank, refund_no)
            if refund is None or refund.state in books.UNMOVED:
                of_order = self._disk.refunds(bank, order_no) if trade_no else []
                returned = [one for one in of_order if (one.trade_no, one.state) == (trade_no, RefundState.RETURNED)]
                refund = returned[0]._replace(refund_no=refund_no) if returned else refund
        return refund_json(refund) if refund else None

    def return_capture(self, bank: str, order_no: str, trade_no: str) -> Json:
        """Send a capture back without being asked, as a card network does. Raises ConflictError."""
        with self._disk.transaction():
            captures, refunds = self._disk.captures(bank, order_no), self._disk.refunds(bank, order_no)
            capture = next((one for one in captures if one.trade_no == trade_no), None)
            if capture is None:
                raise ConflictError(f"order {order_no} has no capture {trade_no}")
            if books.reserved_minor(trade_no, refunds):
                raise ConflictError(f"capture {trade_no} went back, or is about to")
            returned = books.return_of(capture, self._clock.now_ms())
            self._disk.put_refund(returned)
        return refund_json(returned)

    # The user

    def order(self, bank: str, order_no: str) -> Order | None:
        """Return an order for its page."""
        with self._disk.transaction():
            return self._disk.order(bank, order_no)

    def pay(self, bank: str, order_no: str, once: Iterable[Fault] = ()) -> Paid | None:
        """Take the user's money; None when there is no such order. ``once``: faults for this payment only."""
        now_ms = self._clock.now_ms()
        with self._disk.transaction():
            order = self._disk.order(bank, order_no)
            if order is None:
                return None
            box = self._disk.fault_box(bank, order_no, order.subject, once)
            code = books.why_not_payable(order, now_ms, box)
            if code:
                return Paid(order, code, self._disk.captures(bank, order_no))
            paid = self._take(order, 2 if box.take("pay_twice_on_page") else 1, now_ms, box)
            self._disk.count_down(box)
        return paid

    # What time brings

    def settle_due(self, now_ms: int) -> None:
        """Bring accepted charges and refunds whose time has come to their end."""
        with self._disk.transaction():
            orders, refunds = self._disk.orders_to_settle(now_ms), self._disk.refunds_to_settle(now_ms)
            for order in orders:
                self._settle_charge(order, now_ms)
            for refund in refunds:
                state, code = (RefundState.REFUNDED, "") if refund.settle_succeeds else (RefundState.REFUSED, "FAILED")
                self._disk.put_refund(refund._replace(state=state, code=code, settle_at_ms=None, settle_succeeds=None))

    def _settle_charge(self, order: Order, now_ms: int) -> None:
        box = self._disk.fault_box(order.bank, order.order_no, order.subject)
        if order.settle_succeeds:
            self._take(order, 1, now_ms, box)
        else:
            failed = order._replace(state=OrderState.FAILED, code="FAILED", settle_at_ms=None, settle_succeeds=None)
            self._disk.put_order(failed)
            notice = books.failure_notice(order, now_ms, box)
            self._disk.add_notifications(order.bank, order.order_no, [notice])
        self._disk.count_down(box)

    # Auditors

    def books(self, banks: Iterable[str], order_nos: Sequence[str] | None) -> Json:
        """Return the books, of some order numbers or of all."""
        with self._disk.transaction():
            return {"banks": {bank: {"orders": self._audited_orders(bank, order_nos)} for bank in banks}}

    def books_page(self, bank: str, after: str, limit: int) -> Json:
        """Return the books of one bank's orders whose numbers follow ``after``, so many in the numbers' order."""
        with self._disk.transaction():
            orders = self._disk.orders_after(bank, after, limit)
            return {"banks": {bank: {"orders": [self._audited(order) for order in orders]}}}

    def _audited_orders(self, bank: str, order_nos: Sequence[str] | None) -> list[Json]:
        if order_nos is None:
            return [self._audited(order) for order in self._disk.orders(bank)]
        orders = (self._disk.order(bank, order_no) for order_no in order_nos)
        return [self._audited(order) for order in orders if order]

    def _audited(self, order: Order) -> Json:
        captures = self._disk.captures(order.bank, order.order_no)
        refunds = self._disk.refunds(order.bank, order.order_no)
        notifications = self._disk.notifications(order.bank, order.order_no)
        return {
            "order_no": order.order_no,
            "subject": order.subject,
            "method": order.method,
            "amount_minor": order.amount_minor,
            "currency": order.currency,
            "expire_at_ms": order.expire_at_ms,
            "state": order.state,
            "captures": [
                capture_json(one) | {"refunded_minor": books.refunded_minor(one.trade_no, refunds)} for one in captures
            ],
            "kept_minor": books.kept_minor(captures, refunds),
            "refunds": [refund_json(one) for one in refunds],
            "notifications": [notification_json(one) for one in notifications],
        }


def capture_json(one: Capture) -> Json:
    """Return a capture as it is told."""
    return {
        "trade_no": one.trade_no,
        "amount_minor": one.amount_minor,
        "currency": one.currency,
        "paid_at_ms": one.paid_at_ms,
    }


def refund_json(one: Refund) -> Json:
    """Return a refund as it is told."""
    return {
        "refund_no": one.refund_no,
        "order_no": one.order_no,
        "trade_no": one.trade_no,
        "amount_minor": one.amount_minor,
        "currency": one.currency,
        "result": one.state,
        "code": one.code,
    }


def notification_json(one: Notification) -> Json:
    """Return a notification as auditors and drivers see it.

    pending: it will be sent again, once its time comes or its hold ends. given_up: the ladder ended before any
    acknowledgement.
    """
    acknowledged = one.acks > 0
    return {
        "notification_id": one.notification_id,
        "result": one.result,
        "trade_no": one.trade_no,
        "amount_minor": one.amount_minor,
        "sends": one.sends,
        "acknowledged": acknowledged,
        "held": bool(one.held),
        "pending": one.due_at_ms is not None,
        "given_up": one.due_at_ms is None and one.sends > 0 and not acknowledged,
    }
