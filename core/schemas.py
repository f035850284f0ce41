"""What requests may say: one marshmallow schema each, loading to checked values.

Values come as JSON types from a body or as text from a query string; both are read by the same fields,
with core4's words for what is wrong.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

from marshmallow import INCLUDE, RAISE, Schema, ValidationError, fields, validate, validates_schema

from core4 import timetable
from core4.errors import JobInvalid
from core4.filters import SEARCH, date, encodable, storable
from core4.jobs import NAMESPACE, too_deep
from core4.options import OPTIONS, problem
from core4.permissions import KEY_NAME, NAME_LIMIT
from core4.results import Status
from core4.states import IDLE, State

RESULT_WAIT = 50  # seconds that a request may wait for a result: less than clients wait for an answer
# What the list of open jobs can be limited to: easyjobs' words and the states behind them.
OPEN = (Status.QUEUED, Status.RUNNING, *sorted(IDLE), State.RUNNING)
WORKER_STATUS = ("NEW", "WAITING", "BUSY", "HALTED", "ERROR")
SCOPES = ("everything", "namespace", "job", "project", "worker")  # what can be paused
ACTIONS = ("kill", "restart", "remove")  # what can be done to many jobs
FUNCTION_STATES = ("NEW", "RUNNING", "OK", "ERROR", "DONE")  # of the jobs of functions: myjobs' words
BATCH = 1000  # jobs enqueued by one request
DEPENDENCIES = 100  # jobs that one waits for
REQUEST_ID = 255  # characters of a request id
DEPTH = 32  # levels of lists and objects in arguments
BODY_DEPTH = 100  # and in all that is read, results from workers among it
_INT64 = 2**63
_PAGE_LIMIT = 2**31
_TRUE, _FALSE = (
    frozenset({"yes", "y", "on", "1", "true", "t"}),
    frozenset({"no", "n", "off", "0", "false", "f"}),
)
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


class _Typed(fields.Field[Any]):
    """A value of one type, with core4's text if it is not."""

    as_type: ClassVar[str]

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        try:
            return self.read(value)
        except (TypeError, ValueError):
            raise ValidationError(f"parameter [{attr}] expected as_type [{self.as_type}]") from None

    def read(self, value: Any) -> Any:
        """The value. Raises: TypeError, ValueError."""
        raise NotImplementedError


class Int(_Typed):
    """A whole number, or its digits."""

    as_type = "int"

    def read(self, value: Any) -> int:
        if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError


class Number(_Typed):
    """A finite number, or its text."""

    as_type = "float"

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError
        try:
            number = float(value)
        except OverflowError:
            raise ValueError from None
        if not math.isfinite(number):
            raise ValueError
        return number


class Bool(_Typed):
    """True or false, or one of core4's words for it."""

    as_type = "bool"

    def read(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).lower() if isinstance(value, str | int) else ""
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE


