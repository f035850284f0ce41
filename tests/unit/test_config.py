"""Settings: where each value comes from, what is accepted, and how a mistake is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core4.config import FIELDS, MIB, Settings, mask_url
from core4.errors import ConfigError

SECRET_URL = "mongodb://app:s3cret%40@db1:27017/?authSource=admin"


def problems(**options: Any) -> list[str]:
    """What is wrong with these settings."""
    with pytest.raises(ConfigError) as caught:
        Settings.load(**{"environ": {}, **options})
    found: list[str] = caught.value.facts["problems"]
    return found


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.row("S52")
def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """Each layer overrides the one below, and origins tell which one won."""
    toml = write(tmp_path / "core4.toml", 'slots = 2\nport = 7000\nhost = "::1"')

    settings = Settings.load(toml, {"CORE4_PORT": "8000", "CORE4_HOST": "localhost"}, host="127.0.0.2")

    assert (settings.slots, settings.port, settings.host, settings.poll) == (2, 8000, "127.0.0.2", 1.0)
    assert {name: settings.origins[name] for name in ("slots", "port", "host", "poll")} == {
        "slots": f"file {toml}",
        "port": "environment CORE4_PORT",
        "host": "command line",
        "poll": "default",
    }


def test_file_is_named_by_variable_and_option_beats_it(tmp_path: Path) -> None:
    """CORE4_CONFIG names the file unless --config names another one."""
    one, two = write(tmp_path / "1.toml", "slots = 1"), write(tmp_path / "2.toml", "slots = 2")

    assert Settings.load(environ={"CORE4_CONFIG": str(one)}).slots == 1
    assert Settings.load(two, {"CORE4_CONFIG": str(one)}).slots == 2


def test_what_is_not_given_stays_default() -> None:
    """Options left out on the command line and empty variables set nothing."""
    settings = Settings.load(environ={"CORE4_SLOTS": "", "CORE4_MONGO_URL": ""}, port=None, jobs=())

    assert settings == Settings()


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("CORE4_SLOTS", " 8 ", 8),
        ("CORE4_GRACE", "1.5", 1.5),
        ("CORE4_LOG_CAP", "2 MiB", 2 * MIB),
        ("CORE4_LOG_CAP", "4096", 4096),
        ("CORE4_RELOAD", "yes", True),
        ("CORE4_JOBS", "a.b, c.py,", ("a.b", "c.py")),
        ("CORE4_JOBS", '["with, comma.py"]', ("with, comma.py",)),
        ("CORE4_NAMESPACES", "A,B,A", ("A", "B")),
        ("CORE4_HOME", "/data/core4", Path("/data/core4")),
        ("CORE4_MONGO_URL", SECRET_URL, SECRET_URL),
        ("CORE4_ALLOW_ORIGIN", "https://a.example:8443,http://b", ("https://a.example:8443", "http://b")),
    ],
)
def test_text_of_a_variable(variable: str, text: str, value: object) -> None:
    """Variables are text; each becomes a value of its setting's type."""
    settings = Settings.load(environ={variable: text})

    assert getattr(settings, variable.removeprefix("CORE4_").lower()) == value


