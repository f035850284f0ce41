"""Frames, and what is no frame."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core4.worker.protocol import MAX_FRAME, Decoder, ProtocolError, decode, encode, length, read, receive

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=5), max_size=5), st.integers(1, 50))
def test_messages_come_out_as_they_went_in(messages: list[dict[str, Any]], size: int) -> None:
    data = b"".join(map(encode, messages))
    decoder = Decoder()
    found = []
    for start in range(0, len(data), size):
        found += decoder.feed(data[start : start + size])

    assert found == messages


def test_lone_surrogates_pass() -> None:
    assert decode(encode({"a": "\udcff"})[4:]) == {"a": "\udcff"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"1",
        b"null",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"drop": -1e999}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":',
    ],
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)


def test_a_frame_has_a_limit() -> None:
    with pytest.raises(ProtocolError, match="over the limit of 10"):
        length(struct.pack(">I", 11), 10)
    with pytest.raises(ProtocolError, match="too long"):
        encode({"a": "x" * MAX_FRAME})
    with pytest.raises(ProtocolError, match="over the limit"):
        Decoder().feed(b"\xff\xff\xff\xff")


def test_a_blocking_socket_gives_messages_until_its_end() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(encode({"n": 1}) + encode({"n": 2}) + encode({"n": 3})[:-1])
        one.shutdown(socket.SHUT_WR)

        assert [receive(other), receive(other), receive(other)] == [{"n": 1}, {"n": 2}, None]


async def test_a_stream_gives_messages_until_its_end() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(encode({"n": 1}) + encode({"n": 2})[:3])
    reader.feed_eof()

    assert [await read(reader), await read(reader)] == [{"n": 1}, None]
