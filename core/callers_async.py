"""Run functions elsewhere, from asyncio: as `core4.callers`, with coroutines.

from core4.callers_async import AsyncFunctions

async with AsyncFunctions() as functions:
    job = await functions.schedule(addition, a=1, b=2)
    await job.wait()
    print(job.result)
"""

from __future__ import annotations

import asyncio
import os
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp

from core4 import handles
from core4.client import BASE, DEFAULT_URL, ApiError, Unreachable
from core4.handles import DEFAULT_WAIT, Document, Key, Pause, Record, Request, Steps

T = TypeVar("T")


class AsyncJob(Record):
    """A job of a function: what was last seen of it, and how to see more."""

    def __init__(self, functions: AsyncFunctions, row: Document) -> None:
        super().__init__(row)
        self._functions = functions

    async def load(self) -> AsyncJob:
        """Look again; the handle itself."""
        await self._functions.look([self])
        return self

    async def check_ready(self, *, die: bool | None = None) -> bool:
        """One look: False while it is open, True when it has ended. Raises: JobFailed."""
        await self._functions.look([self])
        return self.ended and handles.judge([self], timeout=None, die=die)

    async def wait(self, timeout: float | None = None, die: bool | None = None) -> bool:
        """Wait for its end, as `core4.callers.Job.wait`. Raises: JobFailed, WaitTimeout."""
        await self._functions.look([self], timeout=handles.limit(timeout))
        return handles.judge([self], timeout=timeout, die=die)

    async def start(self) -> AsyncJob:
        """Run it once more, with the same arguments: a new job, if this one has ended."""
        reply = await self._functions.call(Request("PUT", f"job/restart/{self.id}", {"follow": False}))
        child = str(reply["data"])
        return self if child == self.id else await self._functions.get(child)

    async def kill(self) -> None:
        """End it, whether it waits or runs; it is in ERROR then, HALTED."""
        await self._functions.call(Request("PUT", f"job/kill/{self.id}"))
        await self.load()

    async def collect(self) -> Any:
        """Its result, which is then collected, as `core4.callers.Job.collect`. Raises: ApiError."""
        reply = await self._functions.call(Request("POST", "job/pull/result", {"job_id": self.id}))
        await self.load()
        return reply["data"]["result"]


