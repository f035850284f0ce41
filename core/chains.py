"""How jobs hang together: what runs before a job, what follows from its end, and with which arguments. Pure.

A job keeps the names of its hooks (`run_before`, `run_after`, `on_failure`) and, as `hooks`, what has to be
known of every task that can follow from it: the chain goes on whatever becomes of the catalogue. What follows
is noted in the `outbox` of the update that makes it follow; a note has a `kind`, a `target` and an `index`:

    job      make the job `target`, by the `edge` before, after or failure
    restart  make the job `target`, which takes this one's place
    release  let loose whoever waits for this job, or for the child `target` that is not to be
    post     put its end into the return queue `queue`
    hush     end what its attempts called up to that of `fence`: they were lost, and nobody hears of it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from bson import ObjectId

from core4 import jobs
from core4.errors import JobInvalid
from core4.jobs import Job, JobOrder
from core4.options import OPTIONS
from core4.states import FINAL, State

Edge = Literal["before", "after", "failure"]
Document = Mapping[str, Any]

MOST_TASKS = 100  # that may hang together by hooks
ROUND = 2  # failed attempts after which the handler of a task that is always retried is told
_HOOKS = ("run_before", "run_after")


# ---------------------------------------------------------------------- the hooks of a task


def hooks_of(entry: Document) -> list[str]:
    """The qual_names that a task names in its hooks."""
    return [name for key in _HOOKS for name in entry.get(key) or ()] + [
        name for name in [entry.get("on_failure")] if name
    ]


def resolve(entry: Document, others: Iterable[Document]) -> list[dict[str, Any]]:
    """What a job of `entry` has to know of all tasks that can follow from it; `others` are their entries.

    Raises: JobInvalid for a name that nobody has published, for hooks that lead back to where they came
    from, and for a prerequisite that cannot do without arguments.
    """
    known = {each["_id"]: each for each in (entry, *others)}
    if len(known) > MOST_TASKS:
        raise JobInvalid(f"more than {MOST_TASKS} tasks hang together by the hooks of [{entry['_id']}]")
    _check(entry, known, ())
    return [_spec(each) for name, each in known.items() if name != entry["_id"]]


def _check(entry: Document, known: Mapping[str, Document], path: tuple[str, ...]) -> None:
    name = entry["_id"]
    if name in path:
        raise JobInvalid(f"the hooks of [{path[0]}] lead back: {' -> '.join((*path, name))}")
    for hook in hooks_of(entry):
        if hook not in known:
            raise JobInvalid(f"[{name}] names [{hook}] as a hook: no worker has published such a task")
        # What handles the failures of others may name itself: its own are not handed on.
        if hook != name or hook != entry.get("on_failure"):
            _check(known[hook], known, (*path, name))
    for hook in entry.get("run_before") or ():
        missing = [
            each for each in _required(known[hook]) if each not in (known[hook].get("default_args") or {})
        ]
        if missing:
            raise JobInvalid(
                f"[{name}] runs [{hook}] before it, which needs {', '.join(missing)}: "
                "give that task default_args, a prerequisite gets no others"
            )


def _required(entry: Document) -> Sequence[str]:
    found: Sequence[str] = (entry.get("schema") or {}).get("required", ())
    return found


def _spec(entry: Document) -> dict[str, Any]:
    schema = entry.get("schema") or {}
    given = entry.get("options") or {}
    spec = {
        "name": entry["_id"],
        "namespace": entry.get("namespace") or "DEFAULT",
        "options": {name: value for name, value in given.items() if value != OPTIONS[name].default},
        "parameters": list(schema.get("properties", ())),
        "required": list(_required(entry)),
        "more": bool(schema.get("additionalProperties", False)),
        "signature": entry.get("signature"),
        "keep_stopped": entry.get("kind", "class") == "class",
    }
    optional = (*_HOOKS, "on_failure", "retry_policy", "default_args")
    return spec | {key: entry[key] for key in optional if entry.get(key)}


# ---------------------------------------------------------------------- documents


def document(
    order: JobOrder, job_id: ObjectId, now: datetime, *, open_deps: Sequence[ObjectId] = ()
) -> dict[str, Any]:
    """The queue document of a new job; it is blocked while it waits for others.

    Args:
        open_deps: those of its dependencies that have not completed.
    """
    found = jobs.new_document(order, job_id, now)
    before = [_note(job_id, "before", index, name) for index, name in enumerate(order.run_before)]
    waits = [*open_deps, *(note["target"] for note in before)]
    if order.hooks and order.chain_id is None:
        found["chain_id"] = job_id
    if waits:
        found.pop("due", None)
        found.pop("held", None)
        # `settle`: its prerequisites have to be made, and looked at once it is there for them to find.
        found |= {"state": State.BLOCKED.value, "open_deps": waits, "settle": True}
        found["history"] = [{**found["history"][0], "state": State.BLOCKED.value}]
        if before:
            found["outbox"] = before
    return found


def _note(parent_id: ObjectId, edge: Edge, index: int, name: str, **more: Any) -> dict[str, Any]:
    child_id = jobs.derived_id(parent_id, edge, index)
    return {"kind": "job", "target": child_id, "index": index, "edge": edge, "name": name, **more}


def followers(after: Document) -> list[dict[str, Any]]:
    """What follows from the move that leaves the document `after`, as notes for its outbox."""
    state, job_id = State(after["state"]), after["_id"]
    notes: list[dict[str, Any]] = []
    if state is State.COMPLETE and not after.get("chain_killed"):
        names = after.get("run_after") or ()
        notes += [_note(job_id, "after", index, name) for index, name in enumerate(names)]
    handler = after.get("on_failure")
    if handler and _has_failed(after, state) and not after.get("chain_killed"):
        # Not only once for a task that is always retried: the revision tells one round from the next.
        notes.append(_note(job_id, "failure", after["rev"], handler, data=_failure(after)))
    if state in FINAL or after.get("removed_at"):
        notes += [_post(job_id, index, name) for index, name in enumerate(after.get("return_queues") or ())]
        if after.get("awaited"):
            notes.append({"kind": "release", "target": job_id, "index": 0})
    return notes


def _post(job_id: ObjectId, index: int, queue: str) -> dict[str, Any]:
    target = jobs.derived_id(job_id, "return", index)
    return {"kind": "post", "target": target, "index": index, "queue": queue}


def hush(job: Job) -> dict[str, Any]:
    """The note of an attempt that was lost with its worker, for the jobs that it has called."""
    target = jobs.derived_id(job.id, "hush", job.fence)
    return {"kind": "hush", "target": target, "index": 0, "fence": job.fence}


def _has_failed(after: Document, state: State) -> bool:
    failures = after["attempts"] - after["attempts_left"]
    again = state is State.FAILED and after.get("retry_policy") == "retry_always"
    return state is State.ERROR or (again and failures % ROUND == 0)


def _failure(after: Document) -> dict[str, Any]:
    """What a handler is told; the message is easyjobs' own."""
    name = str(after["name"]).rpartition(":")[2]
    return {
        "message": f"task {name} failed",
        "job_id": str(after["_id"]),
        "name": name,
        "error": (after.get("last_error") or {}).get("exception"),
        "attempts": after["trial"],
    }


