"""One operation on many jobs: each of them goes through the very update it would if it were asked for alone.

A call handles so many jobs and takes so long, at most; its `Place` is where the next one goes on. Between two
jobs anything may happen: each outcome is told as the database had it, and a repeated call finds what is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Literal

from bson import ObjectId
from pymongo.errors import PyMongoError

from core4.errors import BadRequest, Conflict, JobNotFound, Unavailable
from core4.jobs import utcnow
from core4.queues import Action, JobQueue

BUDGET = 5.0  # seconds after which a call begins with no further job

Outcome = Literal["changed", "unchanged", "refused", "gone"]


@dataclass(frozen=True)
class Place:
    """How far a run over many jobs has come: behind the id `after`, among those enqueued when it `began`.

    Jobs that came later are not meant, least of all those that a restart makes.
    """

    began: datetime
    after: ObjectId | None = None

    @classmethod
    def parse(cls, text: str) -> Place:
        """The place that `str` gave, the beginning for no text.

        Raises: BadRequest.
        """
        if not text:
            return cls(utcnow())
        millis, _, after = text.partition(".")
        if not (millis.isdecimal() and len(millis) <= 14 and ObjectId.is_valid(after)):
            raise BadRequest("parameter [after] expected what the last answer said in [more]")
        return cls(datetime.fromtimestamp(int(millis) / 1000, UTC), ObjectId(after))

    def __str__(self) -> str:
        return f"{round(self.began.timestamp() * 1000)}.{self.after}"

    def behind(self, where: Mapping[str, Any]) -> dict[str, Any]:
        """The filter for what is still to come."""
        terms = [dict(where), {"enqueued.at": {"$lte": self.began}}]
        if self.after is not None:
            terms.append({"_id": {"$gt": self.after}})
        return {"$and": [term for term in terms if term]}


@dataclass
class Report:
    """What one call did: the outcome of each job, and whether there is more.

    `matched` counts all that the filter meant when the run began; later calls do not count again. `stopped`
    says why a call ended before its time; nothing is known of the job at which it did.
    """

    matched: int | None
    jobs: list[dict[str, Any]] = field(default_factory=list)
    more: Place | None = None
    stopped: str | None = None

    def count(self, outcome: Outcome) -> int:
        """How many jobs of this call came to that."""
        return sum(job["outcome"] == outcome for job in self.jobs)


async def act_on_many(
    queue: JobQueue,
    action: Action,
    where: Mapping[str, Any],
    place: Place,
    *,
    limit: int,
    by: str,
    hostname: str = "",
    journal: bool = False,
    dry_run: bool = False,
) -> Report:
    """Kill, restart or remove up to `limit` jobs behind a trusted filter, in the order of their ids.

    With `dry_run` nothing is written: the report says what would come of each just now.

    Raises: PyMongoError or Unavailable if the database does not answer before anything was done.
    """
    matched = await queue.store.count(place.behind(where), journal=journal) if place.after is None else None
    ids = await queue.store.ids(place.behind(where), limit=limit + 1, journal=journal)
    report = Report(matched)
    deadline = monotonic() + BUDGET
    for job_id in ids[:limit]:
        if report.jobs and monotonic() > deadline:
            break
        try:
            outcome = await _one(queue, action, job_id, by=by, hostname=hostname, dry_run=dry_run)
        except (PyMongoError, Unavailable) as error:
            if not report.jobs:
                raise
            report.stopped = f"job [{job_id}]: {error}"[:500]
            break
        report.jobs.append({"_id": job_id, **outcome})
    if len(report.jobs) < len(ids):
        report.more = Place(place.began, report.jobs[-1]["_id"])
    return report


async def _one(
    queue: JobQueue, action: Action, job_id: ObjectId, *, by: str, hostname: str, dry_run: bool
) -> dict[str, Any]:
    """What came of one job, or would.

    Raises: PyMongoError, Unavailable.
    """
    try:
        if dry_run:
            job, changed = await queue.would(action, job_id)
            return _told(changed, state=job.state)
        if action == "restart":
            child_id, changed = await queue.restarted(job_id, by=by, hostname=hostname)
            return _told(changed, restarted_as=child_id)
        if action == "kill":
            job, changed = await queue.kill(job_id, by=by)
            return _told(changed, state=job.state)
        job = await queue.remove(job_id, by=by)
        return _told(True, state=job.state)
    except JobNotFound:
        return {"outcome": "gone"}
    except Conflict as refused:
        return {"outcome": "refused", "detail": refused.detail, "code": refused.code}


def _told(changed: bool, **facts: Any) -> dict[str, Any]:
    return {"outcome": "changed" if changed else "unchanged", **facts}
