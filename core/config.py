"""The settings: one table, read from defaults, a TOML file, the environment and the command line.

`Settings` is the table. Each field carries its accepted values, unit and meaning; `FIELDS` is the same as
data, from which ``core4 config`` and the settings reference are made. Precedence, weakest first: default,
file, environment (``CORE4_<FIELD>``), command line. Everything is checked once, at start, and all problems
are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environs
from marshmallow import ValidationError, fields, validate

from core4.errors import ConfigError
from core4.options import DEBUG as DEBUG

PREFIX = "CORE4_"
TEST_PREFIX = "CORE4_TEST_"  # left to test suites
WORKER_TYPES = ("inprocess", "subprocess", "tmux")
MIB = 1024 * 1024
# As in the job API's document; made by `core4 up` on a loopback address only.
DEFAULT_USER = ("admin", "hans")

# Variables of the client library and the command line; they are no settings of a daemon.
OTHER_VARIABLES: Mapping[str, str] = {
    "CORE4_CONFIG": "TOML file with settings",
    "CORE4_URL": "where the command line and the client library find the API",
    "CORE4_USER": "user name for the API",
    "CORE4_PASSWORD": "password for the API",
    "CORE4_TOKEN": "bearer token for the API, instead of user name and password",
    "CORE4_FUNCTION_KEY": "key with which functions are signed that are run elsewhere, as NAME:SECRET",
    "CORE4_NEW_PASSWORD": "password that `core4 user add` and `core4 user passwd` set",
}
SECRET_VARIABLES = (
    "CORE4_MONGO_URL",
    "CORE4_BROKER_URL",
    "CORE4_WORKER_SECRET",
    "CORE4_PASSWORD",
    "CORE4_TOKEN",
    "CORE4_NEW_PASSWORD",
    "CORE4_FUNCTION_KEY",
    "CORE4_FUNCTION_KEYS",
)


@lru_cache(maxsize=100)
def is_loopback(host: str) -> bool:
    """True if only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without our variables, for processes that read their settings elsewhere or have none."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(PREFIX) or name.startswith(TEST_PREFIX)
    }


class _Size(fields.Integer):
    """Bytes: a whole number or text like ``16 MiB``."""

    UNITS: Mapping[str, int] = {"": 1, "B": 1, "KIB": 1024, "MIB": MIB, "GIB": 1024 * MIB}

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> int:
        match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
        if match and match[2].upper() in self.UNITS:
            value = int(match[1]) * self.UNITS[match[2].upper()]
        return super()._deserialize(value, *args, **kwargs)


class _Strings(fields.Field[tuple[str, ...]]):
    """A list of texts; in the environment ``a,b`` or a JSON list."""

    def __init__(self, pattern: str = r"(?s).+") -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        items = _split(value) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValidationError("not a list")
        if not all(isinstance(item, str) and self.pattern.fullmatch(item) for item in items):
            raise ValidationError("not a list of accepted values")
        return tuple(dict.fromkeys(items))


