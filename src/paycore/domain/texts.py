"""Rules for texts that come from outside, each answering with the rule that is broken, or None."""

import unicodedata
from urllib.parse import urlsplit

_LINE_BREAKS = {"Cc", "Zl", "Zp"}


def broken_rule(text: str, *, min_length: int, max_length: int) -> str | None:
    """Check a text that people and channels read: its length in characters, and no control characters."""
    if not min_length <= len(text) <= max_length:
        return f"must have {min_length} to {max_length} characters, not {len(text)}"
    if any(unicodedata.category(character) in _LINE_BREAKS for character in text):
        return "must not contain control characters"
    return None


def broken_evidence_rule(text: str, *, max_length: int) -> str | None:
    """Check a text of a notification: only what no database can keep is refused, everything else is evidence."""
    if len(text) > max_length:
        return f"must have at most {max_length} characters, not {len(text)}"
    if "\0" in text:
        return "must not contain NUL"
    return None


def broken_url_rule(url: str, *, max_length: int) -> str | None:
    """Check an absolute http or https URL."""
    rule = broken_rule(url, min_length=1, max_length=max_length)
    if rule is not None:
        return rule
    try:
        parts = urlsplit(url)
    except ValueError:
        return "must be a URL"
    if parts.scheme not in {"http", "https"} or not parts.hostname or any(map(str.isspace, url)):
        return "must be an absolute http or https URL"
    return None
