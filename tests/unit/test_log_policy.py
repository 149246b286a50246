"""The rule of tests/conftest.py about logs, run in a pytest of its own: no test hears of what another one has set."""

from __future__ import annotations

from pathlib import Path

import pytest

POLICY = Path(__file__).parents[1] / "conftest.py"

NEIGHBOURS = """
import io
import logging

import pytest
import structlog

_log = structlog.get_logger()

def configure_and_log():
    gone = io.StringIO()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(gone), cache_logger_on_first_use=True)
    logging.getLogger().handlers[:] = [logging.StreamHandler(gone)]
    logging.getLogger().setLevel(logging.DEBUG)
    _log.info("written")
    gone.close()

@pytest.fixture(scope="module")
def configured():
    configure_and_log()

def test_that_configures():
    configure_and_log()

def test_that_follows(capsys):
    _log.info("followed")
    assert "followed" in capsys.readouterr().out
    assert logging.getLogger().level == logging.WARNING

def test_that_has_a_fixture_configure(configured):
    pass

def test_that_captures():
    with structlog.testing.capture_logs() as lines:
        _log.info("captured")
    assert [line["event"] for line in lines] == ["captured"]
    assert not any(type(handler) is logging.StreamHandler for handler in logging.getLogger().handlers)
"""


def test_logs_that_a_test_or_its_fixture_configures_are_as_before_in_the_next(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(POLICY.read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makepyfile(test_neighbours=NEIGHBOURS)
    pytester.runpytest_inprocess("-p", "no:randomly", "-p", "no:xdist").assert_outcomes(passed=4)
