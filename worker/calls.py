"""The jobs that a running job has called and waits for.

Each has an id that follows from the attempt and the number of the call, so that no call makes two; it is the
caller's child and in its chain, its result is consumed by the caller. As long as a call is open the caller
has lent its slot. What is still open when nobody waits any more, is killed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from bson import ObjectId

from core4.attendance import TROUBLE
from core4.errors import LeaseLost
from core4.jobs import Job
from core4.worker.backend import Backend
from core4.worker.children import Children, Persist
from core4.worker.protocol import Message, ProtocolError
from core4.worker.slots import Slots
from core4.worker.watch import Watch

log = logging.getLogger(__name__)

KILL_PATIENCE = 5.0  # seconds for telling what was called that nobody waits for it any more

Answer = Callable[[Message], Awaitable[None]]


class Calls:
    """The open calls of one attempt of `job`."""

    def __init__(self, job: Job, children: Children, backend: Backend, watch: Watch, slots: Slots) -> None:
        self._job, self._children = job, children
        self._backend, self._watch, self._slots = backend, watch, slots
        self._open: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._kills: list[asyncio.Task[None]] = []  # not cut short by the end of the attempt
        self._closed = self._lost = False

    @property
    def waiting(self) -> bool:
        """True while the job waits for another."""
        return bool(self._open)

    def begin(self, number: int, wanted: Mapping[str, Any], persist: Persist, answer: Answer) -> None:
        """The body calls a job and is to get an `answer`; a number that is open is that call.

        Raises: KeyError, TypeError or ValueError for a request that is none.
        """
        name, args = str(wanted["name"]), dict(wanted["args"])
        if self._closed or number in self._open:
            return
        self._slots.lend(self._job)
        task = asyncio.create_task(self._call(number, name, args, persist, answer))
        self._open[number] = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def drop(self, number: int) -> None:
        """The body does not wait for this any more."""
        if (call := self._open.get(number)) is not None:
            call.cancel()

    async def close(self, *, lost: bool) -> None:
        """The attempt is over: kill what it waited for, but write nothing if the lease is `lost`."""
        self._closed, self._lost = True, lost
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._kills)

    async def _call(
        self, number: int, name: str, args: dict[str, Any], persist: Persist, answer: Answer
    ) -> None:
        try:
            found = await self._outcome(number, name, args, persist)
        except LeaseLost:
            return  # the execution knows
        except Exception as error:  # else the body would wait for an answer that nobody gives
            log.exception("call.failed", extra={"job_id": str(self._job.id)})
            found = {"refused": {"reason": "broken", "detail": repr(error)[:200]}}
        finally:
            del self._open[number]
            if not self._open and not self._closed:
                await self._slots.take_back(self._job)
        await _send(answer, number, found)

    async def _outcome(self, number: int, name: str, args: dict[str, Any], persist: Persist) -> Message:
        found = await self._children.call(number, name, args, persist)
        if "called" not in found:
            return found
        called = ObjectId(found["called"])
        try:
            return await self._watch.end_of(called)
        except asyncio.CancelledError:
            if not self._lost:
                self._kills.append(asyncio.create_task(self._kill(called)))
            raise

    async def _kill(self, called: ObjectId) -> None:
        try:
            async with asyncio.timeout(KILL_PATIENCE):
                await self._backend.kill_called(self._job, called)
        except TROUBLE as error:
            # It runs to its end, unheard.
            log.warning("call.left", extra={"called": str(called), "error": str(error)[:200]})


async def _send(answer: Answer, number: int, found: Message) -> None:
    try:
        await answer({"answer": number, **found})
    except ProtocolError as error:
        await answer({"answer": number, "refused": {"reason": "too_large", "detail": error.detail}})
