"""Spans of ids: none is left out, none comes twice, and they come in order."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from core4.spans import Spans, spans

NOW = 1_800_000_000
SECONDS = st.integers(0, 2**32 - 1)
NEW = st.integers(NOW - 5000, NOW + 50)


def made(second: int, rest: int = 0) -> ObjectId:
    return ObjectId(struct.pack(">IQ", second, rest))


def holds(span: dict[str, ObjectId], found: ObjectId) -> bool:
    """What the database makes of the term."""
    return all(
        {"$lt": found < edge, "$gt": found > edge, "$gte": found >= edge}[verb] for verb, edge in span.items()
    )


@given(st.lists(SECONDS | NEW))
def test_the_newest_of_all(seconds: list[int]) -> None:
    ids = sorted((made(second, number) for number, second in enumerate(seconds)), reverse=True)
    told = [each for span in spans(-1, {}, NOW) for each in ids if holds(span, each)]
    assert told == ids


@given(st.lists(SECONDS | NEW, min_size=1), st.sampled_from([1, -1]))
def test_what_stands_behind_one(seconds: list[int], direction: int) -> None:
    ids = sorted((made(second, number) for number, second in enumerate(seconds)), reverse=direction < 0)
    bound = {"$gt" if direction > 0 else "$lt": ids[0]}
    told = [each for span in spans(direction, bound, NOW) for each in ids if holds(span, each)]
    assert told == ids[1:]


@pytest.mark.parametrize("direction", [1, -1])
def test_there_are_few_of_them(direction: int) -> None:
    """For all time: an empty collection must not cost many round trips."""
    bound = {"$gt": made(0)} if direction > 0 else {}
    assert len(list(spans(direction, bound, NOW))) <= 13


@pytest.mark.parametrize(
    ("where", "behind", "sort", "suits"),
    [
        ({}, {}, [("_id", -1)], True),
        ({"state": "complete"}, {"_id": {"$lt": made(1)}}, [("_id", -1), ("name", 1)], True),
        ({"state": {"$in": ["error"]}}, {"_id": {"$gt": made(1)}}, [("_id", 1)], True),
        ({"state": "complete", "name": "a"}, {}, [("_id", -1)], False),  # reads each state for each span
        ({"name": "a"}, {"_id": {"$lt": made(1)}}, [("_id", -1)], False),
        ({}, {}, [("_id", 1)], False),  # nobody knows where the oldest is
        ({}, {}, [("name", -1), ("_id", -1)], False),
        ({}, {"$or": []}, [("_id", -1)], False),
        ({"_id": {"$lt": made(1)}}, {}, [("_id", -1)], False),
        ({"state": {"$ne": "error"}}, {}, [("_id", -1)], False),
        ({"state": {"$in": ["error"], "$ne": "error"}}, {}, [("_id", -1)], False),
    ],
)
def test_which_lists_are_read_so(where: Any, behind: Any, sort: list[tuple[str, int]], suits: bool) -> None:
    assert (Spans.of(None, where, behind, sort) is not None) is suits  # type: ignore[arg-type]
