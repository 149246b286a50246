from __future__ import annotations

import pytest

from paycore.domain.texts import broken_evidence_rule, broken_rule, broken_url_rule


@pytest.mark.parametrize("text", ["a", "茶" * 8, "a b", "e\u0301", "👍", "-_*|'\"<>", "\u00a0"])
def test_text_within_its_length_and_without_controls_keeps_the_rule(text: str) -> None:
    assert broken_rule(text, min_length=1, max_length=8) is None


@pytest.mark.parametrize("text", ["", "a" * 9, "茶" * 9])
def test_text_outside_its_length_is_told_the_length(text: str) -> None:
    assert broken_rule(text, min_length=1, max_length=8) == f"must have 1 to 8 characters, not {len(text)}"


@pytest.mark.parametrize("control", ["\0", "\t", "\n", "\r", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("place", ["{}b", "a{}", "a{}b"])
def test_text_with_a_control_character_is_refused_wherever_it_stands(control: str, place: str) -> None:
    rule = broken_rule(place.format(control), min_length=1, max_length=8)
    assert rule == "must not contain control characters"


@pytest.mark.parametrize("text", ["", "a" * 8, "\n\t\x7f", "\ud7ff", "１２"])
def test_evidence_is_refused_only_for_what_no_database_keeps(text: str) -> None:
    assert broken_evidence_rule(text, max_length=8) is None


@pytest.mark.parametrize(("text", "word"), [("a" * 9, "at most 8"), ("a\0", "NUL"), ("\0", "NUL")])
def test_evidence_too_long_or_with_nul_names_the_rule(text: str, word: str) -> None:
    assert word in (broken_evidence_rule(text, max_length=8) or "")


@pytest.mark.parametrize(
    "url",
    ["http://a", "https://shop.example", "https://shop.example:8443/back?order=1#x", "http://[::1]:80/", "HTTPS://A/"],
)
def test_absolute_web_url_keeps_the_rule(url: str) -> None:
    assert broken_url_rule(url, max_length=64) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "shop.example",
        "/back",
        "//shop.example/back",
        "ftp://shop.example",
        "javascript:alert(1)",
        "data:text/html,x",
        "https://",
        "https:///back",
        "http://[::1",
        "https://shop.example/ x",
        "https://shop.example/\u00a0",
        "https://shop.example/\n",
        "https://shop.example/" + "x" * 64,
    ],
)
def test_anything_else_breaks_the_rule_of_urls(url: str) -> None:
    assert broken_url_rule(url, max_length=64) is not None
