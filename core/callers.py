"""Run functions elsewhere, from a script: schedule them, wait, read what came of it. Blocks; needs requests.

from core4.client import Functions

def addition(a, b):
    return a + b

with Functions() as functions:
    job = functions.schedule(addition, a=1, b=2)
    job.wait()
    print(job.result)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from core4 import handles
from core4.client import ApiError, Client, Unreachable
from core4.handles import DEFAULT_WAIT, Document, Key, Pause, Record, Request, Steps

T = TypeVar("T")


class Job(Record):
    """A job of a function: what was last seen of it, and how to see more."""

    def __init__(self, functions: Functions, row: Document) -> None:
        super().__init__(row)
        self._functions = functions

    def load(self) -> Job:
        """Look again; the handle itself."""
        self._functions.look([self])
        return self

    def check_ready(self, *, die: bool | None = None) -> bool:
        """One look: False while it is open, True when it has ended.

        Raises: JobFailed if it failed, unless `die` is false (default: as it was scheduled).
        """
        self._functions.look([self])
        return self.ended and handles.judge([self], timeout=None, die=die)

    def wait(self, timeout: float | None = None, die: bool | None = None) -> bool:
        """Wait for its end; True when it has ended, False if `timeout` seconds have passed and not `die`.

        Raises: JobFailed, WaitTimeout; neither if `die` is false (default: as it was scheduled).
        """
        self._functions.look([self], timeout=handles.limit(timeout))
        return handles.judge([self], timeout=timeout, die=die)

    def start(self) -> Job:
        """Run it once more, with the same arguments: a new job, if this one has ended."""
        child = self._functions.client.restart(self.id)
        return self if child == self.id else self._functions.get(child)

    def kill(self) -> None:
        """End it, whether it waits or runs; it is in ERROR then, HALTED."""
        self._functions.client.kill(self.id)
        self.load()

    def collect(self) -> Any:
        """Its result, which is then collected: the state is DONE, and nobody gets it once more.

        Raises: ApiError with status 410 if somebody has collected it.
        """
        answer = self._functions.client.pull(self.id)
        self.load()
        return answer["result"]


class Functions:
    """Functions that run elsewhere, through one API. Close it, or use it as a context manager.

    Args:
        client: how to reach the API; default: a `Client` by the variables CORE4_URL, CORE4_USER, ...
        key: signs what is sent, NAME:SECRET; default: the variable CORE4_FUNCTION_KEY.

    Every method raises `ApiError` if the API refuses and `Unreachable` if it does not answer.
    """

    def __init__(self, client: Client | None = None, *, key: str | None = None) -> None:
        self._key = Key.given(key)
        self.client = client or Client()
        self.scheduled_ids: list[str] = []
        self.jobs = Jobs(self)

    def __enter__(self) -> Functions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self.client.close()

    def schedule(
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
    ) -> Job:
        """Have a function called elsewhere; its job, at once.

        Args:
            method: defined in a file; uses nothing from around it, imports inside.
            name: the job's own; only one open job of the user may have it.
            category: a label to find jobs by.
            timeout: seconds it may run, 0 for any time.
            dependencies: jobs or ids that have to end well before.
            wait: block until the job has ended.
            die: whether waiting raises if the job fails; can be said anew with each wait.
            args_replace: fills ``{name}`` in texts of the function, one at least. Each other value is one
                more source to store: prefer arguments.
            return_queues: the name of a queue that is told of the job's end, well or badly, or up to ten.
            return_queues_reset: the name of a queue that is emptied now, or a list of names.
            kwargs: arguments of the function, those that have a name used here.
            more: arguments of the function.

        Raises: SourceRefused, FreeName, BadArguments, BadOption; JobFailed with `wait`.
        """
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
        job = Job(self, self._do(steps))
        self.scheduled_ids.append(job.id)
        if wait:
            job.wait()
        return job

    def wait(
        self,
        ids: Record | str | Iterable[Record | str] | None = None,
        timeout: float | None = DEFAULT_WAIT,
        die: bool | None = None,
    ) -> list[Job]:
        """Wait for several jobs; their handles in the order given, each once.

        Args:
            ids: ids or jobs, or one of them; default: all that were scheduled here.
            timeout: seconds for all together, None for any time.
            die: raise if one failed, or if the time is up; default: as each was scheduled.

        Raises: JobFailed, WaitTimeout; ValueError if there is nothing to wait for.
        """
        given = handles.listed(self.scheduled_ids if ids is None else ids)
        jobs = self._jobs(handles.wanted(given), timeout=handles.limit(timeout))
        handles.refresh(given, jobs)
        handles.judge(jobs, timeout=timeout, die=die)
        return jobs

    def results(
        self,
        ids: Record | str | Iterable[Record | str] | None = None,
        timeout: float | None = DEFAULT_WAIT,
        die: bool | None = None,
        *,
        return_queues: str | Iterable[str] | None = None,
    ) -> list[Any]:
        """Wait as `wait` does; what the jobs returned, in the same order. `[]` for an empty list.

        Args:
            return_queues: wait for as many records in each of these instead; then in the order of their ends.
        """
        given = handles.listed(self.scheduled_ids if ids is None else ids)
        if ids is not None and not given:
            return []
        if return_queues:
            size = len(handles.ids_of(given))
            jobs = self.wait_queues(return_queues, size, handles.limit(timeout), die)
        else:
            jobs = self.wait(given, timeout, die)
        return [job.result for job in jobs]

    def wait_queues(
        self,
        queue_names: str | Iterable[str],
        size: int,
        timeout: float = 120.0,
        die: bool | None = None,
    ) -> list[Job]:
        """Wait until each of these return queues has had `size` records; the jobs of the last, in order.

        Raises: QueueTimeout, whose `records` are those that had been taken out of that queue; JobFailed if
            one of them failed, unless `die` is false: all of them are its `jobs` then.
        """
        jobs = self._jobs(self._do(handles.pulled(queue_names, size, timeout)))
        handles.judge(jobs, timeout=timeout, die=die)
        return jobs

    def wait_queue(
        self, queue_name: str, size: int = 1, timeout: float = 120.0, die: bool | None = None
    ) -> Job:
        """As `wait_queues` for one queue; the first of the jobs."""
        return self.wait_queues([queue_name], size, timeout, die)[0]

    def check_all(self, die: bool | None = None) -> bool:
        """One look at all that were scheduled here: True if none is open.

        Raises: JobFailed if one failed, unless `die` is false.
        """
        jobs = self._jobs(handles.ids_of(self.scheduled_ids))
        ended = [job for job in jobs if job.ended]
        return handles.judge(ended, timeout=None, die=die) and len(ended) == len(jobs)

    def get(self, job_id: str) -> Job:
        """The job of this id."""
        return self._jobs([job_id])[0]

    def find(
        self,
        *,
        name: str = "",
        category: str | None = None,
        state: str | Sequence[str] = (),
        method: str = "",
    ) -> list[Job]:
        """Jobs by name, category, state in myjobs' words or function, newest first."""
        query = handles.query(name=name, category=category, state=state, method=method)
        return self._jobs(self._do(handles.found(query)))

    def look(self, jobs: Sequence[Job], *, timeout: float = 0.0) -> None:
        """Look at jobs again, when they have ended or `timeout` seconds have passed."""
        rows = self._do(handles.looked_at([job.id for job in jobs], timeout))
        for job, row in zip(jobs, rows, strict=True):
            job.update(row)

    def reset(self) -> None:
        """End all jobs of functions, of everybody, and delete them and their sources. For administrators."""
        self._do(handles.reset())
        self.scheduled_ids.clear()

    def actions(self, page: int = 0, per_page: int = 100) -> list[Document]:
        """The sources that were sent, newest first, without their text."""
        return self._do(handles.actions(page, per_page))

    def action(self, key: str) -> Document:
        """A source by its hash: key, methodname, actorname, code, who signed it, whether it is revoked."""
        return self._do(handles.action(key))

    def revoke(self, key: str, reason: str | None = None) -> Document:
        """Let a source run no more, whoever signed it."""
        return self._do(handles.revoke(key, reason))

    def _jobs(self, ids: Sequence[str], timeout: float = 0.0) -> list[Job]:
        return [Job(self, row) for row in self._do(handles.looked_at(ids, timeout))]

    def _do(self, steps: Steps[T]) -> T:
        try:
            request = next(steps)
            while True:
                request = self._next(steps, request)
        except StopIteration as done:
            result: T = done.value
            return result

    def _next(self, steps: Steps[Any], request: Request | Pause) -> Request | Pause:
        if isinstance(request, Pause):
            time.sleep(request.seconds)
            return steps.send({})
        try:
            reply = self.client._call(request.method, request.path, request.body)
        except (ApiError, Unreachable) as error:
            return steps.throw(error)
        return steps.send(reply)


