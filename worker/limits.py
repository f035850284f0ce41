"""The limits of one attempt, by the worker's own clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

import psutil

from core4.jobs import Job
from core4.retries import Outcome
from core4.states import Flag

MEMORY_EVERY = 1.0  # seconds between two looks at the memory of one job

Mark = Callable[[Flag, str], Awaitable[None]]


class End(Protocol):
    """Ends the attempt with this outcome: TERM, grace, KILL; or KILL `at_once`."""

    def __call__(self, outcome: Outcome, *, at_once: bool = False) -> None: ...


class Limits:
    """Watches one attempt from `begin` on and ends it with `end` when it exceeds what its job allows.

    `parts` are to be run while the job process lives. `longest` is what the worker allows any
    job, in seconds. Whoever `waits` for another job is not silent.
    """

    def __init__(
        self, job: Job, end: End, longest: float | None = None, waits: Callable[[], bool] = lambda: False
    ) -> None:
        self._job, self._end, self._longest, self._waits = job, end, longest, waits
        self._began = self._heard = 0.0

    def begin(self) -> None:
        """The start of the attempt is recorded: time counts from now."""
        self._began = self._heard = time.monotonic()

    def heard(self) -> None:
        """The job has reported progress, or goes on after it has waited."""
        self._heard = time.monotonic()

    def parts(self, pid: int, mark: Mark) -> list[Coroutine[Any, Any, None]]:
        """What has to run beside the job, whose process is `pid`; `mark` stores a flag with its reason."""
        found = [self._watch_silence(self._job.zombie_time, mark)]
        if self._job.wall_time is not None:
            found.append(self._watch_wall(self._job.wall_time, mark))
        if self._job.timeout is not None:
            found.append(self._time_out(self._job.timeout, ""))
        if self._longest is not None:
            found.append(self._time_out(self._longest, ", the limit of its worker"))
        if self._job.memory_limit is not None:
            found.append(self._watch_memory(self._job.memory_limit, pid))
        return found

    async def _time_out(self, seconds: float, whose: str) -> None:
        await asyncio.sleep(self._began + seconds - time.monotonic())
        self._end(Outcome.timed_out(f"timeout: it ran for more than {seconds:g} seconds{whose}"))

    async def _watch_wall(self, seconds: float, mark: Mark) -> None:
        await asyncio.sleep(self._began + seconds - time.monotonic())
        reason = f"wall_time: it runs for more than {seconds:g} seconds"
        await mark("wall", reason)
        if self._job.wall_action == "kill":
            self._end(Outcome.timed_out(reason))

    async def _watch_silence(self, seconds: float, mark: Mark) -> None:
        while (left := self._heard + seconds - time.monotonic()) > 0:
            await asyncio.sleep(left)
            if self._waits():
                self.heard()
        reason = f"zombie_time: no progress for more than {seconds:g} seconds"
        await mark("zombie", reason)
        if self._job.zombie_action == "kill":
            self._end(Outcome.timed_out(reason))

    async def _watch_memory(self, limit: int, pid: int) -> None:
        try:
            keeper = psutil.Process(psutil.Process(pid).ppid())
        except psutil.NoSuchProcess:
            return  # it has ended already
        # In a thread: to find the tree, all processes of the machine are looked at.
        while (used := await asyncio.to_thread(memory_below, keeper)) <= limit:
            await asyncio.sleep(MEMORY_EVERY)
        self._end(Outcome.crashed(f"memory: used {used} of {limit} bytes"), at_once=True)


def memory_below(keeper: psutil.Process) -> int:
    """Bytes that all descendants of a process have in memory; shared pages count for each of them."""
    try:
        processes = keeper.children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    return sum(map(_memory, processes))


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # it has ended meanwhile
