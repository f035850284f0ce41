"""Jobs that a running job asks for: it has no credentials, so its worker has them enqueued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from core4.children import kind_of
from core4.jobs import Job
from core4.worker.backend import Backend
from core4.worker.protocol import Message

Persist = Callable[[Callable[[], Awaitable[Message]]], Awaitable[Message]]


class Children:
    """The jobs one attempt asks for. A repeated attempt gets those of the one before that it did not call."""

    def __init__(self, job: Job, backend: Backend, *, hostname: str) -> None:
        self._job, self._backend, self._hostname = job, backend, hostname
        self._asked: Counter[str] = Counter()

    async def enqueue(self, wanted: Mapping[str, Any], persist: Persist) -> Message:
        """The answer to one request; `persist` repeats what the database did not answer.

        Raises: KeyError, TypeError or AttributeError for a request that is none.
        """
        name, args = str(wanted["name"]), dict(wanted["args"])
        kind = kind_of(name, args)
        number = self._asked[kind]
        answer = await persist(
            lambda: self._backend.enqueue(self._job, name, args, number, hostname=self._hostname)
        )
        if "enqueued" in answer:
            self._asked[kind] += 1
        return answer

    async def call(self, number: int, name: str, args: Mapping[str, Any], persist: Persist) -> Message:
        """The answer to the attempt's call of this number: the id of a job that is to be waited for."""
        return await persist(
            lambda: self._backend.call(self._job, name, args, number, hostname=self._hostname)
        )
