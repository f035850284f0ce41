"""Jobs of plain functions: how they stand in the queue, and how they are told in myjobs' words. Pure.

Such a job has a field `function`: the key of its action, the function's name, who signed for it, who
submitted it, and `die`. Its `name` is made of the function's; the name that its caller gave is its `label`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from bson import ObjectId

from core4.errors import BadArguments, TooLarge
from core4.jobs import JobOrder, canonical
from core4.options import DEBUG
from core4.results import has_ended
from core4.schemas import FUNCTION_STATES, json_problems
from core4.sources import Source
from core4.states import State

NAMESPACE = "FUNCTIONS"  # only workers that run functions look there: nobody else passes their jobs by
SERVES = "core4.function"  # what a worker that runs functions says it serves
PREFIX = SERVES + "."
RESULTS = 8 * 1024 * 1024  # bytes that the results of a job's dependencies may have together

STATES = FUNCTION_STATES
ERROR_CATS = ("NA", "ERROR", "TIMEOUT", "CRASH", "HALTED")


def job_name(method: str) -> str:
    """The name of all jobs of a function: what rights are asked about."""
    return PREFIX + method


def make_order(
    source: Source,
    kwargs: Mapping[str, Any],
    *,
    args_cap: int,
    by: str,
    signer: str,
    label: str | None = None,
    category: str = "",
    timeout: float = 0.0,
    dependencies: Sequence[ObjectId] = (),
    die: bool = True,
    return_queues: Sequence[str] = (),
    **who: Any,
) -> JobOrder:
    """The order of one call of a function.

    Args:
        args_cap: bytes that the arguments may have as JSON.
        by: the user who submits it; `signer` is whose key signed the source.
        label: its own name; only one open job of `by` may have it.
        timeout: seconds, 0 for none.
        who: the fields of a `JobOrder` that say who asks.

    Raises: BadArguments, TooLarge.
    """
    if problems := json_problems(kwargs):
        raise BadArguments(problems)
    size = len(canonical(dict(kwargs)))
    if size > args_cap:
        raise TooLarge(f"the arguments have {size} bytes, {args_cap} are accepted; pass a reference instead")
    source.check_call(kwargs)
    about = {
        "key": source.key,
        "method": source.method,
        "signer": signer,
        "by": by,
        "die": die,
        "debug": source.debug,
    }
    return JobOrder(
        name=job_name(source.method),
        args=kwargs,
        namespace=DEBUG if source.debug else NAMESPACE,
        # Whatever it does is its author's to repeat; and nobody has said how many may run at a time.
        options={
            "attempts": 1,
            "max_parallel": None,
            "timeout": timeout or None,
            **({"return_queues": list(return_queues)} if return_queues else {}),
        },
        unique=label is not None,
        keep_stopped=False,
        label=label,
        category=category or None,
        dependencies=dependencies,
        function=about,
        username=by,
        **who,
    )


def state_of(document: Mapping[str, Any]) -> str:
    """The word of myjobs for the state of a stored job; DONE is OK with the result collected."""
    state = State(document["state"])
    if state is State.COMPLETE:
        return "DONE" if document.get("consumed") else "OK"
    if has_ended(document):
        return "ERROR"
    return "RUNNING" if state is State.RUNNING else "NEW"


def condition(words: Sequence[str]) -> dict[str, Any]:
    """The filter for stored jobs whose state is one of these words."""
    terms: list[dict[str, Any]] = []
    removed: dict[str, Any] = {"$ne": None}
    if "NEW" in words:
        waiting = [State.BLOCKED, State.PENDING, State.FAILED, State.DEFERRED]
        terms.append({"state": {"$in": waiting}, "removed_at": None})
    if "RUNNING" in words:
        terms.append({"state": State.RUNNING})
    if "OK" in words:
        terms.append({"state": State.COMPLETE, "consumed": None})
    if "DONE" in words:
        terms.append({"state": State.COMPLETE, "consumed": removed})
    if "ERROR" in words:
        terms.append({"state": {"$in": [State.ERROR, State.KILLED, State.INACTIVE]}})
        terms.append({"state": {"$in": [State.BLOCKED, State.PENDING]}, "removed_at": removed})
    return {"$or": terms} if terms else {}


def error_cat_of(document: Mapping[str, Any]) -> str:
    """Why a job is in ERROR, in one of myjobs' words; NA if it is not."""
    if state_of(document) != "ERROR":
        return "NA"
    if document["state"] != State.ERROR:
        return "HALTED"  # killed, removed or given up
    found = document.get("error_cat")
    return found if found in ERROR_CATS else "ERROR"


def record(document: Mapping[str, Any]) -> dict[str, Any]:
    """A stored job as myjobs' fields; times in seconds since 1970, 0 for what has not been yet."""
    function = document.get("function") or {}
    state = state_of(document)
    return {
        "id": document["_id"],
        "name": document.get("label") or f"j{document['_id']}",
        "qual_name": document["name"],
        "category": document.get("category") or "",
        "state": state,
        "error_cat": error_cat_of(document),
        "time_created": _seconds(document["enqueued"]["at"]),
        "time_start": _seconds(document.get("started_at")),
        "time_stop": _seconds(document.get("finished_at") or document.get("removed_at"))
        if has_ended(document)
        else 0.0,
        "timeout": document.get("timeout") or 0.0,
        "action_id": function.get("key", ""),
        "kwargs": document["args"],
        "result": document.get("result") if state == "OK" else None,
        "error": _error(document) if state == "ERROR" else {},
        "die": bool(function.get("die", False)),
        "debug": bool(function.get("debug", False)),
        "dependencies": list(document.get("dependencies") or ()),
        "return_queues": list(document.get("return_queues") or ()),
    }


def _error(document: Mapping[str, Any]) -> dict[str, Any]:
    last = document.get("last_error") or {}
    found = {
        "message": last.get("exception") or f"the job was {_end_of(document)}",
        "traceback": "".join(last.get("traceback") or ()),
    }
    culprit = last.get("dependency_failure")
    return {**found, "dependency_failure": culprit} if culprit is not None else found


def _end_of(document: Mapping[str, Any]) -> str:
    return "removed" if document.get("removed_at") else str(document["state"])


def _seconds(at: datetime | None) -> float:
    return at.timestamp() if at else 0.0
