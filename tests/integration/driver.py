"""Both ends of the API for its tests: a client, and whoever runs the jobs through the real stores."""

from __future__ import annotations

import json
import socket
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from bson import ObjectId

from core4.api.app import create_app, listen
from core4.api.frames import Cursor
from core4.api.keys import BASE, HUB, QUEUE, USERS
from core4.catalogue import Catalogue
from core4.config import Settings
from core4.database import Database
from core4.jobs import Job, JobOrder, Owner
from core4.logs import Line, LogStore
from core4.queues import JobQueue
from core4.registry import WorkerRegistry
from core4.retries import Outcome
from core4.users import UserStore

ADMIN = ("admin", "hans")
ANY_ARGS: Mapping[str, Any] = {"type": "object", "additionalProperties": True}


def basic(name: str, password: str) -> dict[str, str]:
    """The header of basic authentication."""
    return {"Authorization": "Basic " + b64encode(f"{name}:{password}".encode()).decode()}


def bearer(token: str) -> dict[str, str]:
    """The header of a bearer token."""
    return {"Authorization": f"Bearer {token}"}


@dataclass(frozen=True)
class Answer:
    """What came back: status, headers and the body as JSON (empty if it is none)."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def data(self) -> Any:
        assert self.status == 200, self.body
        return self.body["data"]


@dataclass
class Event:
    """One event of a stream."""

    kind: str
    id: str
    data: dict[str, Any]

    @property
    def cursor(self) -> Cursor:
        return Cursor.parse(self.id)


class Api:
    """A running API and its client."""

    def __init__(self, app: aiohttp.web.Application, port: int, session: aiohttp.ClientSession) -> None:
        self.app, self.port, self.session = app, port, session
        self.root = f"http://127.0.0.1:{port}"

    @property
    def users(self) -> UserStore:
        return self.app[USERS]

    @property
    def rooms(self) -> int:
        """Jobs that are followed just now."""
        return self.app[HUB].rooms

    @property
    def queue(self) -> JobQueue:
        """What the API's own handlers use."""
        return self.app[QUEUE]

    def waiting(self, job_id: ObjectId) -> int:
        """How many requests wait for news of a job just now."""
        return self.app[HUB].waiting(job_id)

    def url(self, path: str) -> str:
        return self.root + (BASE + path if path.startswith("/") else "/" + path)

    async def call(
        self, method: str, path: str, *, auth: tuple[str, str] | None = ADMIN, **options: Any
    ) -> Answer:
        """One request; `path` is below the base, or absolute without its first slash."""
        headers = {**(basic(*auth) if auth else {}), **options.pop("headers", {})}
        async with self.session.request(method, self.url(path), headers=headers, **options) as response:
            text = await response.text()
            body = json.loads(text) if text and "json" in response.content_type else {}
            return Answer(response.status, response.headers, body)

    async def enqueue(self, name: str = "tests.Job", **args: Any) -> ObjectId:
        answer = await self.call("POST", "/job", json={"qual_name": name, "args": args, "follow": False})
        return ObjectId(answer.data)

    async def detail(self, job_id: ObjectId) -> dict[str, Any]:
        document: dict[str, Any] = (await self.call("GET", f"/job/{job_id}")).data
        return document

    @asynccontextmanager
    async def stream(
        self, path: str, *, method: str = "GET", auth: tuple[str, str] | None = ADMIN, **options: Any
    ) -> AsyncIterator[Stream]:
        """An open stream."""
        headers = {**(basic(*auth) if auth else {}), **options.pop("headers", {})}
        async with self.session.request(method, self.url(path), headers=headers, **options) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            yield Stream(response)

    async def events(self, path: str, **options: Any) -> list[Event]:
        """All events of a stream that ends by itself."""
        async with self.stream(path, **options) as stream:
            return [event async for event in stream]


