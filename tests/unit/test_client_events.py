"""The event parser: the rules of HTML's server-sent events, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core4.client import EventParser, RawEvent

CASES = {
    "one-event": (b"event: log\ndata: {}\nid: 1.2\n\n", [RawEvent("log", "{}", "1.2")]),
    "default-event-name": (b"data: x\n\n", [RawEvent("message", "x", "")]),
    "crlf": (b"event: a\r\ndata: 1\r\n\r\n", [RawEvent("a", "1", "")]),
    "cr": (b"event: a\rdata: 1\r\r", [RawEvent("a", "1", "")]),
    "mixed-line-ends": (b"event: a\rdata: 1\r\ndata: 2\n\n", [RawEvent("a", "1\n2", "")]),
    "several-data-lines": (b"data: a\ndata:\ndata: c\n\n", [RawEvent("message", "a\n\nc", "")]),
    "empty-data-is-data": (b"data\n\n", [RawEvent("message", "", "")]),
    "no-data-no-event": (b"event: a\nid: 7\n\ndata: b\n\n", [RawEvent("message", "b", "7")]),
    "comments": (b": ping\n\n:\n\ndata: a\n: in between\n\n", [RawEvent("message", "a", "")]),
    "only-one-space-goes": (
        b"data:  a\n\ndata:b\n\n",
        [RawEvent("message", " a", ""), RawEvent("message", "b", "")],
    ),
    "colon-in-value": (b"data: a: b\n\n", [RawEvent("message", "a: b", "")]),
    "id-stays": (
        b"id: 1\ndata: a\n\ndata: b\n\n",
        [RawEvent("message", "a", "1"), RawEvent("message", "b", "1")],
    ),
    "id-reset": (
        b"id: 1\ndata: a\n\nid\ndata: b\n\n",
        [RawEvent("message", "a", "1"), RawEvent("message", "b", "")],
    ),
    "id-with-nul-ignored": (b"id: 1\nid: 2\x003\ndata: a\n\n", [RawEvent("message", "a", "1")]),
    "byte-order-mark-at-start": (b"\xef\xbb\xbfdata: a\n\n", [RawEvent("message", "a", "")]),
    "byte-order-mark-later": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [RawEvent("message", "a", "")]),
    "unknown-field": (b"colour: red\ndata: a\n\n", [RawEvent("message", "a", "")]),
    "unfinished-event": (b"data: a\n\ndata: b\n", [RawEvent("message", "a", "")]),
    "other-line-ends-are-text": (
        "data: a\u2028b\x85c\x0bd\n\n".encode(),
        [RawEvent("message", "a\u2028b\x85c\x0bd", "")],
    ),
    "broken-utf8": (b"data: \xff\n\n", [RawEvent("message", "\ufffd", "")]),
}


@pytest.mark.parametrize(("stream", "events"), CASES.values(), ids=CASES)
def test_events_of_a_stream(stream: bytes, events: list[RawEvent]) -> None:
    """Each rule of the format holds for a stream that comes in one piece."""
    assert EventParser().feed(stream) == events


@pytest.mark.parametrize(("stream", "events"), CASES.values(), ids=CASES)
def test_events_of_a_stream_byte_by_byte(stream: bytes, events: list[RawEvent]) -> None:
    """The same rules hold when every byte comes alone."""
    parser = EventParser()

    assert [event for byte in stream for event in parser.feed(bytes([byte]))] == events


LINES = st.lists(
    st.sampled_from(
        ["event: a", "data: ä€😀", "data", "id: 1", "id: \0", ": ping", "retry: 50", "", "\ufeffdata: x", "x"]
    ),
    max_size=30,
)


@given(LINES, st.lists(st.sampled_from(["\n", "\r", "\r\n"]), min_size=30, max_size=30), st.data())
def test_any_cut_gives_the_same_events(lines: list[str], ends: list[str], data: st.DataObject) -> None:
    """Wherever the network cuts a stream, in a character or between CR and LF, the events are the same."""
    stream = "".join(line + end for line, end in zip(lines, ends, strict=False)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    whole, cut = EventParser(), EventParser()

    pieces = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    events = [event for piece in pieces for event in cut.feed(piece)]

    assert events == whole.feed(stream)
    assert (cut.last_event_id, cut.retry) == (whole.last_event_id, whole.retry)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(stream: bytes) -> None:
    """Whatever arrives, cut or whole, is read alike and raises nothing."""
    parser = EventParser()

    assert [event for byte in stream for event in parser.feed(bytes([byte]))] == EventParser().feed(stream)


@pytest.mark.parametrize(
    ("value", "seconds"), [("50", 0.05), ("0", 0.0), ("5s", None), ("-1", None), ("٣", None), ("", None)]
)
def test_retry_is_digits_only(value: str, seconds: float | None) -> None:
    """The server's waiting time counts only if it is made of digits."""
    parser = EventParser()
    parser.feed(f"retry: {value}\n".encode())

    assert parser.retry == seconds


def test_resume_position_moves_with_complete_events_only() -> None:
    """An id whose event was cut off is not where to resume."""
    parser = EventParser("1.0")
    parser.feed(b"id: 1.5\ndata: a\n\nid: 1.6\ndata: cut")

    assert parser.last_event_id == "1.5"