# ---------------------------------------------------------------------- making what follows


def again(parent: Job, note: Document, dependencies: Sequence[ObjectId]) -> JobOrder:
    """The order of the job that takes the place of `parent`, with the same prerequisites and followers."""
    found = parent.document
    return JobOrder(
        name=parent.name,
        args=parent.args,
        namespace=parent.namespace,
        options={name: found[name] for name in OPTIONS if name in found},
        unique=found["unique"],
        keep_stopped=parent.keep_stopped,
        username=note["by"],
        hostname=note["hostname"],
        request_id=note.get("request_id"),
        parent_id=parent.id,
        category=found.get("category"),
        signature=found.get("signature"),
        dependencies=dependencies,
        retry_policy=found.get("retry_policy"),
        run_before=found.get("run_before") or (),
        run_after=found.get("run_after") or (),
        on_failure=found.get("on_failure"),
        hooks=found.get("hooks") or (),
        chain_id=found.get("chain_id"),
        label=found.get("label"),
        function=found.get("function"),
    )


def follower(parent: Job, note: Document, now: datetime) -> dict[str, Any]:
    """The document of the job that `note` in the outbox of `parent` asks for.

    A follower that cannot take what it is given ends before it begins, as error with the reason.
    """
    spec = next(each for each in _known(parent.document) if each["name"] == note["name"])
    args = _args(spec, parent.document, note)
    order = _order(parent, spec, note, args or {})
    if args is not None:
        return document(order, note["target"], now)
    return _misfit(document(order, note["target"], now), spec, now)


