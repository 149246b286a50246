"""docs/api.md names every reason that an error can carry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["domain", "usecases", "store", "rpc"]
RAISED = re.compile(r'\b[A-Z]\w*Error\(\s*"([A-Z_]+)"')
NAMED = re.compile(r'^([A-Z_]+) = "\1"$', re.MULTILINE)


def reasons() -> set[str]:
    """Every reason in the sources: given to an error, or as a constant of its own name."""
    files = [file for folder in FOLDERS for file in (ROOT / "src" / "paycore" / folder).rglob("*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    return {found for text in texts for pattern in (RAISED, NAMED) for found in pattern.findall(text)}


def test_reasons_are_found_in_the_sources() -> None:
    assert {"QUEUE_FULL", "PAYMENT_NOT_FOUND", "CHANNEL_REFUSED", "MALFORMED_MESSAGE"} <= reasons()


@pytest.mark.parametrize("reason", sorted(reasons()))
def test_reason_is_in_the_table_of_errors(reason: str) -> None:
    table = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"`{reason}`" in table