@pytest.mark.row("S52")
@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CORE4_PORT", "65536"),
        ("CORE4_PORT", "1.5"),
        ("CORE4_PORT", "-1"),
        ("CORE4_PORT", "http"),
        ("CORE4_SLOTS", "0"),
        ("CORE4_GRACE", "nan"),
        ("CORE4_GRACE", "inf"),
        ("CORE4_GRACE", "10s"),
        ("CORE4_RELOAD", "perhaps"),
        ("CORE4_LOG_CAP", "2 apples"),
        ("CORE4_LOG_LEVEL", "LOUD"),
        ("CORE4_NAMESPACES", "with space"),
        ("CORE4_JOBS", "[1, 2]"),
        ("CORE4_JOBS", "[broken"),
        ("CORE4_WORKER_NAME", "a@b"),
        ("CORE4_MONGO_DATABASE", "a.b"),
        ("CORE4_ALLOW_ORIGIN", "https://a.example/path"),
        ("CORE4_ALLOW_ORIGIN", "a.example"),
        ("CORE4_MONGO_URL", "postgres://db1"),
        ("CORE4_MONGO_URL", "mongodb://"),
    ],
)
def test_wrong_value_is_named_with_variable_and_accepted_values(variable: str, text: str) -> None:
    """The message has the variable, the value that was given, and what is accepted."""
    (problem,) = problems(environ={variable: text})

    setting = FIELDS[variable.removeprefix("CORE4_").lower()]
    assert problem.startswith(f"{variable} is ")
    assert setting.accepts in problem
    assert setting.secret or repr(text) in problem


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """A start that fails names everything that has to be corrected, whatever its source."""
    toml = write(tmp_path / "core4.toml", 'prot = 1\nslots = "many"\nreload = 1.5')

    found = problems(toml=toml, environ={"CORE4_POLL": "never", "CORE4_SLOT": "2"}, port=70000)

    assert found == [
        f"settings file {toml}: unknown setting prot, did you mean port?",
        f"slots in {toml} is 'many', expected {FIELDS['slots'].accepts}",
        f"reload in {toml} is '1.5', expected true or false",
        f"CORE4_POLL is 'never', expected {FIELDS['poll'].accepts} (seconds)",
        "CORE4_SLOT is not a setting, did you mean CORE4_SLOTS?",
        f"--port is '70000', expected {FIELDS['port'].accepts}",
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("slots", True), ("grace", False), ("port", 1.5), ("jobs", 5), ("host", 1)]
)
def test_file_values_have_the_setting_s_type(tmp_path: Path, name: str, value: object) -> None:
    """TOML has types: true is no number, and 1.5 is not cut to 1."""
    toml = write(tmp_path / "core4.toml", f"{name} = {str(value).lower()}")

    assert [problem.split(" is ")[0] for problem in problems(toml=toml)] == [f"{name} in {toml}"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"slots =", "is not TOML"), (b"\xff\xfe", "is not TOML"), (None, "no such file")],
    ids=["broken", "not-utf8", "missing"],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    """A file that is asked for and cannot be read is an error, not ignored."""
    path = tmp_path / "core4.toml"
    if content is not None:
        path.write_bytes(content)

    (problem,) = problems(toml=path)

    assert str(path) in problem
    assert words in problem.lower() or words in problem


def test_dead_after_leaves_room_for_heartbeats() -> None:
    """Settings that contradict each other are refused together."""
    (problem,) = problems(environ={"CORE4_HEARTBEAT": "10", "CORE4_DEAD_AFTER": "20"})

    assert "CORE4_HEARTBEAT" in problem
    assert "CORE4_DEAD_AFTER" in problem


def test_variables_of_others_are_no_mistake() -> None:
    """What the client library, the command line and test suites read is not taken for a misspelt setting."""
    environ = {"CORE4_URL": "http://a", "CORE4_PASSWORD": "x", "CORE4_TEST_MARK": "1", "HOME": "/root"}

    assert Settings.load(environ=environ) == Settings()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("mongodb://db1/x", "mongodb://db1/x"),
        (SECRET_URL, "mongodb://***@db1:27017/?authSource=admin"),
        ("mongodb://u:p@ss/w@db1", "mongodb://***@db1"),
        ("u:p@db1", "***@db1"),
        ("s3cret", "***"),
        (
            "mongodb://db1/?tlsCertificateKeyFilePassword=p&a=b",
            "mongodb://db1/?tlsCertificateKeyFilePassword=***&a=b",
        ),
        (
            "mongodb://db1/?authMechanismProperties=AWS_SESSION_TOKEN:t",
            "mongodb://db1/?authMechanismProperties=***",
        ),
    ],
)
def test_secrets_of_a_url_are_masked(url: str, shown: str) -> None:
    """Neither user, password nor secret options of a database URL are shown."""
    assert mask_url(url) == shown


@given(st.text("ab:/@?&=%", max_size=20))
def test_password_never_shows(noise: str) -> None:
    """However broken the URL is, neither the error nor the settings' repr has the password."""
    url = f"mongodb://user:s3cret{noise}@db1/"
    try:
        shown = repr(Settings.load(environ={"CORE4_MONGO_URL": url}))
    except ConfigError as error:
        shown = str(error)

    assert "s3cret" not in shown


def test_settings_travel_to_a_child_process() -> None:
    """What `to_environ` gives is read back as the same settings, secrets and odd lists included."""
    environ: Mapping[str, str] = {
        "CORE4_MONGO_URL": SECRET_URL,
        "CORE4_JOBS": '["a,b.py", "[c]"]',
        "CORE4_RELOAD": "on",
        "CORE4_GRACE": "0.25",
        "CORE4_POLL": "1",
    }
    settings = Settings.load(environ=environ, port=0, slots=3)

    assert Settings.load(environ=settings.to_environ()) == settings


@pytest.mark.row("S52")
def test_settings_are_read_only() -> None:
    """What was checked once cannot be changed afterwards."""
    settings = Settings.load(environ={})

    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    """The table has what the documentation and `core4 config` show."""
    assert all(setting.doc and setting.accepts and setting.type for setting in FIELDS.values())
    secret = {name for name, setting in FIELDS.items() if setting.secret}
    assert secret == {"mongo_url", "worker_secret", "broker_url", "function_keys"}
