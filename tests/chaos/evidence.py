"""What a run leaves for the checker: the clients' history, the jobs' ledger, the followers, the last dump.

All of it is written outside of the product. History and ledger are files of lines, appended with one
write each, so that what a killed process noted is there.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bson import json_util

Document = Mapping[str, Any]
Kind = Literal["ok", "fail", "info"]


@dataclass(frozen=True)
class Operation:
    """One request of a client and what it was told: `ok`, `fail` (refused) or `info` (nobody knows).

    ``target`` is the job, for an enqueue the client's own key, which the job has as ``args.key``. ``result``
    is the id that was acknowledged (enqueue, restart, claim) or the reason of a refusal. Times are those
    of the machine's clock; an unknown outcome may take effect at any time after ``begin``.
    """

    client: str
    op: str
    target: str
    kind: Kind
    begin: float
    end: float
    result: str | None = None
    lease: str | None = None


@dataclass(frozen=True)
class Note:
    """One line of the ledger: `start`, `tick` or `end` of an execution; `token` is made by the execution."""

    what: str
    job: str
    attempt: int
    token: str
    pid: int
    at: float


@dataclass(frozen=True)
class Event:
    """One event of a follower: connection number, kind, and the two halves of its id."""

    connection: int
    kind: str
    rev: int
    seq: int


@dataclass(frozen=True)
class Follower:
    """What one follower of one job has seen, over all its connections; `ended` if it was told the end."""

    job: str
    events: Sequence[Event]
    ended: bool = True


@dataclass(frozen=True)
class Evidence:
    """All that the checker knows.

    ``fires`` are the ids of all cron fires, computed offline, None without schedules; ``may_fire`` those of
    instants around the pause of their schedule. ``pauses`` says that processes were stopped and woken: two
    executions may overlap then. ``crashed_database`` says that log lines of the last moment may have been
    shown and lost. ``alive`` are the pids alive at the end. ``malformed`` are the ids of messages that can be
    no jobs, ``dead`` those of the dead letters.
    """

    operations: Sequence[Operation] = ()
    ledger: Sequence[Note] = ()
    queue: Sequence[Document] = ()
    journal: Sequence[Document] = ()
    log: Sequence[Document] = ()
    workers: Sequence[Document] = ()
    followers: Sequence[Follower] = ()
    fires: frozenset[str] | None = None
    may_fire: frozenset[str] = frozenset()
    pauses: bool = False
    crashed_database: bool = False
    alive: frozenset[int] = field(default_factory=frozenset)
    malformed: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()


class History:
    """Appends what clients ask and are told to a file; any number of processes and threads may."""

    _numbers = itertools.count()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._lock = threading.Lock()

    def invoke(self, client: str, op: str, target: object, *, lease: str | None = None) -> str:
        """Note a request before it is sent; returns its number."""
        with self._lock:
            number = f"{os.getpid()}-{next(self._numbers)}"
        self._write(number=number, kind="invoke", client=client, op=op, target=str(target), lease=lease)
        return number

    def answer(
        self,
        number: str,
        kind: Kind,
        result: object = None,
        *,
        lease: str | None = None,
        target: object = None,
    ) -> None:
        """Note what came of it; without a call the outcome is unknown."""
        more = {"lease": lease} if lease else {}
        more |= {"target": str(target)} if target is not None else {}
        self._write(number=number, kind=kind, result=None if result is None else str(result), **more)

    def _write(self, **fields: Any) -> None:
        os.write(self._handle, (json.dumps({**fields, "at": time.time()}) + "\n").encode())

    def close(self) -> None:
        os.close(self._handle)


@contextmanager
def opened(path: Path) -> Iterator[History]:
    """A history that is closed at the end."""
    history = History(path)
    try:
        yield history
    finally:
        history.close()


def read_history(path: Path) -> list[Operation]:
    """The operations of a history file; what was never answered is `info`."""
    asked: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "invoke":
            asked[record["number"]] = {**record, "begin": record["at"], "kind": "info", "end": float("inf")}
        else:
            known = asked[record["number"]]
            known |= {key: value for key, value in record.items() if key != "at"}
            known["end"] = float("inf") if record["kind"] == "info" else record["at"]
    names = ("client", "op", "target", "kind", "begin", "end", "result", "lease")
    rows: list[dict[str, Any]] = [{name: record.get(name) for name in names} for record in asked.values()]
    return [Operation(**row) for row in rows]


def read_ledger(path: Path) -> list[Note]:
    """The lines of a ledger, in the order in which they were written."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        what, job, attempt, token, pid, at = line.split()
        found.append(Note(what, job, int(attempt), token, int(pid), float(at)))
    return found


def write_dump(path: Path, dump: Mapping[str, Sequence[Document]]) -> None:
    """Keep a dump of the database beside the other evidence, for a second look."""
    path.write_text(json_util.dumps(dump, indent=1))
