"""Start, look at and stop workers from Python, under the names that myjobs documents.

Each call takes settings as keywords (`jobs`, `slots`, `namespaces`, `functions`, ...) over those of the
environment; a list may be written as there, too (`jobs="my_jobs.py"`). `ConfigError` says what is wrong.
What is started in processes ends with the process that started it; windows of tmux stay.
"""

from __future__ import annotations

import asyncio
import difflib
import getpass
import signal
import subprocess
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, TypeVar

from core4.config import FIELDS, Settings
from core4.controls import ControlStore
from core4.database import Database, Document
from core4.embedded import database_url
from core4.errors import ConfigError
from core4.options import shown
from core4.pool import WORKER, environ_of
from core4.queues import JobQueue
from core4.registry import LIVING, WorkerRegistry, described
from core4.service import end, spawn
from core4.tmux import Windows

T = TypeVar("T")
Type = Literal["inprocess", "subprocess", "tmux"]
_ARGUMENTS = ("nr", "debug", "nr_fixed_workers", "nr_workers", "minimum", "maximum")  # beside settings
_MOST_WORKERS, _MOST_NR = 1000, 10_000

_started: list[WorkerPool] = []


@dataclass(frozen=True)
class Worker:
    """A worker as it was when somebody looked.

    `name` is w1, w2, ...; `state` is NEW, WAITING, BUSY, HALTED or ERROR, then `error` says why; `pid` is 0
    when it has ended; `timeout` in seconds; the times are UTC.
    """

    id: str
    name: str
    nr: int | None
    type: str
    state: str
    pid: int
    current_jobs: tuple[str, ...]
    time_start: datetime
    last_update: datetime
    timeout: float | None
    error: str | None
    debug: bool
    halt: bool
    settings: Settings = field(repr=False, compare=False)

    @property
    def current_job(self) -> str | None:
        """The first of the jobs that it runs."""
        return self.current_jobs[0] if self.current_jobs else None

    def stop(self, hard: bool = False) -> None:
        """Let it end when its jobs have ended; `hard`: at once, and they go back in line."""

        async def tell(database: Database) -> None:
            await ControlStore(database).stop(self.id, by=getpass.getuser(), hard=hard)

        _ask(self.settings, tell)


