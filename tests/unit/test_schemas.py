"""The arguments of requests: types, texts and what cannot be stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bson import encode
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import ValidationError

from core4.schemas import DEPTH, EnqueueArguments, FollowedArguments, SearchArguments, json_problems


@pytest.mark.row("S19")
@pytest.mark.parametrize("word", ["yes", "Y", "on", "1", "TRUE", "t", True, 1])
def test_words_for_true(word: Any) -> None:
    """core4's words for true, in any case."""
    assert FollowedArguments().load({"follow": word}) == {"follow": True}


@pytest.mark.row("S19")
@pytest.mark.parametrize("word", ["no", "N", "off", "0", "False", "f", False, 0])
def test_words_for_false(word: Any) -> None:
    """core4's words for false, in any case."""
    assert FollowedArguments().load({"follow": word}) == {"follow": False}


@pytest.mark.row("S19")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"follow": "maybe"}, "parameter [follow] expected as_type [bool]"),
        ({"follow": 2}, "parameter [follow] expected as_type [bool]"),
        ({"follow": None}, "Field may not be null."),
    ],
)
def test_other_words_are_refused(arguments: dict[str, Any], text: str) -> None:
    """Neither true nor false is an error with core4's text."""
    with pytest.raises(ValidationError) as caught:
        FollowedArguments().load(arguments)

    assert caught.value.messages_dict == {"follow": [text]}


@pytest.mark.parametrize(
    ("name", "value", "loaded"),
    [
        ("page", "3", 3),
        ("page", -1, -1),
        ("page", " 7 ", 7),
        ("per_page", "500", 500),
        ("filter", '{"state": "failed"}', {"state": "failed"}),
        ("sort", '[["_id", -1]]', [["_id", -1]]),
        ("sort", [["_id", -1]], [["_id", -1]]),
    ],
)
def test_text_and_json_mean_the_same(name: str, value: Any, loaded: Any) -> None:
    """A query string holds text, a body JSON: both are read."""
    assert SearchArguments().load({name: value})[name] == loaded


@pytest.mark.row("S19")
@pytest.mark.parametrize(
    ("name", "value", "as_type"),
    [
        ("page", "one", "int"),
        ("page", "1.5", "int"),
        ("page", 1.0, "int"),
        ("page", True, "int"),
        ("page", "9" * 5000, "int"),
        ("filter", "{", "dict"),
        ("filter", "[]", "dict"),
        ("filter", "[" * 100_000, "dict"),
        ("sort", "{}", "list"),
        ("sort", 5, "list"),
        ("search", 5, "str"),
        ("search", "\0", "str"),
    ],
)
def test_wrong_types(name: str, value: Any, as_type: str) -> None:
    """The text names the parameter and the type, as core4's does."""
    with pytest.raises(ValidationError) as caught:
        SearchArguments().load({name: value})

    assert caught.value.messages_dict == {name: [f"parameter [{name}] expected as_type [{as_type}]"]}


@pytest.mark.parametrize(("name", "value"), [("per_page", 0), ("per_page", 501), ("page", 2**40)])
def test_bounds(name: str, value: int) -> None:
    """Pages have bounds."""
    with pytest.raises(ValidationError, match="expected a number from"):
        SearchArguments().load({name: value})


def test_options_stand_beside_the_rest() -> None:
    """An option may come as JSON or as text."""
    loaded = EnqueueArguments().load(
        {"qual_name": "a.B", "priority": "5", "force": "yes", "wall_time": None, "worker": "w@h"}
        | {"memory_limit": "512MB", "jitter": "0.5", "wall_action": "kill", "timeout": "null"}
    )

    assert loaded["priority"] == 5
    assert loaded["force"] is True
    assert loaded["wall_time"] is None
    assert loaded["worker"] == "w@h"
    assert (loaded["memory_limit"], loaded["jitter"]) == ("512MB", 0.5)
    assert (loaded["wall_action"], loaded["timeout"]) == ("kill", None)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "qual_name"),
        ({"qual_name": ""}, "qual_name"),
        ({"qual_name": "a" * 201}, "qual_name"),
        ({"qual_name": "a\nb"}, "qual_name"),
        ({"qual_name": "a", "attempts": 0}, "attempts"),
        ({"qual_name": "a", "attempts": None}, "attempts"),
        ({"qual_name": "a", "priority": "high"}, "priority"),
        ({"qual_name": "a", "namespace": "a b"}, "namespace"),
        ({"qual_name": "a", "args": []}, "args"),
        ({"qual_name": "a", "bogus": 1}, "bogus"),
    ],
)
def test_bad_orders(arguments: dict[str, Any], field: str) -> None:
    """What is wrong is named."""
    with pytest.raises(ValidationError) as caught:
        EnqueueArguments().load(arguments)

    assert list(caught.value.messages_dict) == [field]


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "pointer"),
    [
        ({"a": 2**63}, "/a"),
        ({"a": {"b": [0, float("inf")]}}, "/a/b/1"),
        ({"a": "\ud800"}, "/a"),
        ({"a~/b": float("nan")}, "/a~0~1b"),
        ({"\0": 1}, ""),
        ({"a": {"$ref": "x", "$id": 1}}, "/a"),
        ({"a": nested(DEPTH)}, "/a" + "/0" * (DEPTH - 1)),
    ],
)
def test_what_cannot_be_stored(value: Any, pointer: str) -> None:
    """Each is found where it is."""
    assert [error["pointer"] for error in json_problems(value)] == [pointer]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters()), JSON, max_size=4))
def test_what_passes_can_be_stored(value: dict[str, Any]) -> None:
    """No value that passes is refused by the database's encoder; what is refused can be shown."""
    problems = json_problems(value)

    if not problems:
        encode({"args": value})
    assert json.dumps(problems).isascii()
