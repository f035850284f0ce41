"""Jobs that a running job asks for: it has no credentials, so its worker enqueues them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from core4.catalogue import Catalogue
from core4.errors import BadArguments, Core4Error, JobExists, JobInvalid, TooLarge, UnknownJob
from core4.jobs import Job, canonical, derived_id
from core4.orders import make_order
from core4.queues import JobQueue
from core4.worker.protocol import Message

Persist = Callable[[Callable[[], Awaitable[Job]]], Awaitable[Job]]


class Children:
    """The jobs one attempt asks for. A repeated attempt gets those of the one before."""

    def __init__(
        self, job: Job, queue: JobQueue, catalogue: Catalogue, *, args_cap: int, hostname: str
    ) -> None:
        self._job, self._queue, self._catalogue = job, queue, catalogue
        self._args_cap, self._hostname = args_cap, hostname
        self._asked: Counter[str] = Counter()

    async def enqueue(self, wanted: Mapping[str, Any], persist: Persist) -> Message:
        """The answer to one request; `persist` repeats what the database did not answer.

        Raises: KeyError, TypeError or AttributeError for a request that is none.
        """
        name, args = str(wanted["name"]), dict(wanted["args"])
        try:
            child = await persist(lambda: self._enqueue(name, args))
        except (BadArguments, JobExists, JobInvalid, TooLarge, UnknownJob) as refused:
            return {"refused": _refusal(refused)}
        self._asked[_kind(name, args)] += 1
        return {"enqueued": str(child.id)}

    async def _enqueue(self, name: str, args: dict[str, Any]) -> Job:
        entry = await self._catalogue.get(name)
        if entry is None:
            raise UnknownJob(name)
        order = make_order(
            entry,
            args,
            args_cap=self._args_cap,
            username=self._job.username,
            hostname=self._hostname,
            request_id=self._job.document.get("request_id"),
            parent_id=self._job.id,
        )
        kind = _kind(name, args)
        child_id = derived_id(self._job.id, "child", kind, self._asked[kind])
        return await self._queue.enqueue(order, job_id=child_id, once=True)


def _kind(name: str, args: Mapping[str, Any]) -> str:
    """What two requests share that only their number tells apart."""
    try:
        return canonical([name, dict(args)])
    except (ValueError, RecursionError):
        return name  # it is refused anyway


def _refusal(error: Core4Error) -> dict[str, str]:
    return {"reason": error.code, "detail": error.detail}
