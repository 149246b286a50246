"""Currencies have the minor units of ISO 4217, and codes that fit a byte."""

from __future__ import annotations

import pytest

from paycore.domain.money import CURRENCY_CODES, MINOR_DIGITS, format_amount


def test_currency_codes_are_distinct_and_fit_a_byte_with_0_left_free() -> None:
    assert CURRENCY_CODES.keys() == MINOR_DIGITS.keys()
    assert len(set(CURRENCY_CODES.values())) == len(CURRENCY_CODES)
    assert 1 <= min(CURRENCY_CODES.values()) <= max(CURRENCY_CODES.values()) <= 255


def test_currencies_are_three_capital_letters() -> None:
    assert all(len(code) == 3 and code.isascii() and code.isalpha() and code.isupper() for code in MINOR_DIGITS)


def test_currency_stands_in_one_list_only() -> None:
    from paycore.domain import money

    listed = f"{money._TWO_DIGITS} {money._NO_DIGITS} {money._THREE_DIGITS}".split()
    assert len(listed) == len(set(listed)) == len(MINOR_DIGITS)


@pytest.mark.parametrize(
    ("currency", "digits"),
    [("CNY", 2), ("USD", 2), ("EUR", 2), ("HKD", 2), ("JPY", 0), ("KRW", 0), ("VND", 0), ("KWD", 3), ("BHD", 3)],
)
def test_currency_has_the_digits_of_iso_4217(currency: str, digits: int) -> None:
    assert MINOR_DIGITS[currency] == digits


@pytest.mark.parametrize(
    ("amount_minor", "currency", "text"),
    [
        (1_234, "CNY", "12.34 CNY"),
        (5, "CNY", "0.05 CNY"),
        (0, "CNY", "0.00 CNY"),
        (-5, "CNY", "-0.05 CNY"),
        (-1_234, "CNY", "-12.34 CNY"),
        (1_234, "JPY", "1234 JPY"),
        (-7, "JPY", "-7 JPY"),
        (1_234, "KWD", "1.234 KWD"),
        (1, "KWD", "0.001 KWD"),
        ((1 << 63) - 1, "CNY", "92233720368547758.07 CNY"),
    ],
)
def test_amount_is_written_with_its_minor_digits(amount_minor: int, currency: str, text: str) -> None:
    assert format_amount(amount_minor, currency) == text


@pytest.mark.parametrize("currency", ["", "cny", "XXX", "RMB"])
def test_unknown_currency_is_not_written(currency: str) -> None:
    with pytest.raises(KeyError):
        format_amount(1, currency)
