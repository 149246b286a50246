"""Two rules for the whole suite.

In CI (environment ``CI=true``) a skipped test is a failed test. A skip says "not shown here". On a developer's machine
that may be fine, because a tool is missing; CI installs every tool, so there a skip hides something that nobody has
tested.

A test leaves the logs as it found them, also where it ran a command in this process: the command's logger writes to a
stream that was captured for that test and is closed with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import structlog


def skips_fail() -> bool:
    """Say whether a skip counts as a failure in this run."""
    return os.environ.get("CI") == "true"


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return why a report says skipped: pytest keeps it as (file, line, reason)."""
    longrepr = report.longrepr
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure that names it. An expected failure (xfail) is none."""
    if report.skipped and not hasattr(report, "wasxfail") and skips_fail():
        report.longrepr = f"{report.nodeid}: a skip is a failure in CI ({skip_reason(report)})"
        report.outcome = "failed"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Look at each phase of each test, after pytest's own hooks have said what it was."""
    report = yield
    fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Look at modules that skip themselves while they are imported."""
    report = yield
    fail_if_skipped(report)
    return report


@contextmanager
def logs_as_before() -> Iterator[None]:
    """Undo what is set about logs meanwhile."""
    configure, before, root = structlog.configure, structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def configure_uncached(**settings: Any) -> None:
        # A logger that a module keeps would hold on to its stream for ever.
        configure(**{**settings, "cache_logger_on_first_use": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", configure_uncached)
        yield
    configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Run a test, with every fixture that is made for it."""
    with logs_as_before():
        return (yield)