class WorkerPool:
    """Workers in processes of their own, with a supervisor that replaces who dies.

    They end with the process that started them.
    """

    def __init__(self, settings: Settings, *options: str) -> None:
        self._settings = settings
        self._process = spawn([*WORKER, *options], env=environ_of(settings), stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True until it has ended."""
        return self._process.poll() is None

    def stop(self, graceful: bool = True, timeout: float = 60.0, hard: bool = True) -> bool:
        """End all workers; False if they have not ended after `timeout` seconds.

        Args:
            graceful: running jobs get `CORE4_DRAIN` seconds to end; else they go back in line at once.
            timeout: seconds to wait.
            hard: whoever is left after that is killed.
        """
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            if not graceful:
                self._process.send_signal(signal.SIGINT)  # a second one hurries
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            if not hard:
                return False
            end(self._process, 0)
        return True


def worker_inprocess_start(nr: int = 1, debug: bool = False, **settings: Any) -> int:
    """Run one job in this process, which waits until there is one, and stop; returns the exit code.

    For tests and for looking at a job closely. Main thread only, without a running event loop.
    """
    _check("nr", nr, _MOST_NR)
    return _run_here(_load(settings, worker_nr=nr, worker_debug=debug, worker_jobs=1))


worker_start = worker_inprocess_start


def worker_subprocess_start(nr: int | None = None, debug: bool = False, **settings: Any) -> WorkerPool:
    """Start one worker as a child process; returns at once. Main thread only."""
    _check("nr", nr, _MOST_NR)
    return _start(_load(settings, worker_nr=nr, worker_debug=debug), "--processes", "1")


def workers_subprocess_start(
    nr_fixed_workers: int | None = None,
    debug: bool = False,
    *,
    minimum: int = 1,
    maximum: int = 10,
    **settings: Any,
) -> WorkerPool:
    """Start a pool of child processes; returns at once. Main thread only.

    Args:
        nr_fixed_workers: so many workers; without it as many as there is work for.
        minimum: at least so many then.
        maximum: at most so many then.

    Raises: ConfigError.
    """
    for name, value in (
        ("nr_fixed_workers", nr_fixed_workers),
        ("minimum", minimum),
        ("maximum", maximum),
    ):
        _check(name, value, _MOST_WORKERS)
    if nr_fixed_workers is None and minimum > maximum:
        raise ConfigError(f"minimum is {minimum}, maximum only {maximum}")
    given = _load(settings, worker_debug=debug)
    if nr_fixed_workers is not None:
        return _start(given, "--processes", str(nr_fixed_workers))
    return _start(given, "--min", str(minimum), "--max", str(maximum))


def worker_tmux_start(nr: int | None = None, debug: bool = False, **settings: Any) -> None:
    """See to it that the worker w<nr> (w1) runs in a window of tmux; nothing happens if it does."""
    _check("nr", nr, _MOST_NR)
    given = _load(settings, worker_debug=debug)
    windows = Windows(given.home)
    windows._require()
    there = windows.wanted if windows.is_open() else ""
    windows.open(given, max(nr or 1, int(there) if there.isdigit() else 0))


def workers_tmux_start(nr_workers: int = 4, debug: bool = False, **settings: Any) -> None:
    """Run so many workers in windows of tmux, which outlive this process. Again: changes their number."""
    _check("nr_workers", nr_workers, _MOST_WORKERS)
    given = _load(settings, worker_debug=debug)
    Windows(given.home).open(given, nr_workers)


def start_worker(type: Type = "subprocess", nr: int | None = None, **settings: Any) -> Any:
    """Start one worker of this type, as the function with its name does."""
    start: dict[str, Callable[..., Any]] = {
        "inprocess": lambda nr, **more: worker_inprocess_start(nr or 1, **more),
        "subprocess": worker_subprocess_start,
        "tmux": worker_tmux_start,
    }
    if type not in start:
        raise ConfigError(f"type is {shown(type)}, expected one of {', '.join(start)}")
    return start[type](nr, **settings)


def workers_find(state: str | None = None, *, every: bool = False, **settings: Any) -> dict[str, Worker]:
    """The workers by name, of one `state` if given.

    Args:
        every: those that have ended, too; of several with one name it is the last.
    """
    given = _load(settings)
    found = _ask(given, lambda database: _look(database, given, every))
    return {worker.name: worker for worker in found if state in (None, worker.state)}


def workers_check(**settings: Any) -> tuple[list[Worker], int, int]:
    """All workers that should be up, how many of them are well, and how many are not.

    Whoever supervises those that are not replaces them.
    """
    given = _load(settings)
    found = _ask(given, lambda database: _look(database, given, every=False))
    bad = sum(worker.state == "ERROR" for worker in found)
    return found, len(found) - bad, bad


def stop(graceful: bool = True, timeout: float = 60.0, hard: bool = True, **settings: Any) -> bool:
    """End the workers that this process has started, and those in tmux; arguments as for `WorkerPool.stop`.

    Returns True when all have ended.
    """
    given = _load(settings)
    ended = [pool.stop(graceful, timeout, hard) for pool in _started]
    _started[:] = [pool for pool in _started if pool.alive]
    windows = Windows(given.home)
    if windows.has_tmux() and windows.is_open():
        windows.close(timeout, now=not graceful)
    return all(ended)


# ---------------------------------------------------------------------- inside


def _load(given: dict[str, Any], **own: Any) -> Settings:
    for name in given:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, [*_ARGUMENTS, *FIELDS], n=1)
            hint = f", did you mean {near[0]}?" if near else "; `core4 config` lists all settings"
            raise ConfigError(f"{name} is neither an argument here nor a setting{hint}")
    return Settings.load(**{**given, **own})


def _check(name: str, value: Any, most: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and 1 <= value <= most):
        hint = "; start_worker(type, nr) starts one of a type" if isinstance(value, str) else ""
        raise ConfigError(f"{name} is {shown(value)}, expected a whole number from 1 to {most}{hint}")


def _start(settings: Settings, *options: str) -> WorkerPool:
    pool = WorkerPool(settings, *options)
    _started.append(pool)
    return pool


def _run_here(settings: Settings) -> int:
    from core4.worker.entry import run

    with database_url(settings) as url:
        return run(replace(settings, mongo_url=url))


def _ask(settings: Settings, action: Callable[[Database], Awaitable[T]]) -> T:
    """What the database says, also where an event loop runs already."""

    async def act(url: str) -> T:
        database = await Database.connect(url, settings.mongo_database, app_name="core4 workers")
        try:
            return await action(database)
        finally:
            await database.close()

    with database_url(settings) as url, ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(act(url))).result()


async def _look(database: Database, settings: Settings, every: bool) -> list[Worker]:
    where: Document = {} if every else {"state": {"$in": LIVING}}
    rows = await WorkerRegistry(database).list(where=where)
    held = await JobQueue(database, settings).store.held_by([row["_id"] for row in rows])
    controls = await ControlStore(database).read()
    found = []
    for row in reversed(rows):
        shown = described(row, held.get(row["_id"], ()), settings.dead_after)
        found.append(
            Worker(
                id=row["_id"],
                name=shown["label"],
                nr=shown.get("nr"),
                type=shown["type"],
                state=shown["status"],
                pid=row["pid"] if row["state"] in LIVING else 0,
                current_jobs=tuple(str(job["_id"]) for job in shown["current"]),
                time_start=row["started_at"],
                last_update=row["beat"],
                timeout=shown["timeout"],
                error=shown["error"],
                debug=shown["debug"],
                halt=controls.stop_of([row["_id"]]) is not None,
                settings=settings,
            )
        )
    return found
