"""A worker's backend behind HTTP: for hosts that have no access to the database.

Each method is one request to `core4.api.workers`, which calls the same stores. What the manager does not
answer is `Unavailable`, and repeated by whoever asked; what it refuses because the lease is not this
worker's any more is `LeaseLost`, as the database would say it. Works through restarts of the manager: its
tokens outlive them, and the worker comes back as another owner if they do not.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import aiohttp
import bson
from bson import ObjectId
from bson.codec_options import CodecOptions

from core4 import __version__, handshake
from core4.attendance import Contact
from core4.changes import Change, Listener
from core4.claims import Begins, Claimed
from core4.config import Settings
from core4.controls import CONTROL, Controls, Halt, Pause, Stop
from core4.database import Document
from core4.errors import ConfigError, Core4Error, LeaseLost, SourceRefused, Unauthenticated, Unavailable
from core4.jobs import Job, Owner
from core4.logs import Line
from core4.retries import Outcome
from core4.states import Flag
from core4.store import QUEUE
from core4.worker.backend import OwnerLost, Refused
from core4.worker.functions import namespaces
from core4.worker.protocol import Message

log = logging.getLogger(__name__)

_PATH = "/core4/api/v1/worker/"
_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(tz_aware=True, tzinfo=UTC)
TIMEOUT = 30.0  # seconds for one request
WAIT = 20.0  # seconds that the manager holds back its answer while there is no news
_PAUSE = 1.0  # seconds until news are asked for again after an error
_FINAL = (400, 403, 404, 413, 422)  # what no repetition changes
_NEWS: Mapping[str, Change] = {
    "work": Change("update", QUEUE, None, {"due": True}),
    "control": Change("update", CONTROL),
    "look": Change("resync"),
}


class Remote:
    """A manager, as a `core4.worker.backend.Backend`; use it as a context manager."""

    def __init__(self, settings: Settings) -> None:
        if settings.manager is None or settings.worker_secret is None:
            raise ConfigError("a worker over HTTP needs CORE4_MANAGER and CORE4_WORKER_SECRET")
        self._url, self._secret = settings.manager.rstrip("/") + _PATH, settings.worker_secret
        self._namespaces = list(namespaces(settings))
        self._tokens: dict[str, str] = {}  # by owner; those of lost owners too, to give back what they held
        self._admitted: set[str] = set()
        self._admitting = asyncio.Lock()
        self._owner: Owner | None = None
        self._listeners: set[Listener] = set()
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Remote:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        self._session = aiohttp.ClientSession(timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def terms(self, settings: Settings) -> Settings:
        """The settings with what manager and worker have to agree on, as the manager has it.

        Raises: Unavailable; Refused if it lets in no workers.
        """
        found = (await self._post("challenge", {}))["terms"]
        return replace(settings, **found)

    # ------------------------------------------------------------------ signing in

    async def _admit(self, owner: Owner) -> str:
        """The token of this owner, after signing in if it has not.

        Raises: Unavailable; Unauthenticated if the manager has another secret, or is not one that knows it.
        """
        async with self._admitting:
            token = self._tokens.setdefault(owner.id, handshake.make_token(owner.id))
            if owner.id not in self._admitted:
                await self._sign_in(owner, token)
                self._admitted.add(owner.id)
                self._owner = owner
        return token

    async def _sign_in(self, owner: Owner, token: str) -> None:
        word = (await self._post("challenge", {}))["challenge"]
        said = {
            "owner": owner.id,
            "name": owner.worker,
            "hostname": owner.hostname,
            "pid": owner.pid,
            "kind": vars(owner.kind),
            "namespaces": self._namespaces,
            "token": handshake.fingerprint(token),
        }
        proof = handshake.worker_proof(self._secret, word, said)
        answer = await self._post("login", {**said, "challenge": word, "proof": proof})
        if not handshake.same(answer["proof"], handshake.manager_proof(self._secret, word, said)):
            raise Unauthenticated("what answers there does not know the secret: it is not our manager")

    async def _post(self, what: str, words: Mapping[str, Any], token: str | None = None) -> Any:
        """The `data` of an answer. Raises: Unavailable, Unauthenticated, Refused."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            async with self._session.post(
                self._url + what, data=json.dumps(words).encode(), headers=headers
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(
                f"the manager does not answer: {str(error) or type(error).__name__:.150}"
            ) from error
        if response.status != 200:
            raise _refusal(response.status, body)
        if response.content_type == "application/bson":
            return bson.decode(body, _CODEC)["data"]
        return json.loads(body)["data"]

    async def _ask(self, owner: Owner, what: str, /, **words: Any) -> Any:
        """One request in the name of a worker. Raises: Unavailable, OwnerLost, Refused."""
        token = await self._admit(owner)
        try:
            return await self._post(what, words, token)
        except Unauthenticated as error:
            raise OwnerLost(f"the manager does not know this worker any more: {error.detail}") from error

    async def _of(self, job: Job, what: str, /, **words: Any) -> Any:
        """One request about a job that this worker holds. Raises: LeaseLost, Unavailable, Refused."""
        assert job.lease is not None
        ids = {"job_id": str(job.id), "lease_id": job.lease.id}
        try:
            return await self._post(what, {**ids, **words}, self._tokens[job.lease.owner])
        except Unauthenticated:
            raise LeaseLost(job.id, job.lease.id) from None
        except Refused as refused:
            if refused.facts.get("code") == LeaseLost.code:
                raise LeaseLost(job.id, job.lease.id) from None
            raise

    # ------------------------------------------------------------------ core4.worker.backend.Backend

    async def prepare(self) -> None:
        return None

    def chores(
        self,
        *,
        contact: Contact,
        controls: Callable[[], Controls],
        worker: Callable[[], str],
        woken: Callable[[], None],
        closing: asyncio.Event,
    ) -> None:
        return None  # that is for workers with a database

    def listen(self, callback: Listener) -> Callable[[], None]:
        self._listeners.add(callback)
        return lambda: self._listeners.discard(callback)

    def is_live(self) -> bool:
        return False

    async def follow(self) -> None:
        while True:
            try:
                if self._owner is None:
                    raise Unavailable("not signed in yet")
                news = await self._ask(self._owner, "wait", seconds=WAIT)
            except Unavailable:
                # Whoever needs an answer finds out, too, and says so; work is looked for all the same.
                await asyncio.sleep(_PAUSE)
                continue
            for change in (_NEWS[word] for word in news if word in _NEWS):
                for listener in tuple(self._listeners):
                    listener(change)

    async def server_time(self, owner: Owner) -> datetime:
        now: datetime = (await self._ask(owner, "controls"))["now"]
        return now

    async def controls(self, owner: Owner) -> Controls:
        found = await self._ask(owner, "controls")
        halt = Halt(**found["halt"]) if found["halt"] else None
        pauses, stops = (found[name] for name in ("pauses", "stops"))
        return Controls(tuple(Pause(**each) for each in pauses), halt, tuple(Stop(**each) for each in stops))

    async def enlist(self, owner: Owner) -> None:
        await self._admit(owner)

    async def register(
        self, owner: Owner, *, slots: int, namespaces: Sequence[str], jobs: Sequence[str]
    ) -> None:
        await self._ask(owner, "register", slots=slots, jobs=list(jobs), version=__version__)

    async def publish(self, owner: Owner, entries: Sequence[Mapping[str, Any]]) -> None:
        own = [entry for entry in entries if entry["namespace"] in self._namespaces]
        if others := sorted(entry["_id"] for entry in entries if entry not in own):
            # It runs them if they are sent to its namespaces; to publish them is for who serves theirs.
            log.warning("jobs.unpublished", extra={"jobs": others, "namespaces": self._namespaces})
        await self._ask(owner, "publish", entries=own)

    async def serve(
        self, owner: Owner, jobs: Sequence[str], namespaces: Sequence[str], broken: Sequence[str]
    ) -> None:
        await self._ask(owner, "serve", jobs=list(jobs), broken=list(broken))

    async def beat(
        self, owner: Owner, *, running: int, draining: bool, gate: str | None, paused: bool
    ) -> bool:
        words = {"running": running, "draining": draining, "gate": gate, "paused": paused}
        try:
            return bool(await self._post("beat", words, await self._admit(owner)))
        except Unauthenticated:
            return False  # as if it had been declared dead: it signs in as another one

    async def leave(self, owner: Owner) -> None:
        if owner.id in self._admitted:
            await self._ask(owner, "leave")

    async def claim(
        self,
        owner: Owner,
        *,
        namespaces: Sequence[str],
        limit: int,
        rooms: Mapping[str, int],
        forced: bool,
        awaited: bool,
        pinned: bool,
        arrived: Sequence[Document] | None,
        controls: Controls,
        begins: Begins,
    ) -> Claimed:
        room = {"limit": limit, "rooms": dict(rooms), "forced": forced, "awaited": awaited}
        rows = await self._ask(owner, "claim", **room)
        return Claimed(map(Job.from_document, rows))

    async def running(self, owner: Owner) -> list[Job]:
        if owner.id not in self._admitted:
            return []
        return [Job.from_document(row) for row in await self._ask(owner, "running")]

    async def release(self, job: Job, *, reason: str, delay: float = 0.0, evicted: int = 0) -> Job:
        row = await self._of(job, "release", reason=reason, delay=delay, evicted=evicted)
        return Job.from_document(row)

    async def start(self, job: Job, *, pid: int) -> Job:
        return Job.from_document(await self._of(job, "start", pid=pid))

    async def progress(self, job: Job, value: float, message: str) -> None:
        await self._of(job, "progress", value=value, message=message)

    async def flag(self, job: Job, what: Flag, *, reason: str) -> Job:
        return Job.from_document(await self._of(job, "flag", what=what, reason=reason))

    async def finish(self, job: Job, outcome: Outcome, *, log_seq: int) -> Job:
        try:
            row = await self._of(job, "finish", **asdict(outcome), log_seq=log_seq)
        except Refused as refused:
            # The job must not run for ever because its result is not accepted.
            small = Outcome.failed(f"the result cannot be stored: {refused.detail}"[:500], [])
            row = await self._of(job, "finish", **asdict(small), log_seq=log_seq)
        return Job.from_document(row)

    async def append(self, job: Job, hostname: str, lines: Sequence[Line]) -> None:
        rows = [
            [line.seq, line.epoch, line.level, line.message, line.source, line.exception] for line in lines
        ]
        await self._of(job, "log", hostname=hostname, lines=rows)

    async def action(self, job: Job) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = await self._granted(job, "action")
        return found

    async def dependencies(self, job: Job) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._granted(job, "dependencies")
        return found

    async def enqueue(
        self, job: Job, name: str, args: Mapping[str, Any], number: int, *, hostname: str
    ) -> Message:
        wanted = {"name": name, "args": dict(args), "number": number, "hostname": hostname}
        return await self._wish(job, "enqueue", wanted)

    async def call(
        self, job: Job, name: str, args: Mapping[str, Any], number: int, *, hostname: str
    ) -> Message:
        wanted = {"name": name, "args": dict(args), "number": number, "hostname": hostname}
        return await self._wish(job, "call", wanted)

    async def ended(self, ids: Sequence[ObjectId]) -> Mapping[ObjectId, Message]:
        assert self._owner is not None  # somebody waits, so somebody runs
        found = await self._ask(self._owner, "ended", ids=[str(each) for each in ids])
        return {ObjectId(job_id): told for job_id, told in found.items()}

    async def kill_called(self, job: Job, called: ObjectId) -> None:
        await self._of(job, "kill", called=str(called))

    async def _granted(self, job: Job, what: str) -> Any:
        try:
            return await self._of(job, what)
        except Refused as refused:
            raise SourceRefused(refused.detail) from None

    async def _wish(self, job: Job, what: str, wanted: Mapping[str, Any]) -> Message:
        try:
            answer: Message = await self._of(job, what, **wanted)
        except Refused as refused:
            return {"refused": {"reason": "bad_arguments", "detail": refused.detail}}
        return answer


def _refusal(status: int, body: bytes) -> Core4Error:
    try:
        problem = json.loads(body)
        detail, code = str(problem["detail"]), str(problem["type"]).rpartition(":")[2]
    except (ValueError, KeyError, TypeError):
        detail, code = body[:200].decode(errors="replace"), ""
    if status == 401:
        return Unauthenticated(detail)
    if status in _FINAL or code == LeaseLost.code:
        return Refused(f"the manager refuses: {detail}", code=code)
    return Unavailable(f"the manager answered {status}: {detail}")
