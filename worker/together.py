"""Calls for single jobs that are made at the same time become one call for all of them.

Nothing waits for others to come: what comes while a call is under way goes into the next one. So a worker
with one job is as fast as without this, and one with many makes few round trips.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Together(Generic[Item, Result]):
    """One kind of call. `perform` gets up to `most` items and gives a result, or an error, for each.

    What it raises itself is raised for each: it has to be repeatable, as all is that a worker stores.
    """

    def __init__(
        self, perform: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]], most: int
    ) -> None:
        self._perform, self._most = perform, most
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._work: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """The result for one item."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._work is None:
            # What is logged on the way is about all of them, not about the job that came first.
            self._work = asyncio.create_task(self._go_on(), context=Context())
        return await future

    async def _go_on(self) -> None:
        try:
            while self._waiting:
                some, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                await self._perform_some(some)
        finally:
            self._work = None
            for _, future in self._waiting:
                future.cancel()  # the loop ends

    async def _perform_some(self, some: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        try:
            results = await self._perform([item for item, _ in some])
        except Exception as error:
            results = [error] * len(some)
        for (_, future), result in zip(some, results, strict=True):
            if future.done():
                continue  # whoever asked is gone
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
