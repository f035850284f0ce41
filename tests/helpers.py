"""What tests share: waiting for a condition, free ports, and the installed stack as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import requests

if TYPE_CHECKING:
    from core4.jobs import Job
    from core4.queues import JobQueue

ROOT = Path(__file__).resolve().parent.parent
BASE = "/core4/api/v1"
ADMIN = ("admin", "hans")
PROCESS_MARK = "CORE4_TEST_MARK"  # in the environment of every process a test starts, and of its children
READY_TIMEOUT = 60.0
MEMORY = Path("/dev/shm")
MEMORY_LEAST = 4 * 1024**3  # bytes free; a container's is often 64 MB

T = TypeVar("T")


def quick_folder() -> Path | None:
    """A folder in memory, if there is a large one. What dies in the tests are processes: what they have
    written stays, and no test waits for a disk at each of its thousands of durable writes.
    """
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < MEMORY_LEAST:
        return None
    return MEMORY


def eventually(look: Callable[[], T], timeout: float = 60.0, *, what: str = "", every: float = 0.05) -> T:
    """The first true value that `look` returns; AssertionError with its last value after `timeout` seconds.

    An AssertionError of `look` itself counts as not yet.
    """
    deadline = time.monotonic() + timeout
    while True:
        value, failure = _look(look)
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(_still(what, value, failure, timeout)) from failure
        time.sleep(every)


@contextlib.contextmanager
def unsettled(queue: JobQueue) -> Iterator[None]:
    """What is done within is left by halves: as by a process that dies before it settles a job."""
    outbox = queue.outbox
    whole = outbox.try_settle, outbox.settle

    async def later(job: Job) -> Any:
        return 0

    outbox.try_settle = outbox.settle = later  # type: ignore[method-assign]
    try:
        yield
    finally:
        outbox.try_settle, outbox.settle = whole  # type: ignore[method-assign]


async def eventually_async(
    look: Callable[[], Awaitable[T]], timeout: float = 60.0, *, what: str = "", every: float = 0.05
) -> T:
    """`eventually` for a coroutine function; the loop goes on in between."""
    deadline = time.monotonic() + timeout
    while True:
        failure: AssertionError | None = None
        value: Any = None
        try:
            value = await look()
        except AssertionError as error:
            failure = error
        if value:
            return value  # type: ignore[no-any-return]
        if time.monotonic() > deadline:
            raise AssertionError(_still(what, value, failure, timeout)) from failure
        await asyncio.sleep(every)


def _look(look: Callable[[], T]) -> tuple[T | None, AssertionError | None]:
    try:
        return look(), None
    except AssertionError as error:
        return None, error


def _still(what: str, value: object, failure: AssertionError | None, timeout: float) -> str:
    seen = f"{failure}" if failure else f"{value!r:.2000}"
    return f"not within {timeout:g} s: {what or 'the condition'}; last seen: {seen}"


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """True if nobody listens on this port of localhost, on IPv4 nor IPv6."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.settimeout(2)
            if probe.connect_ex((host, port)) == 0:
                return False
    return True


def program(name: str) -> str:
    """The installed program of this name: beside the interpreter, else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{name} is not installed beside {sys.executable} nor on PATH"
    return found


def clean_environ(**more: str) -> dict[str, str]:
    """This process's environment without any setting of ours, plus `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CORE4_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


def marked(mark: str) -> list[psutil.Process]:
    """All living processes that carry `mark`, however far they have wandered from their parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(PROCESS_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def has_ended(pid: int) -> bool:
    """True if no process with `pid` runs; one that waits to be reaped by a slow parent does not run."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def described(processes: Sequence[psutil.Process]) -> list[str]:
    """Pid and command of each, for the message of a failed test."""
    lines = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            lines.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
    return lines


