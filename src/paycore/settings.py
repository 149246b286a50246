"""What can be set about a server, in one place: by flag, by environment (``PAYCORE_`` and the name), by default.

Only values and their rules stand here. What they are for is decided elsewhere.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

ENV_PREFIX = "PAYCORE_"

_DAY_SECONDS = 24 * 60 * 60
_NAME = r"^[a-z][a-z0-9_]{0,31}$"

MAX_WORKERS = 64

LadderSeconds = Annotated[int, Field(ge=1, le=30 * _DAY_SECONDS)]

JobName = Literal["refunder", "closer", "recoverer", "ender", "sweeper", "examiner", "auditor"]
JOB_NAMES: tuple[JobName, ...] = get_args(JobName)

AccountName = Annotated[str, Field(pattern=_NAME)]


class SettingsRefusedError(Exception):
    """A setting breaks a rule; the message is one line that names each field and its rule, never a value."""


class Settings(BaseSettings):
    """The settings of one server. Build it with ``load_settings``."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    db: str = Field(
        default="sqlite:///paycore.db",
        min_length=1,
        description="The database's URL: sqlite:///FILE, relative to the current folder; sqlite:////FILE is absolute.",
    )
    listen: str = Field(
        default="127.0.0.1:50051",
        min_length=1,
        description="Where to take gRPC calls: host:port on loopback, or unix:PATH. Port 0 takes any free one.",
    )
    metrics_listen: str = Field(
        default="127.0.0.1:9464",
        min_length=1,
        description="Where to answer HTTP for /metrics, /-/ready and /-/healthy: host:port on loopback.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=MAX_WORKERS,
        description="How many processes take the calls, all on one TCP address. On SQLite their writes are serial.",
    )
    simbank_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+(/\S*)?$",
        description='The bank simulator\'s base URL. Given, the channel "simbank" is configured.',
    )
    simbank_accounts: Annotated[tuple[AccountName, ...], NoDecode] = Field(
        default=("bank_a", "bank_b", "bank_c"),
        min_length=1,
        description="Names of the accounts at simbank, one bank each, separated by commas.",
    )
    simbank_secrets: Annotated[dict[AccountName, SecretStr], NoDecode] = Field(
        default_factory=dict,
        description='The accounts\' secrets, a JSON object: {"bank_a": "..."}. Better given by the environment.',
    )
    simbank_query_ladder_seconds: Annotated[tuple[LadderSeconds, ...], NoDecode] = Field(
        default=(5, 30, 60, 180, 300, 600, 1_800),
        min_length=1,
        description="After how many seconds an attempt at simbank without a word is asked about, rung by rung.",
    )
    simbank_min_close_age_seconds: int = Field(
        default=0, ge=0, le=_DAY_SECONDS, description="How old an order at simbank is before it may be closed there."
    )
    simbank_calls_per_second: int = Field(
        default=100, ge=1, le=100_000, description="How many calls a second repair makes to simbank at most, a process."
    )
    channel_timeout_ms: int = Field(
        default=5_000, ge=1, le=120_000, description="How long a channel may take to answer one request."
    )
    min_validity_seconds: int = Field(
        default=60, ge=1, le=15 * _DAY_SECONDS, description="The shortest validity that Pay takes."
    )
    max_validity_seconds: int = Field(
        default=15 * _DAY_SECONDS, ge=1, le=15 * _DAY_SECONDS, description="The longest validity that Pay takes."
    )
    default_validity_seconds: int = Field(
        default=1_800, ge=1, le=15 * _DAY_SECONDS, description="The validity of a payment whose Pay names none."
    )
    min_remaining_seconds: int = Field(
        default=10, ge=0, le=3_600, description="Pay opens no attempt when less than this is left of the validity."
    )
    pay_timeout_ms: int = Field(
        default=30_000, ge=100, le=300_000, description="How long Pay takes at most, whatever deadline its caller sets."
    )
    late_grace_ms: int = Field(
        default=0, ge=0, le=_DAY_SECONDS * 1_000, description="How long after its expiry a payment counts as in time."
    )
    queue_limit: int = Field(
        default=100_000,
        ge=1,
        le=1_000_000,
        description="How many writes may wait; more are answered RESOURCE_EXHAUSTED.",
    )
    index_max_mib: int = Field(
        default=1_024,
        ge=0,
        le=1_048_576,
        description="How much memory the index may hold, in MiB; 0 sets no limit. A payment takes about 45 bytes, and"
        " one that is not held is read when it is asked for.",
    )
    warm_payments: int = Field(
        default=1_000_000,
        ge=0,
        le=1_000_000_000,
        description="How many payments, the newest first, are read into the index before calls are taken.",
    )
    quarantine_burst: int = Field(
        default=10_000,
        ge=1,
        le=10_000_000,
        description="How much evidence one source, an account or all that are not configured together, may add to"
        " quarantine at once; more is answered THROTTLED.",
    )
    quarantine_per_minute: int = Field(
        default=1_000, ge=1, le=1_000_000, description="How much of that allowance comes back each minute."
    )
    max_message_bytes: int = Field(
        default=8_388_608, ge=131_072, le=67_108_864, description="The largest request message that is read."
    )
    refund_interval_ms: int = Field(
        default=1_000, ge=10, le=600_000, description="How often the refunder looks for work."
    )
    refund_retry_ms: int = Field(
        default=5_000, ge=10, le=_DAY_SECONDS * 1_000, description="How long a refund without a final word rests."
    )
    refund_longest_seconds: int = Field(
        default=1_800, ge=1, le=_DAY_SECONDS, description="The longest that a refund without a final word rests."
    )
    refund_attention_seconds: int = Field(
        default=_DAY_SECONDS,
        ge=1,
        le=365 * _DAY_SECONDS,
        description="How old an unfinished refund is when a person is told of it.",
    )
    close_unreachable_seconds: int = Field(
        default=7 * _DAY_SECONDS,
        ge=1,
        le=365 * _DAY_SECONDS,
        description="How long after its expiry a payment is closed although a channel gives no final word.",
    )
    repair_interval_ms: int = Field(
        default=1_000,
        ge=10,
        le=600_000,
        description="How often is looked for payments to close, attempts to ask about and attempts to end.",
    )
    repair_lease_seconds: int = Field(
        default=60,
        ge=1,
        le=3_600,
        description="How long a pass of a job holds its shares of the payments; after a crash they lie idle so long.",
    )
    sweep_interval_seconds: int = Field(
        default=30, ge=1, le=_DAY_SECONDS, description="How often what is new is swept for what others left undone."
    )
    sweep_full_seconds: int = Field(
        default=_DAY_SECONDS, ge=1, le=365 * _DAY_SECONDS, description="How often everything is swept."
    )
    quarantine_interval_ms: int = Field(
        default=5_000, ge=10, le=_DAY_SECONDS * 1_000, description="How often is looked for evidence to judge again."
    )
    audit_interval_seconds: int = Field(
        default=0,
        ge=0,
        le=365 * _DAY_SECONDS,
        description="How often the whole database is audited by the server itself; 0: never.",
    )
    jobs: Annotated[tuple[JobName, ...], NoDecode] = Field(
        default=JOB_NAMES,
        description="Which jobs this server runs, separated by commas. Every job may run in any number of processes.",
    )
    shutdown_grace_ms: int = Field(
        default=10_000, ge=0, le=600_000, description="How long calls in flight may take to end after SIGTERM."
    )
    log_format: Literal["json", "console"] = Field(default="json", description="How log lines are written to stderr.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least grave log lines that are written."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags and environment only: no file is read that nobody named."""
        del settings_cls, dotenv_settings, file_secret_settings
        return init_settings, env_settings

    @field_validator("simbank_accounts", "simbank_query_ladder_seconds", "jobs", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("simbank_secrets", mode="before")
    @classmethod
    def _parse_secrets(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value or "{}")
        except ValueError:
            # The parser's own message would quote the text, and with it a secret.
            raise ValueError('must be a JSON object of account names and secrets: {"bank_a": "..."}') from None
        return parsed

    @field_validator("simbank_url", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if self.min_validity_seconds > self.max_validity_seconds:
            raise ValueError("min_validity_seconds must not be above max_validity_seconds")
        if not self.min_validity_seconds <= self.default_validity_seconds <= self.max_validity_seconds:
            raise ValueError("default_validity_seconds must lie between min_ and max_validity_seconds")
        if len(set(self.simbank_accounts)) != len(self.simbank_accounts):
            raise ValueError("simbank_accounts must not name an account twice")
        missing = [name for name in self.simbank_accounts if name not in self.simbank_secrets]
        if self.simbank_url is not None and missing:
            raise ValueError(f"simbank_secrets must hold a secret for each account; missing: {', '.join(missing)}")
        return self


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Build the settings from flags that were given (None: not given), then the environment, then defaults.

    Raises SettingsRefusedError.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise SettingsRefusedError("; ".join(_lines(error.errors()))) from None
    except SettingsError as error:
        raise SettingsRefusedError(str(error)) from None


def to_environment(settings: Settings) -> dict[str, str]:
    """Return the environment from which another process loads equal settings; secrets are in it as they are."""
    given = {name: getattr(settings, name) for name in Settings.model_fields}
    return {f"{ENV_PREFIX}{name.upper()}": _as_text(value) for name, value in given.items() if value is not None}


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, Mapping):
        return json.dumps({name: secret.get_secret_value() for name, secret in value.items()})
    return str(value)


def _lines(errors: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for error in errors:
        # Only the field's own name is repeated: deeper down the location may hold text that was given, a secret's too.
        message = str(error["msg"]).removeprefix("Value error, ")
        name = str(error["loc"][0]) if error["loc"] else ""
        yield f"{ENV_PREFIX}{name.upper()}: {_rule(message)}" if name else f"settings: {message}"


def _rule(message: str) -> str:
    return message.removeprefix("Input ").replace("should", "must", 1)


def describe(name: str) -> str:
    """Return a setting's description, for a flag's help."""
    return Settings.model_fields[name].description or ""
