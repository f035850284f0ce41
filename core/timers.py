"""Functions that an application calls by the clock, in its own process: no job, no record, no retry.

For what looks after the process itself, like pausing its worker. What must happen once, whichever process
is up, is a schedule of a task.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from core4 import cron

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])
_LOOK = 60.0  # seconds that are slept at once: the clock may be set


class Timers:
    """Use it as a decorator: ``@timers(schedule="* * * * *")``. Needs a running loop."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def __call__(
        self, schedule: str, default_args: Mapping[str, Any] | None = None, *, zone: str = "UTC"
    ) -> Callable[[F], F]:
        """Call the function at each instant of a cron expression: a coroutine function on the loop, a plain
        one in a thread. What it raises is logged, the next instant comes all the same; one that passes while
        it still runs is left out.

        Args:
            default_args: ``{"args": [...], "kwargs": {...}}`` for each call.
            zone: IANA time zone of the expression.

        Raises: BadOption for an expression or a zone that is not understood.
        """
        cron.validate(schedule)
        cron.validate_zone(zone)
        given = default_args or {}
        args, kwargs = tuple(given.get("args") or ()), dict(given.get("kwargs") or {})

        def decorate(function: F) -> F:
            inspect.signature(function).bind(*args, **kwargs)  # what does not fit is told where it is written
            self._tasks.append(asyncio.create_task(self._run(function, schedule, zone, args, kwargs)))
            return function

        return decorate

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(
        self,
        function: Callable[..., Any],
        schedule: str,
        zone: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        while True:
            due = cron.next_after(schedule, datetime.now(UTC), zone)
            while (left := (due - datetime.now(UTC)).total_seconds()) > 0:
                await asyncio.sleep(min(left, _LOOK))
            try:
                if inspect.iscoroutinefunction(function):
                    await function(*args, **kwargs)
                else:
                    await asyncio.to_thread(function, *args, **kwargs)
            except Exception:
                log.exception("timer.failed", extra={"function": getattr(function, "__qualname__", "?")})