class _Folder(fields.Field[Path]):
    """A path, absolute and with ``~`` resolved."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Path:
        if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
            raise ValidationError("not a path")
        return Path(value).expanduser().absolute()


def _split(text: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        items = json.loads(text)
    except ValueError as error:
        raise ValidationError("not a JSON list") from error
    return items if isinstance(items, list) else [items]


def _check_mongo_url(url: str) -> None:
    scheme, _, rest = url.partition("://")
    server = re.split(r"[/?]", rest, maxsplit=1)[0]
    credentials, _, hosts = server.rpartition("@")
    if scheme not in {"mongodb", "mongodb+srv"} or not hosts or "@" in credentials or rest.count("@") > 1:
        raise ValidationError("not a MongoDB URL")


def _check_broker_url(url: str) -> None:
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme) or url != url.strip():
        raise ValidationError("not a broker URL")
    if scheme not in {"amqp", "amqps"}:
        return  # the broker of that scheme knows what follows
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and rest.count("@") <= 1
    except ValueError:
        valid = False
    if not valid:
        raise ValidationError("not an AMQP URL")


def _check_manager(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.username or parts.query or parts.fragment:
        raise ValidationError("not the URL of a manager")


def _check_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        _ = parts.port
    except ValueError:
        return False
    bare = not (parts.path or parts.query or parts.fragment or parts.username)
    return origin == "*" or (parts.scheme in {"http", "https"} and bool(parts.hostname) and bare)


class _Networks(_Strings):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        networks = super()._deserialize(value, *args, **kwargs)
        try:
            return tuple(str(ipaddress.ip_network(network, strict=False)) for network in networks)
        except ValueError as error:
            raise ValidationError("not a network") from error


class _Origins(_Strings):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        origins = super()._deserialize(value, *args, **kwargs)
        if not all(_check_origin(origin) for origin in origins):
            raise ValidationError("not an origin")
        return origins


def _setting(
    default: Any, parser: fields.Field[Any], accepts: str, doc: str, *, unit: str = "", secret: bool = False
) -> Any:
    # `Any`, because dataclasses describes a field by the type of its default.
    metadata = {"parser": parser, "accepts": accepts, "doc": doc, "unit": unit, "secret": secret}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _seconds(default: float | None, doc: str, *, least: float = 0.05, most: float = 86400.0) -> Any:
    return _setting(
        default,
        fields.Float(validate=validate.Range(least, most)),
        f"a number from {least:g} to {most:g}",
        doc,
        unit="seconds",
    )


def _days(default: float, doc: str) -> Any:
    return _setting(
        default,
        fields.Float(validate=validate.Range(0, 36500)),
        "a number from 0 to 36500; 0 keeps for ever",
        doc,
        unit="days",
    )


def _count(default: int | None, doc: str, *, least: int = 1, most: int = 10_000) -> Any:
    parser = fields.Integer(strict=True, validate=validate.Range(least, most))
    return _setting(default, parser, f"a whole number from {least} to {most}", doc)


def _size(default: int, doc: str, *, most: int = 1024 * MIB) -> Any:
    accepts = f"bytes, or text like 16 MiB, from 1 KiB to {most // MIB} MiB"
    return _setting(
        default, _Size(strict=True, validate=validate.Range(1024, most)), accepts, doc, unit="bytes"
    )


def _choice(default: str, choices: tuple[str, ...], doc: str) -> Any:
    return _setting(
        default, fields.String(validate=validate.OneOf(choices)), "one of " + ", ".join(choices), doc
    )


def _switch(doc: str, *, default: bool = False) -> Any:
    return _setting(default, fields.Boolean(), "true or false", doc)


def _text(default: str, pattern: str, accepts: str, doc: str) -> Any:
    return _setting(default, fields.String(validate=validate.Regexp(rf"(?:{pattern})\Z")), accepts, doc)


def _default_home() -> Path:
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser().absolute() / "core4-jobs"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of every part, checked. Made by `Settings.load`, handed down, never read again."""

    mongo_url: str | None = _setting(
        None,
        fields.String(validate=_check_mongo_url),
        "mongodb://HOST[:PORT]/... or mongodb+srv://...; `@`, `:` and `/` of a password percent-escaped",
        "Database to use. Unset: a private embedded server in the data folder.",
        secret=True,
    )
    mongo_database: str = _text(
        "core4", r"[A-Za-z0-9_-]{1,60}", "1 to 60 of A-Z a-z 0-9 _ -", "Name of the database."
    )
    home: Path = _setting(  # noqa: RUF009 - becomes a default_factory
        _default_home, _Folder(), "a folder", "Data folder: the embedded database and its state file."
    )
    host: str = _text(
        "127.0.0.1", r"[A-Za-z0-9_.:-]{1,255}", "a host name or address", "Address on which the API listens."
    )
    port: int = _count(5001, "Port on which the API listens; 0 takes a free one.", least=0, most=65535)
    manager: str | None = _setting(
        None,
        fields.String(validate=_check_manager),
        "http://HOST:PORT or https://HOST:PORT",
        "Where a worker without a database finds its manager. Unset: it uses the database.",
    )
    worker_secret: str | None = _setting(
        None,
        fields.String(validate=validate.Length(8, 1000)),
        "8 to 1000 characters",
        "Secret that managers and the workers that come to them over HTTP share; it is never sent. "
        "Unset: no such workers are let in.",
        secret=True,
    )
    jobs: tuple[str, ...] = _setting(
        (),
        _Strings(),
        "modules or .py files",
        "What holds the jobs: modules like `my.jobs` or files like `my_jobs.py`.",
    )
    worker_task_dir: Path | None = _setting(  # noqa: RUF009 - the type confuses the check
        None,
        _Folder(),
        "a folder",
        "Folder with the files of tasks that have `subprocess=True`; the variable `WORKER_TASK_DIR` "
        "comes first.",
    )
    namespaces: tuple[str, ...] = _setting(
        ("DEFAULT",),
        _Strings(rf"(?!{DEBUG}\Z)[A-Za-z0-9_-]{{1,100}}"),
        f"names of A-Z a-z 0-9 _ -, but {DEBUG}",
        "Namespaces that the worker serves.",
    )
    slots: int | None = _count(None, "Jobs that a worker runs at the same time. Unset: cores x 2.", most=1000)
    worker_name: str = _text(
        "worker",
        r"[A-Za-z0-9._-]{1,100}",
        "1 to 100 of A-Z a-z 0-9 . _ -",
        "Name of the worker; its host is added: `worker@host`.",
    )
    worker_type: str = _choice(
        "inprocess", WORKER_TYPES, "How the worker was started; set by whoever starts it."
    )
    worker_nr: int | None = _count(
        None, "Number that the worker wants, for its display name `w<nr>`. Unset: the lowest free one."
    )
    worker_launch: str | None = _setting(
        None,
        fields.String(validate=validate.Regexp(r"[A-Za-z0-9._-]{1,100}\Z")),
        "1 to 100 of A-Z a-z 0-9 . _ -",
        "Mark by which a supervisor knows the worker that it has started; set by it.",
    )
    worker_jobs: int | None = _count(
        None, "Jobs that the worker runs before it stops. Unset: any.", most=1_000_000_000
    )
    worker_timeout: float | None = _seconds(
        None,
        "Longest time of any job on this worker, also of one without a limit of its own. Unset: any.",
        most=30 * 86400,
    )
    worker_debug: bool = _switch("Serve the debug jobs (namespace `_debug`) and nothing else.")
    reload: bool = _switch("Load job files again when they change.")
    scheduler: bool = _switch(
        "Make the jobs that are due by their schedules; any number of workers may do so.", default=True
    )
    ingest: bool = _switch(
        "Make jobs of the messages in the inbox and at the broker; any number of workers may do so.",
        default=True,
    )
    broker_url: str | None = _setting(
        None,
        fields.String(validate=_check_broker_url),
        "amqp://USER:PASSWORD@HOST[:PORT]/VHOST, amqps://..., or the scheme of an installed broker; `@`, `:` "
        "and `/` of a password percent-escaped",
        "Message broker to take jobs from, beside the built-in inbox. Unset: none.",
        secret=True,
    )
    broker_prefetch: int = _count(
        50, "Messages that a worker takes from one queue before the first is settled.", most=1000
    )
    broker_patience: float = _seconds(
        30.0, "How long a message waits for a worker that publishes its job, before it is a dead letter."
    )
    broker_user: str | None = _setting(
        None,
        fields.String(validate=validate.Length(1, 100)),
        "name of a user",
        "User whose rights all messages have, whatever they say. Unset: every job of the queue's namespace.",
    )
    broker_require_id: bool = _switch("Refuse messages without an id: without one a redelivery is a new job.")
    broker_any_namespace: bool = _switch("Let a message name another namespace than that of its queue.")
    functions: bool = _switch(
        "Run functions that are shipped as source: an API takes them, a worker runs them. Read the page on "
        "shipped source before."
    )
    function_keys: tuple[str, ...] = _setting(
        (),
        _Strings(r"[A-Za-z0-9._-]{1,50}:[!-~]{32,200}"),
        "NAME:SECRET with 32 printable characters or more, as `core4 function key NAME` makes them",
        "Keys of those whose functions the worker runs.",
        secret=True,
    )
    function_ports: tuple[str, ...] = _setting(
        ("80", "443"),
        _Strings(r"[1-9][0-9]{0,3}|[1-5][0-9]{4}"),
        "numbers of ports, from 1 to 59999",
        "TCP ports, of any host, to which shipped functions may connect; do not add the database's.",
    )
    function_folders: tuple[str, ...] = _setting(
        (),
        _Strings(r"/.*"),
        "absolute paths of folders",
        "Folders in which shipped functions may read and write, beside one of their own that is deleted "
        "when they end.",
    )
    heartbeat: float = _seconds(5.0, "How often a worker shows that it is alive.", most=3600)
    dead_after: float = _seconds(
        30.0, "Silence after which a worker is declared dead and its jobs are rescued."
    )
    rescue_every: float = _seconds(
        5.0, "How often a worker looks for jobs of dead workers; one of more than 40 less often.", most=3600
    )
    poll: float = _seconds(
        1.0,
        "How often a worker looks for work where changes are not announced; a twentieth of it else.",
        most=60,
    )
    grace: float = _seconds(10.0, "Time between SIGTERM and SIGKILL when a job is killed.", most=3600)
    drain: float = _seconds(30.0, "Time that running jobs get to end when a worker stops.", least=0)
    inline_block: float = _seconds(
        5.0,
        "Longest time that an inline job may keep the loop it shares to itself, without an `await`; "
        "then it is ended.",
        least=0.5,
        most=3600,
    )
    kill_wait: float = _seconds(5.0, "How long a kill request waits for the outcome.", least=0, most=300)
    log_flush: float = _seconds(0.5, "Longest time a job's log line waits before it is stored.", most=60)
    log_cap: int = _size(
        16 * MIB,
        "Log output kept per attempt, each line counted with 64 bytes more; behind it a marker and no more.",
    )
    result_cap: int = _size(MIB, "Largest result of a job.", most=8 * MIB)
    args_cap: int = _size(256 * 1024, "Largest arguments of a job.", most=8 * MIB)
    max_cpu: float = _setting(
        100.0,
        fields.Float(validate=validate.Range(1, 100)),
        "a number from 1 to 100",
        "Load of all cores, as a mean over 20 s, above which a worker starts only jobs with force; "
        "100 switches that off.",
        unit="percent",
    )
    min_free_ram: int = _size(
        32 * MIB,
        "Available memory of the machine below which a worker starts only jobs with force.",
        most=1024 * 1024 * MIB,
    )
    max_waiting: int = _count(
        100,
        "Jobs of a worker that wait for jobs they have called; from then on it starts only such as "
        "somebody waits for.",
    )
    max_processes: int = _count(
        500, "Processes that one job may have at a time, children of children included; more end it."
    )
    max_crashes: int = _count(
        3, "Crashes of its process or worker after which a job ends as error.", most=1000
    )
    max_claims: int = _count(10, "Claims without a start after which a job ends as error.", most=1000)
    keep_stopped_days: float = _days(
        30.0, "Age after which stopped jobs (error, killed, inactive) leave the queue for the journal."
    )
    keep_journal_days: float = _days(
        30.0,
        "Age, since they came there, after which jobs are deleted from the journal with their logs.",
    )
    keep_result_days: float = _days(
        0.0, "Age after which results that nobody has pulled are dropped; their jobs stay in the journal."
    )
    keep_return_days: float = _days(
        7.0,
        "Age after which the records of return queues are deleted, whether somebody has taken them or not.",
    )
    keep_log_days: float = _days(
        30.0, "Age after which log lines are deleted, but those of a job that is not over."
    )
    keep_event_days: float = _days(365.0, "Age after which lines of the audit are deleted.")
    clean_every: float = _seconds(300.0, "How often a worker looks for what is too old.", least=0.1)
    count_every: float = _seconds(
        20.0, "How often the jobs in the queue are counted by state, for their history.", least=1, most=3600
    )
    token_ttl: float = _seconds(3600.0, "Life of a bearer token.", least=1, most=365 * 86400)
    bcrypt_cost: int = _count(
        12, "Cost of password hashes: each step doubles the time of one check.", least=4, most=16
    )
    max_body: int = _size(MIB, "Largest body of a request.", most=64 * MIB)
    sse_ping: float = _seconds(15.0, "Time between heartbeat comments of a stream.", most=300)
    sse_buffer: int = _size(MIB, "Events held for one slow follower before it is cut.", most=256 * MIB)
    streams: int = _count(
        5000, "Streams and waiting requests that one API process holds open at the same time.", most=1_000_000
    )
    streams_per_user: int = _count(
        20, "Of these, those of one user: as many pages and commands may follow jobs.", most=1_000_000
    )
    requests_per_user: int | None = _count(
        None, "Requests per second that one API process takes from one user. Unset: any.", most=1_000_000
    )
    page_args: int = _size(
        4 * MIB, "Arguments of jobs in one page of a listing; what is beyond is left out, and said so."
    )
    trusted_proxies: tuple[str, ...] = _setting(
        (),
        _Networks(),
        "addresses or networks like 10.0.0.0/8",
        "Proxies in front of the API whose `X-Forwarded-For` says where a request comes from.",
    )
    allow_origin: tuple[str, ...] = _setting(
        (),
        _Origins(),
        "origins like https://board.example.org, or *",
        "Origins whose pages may call the API from a browser.",
    )
    data_roots: tuple[str, ...] = _setting(
        (),
        _Strings(),
        "folders",
        "Folders from which the example jobs may read files, beside the file that is shipped.",
    )
    dummy_sleep_max: float | None = _seconds(
        None, "Longest sleep of DummyJob; for tests. Unset: as asked for.", least=0
    )
    log_level: str = _choice(
        "INFO", ("DEBUG", "INFO", "WARNING", "ERROR"), "Least level of the daemons' own log."
    )
    log_format: str = _choice(
        "auto",
        ("auto", "text", "json"),
        "Form of the daemons' own log lines; auto is text on a terminal, else JSON.",
    )

    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def load(
        cls,
        toml: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Settings:
        """Read and check all settings.

        Args:
            toml: settings file; without one the variable CORE4_CONFIG may name it.
            environ: variables to read instead of those of this process.
            overrides: values of the command line; None means not given.

        Raises:
            ConfigError: with every problem, one a line; ``facts["problems"]`` lists them.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        problems: list[str] = []
        path = toml or environ.get("CORE4_CONFIG")
        layers = [_from_file(Path(path), problems)] if path else []
        layers += [_from_environment(environ, problems), _from_command_line(overrides, problems)]
        for layer in layers:
            for name, (value, origin) in layer.items():
                values[name], origins[name] = value, origin
        if not problems:
            settings = cls(**values, origins={name: origins.get(name, "default") for name in FIELDS})
            problems = settings._contradictions()
        if problems:
            raise ConfigError("\n".join(problems), problems=problems)
        return settings

    def _contradictions(self) -> list[str]:
        if self.dead_after >= 3 * self.heartbeat:
            return []
        return [
            f"CORE4_DEAD_AFTER is {self.dead_after:g} and CORE4_HEARTBEAT {self.heartbeat:g}: "
            "a worker must miss three heartbeats at least before it is declared dead"
        ]

    def shown(self, name: str) -> Any:
        """The value of a setting as it may be shown: secrets are masked."""
        value = getattr(self, name)
        if not FIELDS[name].secret or not value:
            return value
        return mask_url(value) if isinstance(value, str) else tuple(map(_mask_key, value))

    def signers(self) -> dict[str, str]:
        """The secrets of those whose functions are run, by the names of their keys."""
        return dict(key.split(":", 1) for key in self.function_keys)

    def to_environ(self) -> dict[str, str]:
        """Variables that give another process the same settings: all that differ from the default."""
        variables = {}
        for name, setting in FIELDS.items():
            value = getattr(self, name)
            if value is not None and (
                value != setting.default or self.origins.get(name, "default") != "default"
            ):
                variables[setting.variable] = _to_text(value)
        return variables

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.shown(name)!r}" for name in FIELDS)
        return f"Settings({shown})"


@dataclass(frozen=True)
class Setting:
    """One row of the table of settings."""

    name: str
    type: str
    default: Any
    accepts: str
    doc: str
    unit: str
    secret: bool
    parser: fields.Field[Any]

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return PREFIX + self.name.upper()

    def parse(self, value: Any) -> Any:
        """The checked value of `value`, text or a TOML value.

        Raises:
            ValidationError: it is not accepted.
        """
        # marshmallow counts true as 1 and the text of a number as a number in a file, too.
        if isinstance(value, bool) and not isinstance(self.parser, fields.Boolean):
            raise ValidationError("not a truth value")
        return self.parser.deserialize(_number(value) if isinstance(value, str) and self._numeric else value)

    @property
    def _numeric(self) -> bool:
        return isinstance(self.parser, fields.Integer) and not isinstance(self.parser, _Size)

    def complaint(self, source: str, value: Any) -> str:
        """What is wrong with `value` from `source`, in words."""
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        shown = mask_url(text) if self.secret else text
        unit = f" ({self.unit})" if self.unit and self.unit not in self.accepts else ""
        return f"{source} is {shown!r:.200}, expected {self.accepts}{unit}"


def _number(text: str) -> int | str:
    # A strict integer field takes no text, and a lax one cuts 1.5 to 1.
    return int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text) else text


def _row(field: dataclasses.Field[Any]) -> Setting:
    default = field.default if field.default is not dataclasses.MISSING else "$XDG_DATA_HOME/core4-jobs"
    return Setting(name=field.name, type=str(field.type), default=default, **field.metadata)


FIELDS: Mapping[str, Setting] = {
    field.name: _row(field) for field in dataclasses.fields(Settings) if field.metadata
}

_Layer = dict[str, tuple[Any, str]]


def _mask_key(key: str) -> str:
    return key.partition(":")[0] + ":***"


def mask_url(url: str) -> str:
    """`url` without what must not be shown: user, password and options that carry secrets."""
    head, at, tail = url.rpartition("@")
    scheme = head.partition("://")[0] + "://" if "://" in head else ""
    if not at and "://" not in url:
        return "***"  # whatever it is, it is no URL: perhaps the bare password
    shown = f"{scheme}***@{tail}" if at else url
    return re.sub(r"(?i)((?:password|properties)[^=&]*)=[^&]*", r"\1=***", shown)


def _to_text(value: Any) -> str:
    if isinstance(value, tuple):
        return (
            json.dumps(value)
            if any("," in item or item.startswith("[") for item in value)
            else ",".join(value)
        )
    return str(value).lower() if isinstance(value, bool) else str(value)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else "; `core4 config` lists all settings"


def _from_file(path: Path, problems: list[str]) -> _Layer:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"settings file {path}: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"settings file {path} is not TOML: {error}")
        return {}
    layer: _Layer = {}
    for key, value in table.items():
        if key not in FIELDS:
            problems.append(f"settings file {path}: unknown setting {key}{_did_you_mean(key, FIELDS)}")
            continue
        _parse(layer, FIELDS[key], value, f"file {path}", f"{key} in {path}", problems)
    return layer


# As `core4 worker` has them.
_SHORT = {f"worker_{name}": name for name in ("name", "nr", "timeout", "debug")} | {"namespaces": "namespace"}


def _from_command_line(overrides: Mapping[str, Any], problems: list[str]) -> _Layer:
    layer: _Layer = {}
    for name, value in overrides.items():
        if name not in FIELDS:
            problems.append(f"unknown setting {name}{_did_you_mean(name, FIELDS)}")
        elif value is not None and value != ():
            option = "--" + _SHORT.get(name, name).replace("_", "-")
            _parse(layer, FIELDS[name], value, "command line", option, problems)
    return layer


def _parse(
    layer: _Layer, setting: Setting, value: Any, origin: str, source: str, problems: list[str]
) -> None:
    try:
        layer[setting.name] = setting.parse(value), origin
    except ValidationError:
        problems.append(setting.complaint(source, value))


class _Environment(environs.Env):
    """environs on a given mapping, which need not be that of this process."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(eager=False)
        self.given = environ

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self.given.get(env_key, default)


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> _Layer:
    env = _Environment(environ)
    layer: _Layer = {}
    # An empty variable counts as not set: compose files and units pass `${NAME:-}`.
    for setting in (setting for setting in FIELDS.values() if environ.get(setting.variable)):
        env.add_parser(f"read_{setting.name}", setting.parse)
        read: Callable[[str], Any] = getattr(env, f"read_{setting.name}")
        layer[setting.name] = read(setting.variable), f"environment {setting.variable}"
    try:
        env.seal()
    except environs.EnvValidationError as error:
        for variable in error.error_messages:
            setting = FIELDS[variable.removeprefix(PREFIX).lower()]
            problems.append(setting.complaint(variable, environ[variable]))
    problems.extend(_unknown_variables(environ))
    return layer


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = {*OTHER_VARIABLES, *(setting.variable for setting in FIELDS.values())}
    return [
        f"{name} is not a setting{_did_you_mean(name, known)}"
        for name in sorted(environ)
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX) and name not in known
    ]
