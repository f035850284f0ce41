"""Envelopes: what is read, what is refused, and how positional arguments find their names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core4 import messages
from core4.errors import BadArguments, BadMessage, InvalidJson, TooLarge

ENTRY: dict[str, Any] = {"schema": {"properties": {"a": {}, "b": {}, "c": {}}}}


def read(envelope: Any, queue: str = "ETL") -> messages.Message:
    return messages.read(json.dumps(envelope).encode(), queue, cap=1000)


def test_both_envelopes_say_the_same() -> None:
    flat = {"namespace": "ETL", "name": "load", "args": [1], "kwargs": {"b": 2}}

    assert read(flat) == read({"job": flat})
    assert read(flat) == messages.Message(name="load", namespace="ETL", args=(1,), kwargs={"b": 2})


def test_what_is_left_out() -> None:
    message = read({"name": "load"})

    assert (message.namespace, message.args, dict(message.kwargs)) == ("ETL", (), {})
    assert message.qual_names == ("ETL:load", "load")


@pytest.mark.parametrize(
    ("envelope", "text"),
    [
        ([], "no object"),
        ({"job": "load"}, "no object"),
        ({"job": {"name": "load"}, "name": "load"}, r"\[job\] is not known"),
        ({"name": ""}, "printable"),
        ({"name": "load", "namespace": "a b"}, "namespace"),
        ({"name": "load", "request_id": ""}, "request_id"),
        ({"name": "load", "kwargs": []}, "dict"),
        ({"name": "load", "priority": "high"}, "priority"),
        ({"name": "load", "kwargs": {"$ref": 1}}, r"begins with `\$`"),
    ],
)
def test_what_is_refused(envelope: Any, text: str) -> None:
    with pytest.raises(BadMessage, match=text):
        read(envelope)


def test_a_message_has_a_largest_size() -> None:
    with pytest.raises(TooLarge, match="1000 are accepted"):
        messages.read(b" " * 1001, "ETL", cap=1000)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        messages.read(body, "ETL", cap=200)
    except (InvalidJson, BadMessage, TooLarge):
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["name", "namespace", "args", "kwargs", "job", "request_id", "priority", "force", "x"])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, JSON, max_size=6))
def test_any_object_is_read_or_refused(envelope: dict[str, Any]) -> None:
    """What a producer lets through is what the other end reads."""
    try:
        body = messages.write(envelope, "ETL", cap=10_000)
    except (BadMessage, TooLarge):
        return
    assert messages.read(body, "ETL", cap=10_000) == messages.check(envelope, "ETL")


def test_positional_arguments_find_their_names() -> None:
    message = read({"name": "load", "args": [1, 2], "kwargs": {"c": 3}})

    assert messages.bind(ENTRY, message) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("args", "kwargs", "text"), [([1, 2, 3, 4], {}, "3 positional"), ([1], {"a": 2}, "given twice")]
)
def test_arguments_that_cannot_be_bound(args: list[int], kwargs: dict[str, int], text: str) -> None:
    with pytest.raises(BadArguments, match=text):
        messages.bind(ENTRY, read({"name": "load", "args": args, "kwargs": kwargs}))


def test_the_digest_tells_messages_apart() -> None:
    one = read({"name": "load", "kwargs": {"a": 1, "b": 2}})

    assert one.digest == read({"job": {"kwargs": {"b": 2, "a": 1}, "name": "load"}}).digest
    assert one.digest != read({"name": "load", "kwargs": {"a": 1, "b": 3}}).digest
    assert one.digest != read({"name": "load", "kwargs": {"a": 1, "b": 2}, "priority": 1}).digest
