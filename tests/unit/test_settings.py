"""Settings: flags, environment, defaults, and the line that a wrong one gets."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from paycore.cli.serve import serve
from paycore.settings import Settings, SettingsRefusedError, describe, load_settings, to_environment

SECRET = "a secret that nobody sees"
ALL_SECRETS = f'{{"bank_a": "{SECRET}", "bank_b": "{SECRET}", "bank_c": "{SECRET}"}}'
SIMBANK_URL = "http://127.0.0.1:8081"


@pytest.fixture(autouse=True)
def no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"PAYCORE_{name.upper()}", raising=False)


def refusal(flags: dict[str, Any]) -> str:
    with pytest.raises(SettingsRefusedError) as caught:
        load_settings(flags)
    return str(caught.value)


# One flag each, what it is set to, and what the line must name: the setting and its rule.
REFUSED = [
    ("queue_limit", "many", "PAYCORE_QUEUE_LIMIT", "integer"),
    ("queue_limit", "0", "PAYCORE_QUEUE_LIMIT", "greater than or equal to 1"),
    ("workers", "0", "PAYCORE_WORKERS", "greater than or equal to 1"),
    ("workers", "-1", "PAYCORE_WORKERS", "greater than or equal to 1"),
    ("workers", "1000", "PAYCORE_WORKERS", "less than or equal to 64"),
    ("workers", "two", "PAYCORE_WORKERS", "integer"),
    ("log_format", "xml", "PAYCORE_LOG_FORMAT", "'json' or 'console'"),
    ("log_level", "LOUD", "PAYCORE_LOG_LEVEL", "'debug'"),
    ("db", "", "PAYCORE_DB", "at least 1 character"),
    ("simbank_url", "ftp://bank", "PAYCORE_SIMBANK_URL", "https?"),
    ("simbank_accounts", "", "PAYCORE_SIMBANK_ACCOUNTS", "at least 1"),
    ("simbank_accounts", "bank_a,Bank B", "PAYCORE_SIMBANK_ACCOUNTS", "pattern"),
    ("simbank_accounts", "bank_a,bank_a", "settings", "twice"),
    ("simbank_secrets", '{"bank_a": ', "PAYCORE_SIMBANK_SECRETS", "JSON object"),
    ("simbank_secrets", '["x"]', "PAYCORE_SIMBANK_SECRETS", "dictionary"),
    ("simbank_url", SIMBANK_URL, "settings", "missing: bank_a, bank_b, bank_c"),
    ("min_validity_seconds", "3600", "settings", "default_validity_seconds"),
    ("max_validity_seconds", "61", "settings", "default_validity_seconds"),
    ("max_validity_seconds", "1296001", "PAYCORE_MAX_VALIDITY_SECONDS", "1296000"),
    ("shutdown_grace_ms", "-1", "PAYCORE_SHUTDOWN_GRACE_MS", "0"),
    ("late_grace_ms", "1.5", "PAYCORE_LATE_GRACE_MS", "integer"),
    ("max_message_bytes", "1", "PAYCORE_MAX_MESSAGE_BYTES", "131072"),
    ("no_such_setting", "1", "PAYCORE_NO_SUCH_SETTING", "not permitted"),
]


@pytest.mark.parametrize(("name", "value", "named", "rule"), REFUSED)
def test_setting_that_breaks_a_rule_is_named_in_one_line(name: str, value: str, named: str, rule: str) -> None:
    line = refusal({name: value})
    assert "\n" not in line
    assert line.startswith(named)
    assert rule in line


def test_two_wrong_settings_are_both_named() -> None:
    line = refusal({"queue_limit": "0", "log_format": "xml"})
    assert "PAYCORE_QUEUE_LIMIT" in line
    assert "PAYCORE_LOG_FORMAT" in line


def test_default_settings_are_valid_and_bind_loopback() -> None:
    settings = load_settings()
    assert settings.listen.startswith("127.")
    assert settings.metrics_listen.startswith("127.")
    assert settings.simbank_url is None


def test_flag_wins_over_environment_and_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYCORE_QUEUE_LIMIT", "7")
    monkeypatch.setenv("PAYCORE_LATE_GRACE_MS", "8")
    settings = load_settings({"queue_limit": "9", "late_grace_ms": None})
    assert (settings.queue_limit, settings.late_grace_ms) == (9, 8)


def test_wrong_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYCORE_QUEUE_LIMIT", "many")
    assert "PAYCORE_QUEUE_LIMIT" in refusal({})


def test_simbank_is_configured_from_text() -> None:
    settings = load_settings(
        {"simbank_url": SIMBANK_URL, "simbank_accounts": " bank_a , bank_b", "simbank_secrets": ALL_SECRETS}
    )
    assert settings.simbank_accounts == ("bank_a", "bank_b")
    assert settings.simbank_secrets["bank_a"].get_secret_value() == SECRET


def test_secrets_are_in_no_text_made_of_settings() -> None:
    settings = load_settings({"simbank_url": SIMBANK_URL, "simbank_secrets": ALL_SECRETS})
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    "secrets", [f'{{"bank_a": "{SECRET}"', f'{{"{SECRET}": "x"}}', f'["{SECRET}"]', f'{{"bank_a": ["{SECRET}"]}}']
)
def test_secrets_that_break_a_rule_are_not_repeated(secrets: str) -> None:
    assert SECRET not in refusal({"simbank_secrets": secrets})


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_described_and_has_a_flag(name: str) -> None:
    assert describe(name).endswith((".", "}", '}"'))
    assert name in inspect.signature(serve).parameters


# Every kind of value that a setting has, so that none is lost on its way to another process.
GIVEN = [
    {},
    {
        "db": "sqlite:////var/a folder/pay%20core.db?x=1",
        "listen": "[::1]:5",
        "simbank_url": SIMBANK_URL,
        "simbank_accounts": "bank_a,bank_b",
        "simbank_secrets": '{"bank_a": "\\" with = and \\n", "bank_b": "秘密"}',
        "queue_limit": "7",
        "log_format": "console",
    },
]


@pytest.mark.parametrize("given", GIVEN)
def test_settings_reach_another_process_by_its_environment(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    settings = load_settings(given)
    for name, text in to_environment(settings).items():
        monkeypatch.setenv(name, text)
    assert load_settings() == settings


def test_every_setting_is_handed_on_but_those_without_a_value() -> None:
    handed = to_environment(load_settings())
    assert handed.keys() == {f"PAYCORE_{name.upper()}" for name in Settings.model_fields} - {"PAYCORE_SIMBANK_URL"}
