"""Talk to the API from Python: enqueue, watch, kill, restart, look things up. Needs only requests.

from core4.client import Client

with Client("http://localhost:5001", auth=("admin", "hans")) as client:
    job_id = client.enqueue("my.jobs.Report", {"month": "2026-01"})
    for event in client.follow(job_id):
        print(event)
"""

from __future__ import annotations

import codecs
import json
import math
import os
import random
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import requests
from requests.auth import AuthBase

from core4.errors import ConfigError
from core4.states import FINAL

if TYPE_CHECKING:
    from core4.callers import Functions as Functions
    from core4.callers import results as results
    from core4.callers import schedule as schedule
    from core4.callers import wait as wait

_CALLERS = ("Functions", "schedule", "wait", "results")  # they stand on this module


def __getattr__(name: str) -> Any:
    if name in _CALLERS:
        from core4 import callers

        return getattr(callers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


BASE = "/core4/api/v1"
DEFAULT_URL = "http://localhost:5001"
TIMEOUT = (5.0, 60.0)  # connect, read: longer than the server's heartbeat of 15 s
LONG_POLL = 30.0  # seconds that one request waits for records of a return queue
MOST_RECORDS = 500  # in one of its answers
BUSY = (429, 503)
FIRST_RETRY, LAST_RETRY = 1.0, 30.0  # seconds between two attempts to connect again

T = TypeVar("T")
Document = dict[str, Any]
Documents = list[Document]


class ClientError(Exception):
    """Base of what the client raises; `detail` is for people."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ApiError(ClientError):
    """The API refused; `status` is HTTP's, `body` all that it said.

    `retry_after` are the seconds after which it may be asked again, if it is only too busy now.
    """

    HINT = "Set CORE4_USER and CORE4_PASSWORD, or CORE4_TOKEN."

    def __init__(
        self, status: int, detail: str, body: Document | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.body = body or {}
        said = (headers or {}).get("Retry-After", "")
        self.retry_after = float(said) if status in BUSY and said.isascii() and said.isdigit() else None

    def __str__(self) -> str:
        return f"{self.detail}\n{self.HINT}" if self.status == 401 else self.detail

    @property
    def code(self) -> str:
        """The stable word of the problem, such as `job_exists`; empty if the answer has none."""
        return str(self.body.get("type", "")).rpartition(":")[2]


class Unreachable(ClientError):
    """The API does not answer."""

    HINT = "Is it running? Start it with `core4 up`, or set CORE4_URL."

    def __str__(self) -> str:
        return f"{self.detail}\n{self.HINT}"


class QueueTimeout(TimeoutError):
    """Not all records came in time; `records` are those that had been taken."""

    def __init__(self, queue: str, size: int, records: Documents) -> None:
        super().__init__(f"return queue {queue}: {len(records)} of {size} records came in time")
        self.records = records


@dataclass(frozen=True)
class StateEvent:
    """The job changed: its document as it is now."""

    id: str
    job: Document

    @property
    def state(self) -> str:
        return str(self.job["state"])

    @property
    def progress(self) -> float:
        """How far the job is, from 0 to 1."""
        return float((self.job.get("prog") or {}).get("value") or 0.0)


@dataclass(frozen=True)
class LogEvent:
    """The job wrote a line."""

    id: str
    line: Document

    @property
    def message(self) -> str:
        return str(self.line["message"])

    @property
    def level(self) -> str:
        return str(self.line["level"])


@dataclass(frozen=True)
class CloseEvent:
    """The job has ended and everything has been delivered; `counts` says how many events of each kind."""

    id: str
    counts: Document = field(default_factory=dict)


Event = StateEvent | LogEvent | CloseEvent


@dataclass(frozen=True)
class RawEvent:
    """One event of a stream, as HTML's specification of server-sent events reads it."""

    event: str
    data: str
    id: str


class EventParser:
    """Bytes in, events out; any way of cutting the bytes gives the same events.

    `last_event_id` is where to resume, `retry` the server's wish in seconds or None.
    """

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry: float | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line: list[str] = []
        self._after_cr = False
        self._at_start = True
        self._event, self._data, self._id = "", list[str](), last_event_id

    def feed(self, chunk: bytes) -> list[RawEvent]:
        """The events that `chunk` completes."""
        text = self._decoder.decode(chunk)
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        events = []
        for line in self._lines(text):
            if line:
                self._take(line)
            elif event := self._dispatch():
                events.append(event)
        return events

    def _lines(self, text: str) -> Iterator[str]:
        # A CR ends its line at once; the LF that may follow in the next chunk belongs to it.
        if self._after_cr and text:
            text = text.removeprefix("\n")
            self._after_cr = False
        self._after_cr = self._after_cr or text.endswith("\r")
        *complete, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for part in complete:
            self._line.append(part)
            line, self._line = "".join(self._line), []
            yield line
        if rest:
            self._line.append(rest)

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value) / 1000

    def _dispatch(self) -> RawEvent | None:
        self.last_event_id = self._id
        event, data = self._event or "message", self._data
        self._event, self._data = "", []
        return RawEvent(event, "\n".join(data), self._id) if data else None


