"""Log lines hold no secrets."""

from __future__ import annotations

import json
import logging
import threading

import pytest
import structlog
from pydantic import SecretStr

from paycore.cli.logs import configure_logs, hide_secrets

SECRET = "s3cret"

VALUES = [
    {"value": SecretStr(SECRET)},
    {"value": {"bank_a": SecretStr(SECRET)}},
    {"value": [SecretStr(SECRET), (SecretStr(SECRET),)]},
    {"simbank_secrets": {"bank_a": SECRET}},
    {"headers": {"Authorization": SECRET}},
    {"api_key": SECRET},
    {"password": SECRET},
]


@pytest.mark.parametrize("fields", VALUES)
def test_secret_in_any_place_is_hidden(fields: dict[str, object]) -> None:
    hidden = hide_secrets(None, "info", {"event": "x", **fields})
    assert SECRET not in repr(hidden)
    assert "*****" in repr(hidden)


def test_field_that_is_no_secret_stays() -> None:
    assert hide_secrets(None, "info", {"event": "x", "amount_minor": 5}) == {"event": "x", "amount_minor": 5}


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_line_on_standard_error_holds_the_event_and_no_secret(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure_logs(log_format, "info")
    structlog.get_logger().info("hello", secret=SECRET, payment_id=7)
    structlog.get_logger().debug("not this one")
    logging.getLogger("grpc").error("from %s", "grpc")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 2
    assert "hello" in lines[0]
    assert "from grpc" in lines[1]
    assert SECRET not in err
    if log_format == "json":
        assert json.loads(lines[0])["payment_id"] == 7


def test_lines_of_a_worker_name_it_also_from_other_threads(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info", worker=3)
    thread = threading.Thread(target=lambda: structlog.get_logger().info("from a thread"))
    thread.start()
    thread.join()
    structlog.get_logger().error("from here", worker=2)
    logging.getLogger("grpc").warning("from a library")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    # What an event says of a worker itself, as a supervisor's do, is not written over.
    assert [line["worker"] for line in lines] == [3, 2, 3]
