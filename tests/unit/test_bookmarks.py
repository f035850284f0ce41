"""Bookmarks: what they say comes back, and nothing else gets in."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId

from core4.bookmarks import LIMIT, behind, bookmark, total_order
from core4.errors import BadRequest
from core4.filters import JOB_FIELDS

ROW_ID = ObjectId("65a0c0ffee00000000000001")
AT = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
ROW: dict[str, Any] = {"_id": ROW_ID, "name": "ä/b", "enqueued": {"at": AT}, "force": False, "query_at": None}


def token(terms: Any) -> str:
    return urlsafe_b64encode(json.dumps(terms).encode()).decode()


def test_the_id_decides_at_last() -> None:
    """In the direction of the first field, unless it is asked for itself."""
    assert total_order([]) == [("_id", 1)]
    assert total_order([("name", -1)]) == [("name", -1), ("_id", -1)]
    assert total_order([("_id", -1), ("name", 1)]) == [("_id", -1), ("name", 1)]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ([("_id", 1)], {"_id": {"$gt": ROW_ID}}),
        ([("_id", -1)], {"_id": {"$lt": ROW_ID}}),
        (
            [("name", -1), ("_id", -1)],
            {
                "$or": [
                    {"name": {"$lt": "ä/b"}},
                    {"name": {"$eq": None}},
                    {"name": "ä/b", "_id": {"$lt": ROW_ID}},
                ]
            },
        ),
        (
            [("query_at", 1), ("_id", 1)],
            {"$or": [{"query_at": {"$ne": None}}, {"query_at": None, "_id": {"$gt": ROW_ID}}]},
        ),
        (
            [("query_at", -1), ("_id", 1)],
            {"query_at": None, "_id": {"$gt": ROW_ID}},
        ),
        (
            [("enqueued.at", 1), ("name", 1), ("_id", 1)],
            {
                "$or": [
                    {"enqueued.at": {"$gt": AT}},
                    {"enqueued.at": AT, "name": {"$gt": "ä/b"}},
                    {"enqueued.at": AT, "name": "ä/b", "_id": {"$gt": ROW_ID}},
                ]
            },
        ),
        (
            [("force", 1), ("_id", 1)],
            {"$or": [{"force": {"$gt": False}}, {"force": False, "_id": {"$gt": ROW_ID}}]},
        ),
    ],
)
def test_what_is_behind(order: list[tuple[str, int]], expected: Any) -> None:
    """Values keep their types; null is the least."""
    assert behind(bookmark(ROW, order), order, JOB_FIELDS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "ä",
        "x" * (LIMIT + 1),
        token({}),
        token([]),
        token(7),
        token([["_id", 1]]),
        token([["_id", -1, str(ROW_ID)]]),
        token([["name", 1, "a"]]),
        token([["_id", 1, {"$ne": None}]]),
        token([["_id", 1, ["a"]]]),
        token([["_id", 1, 7]]),
        token([["_id", 1, str(ROW_ID)], ["name", 1, "a"]]),
        token([[{"a": 1}, 1, "x"]]),
    ],
)
def test_what_is_none(text: str) -> None:
    """Of another order, of another type, or no bookmark at all: refused, and no operator gets in."""
    with pytest.raises(BadRequest, match="cursor"):
        behind(text, [("_id", 1)], JOB_FIELDS)
