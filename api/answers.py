"""What each handler answers, as JSON Schema: the part of the API's description that no table has.

Request arguments come from the schemas that check them; an answer has no check, so tests hold what is
sent against what is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core4.api import (
    batch,
    bulk,
    control,
    docs,
    doctor,
    events,
    functions,
    jobs,
    metrics,
    results,
    returns,
    schedules,
    sessions,
    system,
    tasks,
)
from core4.functions import ERROR_CATS, STATES
from core4.results import Status
from core4.states import State

Schema = dict[str, Any]


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _some(kind: str) -> Schema:
    """A value of this type, or null."""
    return {"type": [kind, "null"]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


ID: Schema = {"type": "string", "description": "24 hexadecimal digits"}
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer"}
BOOL: Schema = {"type": "boolean"}
ANY: Schema = {}
TIME: Schema = {"type": "string", "description": "ISO 8601 in UTC, without a zone"}
STATE: Schema = {"type": "string", "enum": [state.value for state in State]}
_FLAGS = dict.fromkeys(("zombie", "killed", "removed", "nonstop"), BOOL)
_ERROR = _object("message", "state", message=TEXT, state=STATE, category=_some("string"), attempt=COUNT)

# Of a stream one event is described; its data is the JSON text of an object.
EVENT: Schema = _object(
    "data", event={"type": "string", "enum": ["state", "log", "close"]}, id=TEXT, data=TEXT
)

COMPONENTS: Mapping[str, Schema] = {
    "Envelope": _object(
        *("_id", "version", "timestamp", "message", "code"),
        _id=TEXT,
        version=TEXT,
        timestamp=TIME,
        message=TEXT,
        code=COUNT,
        flash=_list(_object("level", "message", level=TEXT, message=TEXT)),
    ),
    "Pager": _object(
        *("page", "per_page", "page_count", "total_count", "count"),
        page=COUNT,
        per_page=COUNT,
        page_count=_some("integer"),
        total_count=_some("number"),
        count=COUNT,
    ),
    "Problem": {
        "description": "An error: the envelope and the members of RFC 9457",
        **_object(
            *("_id", "code", "message", "error", "type", "title", "status", "detail", "instance"),
            _id=TEXT,
            code=COUNT,
            message=TEXT,
            error=TEXT,
            type=TEXT,
            title=TEXT,
            status=COUNT,
            detail=TEXT,
            instance=TEXT,
            errors=_list(_object("pointer", "message", pointer=TEXT, message=TEXT)),
        ),
    },
    "Job": {
        "description": "A job as it is stored; of one that may not be read the name is UnauthorizedJob",
        **_object(
            *("_id", "qual_name", "state", "args", "highstate", "flag", "age", "prog", "journal"),
            _id=ID,
            qual_name=TEXT,
            state=STATE,
            args=_some("object"),
            highstate=_some("string"),
            flag=_object(*_FLAGS, **_FLAGS),
            age=NUMBER,
            prog=_object("value", "message", value=NUMBER, message=_some("string")),
            journal=BOOL,
            namespace=TEXT,
        ),
    },
    "Result": _object(
        *("job_id", "request_id", "name", "namespace", "status", "args", "result", "error"),
        job_id=ID,
        request_id=_some("string"),
        name=TEXT,
        namespace=TEXT,
        status={"type": "string", "enum": [status.value for status in Status]},
        args={"type": "object"},
        enqueued_at=TIME,
        started_at=_some("string"),
        finished_at=_some("string"),
        result={"description": "what the job returned: any JSON value"},
        error={"anyOf": [_ERROR, {"type": "null"}]},
    ),
    "Record": {
        "description": "The end of a job in a return queue",
        **_object(
            *("_id", "queue", "at", "job_id", "name", "status", "result", "error"),
            _id=ID,
            queue=TEXT,
            at=TIME,
            job_id=ID,
            request_id=_some("string"),
            name=TEXT,
            namespace=TEXT,
            status={"type": "string", "enum": [Status.FAILED.value, Status.COMPLETED.value]},
            finished_at=_some("string"),
            result={"description": "what the job returned: any JSON value"},
            error={"anyOf": [_ERROR, {"type": "null"}]},
        ),
    },
    "Published": {
        "description": "What can be enqueued",
        **_object(
            *("_id", "namespace", "schema", "workers"),
            _id=TEXT,
            namespace=_some("string"),
            schema=_some("object"),
            workers=COUNT,
        ),
    },
    "FunctionJob": {
        "description": "A job in myjobs' words; times in seconds since 1970, 0 for what has not been",
        **_object(
            *("id", "name", "state", "error_cat", "time_start", "time_stop", "kwargs", "error", "action_id"),
            id=ID,
            name=TEXT,
            qual_name=TEXT,
            category=TEXT,
            state={"type": "string", "enum": [*STATES]},
            error_cat={"type": "string", "enum": [*ERROR_CATS]},
            time_created=NUMBER,
            time_start=NUMBER,
            time_stop=NUMBER,
            timeout=NUMBER,
            action_id=TEXT,
            kwargs={"type": "object"},
            result={"description": "what the function returned: any JSON value"},
            error={"type": "object", "description": "empty, or message, traceback and more"},
            die=BOOL,
            debug=BOOL,
            dependencies=_list(ID),
        ),
    },
    "Action": _object(
        *("key", "methodname", "actorname", "created", "revoked"),
        key=TEXT,
        methodname=TEXT,
        actorname=TEXT,
        created=TIME,
        created_by=TEXT,
        revoked={"type": ["object", "null"]},
        code=TEXT,
    ),
    "Schedule": _object(
        *("_id", "qual_name", "state", "next"), _id=TEXT, qual_name=TEXT, state=TEXT, next=_list(TIME)
    ),
    "Worker": _object(
        *("_id", "name", "label", "type", "state", "status", "current", "beat_age", "jobs"),
        _id=TEXT,
        name=TEXT,
        label=TEXT,
        type=TEXT,
        state=TEXT,
        status=TEXT,
        current=_list(ID),
        error=_some("string"),
        beat_age=NUMBER,
        jobs=_list(TEXT),
    ),
    "Event": EVENT,
    "LogLine": _object("seq", "message", "level", seq=COUNT, message=TEXT, level=TEXT),
}


@dataclass(frozen=True)
class Answer:
    """What a handler answers when all is well, and the statuses of what can go wrong in it.

    Those that any request can meet (who is calling, arguments, the database) are not repeated here.
    """

    data: Schema = field(default_factory=dict)
    fails: tuple[int, ...] = ()
    page: bool = False  # a list of `data`, with a pager
    stream: bool = False  # server-sent events, if they are asked for
    silent: bool = False  # nothing but a stream
    plain: str = ""  # media type of what is no JSON
    bare: bool = False  # JSON without the envelope
    succeeds: tuple[int, ...] = (200,)
    beside: Mapping[str, Schema] = field(default_factory=dict)
    perhaps: Mapping[str, Schema] = field(default_factory=dict)  # beside it, in some answers
    idempotent: bool = False  # takes an Idempotency-Key


_CHANGED = {"job": _object("_id", "state", "changed", _id=ID, state=STATE, changed=BOOL)}
_TRUE = {"type": "boolean"}
_JOBS = Answer(_ref("Job"), page=True, beside={"next": _some("string")})
_RESULT = Answer(_ref("Result"), (404, 409, 410), succeeds=(200, 202))
_RESULTS = Answer(_ref("Result"), page=True)
_SCHEDULE = Answer(_ref("Schedule"), (404, 409, 413, 422))
_FINDING = _object(
    "kind", "subject", "_id", "reason", kind=TEXT, subject=TEXT, _id=TEXT, reason=TEXT, advice=_some("string")
)
_REPORT = Answer(
    _object(
        *("wrong", "findings", "repaired", "more"),
        findings=_list(_FINDING),
        repaired=_list(_FINDING),
        more=COUNT,
    )
)
_PAUSE = _object("scope", "target", scope=TEXT, target=TEXT)

ANSWERS: Mapping[Any, Answer] = {
    jobs.enqueue: Answer(ID, (404, 409, 413, 422), stream=True, idempotent=True),
    jobs.list_queue: _JOBS,
    jobs.list_journal: _JOBS,
    jobs.list_catalogue: Answer(_ref("Published"), page=True),
    jobs.count: Answer(_object("journal", *State, **dict.fromkeys(["journal", *State], COUNT))),
    jobs.missing_id: Answer(fails=(400,), succeeds=()),
    jobs.detail: Answer(_ref("Job"), (404,)),
    jobs.follow: Answer(fails=(404,), stream=True, silent=True, succeeds=(200, 204)),
    jobs.log_lines: Answer(_ref("LogLine"), (404,), page=True, stream=True, succeeds=(200, 204)),
    jobs.kill: Answer(_TRUE, (404, 409), beside=_CHANGED, perhaps={"jobs": _list(_CHANGED["job"])}),
    jobs.remove: Answer(_TRUE, (404, 409), beside=_CHANGED),
    jobs.restart: Answer(ID, (404, 409), stream=True),
    batch.enqueue_many: Answer(_list(_object("outcome", outcome=TEXT))),
    bulk.bulk: Answer(_object("action", "matched", "changed", "jobs", action=TEXT, jobs=_list(ANY))),
    tasks.run: Answer(ID, (404, 409, 413, 422), beside={"request_id": TEXT}, idempotent=True),
    results.view_result: _RESULT,
    results.pull_result: _RESULT,
    results.list_results: _RESULTS,
    results.list_queued: _RESULTS,
    results.list_running: _RESULTS,
    returns.show: Answer(_list(_ref("Record")), beside={"waiting": COUNT}),
    returns.pull: Answer(_list(_ref("Record")), succeeds=(200, 202)),
    returns.reset: Answer(COUNT),
    schedules.list_schedules: Answer(_ref("Schedule"), page=True),
    schedules.preview: Answer(_object("expression", "zone", "next", next=_list(TIME)), (422,)),
    schedules.show: _SCHEDULE,
    schedules.change: _SCHEDULE,
    schedules.pause: _SCHEDULE,
    schedules.resume: _SCHEDULE,
    schedules.reset: _SCHEDULE,
    schedules.trigger: Answer(ID, (404, 409, 413, 422), idempotent=True),
    schedules.delete: Answer(_TRUE, (404, 409, 422)),
    functions.schedule: Answer(_ref("FunctionJob"), (404, 409, 413, 422), idempotent=True),
    functions.look: Answer(_list(_ref("FunctionJob")), (404,)),
    functions.find_jobs: Answer(_list(ID)),
    functions.reset: Answer(_object("killed", "deleted", "left", killed=COUNT, deleted=COUNT, left=COUNT)),
    functions.list_actions: Answer(_ref("Action"), page=True),
    functions.show_action: Answer(_ref("Action"), (404,)),
    functions.revoke: Answer(_ref("Action"), (404,)),
    system.workers: Answer(_list(_ref("Worker"))),
    control.show: Answer(_object("pauses", "halt", pauses=_list(_PAUSE))),
    control.pause: Answer(_PAUSE),
    control.resume: Answer(BOOL),
    control.halt_worker: Answer(
        _object("owner", "by", "at", "hard", owner=TEXT, by=TEXT, at=TIME, hard=BOOL), (404, 409)
    ),
    control.halt: Answer(_object("by", "at", by=TEXT, at=TIME)),
    events.list_events: Answer(
        _object("_id", "created", "name", "author", _id=TEXT, created=TIME, name=TEXT, author=TEXT), page=True
    ),
    events.history: Answer(_object("created", "total", created=TIME, total=COUNT), page=True),
    doctor.examine: _REPORT,
    doctor.repair: _REPORT,
    sessions.login: Answer(_object("token", "expires", token=TEXT, expires=TIME), (401, 403, 429)),
    sessions.logout: Answer(_TRUE),
    sessions.profile: Answer(_object("_id", "name", name=TEXT)),
    sessions.ticket: Answer(_object("ticket", "expires", ticket=TEXT, expires=TIME)),
    system.alive: Answer(TEXT),
    system.ready: Answer(TEXT),
    system.show_version: Answer(_object("product", "version", product=TEXT, version=TEXT)),
    system.home: Answer(TEXT, plain="text/html"),
    system.static: Answer(TEXT, (404,), plain="*/*"),
    metrics.show: Answer(TEXT, plain="text/plain"),
    docs.page: Answer(TEXT, plain="text/html"),
    docs.description: Answer({"type": "object"}, bare=True, succeeds=(200, 304)),
}
