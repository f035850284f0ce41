"""A private database server in the data folder, for first steps and single machines.

`EmbeddedServer` starts one as a child process and stops it again; `running` finds one that another
process has started. Which server: ``mongod`` if installed, else ``secantusd-rs``, else ``secantusd-py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from core4.config import without_settings
from core4.errors import ConfigError
from core4.service import end, spawn, tail_of

if TYPE_CHECKING:
    from pymongo.collection import Collection

    from core4.config import Settings

SERVERS = ("mongod", "secantusd-rs", "secantusd-py")
STATE_FILE, LOCK_FILE, LOG_FILE = "embedded.json", "embedded.lock", "embedded.log"
START_TIMEOUT = 60.0  # recovery after a crash, on a slow disk
STOP_TIMEOUT = 10.0
LOCK_TIMEOUT = 1.0  # the server of a stack that was just killed needs a moment to be gone
PORT_ATTEMPTS = 5


class FolderInUse(ConfigError):
    """Another process uses the data folder."""

    code = "folder_in_use"


class NoServer(ConfigError):
    """No database server is installed."""

    code = "no_server"

    def __init__(self) -> None:
        super().__init__(
            'no database: install the embedded one with `pip install "core4-jobs[embedded]"`, '
            "or set CORE4_MONGO_URL to a MongoDB server"
        )


@dataclass(frozen=True)
class ServerState:
    """What the state file says about a server: enough to find it and to know it from a stranger."""

    pid: int
    create_time: float
    port: int
    kind: str

    @property
    def url(self) -> str:
        """How to reach the server."""
        # It neither retries writes nor holds idle connections for long, whichever of the three it is.
        options = "directConnection=true&retryWrites=false&maxIdleTimeMS=240000&maxPoolSize=20"
        return f"mongodb://127.0.0.1:{self.port}/?{options}"


def running(home: Path) -> ServerState | None:
    """The server that runs on the data folder `home`; None if there is none.

    A state file that a crash left behind is recognised: by the process's start time, as pids come
    back, and by asking the server.
    """
    try:
        state = ServerState(**json.loads((home / STATE_FILE).read_text()))
        alive = abs(psutil.Process(state.pid).create_time() - state.create_time) < 1.0
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return state if alive and _answers(state, timeout=2.0) else None


@contextmanager
def database_url(settings: Settings, *, start: bool = False) -> Iterator[str]:
    """The URL of the database to use: the configured one, else the embedded one.

    Args:
        start: start the embedded server for the time being if none runs.

    Raises:
        ConfigError: there is no database.
    """
    if settings.mongo_url:
        yield settings.mongo_url
        return
    if state := running(settings.home):
        yield state.url
        return
    if not start:
        raise ConfigError(
            f"no database: CORE4_MONGO_URL is not set and no embedded one runs in {settings.home}; "
            "set it, or run `core4 up`"
        )
    with EmbeddedServer(settings.home) as server:
        yield server.url


class EmbeddedServer:
    """One private server on the data folder `home`, on a free loopback port, without authentication.

    It is killed with the process that started it; its data survives that. Use it from the main thread.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._state: ServerState | None = None
        self._last_port: int | None = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """How to reach the server. Raises RuntimeError if it is not started."""
        if self._state is None:
            raise RuntimeError("the embedded server is not started")
        return self._state.url

    @property
    def kind(self) -> str:
        """The name of the server's program; empty if it is not started."""
        return self._state.kind if self._state else ""

    @property
    def alive(self) -> bool:
        """True while the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> str:
        """Start the server and wait until it answers; returns its URL.

        Raises:
            FolderInUse: another process uses the folder.
            NoServer: none of the servers is installed.
            ConfigError: the folder cannot be written, or the server does not start.
        """
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            kind, program = find_server(self.home)
            data = self.home / "database" / kind
            for folder in (data.parent, data):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
            self._lock = _lock(self.home)
        except OSError as error:
            raise ConfigError(f"data folder {self.home}: {(error.strerror or str(error)).lower()}") from error
        try:
            return self._start_on_free_port(kind, program, data)
        except BaseException:
            self.stop()
            raise

    def stop(self, patience: float = STOP_TIMEOUT) -> None:
        """Stop the server, and wait until it is gone; harmless if it does not run.

        It is killed after `patience` seconds: no acknowledged write of state is lost by that.
        """
        if self._process:
            end(self._process, patience)
            self._process = None
        if self._lock is not None:
            (self.home / STATE_FILE).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
        self._state = None

    def _start_on_free_port(self, kind: str, program: str, data: Path) -> str:
        for _ in range(PORT_ATTEMPTS):
            # The same port as before, if it can be: who is connected comes back by itself.
            port, self._last_port = self._last_port or free_port(), None
            output = self._launch(kind, program, data, port)
            if self._wait_until_up(kind, port):
                if kind == "secantusd-rs":
                    _refuse_stale_keys(self.url, program)
                return self.url
            # Between our look and the server's bind another process may have taken the port.
            if "address already in use" not in output().lower():
                break
        raise ConfigError(
            f"the embedded database ({kind}) does not start: {output().rpartition(chr(10))[2]}; "
            f"more in {self.home / LOG_FILE}"
        )

    def _launch(self, kind: str, program: str, data: Path, port: int) -> Any:
        log = self.home / LOG_FILE
        log.unlink(missing_ok=True)
        command = _command(kind, program, data, port)
        assert self._lock is not None
        with os.fdopen(os.open(log, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as output:
            # The server inherits the lock: the folder is in use until both of us are gone.
            self._process = spawn(
                command,
                cwd=self.home,
                env=without_settings(
                    os.environ
                ),  # jobs can read it: passwords of ours are none of its business
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[self._lock],
            )
        return lambda: tail_of(log)

    def _wait_until_up(self, kind: str, port: int) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT
        process = psutil.Process(self._process.pid)
        state = ServerState(self._process.pid, process.create_time(), port, kind)
        while time.monotonic() < deadline and self._process.poll() is None:
            if _listens(process, port) and _answers(state, timeout=1.0):
                self._state, self._last_port = state, port
                write_private(self.home / STATE_FILE, json.dumps(asdict(state)))
                return True
            time.sleep(0.05)
        end(self._process, 0)
        return False


def find_server(home: Path) -> tuple[str, str]:
    """Name and path of the server to use on `home`: the one whose data is there, else the best.

    Raises:
        NoServer: none is installed.
    """
    installed = {kind: program for kind in SERVERS if (program := _program(kind))}
    if not installed:
        raise NoServer
    # A server that is installed later must not hide the data of the one used so far.
    used = [kind for kind in installed if (home / "database" / kind).is_dir()]
    kind = used[0] if used else next(iter(installed))
    return kind, installed[kind]


def _program(kind: str) -> str | None:
    beside = Path(sys.executable).parent / kind
    # In a virtual environment that is not activated, its programs are not on PATH.
    return shutil.which(kind) or (str(beside) if os.access(beside, os.X_OK) else None)


def _command(kind: str, program: str, data: Path, port: int) -> list[str]:
    if kind == "mongod":
        return [
            program,
            "--dbpath",
            str(data),
            "--bind_ip",
            "127.0.0.1",
            "--port",
            str(port),
            "--wiredTigerCacheSizeGB",
            "0.25",
            "--nounixsocket",
            "--quiet",
        ]
    # An empty settings file of our own, or it takes one from the user's folders.
    settings = data.parent / f"{kind}.toml"
    settings.touch(mode=0o600)
    return [
        program,
        "--config",
        str(settings),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--storage-path",
        str(data),
        "--cache-size",
        "128M",
        "--log-level",
        "WARNING",
    ]


def _listens(process: psutil.Process, port: int) -> bool:
    # Whoever took the port in between may be a database as well.
    try:
        sockets = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)


def _answers(state: ServerState, timeout: float) -> bool:
    # The plain connection first: it is refused at once where pymongo would wait and log.
    try:
        socket.create_connection(("127.0.0.1", state.port), timeout).close()
    except OSError:
        return False
    from pymongo import MongoClient
    from pymongo.errors import PyMongoError

    milliseconds = int(timeout * 1000)
    client: MongoClient[dict[str, Any]] = MongoClient(
        state.url, serverSelectionTimeoutMS=milliseconds, socketTimeoutMS=milliseconds
    )
    try:
        client.admin.command("ping")
    except PyMongoError:
        return False
    finally:
        client.close()
    return True


def _refuse_stale_keys(url: str, program: str) -> None:
    from pymongo import MongoClient

    client: MongoClient[dict[str, Any]] = MongoClient(url)
    try:
        if frees_keys(client["core4_probe"]["keys"]):
            return
    finally:
        client.drop_database("core4_probe")
        client.close()
    raise ConfigError(
        f"{program} keeps the old key of a unique index when a document changes: numbers of workers and "
        "slots of jobs would stay taken for ever. Take it off PATH, and "
        "secantusd-py is used; or set CORE4_MONGO_URL"
    )


def frees_keys(collection: Collection[dict[str, Any]]) -> bool:
    """True if a value of a unique index can be had again once its document has another one.

    secantusd-rs 0.5.3-beta.193 and .196 were seen to fail here.
    """
    from pymongo.errors import DuplicateKeyError

    collection.create_index("key", unique=True)
    try:
        collection.insert_one({"_id": "first", "key": 1})
        collection.update_one({"_id": "first"}, {"$set": {"key": 2}})
        collection.insert_one({"_id": "second", "key": 1})
    except DuplicateKeyError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _lock(home: Path) -> int:
    descriptor = os.open(home / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
        os.close(descriptor)
        raise FolderInUse(_in_use(home))


def _in_use(home: Path) -> str:
    state = running(home)
    holder = f" by the database of another `core4 up` (process {state.pid})" if state else ""
    return (
        f"the data folder {home} is in use{holder}; stop that one, or choose another folder with "
        "--home or CORE4_HOME"
    )


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step by one that only this user can read."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
