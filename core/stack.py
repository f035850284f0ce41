"""`core4 up`: database, API and worker as one thing that starts, says when it is ready, and stops.

Each part is a process of its own. All of them are bound to the life of this one, so that nothing is
left behind however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

import psutil
import requests

from core4.brokers import require
from core4.config import DEFAULT_USER, Settings, is_loopback, without_settings
from core4.database import Database
from core4.embedded import EmbeddedServer, write_private
from core4.errors import ConfigError, Core4Error
from core4.running import STATE_FILE
from core4.service import end, hide_memory, spawn, tail_of
from core4.users import UserStore

EXAMPLES = "core4.examples"

READY_TIMEOUT = 60.0
LOOK = 0.25  # seconds between two looks at the processes
BACKOFF = (1.0, 30.0)  # seconds until a process that died is started again: first, last
STABLE = 60.0  # seconds after which an old death is forgotten
MARGIN = 5.0  # seconds granted beyond what a process has promised to need

Say = Callable[[str], None]


class StartFailed(Core4Error):
    """A part of the stack did not start."""

    code = "start_failed"


class Interrupted(BaseException):
    """SIGINT or SIGTERM: stop, from wherever we are. No Exception, so that nobody swallows it."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Part:
    """One child process and how often it died lately."""

    name: str
    process: subprocess.Popen[bytes]
    started: float
    deaths: int = 0
    again_at: float | None = None  # monotonic time of the next start; None while it runs


