"""What `core4 doctor` can make right in the queue and the journal."""

from __future__ import annotations

import asyncio

from bson import ObjectId
from pymongo.errors import DuplicateKeyError

from core4 import jobs, sanity
from core4.errors import JobExists
from core4.jobs import Job
from core4.outbox import Outbox
from core4.results import has_ended
from core4.store import JobStore
from core4.transitions import Change


class Repairs:
    """One repair per method; each may be repeated, and does nothing to a job that is well."""

    def __init__(self, store: JobStore, outbox: Outbox) -> None:
        self._store, self._outbox = store, outbox

    async def mend(self, job_id: ObjectId, *, by: str) -> None:
        """Make right what `core4.sanity` finds wrong with a document and one update can mend.

        Raises: JobNotFound; JobExists if its place has been taken.
        """
        try:
            _, after = await self._outbox.transition(job_id, lambda seen: sanity.mend(seen, by))
        except DuplicateKeyError as error:
            seen = await self._store.get(job_id)
            holder = await self._store.queue.find_one({"unique_key": jobs.unique_key_of(seen.document)})
            raise JobExists(holder["_id"] if holder else job_id, seen.name) from error
        await self._outbox.try_settle(after)

    async def restore_child(self, job_id: ObjectId, *, by: str) -> None:
        """Make the child that a job names as its restart and that does not exist.

        Raises: JobNotFound.
        """

        async def plan(seen: Job) -> Change | None:
            child_id = seen.document["enqueued"].get("child_id")
            if child_id is None or seen.document.get("outbox") or await self._store.document(child_id):
                return None
            return sanity.with_child(seen, child_id, by)

        _, after = await self._outbox.transition(job_id, plan)
        await self._outbox.try_settle(after)

    async def drop_twin(self, job_id: ObjectId) -> None:
        """Delete a job from the queue that the journal has with its end: the journal is right."""
        queued, journaled = await asyncio.gather(
            self._store.queue.find_one({"_id": job_id}), self._store.journal.find_one({"_id": job_id})
        )
        if queued and journaled and not queued.get("settle") and has_ended(journaled):
            await self._store.queue.delete_one({"_id": job_id, "rev": queued["rev"]})

    async def recall(self, job_id: ObjectId, *, by: str) -> None:
        """Bring a job back that is in the journal without an end.

        It is inserted where no worker sees it, and put in line when the journal has let it go: whoever
        starts a job and finds it there takes it for done.
        """
        found = await self._store.journal.find_one({"_id": job_id})
        if found is None or has_ended(found):
            return
        document = sanity.recalled(Job.from_document(found, journal=True), by)
        for _ in range(2):
            try:
                await self._store.queue.insert_one(document)
                break
            except DuplicateKeyError:
                if await self._store.queue.find_one({"_id": job_id}, {"_id": 1}):
                    break  # an earlier try did it, or it had never left
                document.pop("unique_key", None)  # somebody took its place: it runs beside that one
        await self._store.journal.delete_one({"_id": job_id, "rev": found["rev"], "state": found["state"]})
        await self.mend(job_id, by=by)
