"""Amounts as the bank's pages show them: integers in minor units, written in major units."""

_NO_DIGITS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
_THREE_DIGITS = "BHD IQD JOD KWD LYD OMR TND"


def minor_digits(currency: str) -> int:
    """Return the digits of a currency's minor unit (ISO 4217); 2 for every currency that is not listed."""
    if currency in _NO_DIGITS.split():
        return 0
    return 3 if currency in _THREE_DIGITS.split() else 2


def in_major_units(amount_minor: int, currency: str) -> str:
    """Write an amount of at least 0 for people, for example ``12.34`` for 1234 CNY."""
    digits = minor_digits(currency)
    if digits == 0:
        return str(amount_minor)
    whole, rest = divmod(amount_minor, 10**digits)
    return f"{whole}.{rest:0{digits}d}"