class Jobs:
    """The jobs of functions under myjobs' words: `functions.jobs.find(...)`."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def find(self, **query: Any) -> list[Job]:
        """As `Functions.find`."""
        return self._functions.find(**query)

    def get(self, job_id: str) -> Job:
        """As `Functions.get`."""
        return self._functions.get(job_id)

    def exists(self, job_id: str) -> bool:
        """True if there is a job of this id."""
        return self._functions._do(handles.exists(job_id))

    def reset(self) -> None:
        """As `Functions.reset`."""
        self._functions.reset()


_here: Functions | None = None  # of the functions below, made when it is first needed


def _functions() -> Functions:
    global _here
    if _here is None:
        _here = Functions()
    return _here


def schedule(method: Callable[..., Any], /, **options: Any) -> Job:
    """`Functions.schedule`, with the client and the key that the environment names."""
    return _functions().schedule(method, **options)


def wait(
    ids: Record | str | Iterable[Record | str] | None = None,
    timeout: float | None = DEFAULT_WAIT,
    die: bool | None = None,
) -> list[Job]:
    """`Functions.wait`, likewise."""
    return _functions().wait(ids, timeout, die)


def results(
    ids: Record | str | Iterable[Record | str] | None = None,
    timeout: float | None = DEFAULT_WAIT,
    die: bool | None = None,
) -> list[Any]:
    """`Functions.results`, likewise."""
    return _functions().results(ids, timeout, die)