class AsyncFunctions:
    """Functions that run elsewhere, through one API; use it as an async context manager.

    Args:
        url: where the API is; default: variable CORE4_URL, else http://localhost:5001.
        auth: user name and password; default: variables CORE4_USER and CORE4_PASSWORD.
        token: bearer token instead; default: variable CORE4_TOKEN.
        key: signs what is sent, NAME:SECRET; default: variable CORE4_FUNCTION_KEY.

    Every method raises `ApiError` if the API refuses and `Unreachable` if it does not answer.
    """

    def __init__(
        self,
        url: str | None = None,
        auth: tuple[str, str] | None = None,
        *,
        token: str | None = None,
        key: str | None = None,
    ) -> None:
        self._url = (url or os.environ.get("CORE4_URL") or DEFAULT_URL).rstrip("/").removesuffix(BASE)
        token = token or (None if auth else os.environ.get("CORE4_TOKEN"))
        user, password = auth or (os.environ.get("CORE4_USER") or "", os.environ.get("CORE4_PASSWORD") or "")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        if user and not token:
            self._headers = {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}
        self._key = Key.given(key)
        self._session: aiohttp.ClientSession | None = None
        self.scheduled_ids: list[str] = []

    async def __aenter__(self) -> AsyncFunctions:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def schedule(
        self,
        method: Callable[..., Any],
        /,
        name: str | None = None,
        category: str = "",
        timeout: float = 0,
        dependencies: Record | str | Iterable[Record | str] | None = None,
        wait: bool = False,
        die: bool = True,
        args_replace: Mapping[str, Any] | None = None,
        return_queues: str | Iterable[str] | None = None,
        return_queues_reset: str | Iterable[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> AsyncJob:
        """Have a function called elsewhere, as `core4.callers.Functions.schedule`; its job, at once."""
        steps = handles.schedule(
            method,
            self._key,
            name=name,
            category=category,
            timeout=timeout,
            dependencies=dependencies,
            die=die,
            args_replace=args_replace,
            return_queues=return_queues,
            return_queues_reset=return_queues_reset,
            kwargs=handles.together(kwargs, more),
        )
        job = AsyncJob(self, await self._do(steps))
        self.scheduled_ids.append(job.id)
        if wait:
            await job.wait()
        return job

    async def wait(
        self,
        ids: Record | str | Iterable[Record | str] | None = None,
        timeout: float | None = DEFAULT_WAIT,
        die: bool | None = None,
    ) -> list[AsyncJob]:
        """Wait for several jobs, as `core4.callers.Functions.wait`. Raises: JobFailed, WaitTimeout."""
        given = handles.listed(self.scheduled_ids if ids is None else ids)
        jobs = await self._jobs(handles.wanted(given), handles.limit(timeout))
        handles.refresh(given, jobs)
        handles.judge(jobs, timeout=timeout, die=die)
        return jobs

    async def results(
        self,
        ids: Record | str | Iterable[Record | str] | None = None,
        timeout: float | None = DEFAULT_WAIT,
        die: bool | None = None,
        *,
        return_queues: str | Iterable[str] | None = None,
    ) -> list[Any]:
        """Wait as `wait` does; what the jobs returned, as `core4.callers.Functions.results`."""
        given = handles.listed(self.scheduled_ids if ids is None else ids)
        if ids is not None and not given:
            return []
        if return_queues:
            size = len(handles.ids_of(given))
            jobs = await self.wait_queues(return_queues, size, handles.limit(timeout), die)
        else:
            jobs = await self.wait(given, timeout, die)
        return [job.result for job in jobs]

    async def wait_queues(
        self,
        queue_names: str | Iterable[str],
        size: int,
        timeout: float = 120.0,
        die: bool | None = None,
    ) -> list[AsyncJob]:
        """Wait for return queues, as `core4.callers.Functions.wait_queues`.

        Raises: QueueTimeout; JobFailed.
        """
        ids = await self._do(handles.pulled(queue_names, size, timeout))
        jobs = await self._jobs(ids)
        handles.judge(jobs, timeout=timeout, die=die)
        return jobs

    async def wait_queue(
        self, queue_name: str, size: int = 1, timeout: float = 120.0, die: bool | None = None
    ) -> AsyncJob:
        """As `wait_queues` for one queue; the first of the jobs."""
        return (await self.wait_queues([queue_name], size, timeout, die))[0]

    async def check_all(self, die: bool | None = None) -> bool:
        """One look at all that were scheduled here: True if none is open. Raises: JobFailed."""
        jobs = await self._jobs(handles.ids_of(self.scheduled_ids))
        ended = [job for job in jobs if job.ended]
        return handles.judge(ended, timeout=None, die=die) and len(ended) == len(jobs)

    async def get(self, job_id: str) -> AsyncJob:
        """The job of this id."""
        return (await self._jobs([job_id]))[0]

    async def find(
        self,
        *,
        name: str = "",
        category: str | None = None,
        state: str | Sequence[str] = (),
        method: str = "",
    ) -> list[AsyncJob]:
        """Jobs by name, category, state in myjobs' words or function, newest first."""
        query = handles.query(name=name, category=category, state=state, method=method)
        return await self._jobs(await self._do(handles.found(query)))

    async def look(self, jobs: Sequence[AsyncJob], *, timeout: float = 0.0) -> None:
        """Look at jobs again, when they have ended or `timeout` seconds have passed."""
        rows = await self._do(handles.looked_at([job.id for job in jobs], timeout))
        for job, row in zip(jobs, rows, strict=True):
            job.update(row)

    async def _jobs(self, ids: Sequence[str], timeout: float = 0.0) -> list[AsyncJob]:
        return [AsyncJob(self, row) for row in await self._do(handles.looked_at(ids, timeout))]

    async def _do(self, steps: Steps[T]) -> T:
        try:
            request = next(steps)
            while True:
                try:
                    reply = await self._answer(request)
                except (ApiError, Unreachable) as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _answer(self, request: Request | Pause) -> Document:
        if isinstance(request, Pause):
            await asyncio.sleep(request.seconds)
            return {}
        return await self.call(request)

    async def call(self, request: Request) -> Document:
        """One request, below the API's base; its answer.

        Raises: ApiError, Unreachable.
        """
        if self._session is None:
            raise RuntimeError("AsyncFunctions is used with `async with`")
        url = f"{self._url}{BASE}/{quote(request.path, safe='/?=&%')}"
        try:
            async with self._session.request(
                request.method, url, json=request.body, allow_redirects=False
            ) as response:
                body = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(f"cannot reach {self._url}: {error}") from error
        except ValueError:
            body = None
        if response.status not in (200, 202) or not isinstance(body, dict):
            detail = body.get("detail") if isinstance(body, dict) else "this is no answer of a core4 API"
            found = body if isinstance(body, dict) else None
            raise ApiError(response.status, str(detail), found, response.headers)
        return body
