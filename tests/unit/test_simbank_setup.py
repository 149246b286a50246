"""Settings of the simulator: what is refused, and that no message shows a secret."""

import json

import pytest
from pydantic import BaseModel

from paycore.simbank.requests import (
    MAX_INT64,
    OrderRequest,
    RefundRequest,
)
from paycore.simbank.setup import SetupError, read_ladder, read_secrets
from paycore.simbank.web import ApiError, parsed

SECRET = "0123456789abcdef"


def test_read_secrets_valid_object_hides_the_secrets() -> None:
    secrets = read_secrets(json.dumps({"bank_a": SECRET}))
    assert secrets["bank_a"].get_secret_value() == SECRET
    assert SECRET not in repr(secrets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name each bank"),
        ("{}", "must name each bank"),
        (f'["{SECRET}"]', "must name each bank"),
        (f'{{"bank_a": "{SECRET}"', "must be a JSON object"),
        (json.dumps({"Bank A": SECRET}), "'Bank A' is no bank name"),
        (json.dumps({"bank_a\n": SECRET}), "'bank_a\\n' is no bank name"),
        (json.dumps({"bank_a": SECRET[:15]}), "the secret of bank_a must be at least 16"),
        (json.dumps({"bank_a": SECRET + "é"}), "the secret of bank_a must be at least 16 ASCII"),
        (json.dumps({"bank_a": 12345678901234567890}), "the secret of bank_a must be"),
    ],
)
def test_read_secrets_invalid_is_refused_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(SetupError) as refused:
        read_secrets(text)
    assert str(refused.value).startswith(message)
    assert SECRET[:15] not in str(refused.value)


def test_read_ladder_reads_delays() -> None:
    assert read_ladder("200, 500,1000") == (200, 500, 1000)


@pytest.mark.parametrize("text", ["", "200,", "-1", "1.5", "２００", "1e3", "9" * 10])
def test_read_ladder_invalid_is_refused(text: str) -> None:
    with pytest.raises(SetupError):
        read_ladder(text)


ORDER: dict[str, object] = {
    "order_no": "1001",
    "amount_minor": 1,
    "currency": "CNY",
    "subject": "茶",
    "return_url": "https://shop.test/back?a=1",
    "method": "qr",
    "expire_at_ms": 0,
}
REFUND: dict[str, object] = {
    "refund_no": "R1",
    "order_no": "1001",
    "trade_no": "T1",
    "amount_minor": MAX_INT64,
    "currency": "CNY",
}


@pytest.mark.parametrize(("model", "body"), [(OrderRequest, ORDER), (RefundRequest, REFUND)])
def test_request_valid_is_read(model: type[BaseModel], body: dict[str, object]) -> None:
    assert parsed(model, json.dumps(body).encode()).model_dump() == body


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [
        (OrderRequest, "order_no", ""),
        (OrderRequest, "order_no", "1" * 65),
        (OrderRequest, "order_no", "10/01"),
        (OrderRequest, "order_no", "1001\n"),
        (OrderRequest, "order_no", 1001),
        (OrderRequest, "amount_minor", 0),
        (OrderRequest, "amount_minor", -1),
        (OrderRequest, "amount_minor", MAX_INT64 + 1),
        (OrderRequest, "amount_minor", 1.0),
        (OrderRequest, "amount_minor", "1"),
        (OrderRequest, "amount_minor", True),
        (OrderRequest, "currency", "cny"),
        (OrderRequest, "currency", "CNYX"),
        (OrderRequest, "subject", ""),
        (OrderRequest, "return_url", "javascript:alert(1)"),
        (OrderRequest, "return_url", "/back"),
        (OrderRequest, "return_url", "https://"),
        (OrderRequest, "return_url", "https://shop.test/\r\nSet-Cookie: a"),
        (OrderRequest, "method", "cash"),
        (OrderRequest, "expire_at_ms", None),
        (OrderRequest, "unheard_of", 1),
        (RefundRequest, "refund_no", ""),
        (RefundRequest, "amount_minor", 0),
        (RefundRequest, "trade_no", ""),
    ],
)
def test_request_with_a_field_that_breaks_a_rule_is_refused_naming_it(
    model: type[BaseModel], field: str, value: object
) -> None:
    body = (ORDER if model is OrderRequest else REFUND) | {field: value}
    with pytest.raises(ApiError) as refused:
        parsed(model, json.dumps(body).encode())
    assert (refused.value.status, refused.value.body["code"]) == (400, "INVALID_REQUEST")
    assert str(refused.value.body["message"]).startswith(f"{field}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"order_no": "\\ud800"}'])
def test_request_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parsed(OrderRequest, body)
    assert refused.value.status == 400
