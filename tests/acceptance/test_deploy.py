"""The files in deploy/: read by the programs that will read them, and their commands started as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from configparser import RawConfigParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from core4.config import Settings
from tests.helpers import (
    BASE,
    FAST,
    ROOT,
    Command,
    clean_environ,
    eventually,
    free_port,
    program,
)

CONTAINER, SYSTEMD = ROOT / "deploy/container", ROOT / "deploy/systemd"
UNITS = ("core4-api.service", "core4-worker@.service")
INSTALLED = "/opt/core4/bin/core4"  # where the units expect the command
SECRETS = {"MONGO_ROOT_PASSWORD": "aa11", "CORE4_DB_PASSWORD": "bb22", "MONGO_KEY": "cc33"}
USER = ("ann", "a long pass phrase")


class Unit(RawConfigParser):
    """A unit file; a key that stands twice keeps both values, one a line."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, interpolation=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]
        text = (SYSTEMD / name).read_text()
        repeated = re.sub(r"^SystemCallFilter=~.*\n", "", text, flags=re.MULTILINE)
        self.read_string(repeated.replace("EnvironmentFile=-", "OwnEnvironmentFile="))


def compose(**environ: str) -> dict[str, Any]:
    """The compose file with its variables filled in, as compose does it."""
    variables = {**environ_file(CONTAINER / ".env.example"), **SECRETS, **environ}

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2] or ""
        found = variables.get(name, "")
        assert found or not default.startswith(":?"), f"{name} must be set"
        return found or default.removeprefix(":-")

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(each) for key, each in node.items()}
        if isinstance(node, list):
            return [filled(each) for each in node]
        return re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", value, node) if isinstance(node, str) else node

    loaded: dict[str, Any] = filled(yaml.safe_load((CONTAINER / "compose.yaml").read_text()))
    return loaded


