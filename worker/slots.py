"""The slots of a worker: who runs has one, and lends it to others while it waits for jobs that it called.

No more bodies run than there are slots, nor more of a name than its `max_parallel`: who continues takes a
slot back first, before any other job is claimed. Those that wait are bounded elsewhere, see
`core4.worker.daemon`.

A body that has ended leaves its slot while that is being stored, so that nobody waits for the database
between two bodies; it goes on to count for its `max_parallel`, which is about running jobs. Of ends that are
on their way at a time, what is beyond the number of slots takes slots again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bson import ObjectId

from core4.jobs import Job

Attempt = tuple[ObjectId, int]


class Slots:
    """So many slots; `freed` is called when one may have become free."""

    def __init__(self, count: int, freed: Callable[[], None]) -> None:
        self.count, self._freed = count, freed
        # By attempt: the next one of a job may begin while it is stored how the last has ended.
        self._holders: dict[Attempt, Job] = {}
        self._lenders: dict[Attempt, Job] = {}
        self._ending: dict[Attempt, Job] = {}
        self._returning: dict[Attempt, asyncio.Future[None]] = {}  # the first has waited longest
        self._reserved = 0

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        taken = len(self._holders) + self._reserved + max(0, len(self._ending) - self.count)
        return max(0, self.count - taken)

    @property
    def lent(self) -> int:
        """Jobs that wait for others and have lent their slot."""
        return len(self._lenders)

    def rooms(self) -> dict[str, int]:
        """How many more of each name that is limited and runs may run; those that wait do not count."""
        jobs = [*self._holders.values(), *self._ending.values()]
        running = Counter(job.name for job in jobs)
        rooms: dict[str, int] = {}
        for job in jobs:
            if job.max_parallel is not None:
                left = max(0, job.max_parallel - running[job.name])
                rooms[job.name] = min(left, rooms.get(job.name, left))
        return rooms

    def is_full(self, name: str) -> bool:
        """True if as many of a name run as they allow."""
        return self.rooms().get(name) == 0

    @contextmanager
    def reserved(self, count: int) -> Iterator[None]:
        """Keep so many for jobs that are being claimed."""
        self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count
            self._hand_out()

    def take(self, job: Job) -> None:
        """A claimed job begins."""
        self._holders[_attempt(job)] = job

    def end(self, job: Job) -> None:
        """Nothing of the job runs any more; what is left is to store how it ended."""
        if self._holders.pop(_attempt(job), None) or self._lenders.pop(_attempt(job), None):
            self._ending[_attempt(job)] = job
            self._hand_out()
            self._freed()

    def leave(self, job: Job) -> None:
        """The job has ended, here at least."""
        self._ending.pop(_attempt(job), None)
        self._holders.pop(_attempt(job), None)
        self._lenders.pop(_attempt(job), None)
        if (returning := self._returning.pop(_attempt(job), None)) is not None:
            returning.cancel()
        self._hand_out()
        self._freed()

    def lend(self, job: Job) -> None:
        """The job waits for others; one that was to take its slot back goes on without."""
        if (returning := self._returning.pop(_attempt(job), None)) is not None and not returning.done():
            returning.set_result(None)
        if self._holders.pop(_attempt(job), None) is not None:
            self._lenders[_attempt(job)] = job
            self._hand_out()
            self._freed()

    async def take_back(self, job: Job) -> None:
        """The job continues as soon as there is a slot for it."""
        if _attempt(job) not in self._lenders:
            return
        self._returning[_attempt(job)] = returning = asyncio.get_running_loop().create_future()
        self._hand_out()
        try:
            await returning
        finally:
            if self._returning.get(_attempt(job)) is returning:
                del self._returning[_attempt(job)]

    def _hand_out(self) -> None:
        """Give what is free to those that want to continue."""
        for attempt, returning in list(self._returning.items()):
            job = self._lenders.get(attempt)
            if job is None or returning.done() or self.free <= 0 or self.is_full(job.name):
                continue
            self._holders[attempt] = self._lenders.pop(attempt)
            returning.set_result(None)


def _attempt(job: Job) -> Attempt:
    return job.id, job.fence
