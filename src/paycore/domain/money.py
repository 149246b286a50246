"""Currencies and amounts. Amounts are integers in the currency's minor unit, end to end (R9)."""

from typing import Final

_TWO_DIGITS = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP CRC
CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR
JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD
NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN
SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG
"""
_NO_DIGITS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
_THREE_DIGITS = "BHD IQD JOD KWD LYD OMR TND"

MINOR_DIGITS: Final[dict[str, int]] = {
    **dict.fromkeys(_TWO_DIGITS.split(), 2),
    **dict.fromkeys(_NO_DIGITS.split(), 0),
    **dict.fromkeys(_THREE_DIGITS.split(), 3),
}
"""ISO 4217 code -> digits of the minor unit (list one, national currencies in circulation, read 2026-11)."""

CURRENCY_CODES: Final[dict[str, int]] = {currency: code for code, currency in enumerate(sorted(MINOR_DIGITS), start=1)}
"""Currency -> a code of 1 to 255 that lives only in one process's index; 0 stands for an unknown one."""


def format_amount(amount_minor: int, currency: str) -> str:
    """Write an amount for people, for example ``12.34 CNY``; never read back by the program."""
    digits = MINOR_DIGITS[currency]
    if digits == 0:
        return f"{amount_minor} {currency}"
    sign, absolute = "-" * (amount_minor < 0), abs(amount_minor)
    whole, rest = divmod(absolute, 10**digits)
    return f"{sign}{whole}.{rest:0{digits}d} {currency}"
