"""What a worker needs of the rest of the system, and nothing else.

Two have it: `core4.worker.direct` with the database itself, `core4.worker.remote` over HTTP, for hosts
that have no access to it. Leases, fences and heartbeats are the same behind both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from bson import ObjectId

from core4.attendance import Contact
from core4.changes import Listener
from core4.claims import Begins, Claimed
from core4.controls import Controls
from core4.database import Document
from core4.errors import Core4Error, Unavailable
from core4.jobs import Job, Owner
from core4.logs import Line
from core4.retries import Outcome
from core4.states import Flag
from core4.worker.protocol import Message


class OwnerLost(Unavailable):
    """The owner is unknown, has left or was declared dead: nothing more is done in its name."""


class Refused(Core4Error):
    """The manager does not accept what this worker sent."""

    code = "refused"


class Chores(Protocol):
    """What a worker with a database does for all, beside its jobs."""

    def parts(self) -> Sequence[Any]:
        """Coroutines that run until they are cancelled."""

    def crowd(self, namespace: str | None) -> int:
        """How many workers live that serve a namespace, or any, as far as this one knows."""

    async def obey(self, *, resumed: bool) -> None:
        """What operators hold back has changed; with `resumed` a pause has ended."""


class Backend(Protocol):
    """Every method may be repeated after an error; what is worth repeating raises one of `TROUBLE`."""

    async def prepare(self) -> None:
        """Before everything else."""

    def chores(
        self,
        *,
        contact: Contact,
        controls: Callable[[], Controls],
        worker: Callable[[], str],
        woken: Callable[[], None],
        closing: Any,
    ) -> Chores | None:
        """What this worker does for all, if it does.

        Args:
            worker: its name.
            woken: called when there may be something to claim.
            closing: an `asyncio.Event`, set when the worker stops.
        """

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Call `callback` for changes that may concern a worker; returns what ends that."""

    def is_live(self) -> bool:
        """True while whatever can be claimed is told at once."""

    async def follow(self) -> None:
        """Read the changes for those that `listen`, until cancelled."""

    async def server_time(self, owner: Owner) -> datetime:
        """The time that counts."""

    async def controls(self, owner: Owner) -> Controls:
        """What operators hold back."""

    # ------------------------------------------------------------------ the worker itself

    async def enlist(self, owner: Owner) -> None:
        """Announce a worker that is about to load its jobs."""

    async def register(
        self, owner: Owner, *, slots: int, namespaces: Sequence[str], jobs: Sequence[str]
    ) -> None:
        """Announce an owner; comes before its first claim."""

    async def publish(self, owner: Owner, entries: Sequence[Mapping[str, Any]]) -> None:
        """Store what a worker can run, and its schedules."""

    async def serve(
        self, owner: Owner, jobs: Sequence[str], namespaces: Sequence[str], broken: Sequence[str]
    ) -> None:
        """Say anew which jobs this worker runs, in which namespaces, and which files are broken."""

    async def beat(
        self, owner: Owner, *, running: int, draining: bool, gate: str | None, paused: bool
    ) -> bool:
        """Renew; False if the owner has been declared dead and must give up what it holds."""

    async def leave(self, owner: Owner) -> None:
        """The owner ends by itself and holds nothing any more."""

    # ------------------------------------------------------------------ its jobs

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
        """Up to `limit` due jobs, now held by `owner`; see `core4.claims`."""

    async def running(self, owner: Owner) -> list[Job]:
        """All jobs held by this owner."""

    async def release(self, job: Job, *, reason: str, delay: float = 0.0, evicted: int = 0) -> Job:
        """Put a held job back in line, uncharged. Raises: LeaseLost."""

    async def start(self, job: Job, *, pid: int) -> Job:
        """Record that the attempt begins. Raises: LeaseLost."""

    async def progress(self, job: Job, value: float, message: str) -> None:
        """Store how far the job is. Raises: LeaseLost."""

    async def flag(self, job: Job, what: Flag, *, reason: str) -> Job:
        """Note that the job runs or is silent too long. Raises: LeaseLost."""

    async def finish(self, job: Job, outcome: Outcome, *, log_seq: int) -> Job:
        """Record how the attempt ended. Raises: LeaseLost."""

    async def append(self, job: Job, hostname: str, lines: Sequence[Line]) -> None:
        """Store lines of its log."""

    async def action(self, job: Job) -> Mapping[str, Any] | None:
        """What is stored of the shipped function that the job calls; None if it is gone.

        Raises: SourceRefused if it is not given to this worker.
        """

    async def dependencies(self, job: Job) -> Mapping[str, Any]:
        """The results of the jobs before it by their ids, in the order in which they were named.

        Raises: SourceRefused if one is gone, or if they are more than `core4.functions.RESULTS`.
        """

    async def enqueue(
        self, job: Job, name: str, args: Mapping[str, Any], number: int, *, hostname: str
    ) -> Message:
        """Enqueue what the job asks for, see `core4.children`. Raises: LeaseLost."""

    async def call(
        self, job: Job, name: str, args: Mapping[str, Any], number: int, *, hostname: str
    ) -> Message:
        """Enqueue a job that this one waits for, see `core4.children`. Raises: LeaseLost."""

    async def ended(self, ids: Sequence[ObjectId]) -> Mapping[ObjectId, Message]:
        """What callers are told of those of these jobs that have ended."""

    async def kill_called(self, job: Job, called: ObjectId) -> None:
        """End a job that this one has called and does not wait for any more."""