@dataclass
class Command:
    """A running command whose output is read as it comes; use it as a context manager.

    On exit it is ended by SIGTERM, and the test fails if any process it started is left.
    """

    args: Sequence[str | Path]
    environ: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    stop_timeout: float = 60.0

    def __post_init__(self) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.lines: list[str] = []
        self._reader: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "the command is not started"
        return self._process

    @property
    def output(self) -> str:
        """All that it wrote so far, stdout and stderr together."""
        return "".join(self.lines)

    def start(self) -> Command:
        environ = {**clean_environ(), **self.environ, PROCESS_MARK: self.mark}
        self._process = subprocess.Popen(
            [str(arg) for arg in self.args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            env=environ,
            cwd=self.cwd,
            # A group of its own: a test's Ctrl-C goes to it and not to the tests.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, text: str, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the output contains `text`; fails at once if the command ends before."""

        def look() -> bool:
            ended = self.process.poll() is not None
            if text in self.output:
                return True
            if ended:
                self._join()
                if text not in self.output:
                    raise RuntimeError(
                        f"ended with {self.process.returncode} before {text!r}:\n{self.output}"
                    )
            return text in self.output

        eventually(look, timeout, what=f"{text!r} in the output of {self.args}:\n{self.output[-4000:]}")

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for its end; returns the exit code."""
        code = self.process.wait(timeout)
        self._join()
        return code

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT for the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def stop(self) -> int:
        """SIGTERM, and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.wait(self.stop_timeout)

    def kill_everything(self) -> None:
        """kill -9 for every process that it started, itself included."""
        while alive := marked(self.mark):
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if self._process:
                self._process.poll()

    def assert_nothing_left(self, timeout: float = 10.0) -> None:
        """Every process it started has ended, detached ones included."""
        eventually(
            lambda: not marked(self.mark),
            timeout,
            what=f"no process left of {self.args}: {described(marked(self.mark))}",
        )

    def _join(self) -> None:
        if self._reader:
            self._reader.join(5)

    def __enter__(self) -> Command:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.stop()
            if kind is None:
                self.assert_nothing_left()
        finally:
            self.kill_everything()
            self._join()
            if self.process.stdout:
                self.process.stdout.close()
            if kind is not None:
                print(self.output[-20_000:])


@dataclass
class Stack:
    """The installed `core4 up`, running."""

    url: str
    home: Path
    command: Command
    auth: tuple[str, str] = ADMIN

    @property
    def api(self) -> str:
        """Base of the routes."""
        return self.url + BASE

    def request(self, method: str, path: str, **more: Any) -> requests.Response:
        """A request as the administrator; `path` is below the base."""
        return requests.request(method, self.api + path, **{"auth": self.auth, "timeout": (5, 60), **more})

    def data(self, method: str, path: str, **more: Any) -> Any:
        """The `data` of an answer that must be 200."""
        response = self.request(method, path, **more)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def enqueue(self, qual_name: str, **args: Any) -> str:
        """Enqueue without following; the job's id."""
        job_id = self.data("POST", "/job", json={"qual_name": qual_name, "args": args, "follow": False})
        assert isinstance(job_id, str)
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        """The document of a job as the API shows it."""
        document: dict[str, Any] = self.data("GET", f"/job/{job_id}")
        return document

    def wait_for_state(self, job_id: str, *states: str, timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the job is in one of `states`; its document then."""

        def look() -> dict[str, Any] | None:
            document = self.job(job_id)
            assert document["state"] in states, f"state is {document['state']}"
            return document

        found = eventually(look, timeout, what=f"job {job_id} in {states}", every=0.1)
        assert found is not None
        return found


@contextlib.contextmanager
def running_stack(
    home: Path, *targets: str | Path, port: int | None = None, **environ: str
) -> Iterator[Stack]:
    """The installed `core4 up` with a data folder of its own, until the block ends.

    Args:
        targets: job modules or files for its worker.
        port: a free one if not given.
        environ: variables like ``CORE4_SLOTS``.
    """
    port = port or free_port()
    variables = {"CORE4_HOME": str(home), "CORE4_PORT": str(port), **FAST, **environ}
    with Command([program("core4"), "up", *targets], variables, cwd=home) as command:
        stack = Stack(f"http://127.0.0.1:{port}", home, command)
        command.wait_for("\nready ", READY_TIMEOUT)
        eventually(lambda: _is_ready(stack.url), READY_TIMEOUT, what="GET /readyz answers 200")
        yield stack


def _is_ready(url: str) -> bool:
    try:
        return requests.get(url + "/readyz", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


# Timings of every test stack: failures show within seconds, not minutes.
FAST: Mapping[str, str] = {
    "CORE4_HEARTBEAT": "0.5",
    "CORE4_DEAD_AFTER": "3",
    "CORE4_RESCUE_EVERY": "0.5",
    "CORE4_POLL": "0.2",
    "CORE4_GRACE": "1",
    "CORE4_DRAIN": "2",
    "CORE4_LOG_FLUSH": "0.2",
    "CORE4_BCRYPT_COST": "4",
    "CORE4_STREAMS_PER_USER": "1000",
    "CORE4_MAX_CPU": "100",  # whatever else this machine does meanwhile
}
