"""The filter, sort and search that clients may send, compiled to what the database is asked. Pure.

A filter is `{field: value}` or `{field: {op: value, ...}}`; every term must hold. Nothing a client
sends reaches the database as a key or an operator: fields are listed here, operators are translated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from bson.errors import InvalidId

from core4.errors import BadRequest
from core4.states import State

OPERATORS = {name: "$" + name for name in ("eq", "ne", "in", "gt", "gte", "lt", "lte")} | {"exists": "exists"}
TERMS, LIST, TEXT, SORTS, WILDCARDS, SEARCH = 20, 100, 1000, 3, 10, 200
_INT64 = 2**63

_HALVES = re.compile("[\ud800-\udfff]")
_ARGS_PATH = re.compile(r"args(?:\.[A-Za-z_][A-Za-z0-9_-]{0,63}){1,5}")

Parser = Callable[[Any], Any]


@dataclass(frozen=True)
class Field:
    """One field that may be asked for.

    `private` ones say something about a job that one may not read: a filter on them sees only jobs
    that one may read, else rows could be probed by counting.
    """

    path: str
    parse: Parser
    private: bool = False


@dataclass(frozen=True)
class Query:
    """A compiled filter: what the database is asked, and whether it looks into private fields."""

    where: Mapping[str, Any]
    private: bool


def compile_filter(given: Mapping[str, Any], fields: Mapping[str, Field], *, args: bool = True) -> Query:
    """The database's filter for a client's.

    Args:
        given: what the client sent.
        fields: the fields that may be named.
        args: whether `args.<path>` may be named.

    Raises: BadRequest naming the key that is not accepted.
    """
    terms: dict[str, dict[str, Any]] = {}
    private = False
    count = 0
    for key, value in given.items():
        field = _field(key, fields, args=args)
        private = private or field.private
        operations = _operations(key, value)
        count += len(operations)
        if count > TERMS:
            raise BadRequest(f"parameter [filter] has more than {TERMS} terms")
        if field.path in terms:
            raise BadRequest(f"parameter [filter]: [{key}] is given twice")
        terms[field.path] = _term(key, operations, field.parse)
    # `_id` first: a server may use only the first clause that has an index.
    ordered = sorted(terms, key=lambda path: (path != "_id", "$eq" not in terms[path]))
    return Query({path: terms[path] for path in ordered}, private)


def compile_sort(given: Sequence[Any], fields: Mapping[str, Field]) -> tuple[list[tuple[str, int]], bool]:
    """The database's order for a client's list of [field, 1 or -1], and whether it shows private fields.

    Raises: BadRequest.
    """
    if len(given) > SORTS:
        raise BadRequest(f"parameter [sort] has more than {SORTS} fields")
    order: list[tuple[str, int]] = []
    private = False
    for term in given:
        if not (isinstance(term, list) and len(term) == 2 and isinstance(term[0], str)):
            raise BadRequest("parameter [sort] expected as_type [list] of [field, 1 or -1]")
        name, direction = term
        if isinstance(direction, bool) or direction not in (1, -1):
            raise BadRequest(f"parameter [sort]: the direction of [{name:.100}] is neither 1 nor -1")
        field = _field(name, fields, args=False, parameter="sort")
        if field.path in dict(order):
            raise BadRequest(f"parameter [sort]: [{name}] is given twice")
        order.append((field.path, int(direction)))
        private = private or field.private
    return order, private


def compile_search(text: str) -> str:
    """A regular expression for a substring with `?` for one character and `*` for any run.

    To be matched without regard to case. Few wildcards and no nesting keep its cost bounded.

    Raises: BadRequest.
    """
    text = re.sub(r"\*+", "*", text).strip("*")
    if len(text) > SEARCH:
        raise BadRequest(f"parameter [search] is longer than {SEARCH} characters")
    if not storable(text):
        raise BadRequest("parameter [search] has characters that no name has")
    if text.count("*") + text.count("?") > WILDCARDS:
        raise BadRequest(f"parameter [search] has more than {WILDCARDS} wildcards")
    if text.count("*") > 3:
        raise BadRequest("parameter [search] has more than 3 inner [*]")
    return "".join({"*": ".*", "?": "."}.get(char) or re.escape(char) for char in text)


def storable(text: str) -> bool:
    """True if the database can hold this text: no NUL, no half of a surrogate pair."""
    return "\0" not in text and encodable(text)


def encodable(text: str) -> bool:
    """True if there is no half of a surrogate pair in this text."""
    return text.isascii() or _HALVES.search(text) is None


# ---------------------------------------------------------------------- inside


def _field(key: Any, fields: Mapping[str, Field], *, args: bool, parameter: str = "filter") -> Field:
    if key in fields:
        return fields[key]
    if args and _ARGS_PATH.fullmatch(key):
        return Field(key, _scalar, private=True)
    raise BadRequest(f"parameter [{parameter}]: unknown field [{key[:100]!a}]")


def _operations(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"eq": value}
    operations = {}
    for name, operand in value.items():
        operator = name.removeprefix("$")
        if operator not in OPERATORS or operator in operations:
            raise BadRequest(f"parameter [filter]: unknown operator [{name[:100]!a}] for [{key}]")
        operations[operator] = operand
    if not operations:
        raise BadRequest(f"parameter [filter]: [{key}] names no operator")
    if "exists" in operations and len(operations) > 1:
        raise BadRequest(f"parameter [filter]: [exists] of [{key}] stands alone")
    return operations


def _term(key: str, operations: Mapping[str, Any], parse: Parser) -> dict[str, Any]:
    try:
        return dict(_operation(operator, operand, parse) for operator, operand in operations.items())
    except (TypeError, ValueError) as error:
        raise BadRequest(f"parameter [filter]: [{key}] {error}") from error


def _operation(operator: str, operand: Any, parse: Parser) -> tuple[str, Any]:
    if operator == "exists":
        if not isinstance(operand, bool):
            raise ValueError("expected true or false for [exists]")
        # Fields that are not set are stored as null: for people both mean that it does not exist.
        return ("$ne" if operand else "$eq"), None
    if operator == "in":
        if not isinstance(operand, list) or len(operand) > LIST:
            raise ValueError(f"expected a list of at most {LIST} values for [in]")
        return "$in", [_value(item, parse) for item in operand]
    if operand is None and operator not in ("eq", "ne"):
        raise ValueError(f"cannot be compared with null by [{operator}]")
    return OPERATORS[operator], _value(operand, parse)


def _value(value: Any, parse: Parser) -> Any:
    return None if value is None else parse(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value)
    return number(value)


def text(value: Any) -> str:
    """A short text. Raises: ValueError."""
    if not isinstance(value, str) or len(value) > TEXT or not storable(value):
        raise ValueError(f"expected text of at most {TEXT} characters")
    return value


def number(value: Any) -> int | float:
    """A number that the database can hold. Raises: TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("expected a number, text, true, false or null")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise ValueError("expected a number of 64 bits")
    return value