def _known(parent: Document) -> Iterator[Document]:
    yield from parent.get("hooks") or ()


def _order(parent: Job, spec: Document, note: Document, args: Mapping[str, Any]) -> JobOrder:
    hooked = bool(hooks_of(spec))
    handler = spec.get("on_failure")
    before = note["edge"] == "before"
    return JobOrder(
        name=spec["name"],
        args=args,
        namespace=spec["namespace"],
        options=spec["options"],
        unique=False,
        keep_stopped=spec["keep_stopped"],
        username=parent.username,
        hostname=parent.document["enqueued"].get("hostname") or "",
        parent_id=parent.id,
        chain_id=parent.document.get("chain_id") or parent.id,
        consumed_by=parent.id if before else None,
        place=parent.rank if before else None,
        depth=parent.document.get("depth", 0) + 1 if before else 0,
        category=parent.document.get("category"),
        retry_policy=spec.get("retry_policy"),
        run_before=spec.get("run_before") or (),
        run_after=spec.get("run_after") or (),
        # A handler that fails is not handed to itself.
        on_failure=None if note["edge"] == "failure" and handler == spec["name"] else handler,
        hooks=tuple(_known(parent.document)) if hooked else (),
        signature=spec.get("signature"),
    )


def _misfit(found: dict[str, Any], spec: Document, now: datetime) -> dict[str, Any]:
    takes = ", ".join(spec["parameters"]) or "nothing"
    text = f"the result of the task before does not fit [{spec['name']}], which takes {takes}"
    for name in ("due", "held", "open_deps", "outbox"):
        found.pop(name, None)
    found |= {
        "state": State.ERROR.value,
        "finished_at": now,
        "attempts_left": 0,
        "error_cat": "ERROR",
        "last_error": {"exception": text, "timestamp": now, "traceback": None},
        "history": [{**found["history"][0], "state": State.ERROR.value, "reason": text}],
        "settle": True,
    }
    notes = followers(found)
    return found | ({"outbox": notes} if notes else {})


def _args(spec: Document, parent: Document, note: Document) -> dict[str, Any] | None:
    if note["edge"] == "before":
        return dict(spec.get("default_args") or {})
    if note["edge"] == "failure":
        return bind_failure(spec, note["data"])
    return bind_result(spec, parent.get("result"))


def bind_result(spec: Document, result: Any) -> dict[str, Any] | None:
    """The arguments that the result of the task before is; None if it does not fit.

    An object whose keys are parameters is spread; anything else goes whole to the one parameter there is.
    """
    names, required = spec["parameters"], spec["required"]
    if (
        isinstance(result, Mapping)
        and set(required) <= set(result)
        and (spec["more"] or set(result) <= set(names))
    ):
        return dict(result)
    if not names and result is None:
        return {}
    free = names if len(names) == 1 else required
    return {free[0]: result} if len(free) == 1 else None


def bind_failure(spec: Document, data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a handler: `job_failed` if it has that, else its first parameter."""
    names, required = spec["parameters"], spec["required"]
    if "job_failed" in names or (spec["more"] and not names):
        name = "job_failed"
    elif names:
        name = (required or names)[0]
    else:
        return {}
    return {name: dict(data)} if set(required) <= {name} else None
