"""The result of a job for those who asked for it: a status in four words, and what came out. Pure.

Queued, Running, Failed and Completed are easyjobs' words; `core4.states` has the states behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from core4.states import FINAL, State

FIELDS = (
    "_id request_id name namespace state args enqueued started_at finished_at removed_at trial result "
    "last_error error_cat killed_at"
).split()
"""What of a job's document is needed here."""


EXPIRY = "expiry"  # who takes what nobody has pulled
DEPTH = 64  # levels of lists and objects in a result; databases refuse documents of a hundred


class Status(StrEnum):
    """How far a job is, as whoever waits for its result sees it."""

    QUEUED = "Queued"
    RUNNING = "Running"
    FAILED = "Failed"
    COMPLETED = "Completed"


def has_ended(document: Mapping[str, Any]) -> bool:
    """True if nothing more will come of the job: it has ended, or was removed before it could."""
    removed = bool(document.get("removed_at")) and document["state"] != State.RUNNING
    return document["state"] in FINAL or removed


def status_of(document: Mapping[str, Any]) -> Status:
    """The word for the state of a stored job."""
    if document["state"] == State.COMPLETE:
        return Status.COMPLETED
    if has_ended(document):
        return Status.FAILED
    return Status.RUNNING if document["state"] == State.RUNNING else Status.QUEUED


def unstorable(result: Any) -> str | None:
    """Why a value that JSON can write is no result although a database takes it; None if it is one.

    What comes back must be what was given: JSON makes texts of other keys, and drivers make objects with
    `$ref` and the like into values that are no JSON any more.
    """
    waiting: list[tuple[Any, int]] = [(result, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return f"{item} is no number in JSON"
        if not isinstance(item, Mapping | list | tuple):
            continue
        if depth > DEPTH:
            return f"nested deeper than {DEPTH} levels"
        if isinstance(item, Mapping):
            for key in item:
                if not isinstance(key, str):
                    return f"the key {key!r:.100} is not a text"
                if key.startswith("$"):
                    return f"the name {key[:100]!a} begins with `$`"
                if "\0" in key:
                    return f"the name {key[:100]!a} has NUL"
        waiting += [(each, depth + 1) for each in (item.values() if isinstance(item, Mapping) else item)]
    return None


def result_of(document: Mapping[str, Any], *, traceback: bool = False) -> dict[str, Any]:
    """What is told of a job's result; `error` is None unless the job is Failed.

    Any JSON value is a result, null and false among them: `status` says whether there is one.
    """
    status = status_of(document)
    return {
        "job_id": document["_id"],
        "request_id": document.get("request_id"),
        "name": document["name"],
        "namespace": document["namespace"],
        "status": status.value,
        "args": document["args"],
        "enqueued_at": document["enqueued"]["at"],
        "started_at": document.get("started_at"),
        "finished_at": document.get("finished_at"),
        "result": document.get("result") if status is Status.COMPLETED else None,
        "error": _error(document, traceback=traceback) if status is Status.FAILED else None,
    }


def gone(document: Mapping[str, Any]) -> str:
    """Why a job has no result any more, in words."""
    taken = document["consumed"]
    how = "has expired" if taken["by"] == EXPIRY else f"was pulled by {taken['by']}"
    return f"the result of job [{document['_id']}] {how} at {taken['at'].isoformat(timespec='seconds')}"


def _error(document: Mapping[str, Any], *, traceback: bool) -> dict[str, Any]:
    last = document.get("last_error") or {}
    text = last.get("exception")
    if document["state"] not in FINAL:
        text = f"removed while {document['state']}" + (f"; before that: {text}" if text else "")
    elif document["state"] == State.INACTIVE:
        text = "deferred past its window" + (f": {text}" if text else "")
    found = {
        "message": text or f"the job is {document['state']}",
        "state": document["state"],
        "category": document.get("error_cat"),
        "attempt": document["trial"],
    }
    return {**found, "traceback": last.get("traceback")} if traceback else found