class Stream:
    """The events of an open stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.comments: list[str] = []
        self.retry: int | None = None

    @property
    def job_id(self) -> ObjectId:
        return ObjectId(self.response.headers["X-Job-Id"])

    async def __aiter__(self) -> AsyncIterator[Event]:
        fields: dict[str, str] = {}
        async for raw in self.response.content:
            text = raw.decode().rstrip("\n")
            if text.startswith(":"):
                self.comments.append(text)
            elif text:
                name, _, value = text.partition(": ")
                fields[name] = value
            else:
                self.retry = int(fields.pop("retry", 0)) or self.retry
                if "event" in fields:
                    yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
                fields = {}

    async def until(self, kind: str, **wanted: Any) -> list[Event]:
        """The events up to the first of this kind with these members in its data."""
        return await self.when(lambda event: event.kind == kind and wanted.items() <= event.data.items())

    async def when(self, found: Callable[[Event], Any]) -> list[Event]:
        """The events up to the first that is `found`."""
        seen: list[Event] = []
        async for event in self:
            seen.append(event)
            if found(event):
                return seen
        raise AssertionError(f"the stream ended without it: {[event.data for event in seen]}")


@asynccontextmanager
async def serving(settings: Settings, database: Database, *, port: int = 0) -> AsyncIterator[Api]:
    """An API, on a free port if none is given."""
    app = create_app(settings, database)
    async with listen(app, "127.0.0.1", port) as port, aiohttp.ClientSession() as session:
        yield Api(app, port, session)


@dataclass
class Runner:
    """Plays the worker: whatever it does to a job goes through the real stores."""

    queue: JobQueue
    logs: LogStore
    registry: WorkerRegistry
    catalogue: Catalogue
    owner: Owner = field(
        default_factory=lambda: Owner(uuid.uuid4().hex, "runner@here", socket.gethostname(), 1)
    )

    async def publish(self, *names: str, schema: Mapping[str, Any] = ANY_ARGS, **more: Any) -> None:
        """Make names known, as classes that any arguments fit."""
        entry = {"namespace": "DEFAULT", "kind": "class", "schema": schema, "options": {}, "unique": True}
        await self.catalogue.publish(
            [{"_id": name, "author": "ann", "doc": "A job.", **entry, **more} for name in names]
        )

    async def up(self, *names: str) -> None:
        """Register as a worker that runs these."""
        await self.registry.register(self.owner, slots=2, namespaces=["DEFAULT"], jobs=names, version="1")

    async def up_also(self, *names: str) -> None:
        """Say that this worker runs these beside `tests.Job`."""
        await self.registry.serve(self.owner, ["tests.Job", *names])

    async def start(self) -> Attempt:
        """Begin the first job in line."""
        (job,) = await self.queue.claims.claim(self.owner, namespaces=["DEFAULT"])
        return Attempt(self, await self.queue.start(job, pid=1))


class Attempt:
    """One execution of a job."""

    def __init__(self, runner: Runner, job: Job) -> None:
        self.runner, self.job = runner, job
        self.seq = job.fence << 32

    async def log(self, *messages: str, level: str = "INFO") -> None:
        lines = []
        for message in messages:
            self.seq += 1
            lines.append(Line(self.seq, time.time(), level, message))
        await self.runner.logs.append(self.job, "here", lines)

    async def progress(self, value: float, message: str = "") -> None:
        await self.runner.queue.progress(self.job, value, message)

    async def finish(self, outcome: Outcome | None = None) -> Job:
        outcome = outcome or Outcome.complete({"done": True})
        return await self.runner.queue.finish(self.job, outcome, log_seq=self.seq)


def order(name: str = "tests.Job", **more: Any) -> JobOrder:
    """An order that bypasses the API."""
    return JobOrder(**{"name": name, "username": "ann", **more})


OWNER = Owner("owner", "worker@here", "here", 1)


async def claim(queue: JobQueue, limit: int = 10) -> list[Job]:
    """What a worker with so many free slots is given."""
    return await queue.claims.claim(OWNER, namespaces=["DEFAULT"], limit=limit)


async def held(queue: JobQueue, job: Job) -> str | None:
    """Why the job is out of the line."""
    found: str | None = (await queue.store.get(job.id)).document.get("held")
    return found


def states(events: Sequence[Event]) -> list[str]:
    """The states that events told, without repeats that follow each other."""
    told = [event.data["state"] for event in events if event.kind == "state"]
    return [state for index, state in enumerate(told) if index == 0 or told[index - 1] != state]


def messages(events: Sequence[Event]) -> list[str]:
    """The log messages among events."""
    return [event.data["message"] for event in events if event.kind == "log"]