def environ_file(path: Path) -> dict[str, str]:
    """The variables of an env file."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def composers() -> list[list[str]]:
    """The installed programs that read compose files; there must be one in CI."""
    found = [
        command
        for command in (["docker", "compose"], ["docker-compose"])
        if shutil.which(command[0])
        and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0
    ]
    assert found or not os.environ.get("CI"), "CI must have docker compose"
    return found[:1]


# ---------------------------------------------------------------------- containers


def test_compose_reads_the_file() -> None:
    """Compose accepts the file and makes of it what we do; without the secrets it refuses."""
    expected = compose()
    for command in composers():
        full = [*command, "-f", str(CONTAINER / "compose.yaml"), "config"]
        done = subprocess.run(
            full, capture_output=True, text=True, check=False, env=clean_environ(**SECRETS), cwd=CONTAINER
        )
        assert done.returncode == 0, done.stderr
        read = yaml.safe_load(done.stdout)
        assert set(read["services"]) == set(expected["services"])
        for name, service in expected["services"].items():
            assert read["services"][name]["image"] == service["image"]
            assert read["services"][name]["environment"] == {
                key: str(each) for key, each in service["environment"].items()
            }
        refused = subprocess.run(
            full, capture_output=True, text=True, check=False, env=clean_environ(), cwd=CONTAINER
        )
        assert refused.returncode != 0
        assert "see .env.example" in refused.stderr


def test_compose_services() -> None:
    """A database that is ready before the rest starts, the API, two workers; nothing runs with privileges."""
    services = compose()["services"]

    assert sorted(services) == ["api", "mongo", "worker1", "worker2"]
    assert "healthcheck" in services["mongo"]
    assert "healthcheck" in services["api"]
    for name in ("api", "worker1", "worker2"):
        service = services[name]
        assert service["depends_on"]["mongo"]["condition"] == "service_healthy"
        assert (service["cap_drop"], service["read_only"]) == (["ALL"], True)
        assert "no-new-privileges:true" in service["security_opt"]
    assert all(str(port).startswith("127.0.0.1:") for port in services["api"]["ports"])
    assert "ports" not in services["mongo"]


def test_compose_settings_are_ours() -> None:
    """What compose hands to the product are settings that it accepts; secrets come from outside."""
    for name in ("api", "worker1", "worker2"):
        environ = {key: str(value) for key, value in compose()["services"][name]["environment"].items()}
        settings = Settings.load(environ=environ)
        assert settings.mongo_url == "mongodb://core4:bb22@mongo:27017/?replicaSet=rs0&authSource=core4"


def test_compose_commands_exist() -> None:
    """Each service's command is one that the command line knows, with options that it has."""
    for name in ("api", "worker1", "worker2"):
        verb, *options = compose()["services"][name]["command"]
        done = subprocess.run([program("core4"), verb, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert all(option in done.stdout for option in options if option.startswith("--"))


def test_stopping_gives_jobs_their_time() -> None:
    """Containers and units wait longer than a worker needs to let its jobs end."""
    needed = Settings.load(environ={}).drain + Settings.load(environ={}).grace

    assert int(compose()["services"]["worker1"]["stop_grace_period"].removesuffix("s")) > needed
    assert int(Unit(UNITS[1])["Service"]["TimeoutStopSec"]) > needed


def test_no_secret_is_in_the_files() -> None:
    """The files name secrets and hold none."""
    example = environ_file(CONTAINER / ".env.example")

    assert {name: example[name] for name in SECRETS} == dict.fromkeys(SECRETS, "")
    for path in (*CONTAINER.iterdir(), *SYSTEMD.iterdir()):
        assert not re.search(r"(?i)(password|key|pwd)[ ]*[=:][ ]*[\"']?(?=\w*\d)\w{6,}", path.read_text()), (
            path
        )


def test_the_image_has_what_the_wheel_needs() -> None:
    """The Dockerfile copies every folder of the package, builds in one stage, and does not run as root."""
    lines = (CONTAINER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    ignored = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()

    assert {"pyproject.toml", "README.rst", "LICENSE", "core", "api", "worker"} <= copied
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    assert sum(line.startswith("FROM") for line in lines) == 2
    assert [line for line in lines if line.startswith("USER")] == ["USER core4"]


# ---------------------------------------------------------------------- systemd


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units with the command's path mapped to the installed one."""
    found = []
    for name in UNITS:
        text = (SYSTEMD / name).read_text()
        assert INSTALLED in text
        path = tmp_path / name.replace("@.", "@one.")
        path.write_text(text.replace(INSTALLED, program("core4")))
        found.append(path)
    return found


def test_systemd_reads_the_units(units: list[Path]) -> None:
    """systemd finds nothing to complain about, and rates the exposure of the services as low."""
    analyze = shutil.which("systemd-analyze")
    assert analyze or not os.environ.get("CI"), "CI must have systemd-analyze"
    for unit in units if analyze else ():
        verify = [str(analyze), "verify", "--man=no", str(unit)]
        done = subprocess.run(verify, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        security = [str(analyze), "security", "--offline=yes", "--threshold=20", str(unit)]
        done = subprocess.run(security, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", UNITS)
def test_units_are_restarted_and_restricted(name: str) -> None:
    """A service comes back after a failure, runs as its own user and gets no privileges."""
    service = Unit(name)["Service"]

    assert service["Restart"] == "always"
    assert service["User"] == "core4"
    assert service["KillMode"] == "mixed"
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["ProtectSystem"] == "strict"


@pytest.fixture
def services(mongo_url: str, database_name: str, tmp_path: Path) -> Iterator[tuple[str, dict[str, Command]]]:
    """The units' commands, started as written with their example's settings; one user exists."""
    port = free_port()
    example = environ_file(SYSTEMD / "core4.env.example")
    environ = {
        **example,
        **FAST,
        "CORE4_MONGO_URL": mongo_url,
        "CORE4_MONGO_DATABASE": database_name,
        "CORE4_PORT": str(port),
        "CORE4_JOBS": "core4.examples",
    }
    add = subprocess.run(
        [program("core4"), "user", "add", USER[0], "--allow", "cop"],
        env=clean_environ(**environ, CORE4_NEW_PASSWORD=USER[1]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert add.returncode == 0, add.stderr
    with ExitStack() as running:
        commands = {}
        for name in UNITS:
            line = Unit(name)["Service"]["ExecStart"].replace("%i", "one")
            words = shlex.split(line.replace(INSTALLED, program("core4")))
            commands[name] = running.enter_context(Command(words, environ, cwd=tmp_path))
        yield f"http://127.0.0.1:{port}", commands


def test_the_units_commands_work(services: tuple[str, dict[str, Command]]) -> None:
    """API and worker, started as the units do, run a job; SIGTERM ends both with exit code 0."""
    url, commands = services

    def ready() -> bool:
        for command in commands.values():
            assert command.process.poll() is None, command.output
        return requests.get(f"{url}/readyz", timeout=5).status_code == 200

    def ready_at_last() -> bool:
        try:
            return ready()
        except requests.ConnectionError:
            return False

    eventually(ready_at_last, 60, what="the API is ready")
    job = {"qual_name": "core4.queue.helper.job.example.DummyJob", "args": {"sleep": 0}, "follow": False}

    def enqueued() -> str:
        answer = requests.post(f"{url}{BASE}/job", json=job, auth=USER, timeout=30)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"])

    # Unknown until the worker has published it.
    job_id = eventually(enqueued, 60)

    def done() -> dict[str, Any]:
        document: dict[str, Any] = requests.get(f"{url}{BASE}/job/{job_id}", auth=USER, timeout=30).json()[
            "data"
        ]
        assert document["state"] == "complete"
        return document

    assert eventually(done, 60)["history"][-1]["worker"].startswith("one@")
    assert {name: command.stop() for name, command in commands.items()} == dict.fromkeys(UNITS, 0)
