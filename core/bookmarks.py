"""Where a reader of a sorted list has stopped: the values by which the last row stands there, as text. Pure.

What follows is asked for by these values. To skip so many rows instead, a database has to read all of them,
and rows that come or go meanwhile would move the others to another page.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from bson import ObjectId

from core4.errors import BadRequest
from core4.filters import Field

LIMIT = 8000  # characters of a bookmark

Order = Sequence[tuple[str, int]]


def total_order(order: Order) -> list[tuple[str, int]]:
    """The order with `_id` at its end, so that no two rows are equal in it."""
    terms = list(order)
    if "_id" not in dict(terms):
        terms.append(("_id", terms[0][1] if terms else 1))
    return terms


def bookmark(row: Mapping[str, Any], order: Order) -> str:
    """The place behind `row` in a `total_order`."""
    terms = [[path, direction, _plain(_value(row, path))] for path, direction in order]
    return urlsafe_b64encode(json.dumps(terms, separators=(",", ":")).encode()).decode().rstrip("=")


def behind(text: str, order: Order, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The database's filter for the rows behind a bookmark, in the same order.

    Raises: BadRequest if it is not one, or one of another order.
    """
    alternatives: list[dict[str, Any]] = []
    equal: dict[str, Any] = {}
    for (path, direction), value in zip(order, _read(text, order, fields), strict=True):
        alternatives += [{**equal, path: term} for term in _following(path, direction, value)]
        equal[path] = value
    return alternatives[0] if len(alternatives) == 1 else {"$or": alternatives}


def _following(path: str, direction: int, value: Any) -> list[Any]:
    """What comes behind a value; null, which is also what is missing, is the least."""
    if direction > 0:
        return [{"$ne": None}] if value is None else [{"$gt": value}]
    if value is None:
        return []
    return [{"$lt": value}] if path == "_id" else [{"$lt": value}, {"$eq": None}]


def _read(text: str, order: Order, fields: Mapping[str, Field]) -> list[Any]:
    parsers = {field.path: field.parse for field in fields.values()}
    try:
        if len(text) > LIMIT:
            raise ValueError
        terms = json.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        if [(path, direction) for path, direction, _ in terms] != list(order):
            raise ValueError
        return [None if value is None else parsers[path](value) for path, _, value in terms]
    except (KeyError, RecursionError, TypeError, ValueError):
        raise unreadable() from None


def unreadable() -> BadRequest:
    """A `cursor` that no answer has given, or one to another question."""
    return BadRequest("parameter [cursor] expected [next] of an answer with the same sort")


def _value(row: Mapping[str, Any], path: str) -> Any:
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, ObjectId):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else value