def flag(value: Any) -> bool:
    """True or false. Raises: TypeError."""
    if not isinstance(value, bool):
        raise TypeError("expected true or false")
    return value


def state(value: Any) -> str:
    """The word of a state. Raises: ValueError."""
    if not isinstance(value, str) or value not in set(State):
        raise ValueError(f"expected one of {', '.join(State)}")
    return value


def date(value: Any) -> datetime:
    """A time in ISO form; UTC if it names no zone. Raises: ValueError."""
    if not isinstance(value, str) or len(value) > 40:
        raise ValueError("expected a time like 2026-01-31T12:00:00")
    try:
        parsed = datetime.fromisoformat(value)
        return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError("expected a time like 2026-01-31T12:00:00") from None


def object_id(value: Any) -> ObjectId:
    """An id. Raises: ValueError."""
    try:
        return ObjectId(text(value))
    except (InvalidId, ValueError):
        raise ValueError("expected an id of 24 hexadecimal digits") from None


def _fields(parse: Parser, paths: str, *, private: bool = False) -> dict[str, Field]:
    return {path: Field(path, parse, private) for path in paths.split()}


JOB_FIELDS: Mapping[str, Field] = {
    **_fields(object_id, "_id enqueued.parent_id enqueued.child_id chain_id"),
    **_fields(state, "state"),
    **_fields(text, "namespace worker locked.worker enqueued.username enqueued.hostname"),
    **_fields(text, "error_cat held"),
    **_fields(number, "priority attempts attempts_left trial crashes runtime rev prog.value max_parallel"),
    **_fields(flag, "force"),
    **_fields(
        date,
        "enqueued.at started_at finished_at query_at inactive_at killed_at removed_at zombie_at wall_at",
    ),
    **_fields(text, "name category prog.message request_id", private=True),
    "qual_name": Field("name", text, private=True),
}

CATALOGUE_FIELDS: Mapping[str, Field] = {
    **_fields(text, "_id author namespace kind tag schedule"),
    "qual_name": Field("_id", text),
    **_fields(flag, "unique"),
    **_fields(date, "created_at updated_at"),
}

SCHEDULE_FIELDS: Mapping[str, Field] = {
    **_fields(text, "_id qual_name namespace expression zone missed source state"),
    **_fields(flag, "enabled"),
    **_fields(date, "cursor created_at updated_at"),
}

WORKER_FIELDS: Mapping[str, Field] = {
    **_fields(text, "_id name label type state hostname namespaces version launch error"),
    **_fields(number, "nr pid slots running timeout"),
    **_fields(flag, "debug"),
    **_fields(date, "started_at ended_at beat"),
}

EVENT_FIELDS: Mapping[str, Field] = {
    **_fields(text, "_id name author request_id job_id qual_name outcome"),
    **_fields(date, "created"),
}

LOG_FIELDS: Mapping[str, Field] = {
    **_fields(text, "level hostname source message"),
    **_fields(number, "levelno epoch seq"),
}


# ---------------------------------------------------------------------- in memory

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "$gt": lambda left, right: left > right,
    "$gte": lambda left, right: left >= right,
    "$lt": lambda left, right: left < right,
    "$lte": lambda left, right: left <= right,
}


def matches(where: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """True if a document passes a compiled filter, read as the database reads it."""
    return all(
        _holds(operator, document.get(path), operand)
        for path, term in where.items()
        for operator, operand in term.items()
    )


def _holds(operator: str, value: Any, operand: Any) -> bool:
    match operator:
        case "$eq":
            return _equal(value, operand)
        case "$ne":
            return not _equal(value, operand)
        case "$in":
            return any(_equal(value, item) for item in operand)
    try:
        return value is not None and _COMPARE[operator](value, operand)
    except TypeError:  # values of different types are not ordered
        return False


def _equal(value: Any, operand: Any) -> bool:
    if isinstance(value, list):
        return operand in value
    return bool(value == operand) and isinstance(value, bool) == isinstance(operand, bool)
