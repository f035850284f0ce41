"""The filter, sort and search of clients."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from core4.errors import BadRequest
from core4.filters import (
    CATALOGUE_FIELDS,
    JOB_FIELDS,
    compile_filter,
    compile_search,
    compile_sort,
    matches,
)

ID = "5f6252b42e84fa29038a3e3f"
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given_filter", "where"),
    [
        ({}, {}),
        ({"state": "pending"}, {"state": {"$eq": "pending"}}),
        ({"state": {"in": ["pending", "failed"]}}, {"state": {"$in": ["pending", "failed"]}}),
        ({"priority": {"$gte": 1, "lt": 5}}, {"priority": {"$gte": 1, "$lt": 5}}),
        ({"qual_name": "a.B"}, {"name": {"$eq": "a.B"}}),
        ({"args.segment": 3}, {"args.segment": {"$eq": 3}}),
        ({"args.a.b_c.d-e": {"ne": None}}, {"args.a.b_c.d-e": {"$ne": None}}),
        ({"enqueued.at": {"gt": "2026-01-31T12:00:00"}}, {"enqueued.at": {"$gt": NOON}}),
        ({"finished_at": {"lt": "2026-01-31T13:00:00+01:00"}}, {"finished_at": {"$lt": NOON}}),
        ({"_id": ID}, {"_id": {"$eq": ObjectId(ID)}}),
        ({"chain_id": ID}, {"chain_id": {"$eq": ObjectId(ID)}}),
        ({"_id": {"in": [ID]}}, {"_id": {"$in": [ObjectId(ID)]}}),
        ({"killed_at": {"exists": True}}, {"killed_at": {"$ne": None}}),
        ({"worker": {"exists": False}}, {"worker": {"$eq": None}}),
        ({"force": True}, {"force": {"$eq": True}}),
        ({"started_at": None}, {"started_at": {"$eq": None}}),
    ],
)
def test_what_is_accepted(given_filter: dict[str, Any], where: dict[str, Any]) -> None:
    """Each form becomes plain operators on stored fields."""
    assert compile_filter(given_filter, JOB_FIELDS).where == where


@pytest.mark.parametrize(
    ("given_filter", "names"),
    [
        ({"$where": "1"}, r"\$where"),
        ({"$or": [{}]}, r"\$or"),
        ({"lease.id": "x"}, "lease.id"),
        ({"unique_key": "x"}, "unique_key"),
        ({"state": "bogus"}, "state"),
        ({"state": {"$regex": "a"}}, "regex"),
        ({"state": {"$not": {}}}, "not"),
        ({"state": {}}, "state"),
        ({"state": ["pending"]}, "state"),
        ({"state": {"eq": {"$gt": ""}}}, "state"),
        ({"state": {"eq": "killed", "$eq": "error"}}, "eq"),
        ({"priority": "1"}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 2**63}, "64 bits"),
        ({"runtime": float("nan")}, "finite"),
        ({"force": 1}, "force"),
        ({"_id": "nope"}, "24 hexadecimal"),
        ({"_id": 5}, "24 hexadecimal"),
        ({"enqueued.at": "yesterday"}, "time like"),
        ({"enqueued.at": 5}, "time like"),
        ({"args": {"a": 1}}, "args"),
        ({"args.": 1}, "args"),
        ({"args.$where": 1}, "args"),
        ({"args.a..b": 1}, "args"),
        ({"args.a\0b": 1}, "args"),
        ({"args.a.b.c.d.e.f": 1}, "args"),
        ({"args.a": [1]}, "args.a"),
        ({"args.a": {"in": 1}}, "list of at most 100"),
        ({"args.a": {"in": [1] * 101}}, "list of at most 100"),
        ({"args.a": {"in": [[1]]}}, "args.a"),
        ({"args.a": {"gt": None}}, "null"),
        ({"args.a": {"exists": 1}}, "true or false"),
        ({"args.a": {"exists": True, "eq": 1}}, "stands alone"),
        ({"args.a": "x" * 1001}, "at most 1000"),
        ({"args.a": "\ud800"}, "text"),
        ({f"args.a{n}": n for n in range(21)}, "20 terms"),
        ({"name": "a", "qual_name": "b"}, "twice"),
    ],
)
def test_what_is_refused(given_filter: dict[str, Any], names: str) -> None:
    """Anything else is refused and named."""
    with pytest.raises(BadRequest, match=names):
        compile_filter(given_filter, JOB_FIELDS)


def test_id_and_equalities_come_first() -> None:
    """A server that uses the first clause with an index gets the best one."""
    query = compile_filter({"priority": {"gt": 1}, "state": "failed", "_id": {"gt": ID}}, JOB_FIELDS)

    assert list(query.where) == ["_id", "state", "priority"]


@pytest.mark.parametrize(
    ("given_filter", "private"),
    [
        ({"category": {"gte": "a"}}, True),
        ({"state": "failed"}, False),
        ({"args.a": 1}, True),
        ({"qual_name": "a"}, True),
        ({"name": {"ne": "a"}}, True),
    ],
)
def test_private_filters_are_known(given_filter: dict[str, Any], private: bool) -> None:
    """What looks at a name or at arguments is known to do so."""
    assert compile_filter(given_filter, JOB_FIELDS).private is private


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from([*JOB_FIELDS, "args.a", "$where", "$expr"]) | st.text()
OPERANDS = st.dictionaries(
    st.sampled_from(["eq", "$ne", "in", "gt", "exists", "$regex", "$where"]) | st.text(), JSON
)


@given(st.dictionaries(KEYS, JSON | OPERANDS, max_size=4))
def test_nothing_of_a_client_becomes_an_operator(given_filter: dict[str, Any]) -> None:
    """Whatever comes in: refused, or listed operators on listed fields with plain values."""
    try:
        where = compile_filter(given_filter, JOB_FIELDS).where
    except BadRequest:
        return
    for path, term in where.items():
        assert path in {field.path for field in JOB_FIELDS.values()} or path.startswith("args.")
        for operator, operand in term.items():
            assert operator in {"$eq", "$ne", "$in", "$gt", "$gte", "$lt", "$lte"}
            for value in operand if operator == "$in" else [operand]:
                assert not isinstance(value, dict | list)


def test_sort() -> None:
    """A list of fields and directions, with stored names."""
    order, private = compile_sort([["priority", -1], ["_id", 1]], JOB_FIELDS)

    assert order == [("priority", -1), ("_id", 1)]
    assert not private
    assert compile_sort([["qual_name", 1]], JOB_FIELDS) == ([("name", 1)], True)


@pytest.mark.parametrize(
    "given_sort",
    [
        ["_id"],
        [["_id"]],
        [["_id", 0]],
        [["_id", True]],
        [["_id", "1"]],
        [[5, 1]],
        [["args.a", 1]],
        [["$natural", 1]],
        [["_id", 1], ["_id", -1]],
        [["_id", 1], ["state", 1], ["priority", 1], ["attempts", 1]],
    ],
)
def test_bad_sort(given_sort: list[Any]) -> None:
    """Anything else is refused."""
    with pytest.raises(BadRequest, match="sort"):
        compile_sort(given_sort, JOB_FIELDS)


@pytest.mark.parametrize(
    ("search", "name", "found"),
    [
        ("dummy", "core4.example.DummyJob", True),
        ("DUMMY", "core4.example.DummyJob", True),
        ("d?mmy", "core4.example.DummyJob", True),
        ("core*job", "core4.example.DummyJob", True),
        ("job*core", "core4.example.DummyJob", False),
        ("e.e", "core4xexample", False),
        ("4.e", "core4.example", True),
        ("[a-z]", "core4.example", False),
        ("***dummy***", "core4.example.DummyJob", True),
        ("", "anything", True),
    ],
)
def test_search(search: str, name: str, found: bool) -> None:
    """`?` and `*` are wildcards, all else is itself."""
    assert bool(re.search(compile_search(search), name, re.IGNORECASE)) is found


@pytest.mark.parametrize("search", ["a" * 201, "a*b*c*d*e", "?" * 11, "a\0", "\ud800"])
def test_bad_search(search: str) -> None:
    """What could run long or cannot be stored is refused."""
    with pytest.raises(BadRequest, match="search"):
        compile_search(search)


@given(st.text(max_size=20))
def test_search_is_always_a_valid_pattern(search: str) -> None:
    """No text of a client can break the pattern."""
    try:
        pattern = compile_search(search)
    except BadRequest:
        return
    re.compile(pattern)


@pytest.mark.parametrize(
    ("given_filter", "found"),
    [
        ({"tag": "a"}, True),
        ({"tag": {"ne": "a"}}, False),
        ({"author": {"in": ["ann", "bob"]}}, True),
        ({"author": {"gt": "b"}}, False),
        ({"schedule": {"exists": True}}, False),
        ({"schedule": {"gt": "a"}}, False),
        ({"unique": True}, True),
        ({"qual_name": "my.Job"}, True),
    ],
)
def test_filter_in_memory(given_filter: dict[str, Any], found: bool) -> None:
    """Small collections are filtered here, as the database would."""
    entry = {"_id": "my.Job", "tag": ["a", "b"], "author": "ann", "schedule": None, "unique": True}

    assert matches(compile_filter(given_filter, CATALOGUE_FIELDS, args=False).where, entry) is found
