"""The jobs whose end somebody on this worker waits for: one look at the database is for all of them."""

from __future__ import annotations

import asyncio
import logging
import random

from bson import ObjectId

from core4.attendance import TROUBLE
from core4.changes import Change
from core4.waits import heard
from core4.worker.backend import Backend
from core4.worker.protocol import Message

log = logging.getLogger(__name__)


class Watch:
    """Tells how jobs ended, wherever they run; looks when something changed, else every so many seconds."""

    def __init__(self, backend: Backend, every: float) -> None:
        self._backend, self._every = backend, every
        self._waiting: dict[ObjectId, list[asyncio.Future[Message]]] = {}
        self._look = asyncio.Event()

    def hear(self, change: Change) -> None:
        """Something has changed in the queue."""
        if self._waiting and (change.kind == "resync" or change.id in self._waiting):
            self._look.set()

    async def end_of(self, job_id: ObjectId) -> Message:
        """What its caller is told when the job has ended."""
        end: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, []).append(end)
        self._look.set()  # it may have ended before anybody listened
        try:
            return await end
        finally:
            waiting = self._waiting[job_id]
            waiting.remove(end)
            if not waiting:
                del self._waiting[job_id]

    async def run(self) -> None:
        """Look until cancelled; an outage of the database only takes time."""
        while True:
            await heard(self._look, self._every * random.uniform(0.75, 1.25))
            self._look.clear()
            if not self._waiting:
                await self._look.wait()
                continue
            try:
                await self._tell()
            except TROUBLE as error:
                log.warning("watch.delayed", extra={"error": str(error)[:200]})

    async def _tell(self) -> None:
        for job_id, told in (await self._backend.ended(list(self._waiting))).items():
            for end in self._waiting.get(job_id, ()):
                if not end.done():
                    end.set_result(told)