@dataclass(frozen=True)
class Page:
    """Some rows of a listing; `total` counts all that match, None behind a `cursor` (and `page_count` is 0).

    `next` is the `cursor` for the rows behind these, None at the end and where a listing has none.
    """

    rows: Documents
    page: int
    per_page: int
    page_count: int
    total: int | None
    next: str | None = None

    def __iter__(self) -> Iterator[Document]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class _Basic(AuthBase):
    def __init__(self, user: str, password: str) -> None:
        self._credentials = b64encode(f"{user}:{password}".encode()).decode()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # requests itself would encode text as Latin-1 and fail for the rest of the world.
        request.headers["Authorization"] = f"Basic {self._credentials}"
        return request


class _Bearer(AuthBase):
    # As an auth object and not a header, which requests would overwrite from a ~/.netrc.
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Client:
    """The API as Python methods. Ids, states and documents are those of the HTTP API.

    Args:
        url: where the API is; default: variable CORE4_URL, else http://localhost:5001.
        auth: user name and password; default: variables CORE4_USER and CORE4_PASSWORD.
        token: bearer token instead; default: variable CORE4_TOKEN.
        timeout: seconds to connect and to wait for bytes.

    `flash` holds the warnings that came with the last answer, such as that no worker serves the job.
    Every method raises `ApiError` if the API refuses and `Unreachable` if it does not answer. Those that wait
    ask again when the API is only too busy, as long as their time lasts.
    """

    def __init__(
        self,
        url: str | None = None,
        auth: tuple[str, str] | None = None,
        *,
        token: str | None = None,
        timeout: tuple[float, float] = TIMEOUT,
    ) -> None:
        self.url = _checked(url or os.environ.get("CORE4_URL") or DEFAULT_URL)
        self.flash: list[str] = []  # warnings that came with the last answer
        self._timeout = timeout
        self._session = requests.Session()
        self._session.auth = _credentials(auth, token)
        # A proxy set for the internet must not be asked for this machine.
        self._session.trust_env = urlsplit(self.url).hostname not in {"localhost", "127.0.0.1", "::1"}

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._session.close()

    def enqueue(
        self, name: str, args: Mapping[str, Any] | None = None, *, key: str | None = None, **options: Any
    ) -> str:
        """Put a job into the queue; returns its id.

        Args:
            name: the job's qual_name.
            args: arguments for its `execute`.
            key: the same key again, within a day, gives the same job instead of another one.
            options: namespace, priority, attempts and the like; `dependencies`, the ids of jobs that have to
                complete first; `return_queues`.
        """
        body = {**options, "qual_name": name, "args": dict(args or {}), "follow": False}
        return str(self._call("POST", "job", body, headers=_keyed(key))["data"])

    def enqueue_many(self, jobs: Sequence[Mapping[str, Any]]) -> Documents:
        """Put up to 1,000 jobs into the queue; what has become of each, in their order.

        Args:
            jobs: each with qual_name, args, options like namespace or priority, and perhaps a ``key``: under
                the same key a job is made once, however often it is asked for.

        An answer has ``outcome``: enqueued or replayed, with ``_id``, or refused, with ``status``, ``code``
        and ``detail``. Some may be refused and the others enqueued.
        """
        rows: Documents = self._call("POST", "job/batch", {"jobs": [dict(job) for job in jobs]})["data"]
        return rows

    def show(self, job_id: str) -> Document:
        """The whole document of a job, from the queue or the journal."""
        job: Document = self._call("GET", f"job/{quote(job_id, safe='')}")["data"]
        return job

    def result(
        self, job_id: str | None = None, *, request_id: str | None = None, timeout: float = 0.0
    ) -> Document:
        """How far a job is: `status` is Queued, Running, Failed or Completed; `result` and `error` tell more.

        Args:
            job_id: the job; or
            request_id: of the request that made it.
            timeout: seconds to wait for its end, up to 50.

        Raises:
            ApiError: with status 410 if the result has been pulled.
        """
        return self._result("view", job_id, request_id, timeout)

    def pull(
        self, job_id: str | None = None, *, request_id: str | None = None, timeout: float = 5.0
    ) -> Document:
        """The same, and the result is removed once it is handed out: only one caller gets it.

        Nothing is removed while `status` is Queued or Running. If the answer gets lost, so does the result.
        """
        return self._result("pull", job_id, request_id, timeout)

    def results(self, **query: Any) -> Page:
        """Results that nobody has pulled. `query`: page, per_page, namespace, name."""
        return self._page("job/view/results", query)

    def queued(self, **query: Any) -> Page:
        """Jobs that wait, as `result` shows them. `query`: page, per_page, namespace, name."""
        return self._page("job/view/queued", query)

    def running(self, **query: Any) -> Page:
        """Jobs that run, as `result` shows them. `query`: page, per_page, namespace, name, status."""
        return self._page("job/view/running", query)

    def _result(self, verb: str, job_id: str | None, request_id: str | None, timeout: float) -> Document:
        which = {"job_id": job_id, "request_id": request_id}
        given = {name: text for name, text in which.items() if text is not None}

        def ask(left: float) -> Document:
            found: Document = self._call("POST", f"job/{verb}/result", {**given, "timeout": left})["data"]
            return found

        return _patiently(ask, timeout)

    def show_queue(self, queue: str, limit: int = 100) -> Documents:
        """The first records of a return queue, oldest first; they stay there."""
        rows: Documents = self._call("GET", f"return/{quote(queue, safe='')}", params={"limit": limit})[
            "data"
        ]
        return rows

    def pull_queue(
        self, queue: str, size: int = 1, *, least: int = 1, timeout: float = 5.0, token: str | None = None
    ) -> Documents:
        """Take records out of a return queue: the ends of jobs that were enqueued with `return_queues`.

        Args:
            size: most that are taken; fewer if the results in them are large.
            least: how many there have to be before any is taken.
            timeout: seconds to wait for that, up to 50; then the answer is empty.
            token: a text that nobody else uses: with it the same call can be made again and gets the same
                records, whatever became of the answer.
        """
        body: Document = {"size": size, "least": least}
        body |= {"token": token} if token else {}

        def ask(left: float) -> Documents:
            path = f"return/pull/{quote(queue, safe='')}"
            rows: Documents = self._call("POST", path, {**body, "timeout": left})["data"]
            return rows

        return _patiently(ask, timeout)

    def wait_queue(self, queue: str, size: int = 1, timeout: float = 120.0) -> Documents:
        """`size` records of a return queue, as soon as they are there, in the order in which they came.

        An answer that gets lost is asked for again.

        Raises: QueueTimeout.
        """
        deadline, found = time.monotonic() + timeout, list[Document]()
        token = uuid.uuid4().hex
        while len(found) < size:
            left = max(deadline - time.monotonic(), 0.0)
            want = min(size - len(found), MOST_RECORDS)
            try:
                some = self.pull_queue(queue, want, least=want, timeout=min(left, LONG_POLL), token=token)
            except Unreachable:
                if not left:
                    raise
                time.sleep(min(FIRST_RETRY, left))
                continue
            if some:
                found, token = [*found, *some], uuid.uuid4().hex
            elif not left:
                raise QueueTimeout(queue, size, found)
        return found

    def wait_queues(self, queues: str | Sequence[str], size: int, timeout: float = 120.0) -> Documents:
        """Wait until each of these return queues has had `size` records, take them, return those of the last.

        For jobs that put their ends into all of them.

        Raises: QueueTimeout.
        """
        deadline, found = time.monotonic() + timeout, list[Document]()
        for queue in [queues] if isinstance(queues, str) else queues:
            found = self.wait_queue(queue, size, max(deadline - time.monotonic(), 0.0))
        return found

    def reset_queue(self, queue: str) -> int:
        """Empty a return queue; how many records were in it."""
        return int(self._call("PUT", f"return/reset/{quote(queue, safe='')}")["data"])

    def kill(self, job_id: str) -> Document:
        """End a job; returns its state and whether that changed. `running`: the worker is at it."""
        return self._change("kill", job_id)

    def kill_chain(self, job_id: str) -> Documents:
        """End all jobs that hang together with this one; id, state and whether that changed of each."""
        reply = self._call("PUT", f"job/kill/{quote(job_id, safe='')}", {"chain": True})
        rows: Documents = reply["jobs"]
        return rows

    def remove(self, job_id: str) -> Document:
        """Move a job that is not running to the journal."""
        return self._change("remove", job_id)

    def restart(self, job_id: str) -> str:
        """Run a job again; returns the id of the new job, or the same one if it only waited."""
        path = f"job/restart/{quote(job_id, safe='')}"
        return str(self._call("PUT", path, {"follow": False})["data"])

    def bulk(
        self,
        action: str,
        filter: Mapping[str, Any] | None = None,
        *,
        search: str | None = None,
        all: bool = False,
        journal: bool = False,
        dry_run: bool = False,
        limit: int = 100,
        at_most: int | None = None,
        on_answer: Callable[[Document], None] | None = None,
    ) -> Document:
        """Kill, restart or remove all jobs behind a filter, in as many requests as that takes.

        Returns how many were `matched`, `changed`, `unchanged`, `refused` and `gone`, and the `jobs` with the
        outcome of each. `stopped` is null, or why the rest was not tried: the database stopped answering.

        Args:
            action: kill, restart or remove.
            filter: which jobs, as for `queue`.
            search: part of the jobs' names.
            all: every job; instead of filter and search.
            journal: restart jobs of the journal instead of those in the queue.
            dry_run: change nothing, tell what would be done.
            limit: jobs per request, 500 at most.
            at_most: jobs to handle; if there are others, `more` is not null.
            on_answer: called with what has been done so far, after each request.
        """
        body: Document = {"action": action, "filter": dict(filter or {}), "search": search or "", "all": all}
        body |= {"journal": journal, "dry_run": dry_run}
        left = limit if at_most is None else at_most
        total: Document = self._call("POST", "job/bulk", {**body, "limit": min(limit, left)})["data"]
        while True:
            if on_answer:
                on_answer(total)
            left = limit if at_most is None else at_most - len(total["jobs"])
            if total["stopped"] or not total["more"] or left <= 0:
                return total
            body |= {"limit": min(limit, left), "after": total["more"]}
            answer: Document = self._call("POST", "job/bulk", body)["data"]
            for name in ("changed", "unchanged", "refused", "gone", "jobs"):
                total[name] += answer[name]
            total |= {name: answer[name] for name in ("more", "stopped")}

    def count(self) -> dict[str, int]:
        """Number of jobs in the queue per state."""
        counts: dict[str, int] = self._call("GET", "job/count")["data"]
        return counts

    def queue(self, **query: Any) -> Page:
        """Jobs in the queue. `query`: page or cursor, per_page, filter, sort, search."""
        return self._page("job/queue", query)

    def journal(self, **query: Any) -> Page:
        """Finished and removed jobs. `query` as for `queue`."""
        return self._page("job/journal", query)

    def log(self, job_id: str, **query: Any) -> Page:
        """Lines that a job wrote. `query`: page or cursor, per_page, filter, sort."""
        return self._page(f"job/log/{quote(job_id, safe='')}", query)

    def workers(self, *, status: str | None = None, filter: Mapping[str, Any] | None = None) -> Documents:
        """The workers, what they serve and when they were last heard of.

        Args:
            status: only those that are NEW, WAITING, BUSY, HALTED or ERROR.
            filter: on other fields, as for `queue`.
        """
        query = {"status": status, "filter": dict(filter or {})}
        rows: Documents = self._call("GET", "worker", query)["data"]
        return rows

    def halt_worker(self, worker_id: str, *, hard: bool = False, reason: str | None = None) -> Document:
        """End one worker when what it runs has ended; `hard`: at once, and that goes back in line."""
        body = {"hard": hard, "reason": reason}
        made: Document = self._call("PUT", f"control/halt/{quote(worker_id, safe='')}", body)["data"]
        return made

    def events(self, **query: Any) -> Page:
        """Who did what, newest first; for administrators. `query`: page, per_page, filter, sort."""
        return self._page("event", query)

    def state_history(
        self, *, since: str | None = None, until: str | None = None, page: int = 0, per_page: int = 10
    ) -> Page:
        """State counts of the queue per bucket of time, newest first; times in ISO form, UTC."""
        query = {"startDate": since, "endDate": until, "page": page, "perPage": per_page}
        return self._page("queue/history", query)

    def controls(self) -> Document:
        """What is paused, by whom and why, how many of its jobs run and are held; the last halt."""
        found: Document = self._call("GET", "control")["data"]
        return found

    def pause(self, scope: str = "everything", target: str = "", *, reason: str | None = None) -> Document:
        """Start no more of these jobs; those that run go on.

        Args:
            scope: everything, namespace, job, project (first part of the jobs' names) or worker.
            target: which namespace, job, project or worker (name@host).
            reason: told to whoever asks why a job waits.
        """
        body = {"scope": scope, "target": target, "reason": reason}
        made: Document = self._call("PUT", "control/pause", body)["data"]
        return made

    def resume(self, scope: str = "everything", target: str = "") -> bool:
        """End a pause; False if there was none. Arguments as for `pause`."""
        return bool(self._call("PUT", "control/resume", {"scope": scope, "target": target})["data"])

    def halt(self, *, reason: str | None = None) -> Document:
        """End all workers that are up now, as a SIGTERM would; those that start later are not meant."""
        made: Document = self._call("PUT", "control/halt", {"reason": reason})["data"]
        return made

    def catalogue(self, **query: Any) -> Page:
        """What can be enqueued. `query`: page, per_page, filter, sort, search."""
        return self._page("job/list", query)

    list = catalogue

    def schedules(self, **query: Any) -> Page:
        """The schedules. `query`: page, per_page, filter, sort, search, and count of the next times."""
        return self._page("schedule", query)

    def schedule(self, name: str, count: int = 5) -> Document:
        """A schedule as it is in force, as the code and the operator have it, and its next times."""
        found: Document = self._call("GET", f"schedule/{quote(name)}", params={"count": count})["data"]
        return found

    def set_schedule(self, name: str, **fields: Any) -> Document:
        """Change a schedule over what the code says, or make a new one.

        Args:
            name: of the schedule; one that a class declares has the job's qual_name unless it says else.
            fields: qual_name, expression, zone, args, options, namespace, missed, limit, max_age, enabled.
        """
        return self._changed_schedule(name, fields)

    def reset_schedule(self, name: str, fields: Sequence[str] = ()) -> Document:
        """Take an operator's changes back, of these fields or all: what the code says stands again."""
        return self._changed_schedule(f"reset/{name}", {"fields": [*fields]})

    def pause_schedule(self, name: str) -> Document:
        """Let a schedule fire no more until it is resumed."""
        return self._changed_schedule(f"pause/{name}")

    def resume_schedule(self, name: str) -> Document:
        """Let a paused schedule fire again, from now on."""
        return self._changed_schedule(f"resume/{name}")

    def trigger_schedule(self, name: str, key: str | None = None) -> str:
        """One job now; returns its id. The same `key` again gives the same job."""
        headers = _keyed(key)
        return str(self._call("PUT", f"schedule/trigger/{quote(name)}", headers=headers)["data"])

    def delete_schedule(self, name: str) -> None:
        """Forget a schedule that an operator made, or that the code has withdrawn."""
        self._call("DELETE", f"schedule/{quote(name)}")

    def next_fires(self, expression: str, zone: str = "UTC", count: int = 5) -> Document:
        """When an expression would fire: `next` is a list of times in UTC."""
        query = {"expression": expression, "zone": zone, "count": count}
        found: Document = self._call("GET", "schedule/next", params=query)["data"]
        return found

    def _changed_schedule(self, path: str, body: Mapping[str, Any] | None = None) -> Document:
        schedule: Document = self._call("PUT", f"schedule/{quote(path)}", body or {})["data"]
        return schedule

    def wait(self, job_id: str, timeout: float | None = None) -> Document:
        """The document of a job once it has ended.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = 0.1
        while (job := _patiently(lambda _: self.show(job_id), _left(deadline)))["state"] not in FINAL:
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"job {job_id} is still {job['state']} after {timeout} s")
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 2.0)
        return job

    def follow(
        self,
        job_id: str,
        last_event_id: str | None = None,
        *,
        patience: float = 300.0,
        on_lost: Callable[[str], None] | None = None,
    ) -> Iterator[Event]:
        """Everything that happens to a job, from its beginning (or after `last_event_id`) to its end.

        A connection that is lost or silent is made again where it stopped: no event is missing, none
        comes twice. The last event is a `CloseEvent`; if everything had been read before, there is none.

        Args:
            last_event_id: the id of the last event that was seen.
            patience: seconds without any answer after which a lost connection is given up.
            on_lost: called once per outage, with its cause.

        Raises:
            Unreachable: no answer at first, or none for `patience` seconds later.
            ApiError: the job is unknown, or not yours to read.
        """
        path = f"job/follow/{quote(job_id, safe='')}"
        return _Follower(self, path, last_event_id or "", patience, on_lost or _nobody).events()

    def _change(self, verb: str, job_id: str) -> Document:
        reply = self._call("PUT", f"job/{verb}/{quote(job_id, safe='')}")
        job: Document = reply.get("job") or {}
        return job

    def _page(self, path: str, query: Mapping[str, Any]) -> Page:
        given = {name: value for name, value in query.items() if value is not None}
        texts = {
            n: json.dumps(v) if isinstance(v, Mapping | Sequence | bool) and not isinstance(v, str) else v
            for n, v in given.items()
        }
        reply = self._call("GET", path, params=texts)
        return Page(
            rows=reply["data"],
            page=int(reply["page"]),
            per_page=int(reply["per_page"]),
            page_count=int(reply["page_count"] or 0),
            total=None if reply["total_count"] is None else int(reply["total_count"]),
            next=reply.get("next"),
        )

    def _call(
        self, method: str, path: str, body: Any = None, params: Mapping[str, Any] | None = None, **more: Any
    ) -> Document:
        response = self.send(method, path, json=body, params=params, **more)
        reply = _json_object(response)
        if response.status_code not in (200, 202) or reply is None:
            raise _refusal(response, reply)
        self.flash = [str(each.get("message", "")) for each in reply.get("flash") or ()]
        return reply

    def send(self, method: str, path: str, **options: Any) -> requests.Response:
        """One raw request to `path` below the API's base; for what has no method here.

        Raises:
            Unreachable: the API does not answer.
        """
        url = f"{self.url}{BASE}/{path}"
        try:
            # Not followed: a redirect turns PUT into GET and may lead the password elsewhere.
            return self._session.request(method, url, timeout=self._timeout, allow_redirects=False, **options)
        except requests.Timeout as error:
            raise Unreachable(f"no answer from {self.url} in time") from error
        except requests.RequestException as error:
            raise Unreachable(f"cannot connect to {self.url}: {_cause(error)}") from error


class _Follower:
    """One `follow`: connects, reads, and connects again until the job has ended."""

    def __init__(
        self,
        client: Client,
        path: str,
        last_event_id: str,
        patience: float,
        on_lost: Callable[[str], None],
    ) -> None:
        self._client, self._path, self._on_lost = client, path, on_lost
        self._last_event_id = last_event_id
        self._patience = patience
        self._retry = FIRST_RETRY
        self._failures = 0
        self._heard: float | None = None  # monotonic time of the last byte; None: never yet

    def events(self) -> Iterator[Event]:
        while True:
            cause = "the server ended the stream"
            try:
                response = self._connect()
                if response is None:
                    return
                with response:
                    for event in self._read(response):
                        yield event
                        if isinstance(event, CloseEvent):
                            return
            except (requests.RequestException, Unreachable) as error:
                self._give_up_after_patience(error)
                cause = error.detail if isinstance(error, Unreachable) else _cause(error)
            if self._failures == 0:
                self._on_lost(cause)
            self._pause()

    def _connect(self) -> requests.Response | None:
        headers = {"Accept": "text/event-stream"}
        if self._last_event_id:
            headers["Last-Event-ID"] = self._last_event_id
        response = self._client.send("GET", self._path, headers=headers, stream=True)
        if response.status_code == 200:
            return response
        with response:
            if response.status_code == 204:  # ended, and everything has been read
                return None
            refusal = _refusal(response, _json_object(response))
        if self._heard is not None and (response.status_code >= 500 or response.status_code == 429):
            raise Unreachable(refusal.detail) from refusal
        raise refusal

    def _read(self, response: requests.Response) -> Iterator[Event]:
        parser = EventParser(self._last_event_id)
        self._heard = time.monotonic()
        for chunk in response.iter_content(chunk_size=None):
            self._heard = time.monotonic()
            for raw in parser.feed(chunk):
                self._failures = 0
                self._last_event_id = raw.id
                event = _typed(raw)
                if event:
                    yield event
            self._last_event_id = parser.last_event_id
            self._retry = self._retry if parser.retry is None else parser.retry

    def _give_up_after_patience(self, error: requests.RequestException | Unreachable) -> None:
        silent = None if self._heard is None else time.monotonic() - self._heard
        if silent is None or silent > self._patience:
            raise error if isinstance(error, Unreachable) else Unreachable(_cause(error)) from error

    def _pause(self) -> None:
        # All followers of a server that restarts must not come back in the same moment.
        wish = min(max(self._retry, 0.05) * 2**self._failures, max(LAST_RETRY, self._retry))
        self._failures = min(self._failures + 1, 10)
        time.sleep(wish * random.uniform(0.5, 1.0))


def _patiently(ask: Callable[[float], T], timeout: float) -> T:
    """What `ask` is answered, which is given the seconds left.

    Asked again when the API says that it is too busy, as long as there are any.
    """
    deadline = time.monotonic() + timeout
    left = timeout
    while True:
        try:
            return ask(left)
        except ApiError as error:
            left = max(deadline - time.monotonic(), 0.0)
            if error.retry_after is None or not left:
                raise
            time.sleep(min(error.retry_after, left))
            left = max(deadline - time.monotonic(), 0.0)


def _left(deadline: float | None) -> float:
    return math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)


def _nobody(_cause: str) -> None:
    """Who does not ask is not told of outages."""


def _typed(raw: RawEvent) -> Event | None:
    kinds: dict[str, type[StateEvent] | type[LogEvent] | type[CloseEvent]] = {
        "state": StateEvent,
        "log": LogEvent,
        "close": CloseEvent,
    }
    kind = kinds.get(raw.event)
    # A kind that a newer server has and this client does not know is no error.
    return kind(raw.id, json.loads(raw.data)) if kind else None


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError("the API's URL must look like http://HOST:PORT or https://HOST")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ConfigError("credentials do not belong into a URL: use CORE4_USER and CORE4_PASSWORD, or auth=")
    return url.rstrip("/").removesuffix(BASE)


def _credentials(auth: tuple[str, str] | None, token: str | None) -> AuthBase | None:
    if auth is None and token is None:
        token = os.environ.get("CORE4_TOKEN") or None
        user, password = os.environ.get("CORE4_USER"), os.environ.get("CORE4_PASSWORD")
        auth = (user, password or "") if user and not token else None
    if token is not None:
        return _Bearer(token)
    return _Basic(*auth) if auth else None


def _json_object(response: requests.Response) -> Document | None:
    try:
        reply = response.json()
    except (ValueError, requests.RequestException):
        return None
    return reply if isinstance(reply, dict) else None


def _refusal(response: requests.Response, reply: Document | None) -> ApiError:
    status = response.status_code
    if reply is None:
        where = response.headers.get("Location")
        hint = f"redirects to {where}" if where else "this does not look like a core4 API"
        return ApiError(status, f"{response.url} answered {status}: {hint}", None, response.headers)
    detail = reply.get("detail") or reply.get("error") or reply.get("message") or f"status {status}"
    return ApiError(status, str(detail), reply, response.headers)


def _cause(error: requests.RequestException) -> str:
    """The operating system's words for what went wrong, without urllib3's object dump."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        reason = getattr(cause, "reason", None) or (cause.args[0] if cause.args else None)
        cause = reason if isinstance(reason, BaseException) else cause.__cause__ or cause.__context__
    return "connection failed"


def _keyed(key: str | None) -> dict[str, str] | None:
    """The headers of a request that may be sent again under the same key."""
    return {"Idempotency-Key": key} if key else None
