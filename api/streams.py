"""Server-sent events: what happens to one job, from where the reader stopped to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp_sse import EventSourceResponse
from bson import ObjectId

from core4.api.frames import Cursor, Frame, Mode, close_frame, transitions
from core4.api.hub import Follower, Hub
from core4.api.keys import BASE, HUB, SEATS, SETTINGS, USER
from core4.results import has_ended

log = logging.getLogger(__name__)

CHUNK = 65_536  # bytes written at once
ROOM = 32_768  # bytes that are sent to a connection without waiting for it
RETRY = b"retry: 3000\n\n"


def job_headers(job_id: ObjectId) -> dict[str, str]:
    """Where the job is, for every answer that made or restarted one; before the first event."""
    return {"X-Job-Id": str(job_id), "Location": f"{BASE}/job/{job_id}"}


async def follow_job(
    request: web.Request, job_id: ObjectId, *, states: bool = True, last_event_id: str = ""
) -> web.StreamResponse:
    """Stream a job that may be read: it is there, or promised.

    Raises: BadRequest for a cursor that cannot be read; TooManyRequests, Unavailable if too many are open.
    """
    # A browser that comes back sends the header; its first request can only have the query.
    cursor = Cursor.parse(request.headers.get("Last-Event-ID", "") or last_event_id)
    if cursor != Cursor():
        left = await _left_of(request.app[HUB], job_id, cursor)
        if left is None:
            return web.Response(status=204, headers=job_headers(job_id))
        cursor = left
    transport, response = request.transport, _response(request, job_id)
    if transport is None:
        raise ConnectionResetError
    with (
        request.app[SEATS].taken(request[USER].name, job_id=str(job_id)),
        Follower(request.app[HUB], job_id, cursor, transport) as follower,
    ):
        try:
            await response.prepare(request)
            response.headers.clear()  # they are sent: a tenth of what a follower costs
            async with response:
                await _Sender(transport, response, follower, states=states).send_all()
        except (ConnectionError, TimeoutError):
            log.debug("stream.cut", extra={"job_id": str(job_id)})
        except Exception:
            # The answer has begun: there is no other way to say that it is incomplete.
            log.exception("stream.failed", extra={"job_id": str(job_id)})
            transport.abort()
    return response


async def _left_of(hub: Hub, job_id: ObjectId, cursor: Cursor) -> Cursor | None:
    """Where to go on for who comes back; None if everything has been read.

    On its own, as thousands of followers would each hold the document for as long as they follow.
    """
    found = await hub.find(job_id)
    if found is None:
        return cursor
    document, _ = found
    last_seq = await hub.last_seq(job_id)
    if _all_read(document, cursor, last_seq):
        return None
    # A number from elsewhere must not hide what is there.
    return Cursor(min(cursor.rev, document["rev"]), min(cursor.seq, last_seq))


def _all_read(document: Mapping[str, Any], cursor: Cursor, last_seq: int) -> bool:
    """True if whoever has this cursor has read everything, `close` included."""
    if not has_ended(document):
        return False
    entries = transitions(document)
    return cursor.seq > last_seq and (not entries or cursor.rev >= entries[-1]["rev"])


def _response(request: web.Request, job_id: ObjectId) -> EventSourceResponse:
    response = EventSourceResponse(
        headers=job_headers(job_id),
        sep="\n",
        allow_all_methods=True,  # POST job and PUT job/restart stream, too
        ping_interval=request.app[SETTINGS].sse_ping,
    )
    # The end of the connection is the end of the stream for readers that know no events.
    response.headers["Connection"] = "close"
    response.force_close()
    return response


class _Sender:
    """What one follower is sent, and how much of it."""

    __slots__ = ("_cursor", "_follower", "_logs", "_response", "_states", "_transport", "_with_states")

    def __init__(
        self, transport: asyncio.Transport, response: EventSourceResponse, follower: Follower, *, states: bool
    ) -> None:
        self._transport, self._response, self._follower = transport, response, follower
        self._with_states = states
        self._states = self._logs = 0  # that were sent
        self._cursor = follower.cursor  # behind what was sent

    async def send_all(self) -> None:
        """Send what there is and what comes, to the end of the job."""
        begin = RETRY
        while frames := await self._follower.next(self._push):
            for chunk in self._chunks(frames):
                await self._response.write(begin + chunk)
                begin = b""
            self._count(frames)
        counts = {"state": self._states, "log": self._logs}
        await self._response.write(begin + close_frame(self._cursor, counts))

    def _push(self, frames: Sequence[Frame]) -> bool:
        """Send what came if the connection takes it at once, see `Follower.next`."""
        chunks = list(self._chunks(frames))
        begun = self._states or self._logs
        if not begun or sum(map(len, chunks)) >= ROOM or self._transport.get_write_buffer_size():
            return False
        for chunk in chunks:
            try:
                self._response.write(chunk).send(None)
            except StopIteration:
                continue  # done: so little, where nothing is on its way, waits for nothing
        self._count(frames)
        return True

    def _chunks(self, frames: Sequence[Frame]) -> Iterable[bytes]:
        cursor, live, states = self._cursor, self._follower.live, self._with_states
        key = (cursor, self._follower.cursor, live, states)
        return self._follower.encoded(key, partial(_pieces, frames, cursor, live, states=states))

    def _count(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            if frame.kind == "log":
                self._logs += 1
            elif self._with_states:
                self._states += 1
        self._cursor = self._follower.cursor


def _pieces(frames: Sequence[Frame], cursor: Cursor, live: bool, *, states: bool) -> Iterator[bytes]:
    return chunks(_encoded(frames, cursor, live, states=states))


def _encoded(frames: Sequence[Frame], cursor: Cursor, live: bool, *, states: bool) -> Iterator[bytes]:
    """One event after the other: what a slow reader has not taken yet need not be there twice."""
    for frame in frames:
        cursor = frame.after(cursor)
        if states or frame.kind == "log":
            yield frame.encode(cursor, _mode(frame, live=live))


def _mode(frame: Frame, *, live: bool) -> Mode:
    if not live:
        return "prelog"
    return "postlog" if frame.last else "watchlog"


def chunks(encoded: Iterable[bytes]) -> Iterator[bytes]:
    """Whole events joined to pieces of about CHUNK bytes: a heartbeat may come between two writes."""
    piece: list[bytes] = []
    size = 0
    for event in encoded:
        piece.append(event)
        size += len(event)
        if size >= CHUNK:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)