class Stack:
    """The whole product on this machine: start it, `watch` it, `stop` it. Main thread only.

    Args:
        settings: as loaded; the stack fills in what it decides (database, port, examples).
        say: gets each line for the user.
        output: file for what the parts log; None: where this process logs.
    """

    def __init__(
        self, settings: Settings, *, say: Say = print, examples: bool = True, output: IO[bytes] | None = None
    ) -> None:
        self._say, self._output = say, output
        self._database: EmbeddedServer | None = None
        self._parts: dict[str, _Part] = {}
        jobs = (EXAMPLES, *settings.jobs) if examples and EXAMPLES not in settings.jobs else settings.jobs
        self.settings = replace(settings, jobs=jobs)
        self.default_user = False
        self._told = False  # the state file is ours

    @property
    def url(self) -> str:
        """Where the API is, for a client on this machine."""
        host = self.settings.host
        if is_loopback(host) or _is_any(host):
            host = "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    def start(self) -> None:
        """Start all parts; returns when a job can be enqueued and will run.

        Raises:
            ConfigError: something must be changed first; nothing is left running.
            StartFailed: a part ended or did not get ready in time; nothing is left running.
        """
        try:
            self._start()
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        hide_memory()
        _check_files(self.settings)
        if self.settings.broker_url:
            require(self.settings.broker_url)
        self.settings = replace(self.settings, port=_claimable_port(self.settings))
        if not self.settings.mongo_url:
            self._database = EmbeddedServer(self.settings.home)
            self.settings = replace(self.settings, mongo_url=self._database.start())
            self._say(f"database  {self._database.kind}, in {self.settings.home}")
        self.default_user = asyncio.run(_first_user(self.settings, embedded=self._database is not None))
        for name in ("api", "worker"):
            self._launch(name)
        self._wait_until_ready()
        self._write_state()

    def watch(self) -> None:
        """Keep all parts running until interrupted."""
        while True:
            if self._database and not self._database.alive:
                self._restart_database(self._database)
            for part in list(self._parts.values()):
                self._look_after(part)
            time.sleep(LOOK)

    def stop(self) -> None:
        """Stop all parts, the worker first: its jobs get their time, and their followers see the end."""
        for name, patience in (("worker", self.settings.drain + self.settings.grace), ("api", 5.0)):
            part = self._parts.get(name)
            if part:
                end(part.process, patience + MARGIN)
        self.kill(MARGIN)

    def kill(self, patience: float = 0) -> None:
        """Stop all parts at once; harmless if none runs. What was acknowledged is on disk already."""
        for part in self._parts.values():
            end(part.process, 0)
        self._parts.clear()
        if self._told:  # not that of another stack, which has refused us the folder
            (self.settings.home / STATE_FILE).unlink(missing_ok=True)
        if self._database:
            self._database.stop(patience)

    # ------------------------------------------------------------------ inside

    def _launch(self, name: str) -> None:
        settings = replace(self.settings, worker_type="subprocess")
        environ = without_settings(os.environ) | settings.to_environ()
        process = spawn(
            [sys.executable, "-P", "-m", "core4", name],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        deaths = self._parts[name].deaths if name in self._parts else 0
        self._parts[name] = _Part(name, process, time.monotonic(), deaths)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        asyncio.run(self._worker_up(deadline))
        while not _says_ready(f"http://{_address(self.settings)}/readyz"):
            self._check_start(deadline)
            time.sleep(0.05)

    async def _worker_up(self, deadline: float) -> None:
        """Wait until the worker is registered and what it runs is published."""
        # Imported here, as `core4 demo --help` needs no store.
        from core4.catalogue import Catalogue
        from core4.functions import SERVES
        from core4.registry import WorkerRegistry

        database = await Database.connect(str(self.settings.mongo_url), self.settings.mongo_database)
        try:
            registry, catalogue = WorkerRegistry(database), Catalogue(database)
            pid, hostname = self._parts["worker"].process.pid, socket.gethostname()
            while True:
                workers = [w for w in await registry.up() if (w["pid"], w["hostname"]) == (pid, hostname)]
                # That it runs functions is said by no entry of the catalogue: they come as source.
                published = {entry["_id"] for entry in await catalogue.all()} | {SERVES}
                if any(set(worker["jobs"]) <= published for worker in workers):
                    return
                self._check_start(deadline)
                await asyncio.sleep(0.05)
        finally:
            await database.close()

    def _check_start(self, deadline: float) -> None:
        for part in self._parts.values():
            if part.process.poll() is not None:
                raise StartFailed(
                    f"the {part.name} ended with exit code {part.process.returncode}{self._tail()}"
                )
        if time.monotonic() > deadline:
            raise StartFailed(f"not ready after {READY_TIMEOUT:g} s{self._tail()}")

    def _tail(self) -> str:
        if self._output is None:
            return "; see its messages above"
        return ":\n" + tail_of(Path(self._output.name))

    def _look_after(self, part: _Part) -> None:
        now = time.monotonic()
        if part.again_at is not None:
            if now >= part.again_at:
                self._launch(part.name)
            return
        if part.process.poll() is None:
            return
        part.deaths = 1 if now - part.started > STABLE else part.deaths + 1
        pause = min(BACKOFF[0] * 2 ** (part.deaths - 1), BACKOFF[1])
        part.again_at = now + pause
        self._say(
            f"the {part.name} ended ({_how(part.process.returncode)}); it is started again in {pause:g} s"
        )

    def _restart_database(self, database: EmbeddedServer) -> None:
        self._say("the database ended; it is started again")
        before = database.url
        database.stop()
        if database.start() == before:
            return
        # Its port was taken meanwhile: the others must learn the new one.
        self.settings = replace(self.settings, mongo_url=database.url)
        for name in self._parts:
            end(self._parts[name].process, MARGIN)
            self._launch(name)

    def _write_state(self) -> None:
        state = {
            "pid": os.getpid(),
            "create_time": psutil.Process().create_time(),
            "url": self.url,
            "default_user": self.default_user,
        }
        if self._database:
            write_private(self.settings.home / STATE_FILE, json.dumps(state))
            self._told = True


def _is_any(host: str) -> bool:
    return host in {"0.0.0.0", "::"}


def _address(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"{f'[{host}]' if ':' in host else host}:{settings.port}"


def _check_files(settings: Settings) -> None:
    missing = [target for target in settings.jobs if target.endswith(".py") and not Path(target).is_file()]
    if missing:
        raise ConfigError(f"no such file: {', '.join(missing)}; `core4 init FILE` writes a first job file")


def _claimable_port(settings: Settings) -> int:
    """The port to use, checked before anything is started. Raises ConfigError if it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"CORE4_HOST is '{settings.host}': {(error.strerror or '').lower()}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host}, port {settings.port}: {(error.strerror or '').lower()}; "
                "stop what uses it, or choose another one with --port (0 takes a free one)"
            ) from error
        port: int = probe.getsockname()[1]
        return port


async def _first_user(settings: Settings, *, embedded: bool) -> bool:
    """See to it that somebody can sign in; True if that is the default user.

    Raises:
        ConfigError: there is no user, or the default one would be reachable from outside.
    """
    database = await Database.connect(str(settings.mongo_url), settings.mongo_database)
    users = UserStore(database, settings)
    local = embedded and is_loopback(settings.host)
    try:
        await users.prepare()
        if not await users.list():
            if not local:
                raise ConfigError(
                    "no user exists yet; create the first one with `core4 user add NAME --allow cop`"
                )
            await users.add(*DEFAULT_USER, allow=["cop", "code"])
        default = await users.verify(*DEFAULT_USER) is not None
    finally:
        users.close()
        await database.close()
    if default and not local:
        name, password = DEFAULT_USER
        raise ConfigError(
            f"the default user {name} / {password} must not be reachable beyond this machine: change its "
            f"password with `core4 user passwd {name}`, or listen on 127.0.0.1"
        )
    return default


async def refuse_default_user(settings: Settings) -> None:
    """For an API that other machines can reach. Raises ConfigError if the default user can sign in."""
    if not is_loopback(settings.host):
        await _first_user(settings, embedded=False)


def _says_ready(url: str) -> bool:
    session = requests.Session()
    session.trust_env = False  # no proxy for this machine
    with session:
        try:
            return session.get(url, timeout=2).status_code == 200
        except requests.RequestException:
            return False


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