class AnyText(_Typed):
    """A text, whatever its characters."""

    as_type = "str"

    def read(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        return value


class Text(AnyText):
    """A text that can be stored."""

    def read(self, value: Any) -> str:
        text = super().read(value)
        if not storable(text):
            raise ValueError
        return text


class Dict(_Typed):
    """An object, or its JSON text."""

    as_type = "dict"

    def read(self, value: Any) -> dict[str, Any]:
        value = read_json(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise TypeError
        return value


class List(_Typed):
    """A list, or its JSON text."""

    as_type = "list"

    def read(self, value: Any) -> list[Any]:
        value = read_json(value) if isinstance(value, str) else value
        if not isinstance(value, list):
            raise TypeError
        return value


class Ids(List):
    """Up to 1,000 ids of jobs, each a text."""

    def read(self, value: Any) -> list[Any]:
        ids = super().read(value)
        if len(ids) > BATCH or not all(isinstance(each, str) for each in ids):
            raise ValueError
        return ids


class Words(List):
    """States in myjobs' words: one, or a list of them."""

    def read(self, value: Any) -> list[Any]:
        words = [value] if isinstance(value, str) and value in FUNCTION_STATES else super().read(value)
        if not all(isinstance(each, str) and each in FUNCTION_STATES for each in words):
            raise ValueError
        return words

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        try:
            return self.read(value)
        except (TypeError, ValueError):
            words = ", ".join(FUNCTION_STATES)
            raise ValidationError(f"parameter [{attr}] expected one of {words}, or a list of them") from None


_TEXTS = ("worker", "max_running_key", "rate_limit", "return_queues")


class OptionValue(fields.Field[Any]):
    """The value of a job's option, checked by the one table of options."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        assert attr is not None
        if isinstance(value, str) and (attr not in _TEXTS or value.startswith("[")):
            value = from_text(value, is_bool=isinstance(OPTIONS[attr].default, bool))
        complaint = problem(attr, value)
        if complaint:
            raise ValidationError(f"parameter [{attr}]: {complaint}")
        return value


def from_text(text: str, *, is_bool: bool) -> Any:
    """A value of a query string: JSON, or a word for true or false; as it is if it is neither."""
    try:
        return Bool().read(text) if is_bool else read_json(text)
    except ValueError:
        return text


def _name(value: str) -> None:
    if not 0 < len(value) <= NAME_LIMIT or not value.isprintable():
        raise ValidationError(f"parameter [qual_name] expected 1 to {NAME_LIMIT} printable characters")


def _namespace(value: str) -> None:
    if not NAMESPACE.fullmatch(value):
        raise ValidationError("parameter [namespace] expected 1 to 100 of A-Z a-z 0-9 _ -")


def _batch(value: list[Any]) -> None:
    if not 0 < len(value) <= BATCH:
        raise ValidationError(f"parameter [jobs] expected 1 to {BATCH} jobs, not {len(value)}")


def _dependencies(value: list[Any]) -> None:
    if len(value) > DEPENDENCIES:
        raise ValidationError(
            f"parameter [dependencies] expected at most {DEPENDENCIES} ids, not {len(value)}"
        )


def _key(value: str) -> None:
    if not (0 < len(value) <= 255 and value.isascii() and value.isprintable()):
        raise ValidationError("parameter [key] expected 1 to 255 printable ASCII characters")


def _action(value: str) -> None:
    if value not in ACTIONS:
        raise ValidationError(f"parameter [action] expected one of {', '.join(ACTIONS)}")


def _request_id(value: str) -> None:
    if not 0 < len(value) <= REQUEST_ID or not value.isprintable():
        raise ValidationError(f"parameter [request_id] expected 1 to {REQUEST_ID} printable characters")


def _label(value: str) -> None:
    if not 0 < len(value) <= NAME_LIMIT or not value.isprintable():
        raise ValidationError(f"parameter [name] expected 1 to {NAME_LIMIT} printable characters")


def _return_queues(value: list[Any]) -> None:
    if value and (complaint := problem("return_queues", value)):
        raise ValidationError(f"parameter [return_queues]: {complaint}")


def _category(value: str) -> None:
    if len(value) > NAME_LIMIT or (value and not value.isprintable()):
        raise ValidationError(f"parameter [category] expected at most {NAME_LIMIT} printable characters")


def _scope(value: str) -> None:
    if value not in SCOPES:
        raise ValidationError(f"parameter [scope] expected one of {', '.join(SCOPES)}")


def _target(value: str) -> None:
    if len(value) > NAME_LIMIT or not value.isprintable():
        raise ValidationError(f"parameter [target] expected at most {NAME_LIMIT} printable characters")


def _reason(value: str) -> None:
    if len(value) > 500:
        raise ValidationError("parameter [reason] expected at most 500 characters")


def _within(name: str, least: float, most: float) -> Callable[[float], None]:
    def check(value: float) -> None:
        if not least <= value <= most:
            raise ValidationError(f"parameter [{name}] expected a number from {least} to {most}")

    return check


def _schedule_fields(names: list[Any]) -> None:
    for name in names:
        if not isinstance(name, str) or name not in timetable.FIELDS:
            raise ValidationError(f"parameter [fields] expected some of {', '.join(timetable.FIELDS)}")


def _status(value: Any) -> None:
    if value is not None and value not in WORKER_STATUS:
        raise ValidationError(f"parameter [status] expected one of {', '.join(WORKER_STATUS)}")


class Arguments(Schema):
    """Base of all: an argument that a request does not know is an error that names it."""

    class Meta:
        unknown = RAISE

    error_messages = {"unknown": "unknown argument"}  # noqa: RUF012 - as marshmallow declares it


def _required(field: type[fields.Field[Any]], **options: Any) -> fields.Field[Any]:
    return field(required=True, error_messages={"required": "Missing argument"}, **options)


class NoArguments(Arguments):
    """A request without arguments."""


class PageArguments(Arguments):
    """Which rows of a listing."""

    page = Int(load_default=0, validate=_within("page", -_PAGE_LIMIT, _PAGE_LIMIT))
    per_page = Int(load_default=10, validate=_within("per_page", 1, 500))
    filter = Dict(load_default=dict)
    sort = List(load_default=lambda: [["_id", 1]])


class SearchArguments(PageArguments):
    """Which rows, by name too."""

    search = Text(
        load_default="", validate=validate.Length(max=SEARCH, error="parameter [search] is too long")
    )


class CursorArguments(Schema):
    """What follows behind a cursor, instead of a page by its number."""

    cursor = Text(allow_none=True, load_default=None)

    @validates_schema
    def _one_of_both(self, data: Mapping[str, Any], **_: Any) -> None:
        if data["cursor"] is not None and data["page"]:
            raise ValidationError("parameter [cursor] stands for [page]: give one of them", "cursor")


class JobListArguments(SearchArguments, CursorArguments):
    """Which jobs: a page by its number, or what follows behind a cursor."""


class BulkArguments(Arguments):
    """What to do with which jobs; `all` stands for no filter, `after` is `more` of the answer before."""

    action = _required(Text, validate=_action)
    filter = Dict(load_default=dict)
    search = Text(
        load_default="", validate=validate.Length(max=SEARCH, error="parameter [search] is too long")
    )
    all = Bool(load_default=False)
    journal = Bool(load_default=False)
    dry_run = Bool(load_default=False)
    limit = Int(load_default=100, validate=_within("limit", 1, 500))
    after = Text(load_default="")


class EventArguments(PageArguments):
    """Which lines of the audit; they are sorted by `created` only."""

    sort = List(load_default=lambda: [["created", -1]])


class Date(_Typed):
    """A time in ISO form; UTC if it names no zone."""

    as_type = "datetime"

    def read(self, value: Any) -> Any:
        return date(value)


def _direction(value: int) -> None:
    if value not in (1, -1):
        raise ValidationError("parameter [sort] expected 1 or -1")


class HistoryArguments(Arguments):
    """A span of time; the names are core4's."""

    page = Int(load_default=0, validate=_within("page", -_PAGE_LIMIT, _PAGE_LIMIT))
    per_page = Int(load_default=10, data_key="perPage", validate=_within("perPage", 1, 500))
    start_date = Date(load_default=None, data_key="startDate")
    end_date = Date(load_default=None, data_key="endDate")
    sort = Int(load_default=-1, validate=_direction)


class EnqueueArguments(Arguments):
    """What to enqueue; the options of the job stand beside the rest."""

    qual_name = _required(Text, validate=_name)
    args = Dict(load_default=dict)
    follow = Bool(load_default=True)
    namespace = Text(validate=_namespace)
    dependencies = List(load_default=list, validate=_dependencies)

    # marshmallow's own way to add the rows of a table to the fields written above.
    class Meta(Arguments.Meta):
        include: ClassVar[dict[str, fields.Field[Any]]] = {
            name: OptionValue(allow_none=option.check(None)) for name, option in OPTIONS.items()
        }


class BatchArguments(Arguments):
    """Jobs to enqueue, each as in `BatchJob`."""

    jobs = _required(List, validate=_batch)


class BatchJob(EnqueueArguments):
    """One of them; `key` stands for the header Idempotency-Key of a single request."""

    class Meta(EnqueueArguments.Meta):
        exclude = ("follow",)

    key = Text(validate=_key)


class MessageArguments(Arguments):
    """What a message of a broker asks for; the options of the job stand beside the rest."""

    name = _required(Text, validate=_name)
    namespace = Text(validate=_namespace)
    args = List(load_default=list)
    kwargs = Dict(load_default=dict)
    request_id = Text(validate=_request_id)

    class Meta(Arguments.Meta):
        include: ClassVar[dict[str, fields.Field[Any]]] = {
            name: OptionValue(allow_none=option.check(None)) for name, option in OPTIONS.items()
        }


class ScheduleValue(fields.Field[Any]):
    """The value of a schedule's field, checked by the one table of them."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        assert attr is not None
        if isinstance(value, str) and attr not in _SCHEDULE_TEXTS:
            value = from_text(value, is_bool=attr == "enabled")
        try:
            return timetable.checked({attr: value})[attr]
        except JobInvalid as error:
            raise ValidationError(f"parameter [{attr}]: {error.detail}") from None


_SCHEDULE_TEXTS = ("qual_name", "expression", "zone", "namespace", "missed")


class ScheduleArguments(Arguments):
    """What an operator says of a schedule; what is left out stays as it is."""

    class Meta(Arguments.Meta):
        include: ClassVar[dict[str, fields.Field[Any]]] = {
            name: ScheduleValue(allow_none=name in ("namespace", "max_age")) for name in timetable.FIELDS
        }


class SchedulesArguments(SearchArguments):
    """Which schedules, and how many of their next times (`count`)."""

    count = Int(load_default=5, validate=_within("count", 0, 100))


class NextArguments(Arguments):
    """How many of the next times."""

    count = Int(load_default=5, validate=_within("count", 0, 100))


class PreviewArguments(NextArguments):
    """The expression and the zone to try."""

    expression = _required(ScheduleValue)
    zone = ScheduleValue(load_default="UTC")


class ResetArguments(Arguments):
    """The fields that the code is to decide again; all if none is named."""

    # Not as an attribute: a schema has one of this name.
    class Meta(Arguments.Meta):
        include: ClassVar[dict[str, fields.Field[Any]]] = {
            "fields": List(load_default=list, validate=_schedule_fields)
        }


class PauseTarget(Arguments):
    """What is paused: everything, or one namespace, job, project (first part of names) or worker@host."""

    scope = Text(load_default="everything", validate=_scope)
    target = Text(load_default="", validate=_target)

    @validates_schema
    def _fits(self, data: Mapping[str, Any], **_: Any) -> None:
        scope, target = data["scope"], data["target"]
        if (scope == "everything") != (target == ""):
            raise ValidationError(f"parameter [target] expected the name of the {scope}", "target")
        if scope == "project" and "." in target:
            raise ValidationError("parameter [target]: a project is the first part of a name", "target")


class PauseArguments(PauseTarget):
    """What to pause and why."""

    reason = Text(load_default=None, allow_none=True, validate=_reason)


class FunctionArguments(Arguments):
    """A function as source, who signs for it, and how it is called."""

    code = _required(Text)
    signer = _required(Text, validate=validate.Regexp(rf"{KEY_NAME}\Z"))
    signature = _required(Text, validate=validate.Regexp(r"[0-9a-f]{64}\Z"))
    kwargs = Dict(load_default=dict)
    name = Text(load_default=None, allow_none=True, validate=_label)
    category = Text(load_default="", validate=_category)
    timeout = Number(load_default=0.0, validate=_within("timeout", 0, 10 * 365 * 86400))
    dependencies = Ids(load_default=list)
    die = Bool(load_default=True)
    actorname = Text(load_default="", validate=validate.Length(max=NAME_LIMIT))
    return_queues = List(load_default=list, validate=_return_queues)


class LookArguments(Arguments):
    """Which jobs, and how many seconds to wait for their end."""

    job_ids = Ids(required=True)
    timeout = Number(load_default=0.0, validate=_within("timeout", 0, RESULT_WAIT))


class FindArguments(Arguments):
    """Which jobs of functions; `before` is the id behind which the next page begins."""

    name = Text(load_default="", validate=validate.Length(max=NAME_LIMIT))
    category = Text(load_default=None, allow_none=True, validate=_category)
    state = Words(load_default=list)
    method = Text(load_default="", validate=validate.Length(max=NAME_LIMIT))
    limit = Int(load_default=500, validate=_within("limit", 1, 1000))
    before = Text(load_default="")


class PageOnlyArguments(Arguments):
    """Which page of a listing."""

    page = Int(load_default=0, validate=_within("page", -_PAGE_LIMIT, _PAGE_LIMIT))
    per_page = Int(load_default=10, validate=_within("per_page", 1, 500))


class HaltArguments(Arguments):
    """Why."""

    reason = Text(load_default=None, allow_none=True, validate=_reason)


class StopArguments(HaltArguments):
    """Why, and whether what it runs is ended with it."""

    hard = Bool(load_default=False)


class WorkersArguments(Arguments):
    """Which workers: of one status (myjobs' words), and by their fields."""

    status = Text(load_default=None, allow_none=True, validate=_status)
    filter = Dict(load_default=dict)


class DoctorArguments(Arguments):
    """Seconds for which something must stand wrong to be told; whether all of the journal is looked at."""

    patience = Int(load_default=15, validate=_within("patience", 0, 60))
    everything = Bool(load_default=False)


class TaskArguments(Arguments):
    """The arguments of a task or job, each by its name; they are checked against its signature."""

    class Meta(Arguments.Meta):
        unknown = INCLUDE


class KillArguments(Arguments):
    """Whether the whole chain of the job is meant."""

    chain = Bool(load_default=False)


class FollowedArguments(Arguments):
    """Whether the answer is a stream."""

    follow = Bool(load_default=True)


class StreamArguments(Arguments):
    """A stream: `follow` is accepted because core4 does; the ticket is for browsers."""

    follow = Bool(load_default=True)
    last_event_id = Text(load_default="")
    ticket = Text(load_default="")


class LogArguments(PageArguments, CursorArguments):
    """Lines of a log: a page of them, what follows behind a cursor, or the stream."""

    follow = Bool(load_default=False)
    last_event_id = Text(load_default="")
    ticket = Text(load_default="")


class ResultArguments(Arguments):
    """Which job, by its id or by the request that made it, and how many seconds to wait for its end."""

    job_id = Text()
    request_id = Text()
    timeout = Number(load_default=0.0, validate=_within("timeout", 0, RESULT_WAIT))

    @validates_schema
    def _one(self, data: Mapping[str, Any], **_: Any) -> None:
        if ("job_id" in data) == ("request_id" in data):
            raise ValidationError("one of the parameters [job_id] and [request_id] is needed", "job_id")


class PullArguments(ResultArguments):
    """As for a result, with easyjobs' patience."""

    timeout = Number(load_default=5.0, validate=_within("timeout", 0, RESULT_WAIT))


class QueueArguments(Arguments):
    """How many of the records of a return queue to look at."""

    limit = Int(load_default=100, validate=_within("limit", 1, 500))


class PullQueueArguments(Arguments):
    """How many records to take, and how many there must be before any is; `token` makes it repeatable."""

    size = Int(load_default=1, validate=_within("size", 1, 500))
    least = Int(load_default=1, validate=_within("least", 1, 500))
    timeout = Number(load_default=5.0, validate=_within("timeout", 0, RESULT_WAIT))
    token = Text(validate=_key)


class ResultListArguments(Arguments):
    """Which rows of a list of results, by namespace and name."""

    page = Int(load_default=0, validate=_within("page", -_PAGE_LIMIT, _PAGE_LIMIT))
    per_page = Int(load_default=100, validate=_within("per_page", 1, 500))
    namespace = Text(validate=_namespace)
    name = Text(validate=validate.Length(max=NAME_LIMIT, error="parameter [name] is too long"))


def _open_status(value: str) -> None:
    if value not in OPEN:
        raise ValidationError(f"parameter [status] expected one of {', '.join(OPEN)}")


class RunningArguments(ResultListArguments):
    """Which open jobs; without a `status` those that run."""

    status = Text(load_default=Status.RUNNING.value, validate=_open_status)


class LoginArguments(Arguments):
    """Credentials in a body; without them those of the header count."""

    username = AnyText()
    password = AnyText()


# ---------------------------------------------------------------------- values of arguments


class Unreadable(ValueError):
    """What Python takes for JSON, and we do not."""


def read_json(text: str) -> Any:
    """The value that a text from outside stands for.

    Raises: Unreadable for numbers that are not finite and for what is nested so deep that whatever walks it
    fails; ValueError for what is no JSON.
    """
    too_many = Unreadable(f"is nested deeper than {BODY_DEPTH} levels")
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise too_many from None
    if too_deep(value, BODY_DEPTH):
        raise too_many
    return value


def _no_number(text: str) -> NoReturn:
    raise Unreadable(f"has {text[:50]}, which is no finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def json_problems(value: Any) -> list[dict[str, str]]:
    """What in a JSON value cannot be stored, as pointers and messages; at most ten."""
    found: list[dict[str, str]] = []
    stack: list[tuple[str, Any, int]] = [("", value, 1)]
    while stack and len(found) < 10:
        pointer, item, depth = stack.pop()
        message = _complaint(item, depth)
        if message:
            found.append({"pointer": pointer, "message": message})
        else:
            stack.extend((f"{pointer}/{key}", child, depth + 1) for key, child in _children(item))
    return found


def _children(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, Mapping):
        for key, child in item.items():
            yield escape_pointer(key), child
    elif isinstance(item, list):
        for index, child in enumerate(item):
            yield str(index), child


def escape_pointer(key: str) -> str:
    """One step of a JSON pointer (RFC 6901), printable whatever the key holds."""
    readable = key.encode("utf-8", "backslashreplace").decode().replace("\0", "\\u0000")
    return readable.replace("~", "~0").replace("/", "~1")


def _complaint(item: Any, depth: int) -> str | None:
    if isinstance(item, Mapping | list) and depth > DEPTH:
        return f"nested deeper than {DEPTH} levels"
    if isinstance(item, Mapping):
        return next((message for key in item if (message := _key_complaint(key))), None)
    if isinstance(item, float) and not math.isfinite(item):
        return "not a finite number"
    if isinstance(item, int) and not -_INT64 <= item < _INT64:
        return "not a number of 64 bits"
    if isinstance(item, str) and not encodable(item):
        return "has half of a surrogate pair"
    return None


def _key_complaint(key: str) -> str | None:
    if not storable(key):
        return "a name has NUL or half of a surrogate pair"
    if key.startswith("$"):
        # Drivers turn objects with `$ref` and the like into values that are no JSON any more.
        return f"the name {key[:100]!r} begins with `$`"
    return None
