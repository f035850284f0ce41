"""One reader of changes for all followers of one API process.

The hub hears what changes in the database and wakes whoever waits for that job. A room is a followed job:
it reads what is new once, encodes it once and keeps the newest frames; each follower has its own place
in them. Who is behind the frames that are kept reads the database himself until he has caught up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any, Self

from bson import ObjectId
from pymongo.errors import PyMongoError

from core4.api.frames import Batch, Cursor, Frame, behind, merge
from core4.changes import Change, ChangeFeed
from core4.database import Document
from core4.errors import Unavailable
from core4.logs import LOG, LogStore, text_size
from core4.queues import JobQueue
from core4.returns import RETURN
from core4.waits import heard

log = logging.getLogger(__name__)

PAGE = 1000  # lines read at once
PAGE_TEXT = 256 * 1024  # characters in them: each slow follower holds a page of its own
READS = 4  # of them under way at the same time, for the same reason
SLICE = 100  # followers that are sent something before others get their turn
GAP = 0.02  # seconds: what changes within them is read together
REREAD = 5.0  # seconds after which a job is read without being told
REREADS = 50  # such reads per second, of however many jobs
# Bytes of frames that are encoded once for all: of a page, with what is around its text.
SHARED = 2 * PAGE_TEXT
VARIANTS = 8  # ways in which the same frames are sent: with or without states, from other places
LATE = 0.2  # seconds between two looks for lines that a job has counted
PATIENCE = 3.0  # seconds they are waited for
OUTAGE = 1.0  # seconds between two tries while the database does not answer


class Hub:
    """All followed jobs of this process."""

    def __init__(self, feed: ChangeFeed, queue: JobQueue, logs: LogStore, *, buffer: int) -> None:
        self._feed, self._queue, self._logs = feed, queue, logs
        self.buffer = buffer
        self._waiting: dict[ObjectId | str, set[asyncio.Event]] = {}
        self._rooms: dict[ObjectId, Room] = {}
        self._open: set[asyncio.Transport] = set()
        self._reads = asyncio.Semaphore(READS)
        self._looks: dict[ObjectId, asyncio.Task[tuple[Document, bool] | None]] = {}

    @property
    def reread(self) -> float:
        """Seconds after which a followed job is read without being told."""
        return max(REREAD, len(self._rooms) / REREADS)

    @property
    def rooms(self) -> int:
        """Number of jobs that are followed."""
        return len(self._rooms)

    def waiting(self, job_id: ObjectId) -> int:
        """How many wait for news of a job, its room among them."""
        return len(self._waiting.get(job_id, ()))

    async def run(self) -> None:
        """Hear changes until cancelled."""
        self._feed.listen(self._hear)
        while True:
            try:
                await self._feed.run()
            except Exception:
                # Followers look for themselves now and then: late is better than never.
                log.exception("hub.failed")
                await asyncio.sleep(OUTAGE)

    def _hear(self, change: Change) -> None:
        if change.kind == "resync":
            for events in self._waiting.values():
                for event in events:
                    event.set()
            return
        for event in self._waiting.get(_subject(change), ()):
            event.set()

    @contextmanager
    def hints(self, subject: ObjectId | str) -> Iterator[asyncio.Event]:
        """An event that is set whenever a job or its log may have changed, or a return queue of this name."""
        event = asyncio.Event()
        self._waiting.setdefault(subject, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[subject].discard(event)
            if not self._waiting[subject]:
                del self._waiting[subject]

    def enter(self, job_id: ObjectId, cursor: Cursor, transport: asyncio.Transport) -> Room:
        """The room of a job with one follower more, whose connection is cut with the others at the end."""
        room = self._rooms.get(job_id)
        if room is None:
            room = self._rooms[job_id] = Room(self, job_id, cursor)
        room.followers += 1
        self._open.add(transport)
        return room

    def leave(self, room: Room, transport: asyncio.Transport) -> None:
        """The room closes with its last follower."""
        self._open.discard(transport)
        room.followers -= 1
        if not room.followers:
            del self._rooms[room.job_id]
            room.close()

    def cut(self) -> None:
        """End all open streams without a word: their readers come back where they stopped."""
        for transport in tuple(self._open):
            transport.abort()

    async def read(self, job_id: ObjectId, cursor: Cursor, *, patient: bool = False) -> Batch | None:
        """What is stored behind `cursor`; None if there is no such job."""
        # The document first: the lines it counts are then there to be read.
        async with self._reads:
            found = await self._queue.store.document(job_id)
            if found is None:
                return None
            lines = await self._logs.tail(job_id, cursor.seq, limit=PAGE, size=PAGE_TEXT)
            more = len(lines) >= PAGE or sum(map(text_size, lines)) >= PAGE_TEXT
            return merge(found[0], lines, cursor, more=more, patient=patient)

    async def find(self, job_id: ObjectId) -> tuple[Document, bool] | None:
        """The stored document of a job and whether it is the journal's, read once for who ask together."""
        look = self._looks.get(job_id)
        if look is not None and (found := await asyncio.shield(look)) is not None:
            return found
        # It may have been made since the others asked.
        look = self._looks[job_id] = asyncio.create_task(self._queue.store.document(job_id))
        look.add_done_callback(partial(self._looked, job_id))
        return await asyncio.shield(look)

    def _looked(self, job_id: ObjectId, look: asyncio.Task[Any]) -> None:
        if self._looks.get(job_id) is look:
            del self._looks[job_id]
        if not look.cancelled():
            look.exception()  # all who asked may have left: then nobody else looks at it

    async def last_seq(self, job_id: ObjectId) -> int:
        """The number of the last line that is stored."""
        return await self._logs.last_seq(job_id)


class Room:
    """One followed job: a task that reads, and the newest frames (up to a number of bytes)."""

    def __init__(self, hub: Hub, job_id: ObjectId, cursor: Cursor) -> None:
        self.job_id = job_id
        self.followers = 0
        self.caught_up = False  # everything that was stored when the room opened has been read
        self.ended = False
        self.start = self.cursor = cursor  # before the first and behind the last frame that is kept
        self.before = cursor  # the first frame that was read last
        self.first = 0  # number of the first frame that is kept, counted from the opening of the room
        self.newest = 0  # number of the first frame that was read last
        self.shares = False  # these are few enough to be kept as they are sent
        self.frames: list[Frame] = []
        self.encoded: dict[Hashable, list[bytes]] = {}  # what was read last as it is sent to most
        self._waiting: dict[Follower, asyncio.Future[None]] = {}  # those that have read all there is
        self._hub = hub
        self._bytes = 0
        self._task = asyncio.create_task(self._run(), name=f"room {job_id}")

    def close(self) -> None:
        """Stop reading."""
        self._task.cancel()

    async def read(self, cursor: Cursor) -> Batch | None:
        """What is stored behind `cursor`, for who cannot use the frames that are kept."""
        return await self._hub.read(self.job_id, cursor)

    async def _run(self) -> None:
        seen, late_since = False, 0.0
        with self._hub.hints(self.job_id) as hint:
            while not self.ended:
                hint.clear()
                patient = not late_since or monotonic() - late_since < PATIENCE
                batch = await self._try_read(patient=patient)
                # None: promised by a restart but not made yet; or gone for good.
                await self._publish(batch or Batch(cursor=self.cursor, ended=seen))
                seen = seen or batch is not None
                waiting = batch is not None and batch.waiting
                late_since = (late_since or monotonic()) if waiting else 0.0
                if batch is None or not batch.more:
                    read = monotonic()
                    await heard(hint, LATE if waiting or not seen else self._hub.reread)
                    # What comes after a silence is read at once.
                    await asyncio.sleep(max(read + GAP - monotonic(), 0.0))

    async def _try_read(self, *, patient: bool) -> Batch | None:
        while True:
            try:
                return await self._hub.read(self.job_id, self.cursor, patient=patient)
            except (PyMongoError, Unavailable) as error:
                log.warning("room.database_unavailable", extra={"error": str(error)[:200]})
            except Exception:
                log.exception("room.failed", extra={"job_id": str(self.job_id)})
            await asyncio.sleep(OUTAGE)

    async def _publish(self, batch: Batch) -> None:
        caught_up = self.caught_up or not batch.more
        if not batch.frames and (caught_up, batch.ended) == (self.caught_up, self.ended):
            return  # thousands need not be woken to be told nothing
        size = sum(len(frame.body) for frame in batch.frames)
        self.newest, self.shares = self.first + len(self.frames), size <= SHARED
        self.encoded.clear()
        self.frames += batch.frames
        self._bytes += size
        self._trim()
        self.before, self.cursor = self.cursor, batch.cursor
        self.ended, self.caught_up = batch.ended, caught_up
        await self._hand_out()

    async def _hand_out(self) -> None:
        """Send what was read last to those that wait for it; wake who has to see for himself.

        To wake a task costs more than what it would then do. Whatever else the process does goes between.
        """
        for number, (follower, woken) in enumerate(tuple(self._waiting.items()), 1):
            if woken.done():
                continue
            try:
                pushed = follower.pushed()
            except Exception:  # the follower meets that himself; it is nothing to the others
                pushed = False
            if not pushed:
                woken.set_result(None)
            if not number % SLICE:
                await asyncio.sleep(0)

    async def news(self, follower: Follower) -> None:
        """Until something was read that the follower has not been sent meanwhile."""
        self._waiting[follower] = woken = asyncio.get_running_loop().create_future()
        try:
            await woken
        finally:
            del self._waiting[follower]

    def _trim(self) -> None:
        count = 0
        while self._bytes > self._hub.buffer and count < len(self.frames) - 1:
            self._bytes -= len(self.frames[count].body)
            self.start = self.frames[count].after(self.start)
            count += 1
        del self.frames[:count]
        self.first += count


Push = Callable[[Sequence[Frame]], bool]


class Follower:
    """One reader of a room, within a `with` block. `cursor` is behind what `next` has returned.

    There are thousands of these: no generators, no dictionaries.
    """

    __slots__ = ("_began", "_hub", "_place", "_push", "_room", "_transport", "cursor", "live")

    def __init__(self, hub: Hub, job_id: ObjectId, cursor: Cursor, transport: asyncio.Transport) -> None:
        self._hub, self._transport = hub, transport
        self._room = hub.enter(job_id, cursor, transport)  # left by the end of the block
        self._began = 0  # number of the first frame that `next` took last, whether it was new or not
        self._place: int | None = None  # number of the next frame; None: not among those that are kept
        self.cursor = cursor
        self.live = False  # True once everything that was stored has been read
        self._push: Push | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hub.leave(self._room, self._transport)

    async def next(self, push: Push) -> list[Frame]:
        """The next frames, at least one; none at all when the job has ended and everything was returned.

        `push` is given frames while this waits, that it need not end for them; it returns whether they
        were sent. They count as returned then.
        """
        self._push = push
        while True:
            frames = self._kept() if self._find_place() else await self._stored()
            fresh = [frame for frame in frames if frame.new_for(self.cursor)]
            self.cursor = behind(fresh, self.cursor)
            if self.cursor == self._room.cursor:
                self.cursor = self._room.cursor  # one for all
            if fresh:
                return fresh
            if frames:
                continue
            if self._room.ended and self._place is not None:
                return []
            self.live = self._room.caught_up
            if self._place is not None:
                await self._room.news(self)
            else:  # not among the frames that are kept: he looks again by himself
                with suppress(TimeoutError):
                    async with asyncio.timeout(LATE):
                        await self._room.news(self)

    def pushed(self) -> bool:
        """True if what the room has read last was sent, and needs nobody to be woken."""
        room, seen, began = self._room, self.cursor, self._began
        level = self.live and seen == room.before and self._place == room.newest
        # Of more than is kept the first frames are gone already.
        if self._push is None or room.ended or not level or room.newest < room.first:
            return False
        frames, sent = self._kept(), False
        self.cursor = room.cursor
        try:
            sent = self._push(frames)
        finally:
            if not sent:
                self.cursor, self._began, self._place = seen, began, room.newest
        return sent

    def encoded(self, key: Hashable, make: Callable[[], Iterable[bytes]]) -> Iterable[bytes]:
        """What `make` gives; made once for all of the same `key` who were just given the newest frames."""
        room = self._room
        alone = room.followers == 1 or self._place is None or self._began != room.newest
        if key in room.encoded and not alone:
            return room.encoded[key]
        if alone or not room.shares or len(room.encoded) >= VARIANTS:
            return make()
        room.encoded[key] = list(make())
        return room.encoded[key]

    def _find_place(self) -> bool:
        room = self._room
        if self._place is None or self._place < room.first:
            self._place = room.first if self.cursor.covers(room.start) else None
        return self._place is not None

    def _kept(self) -> list[Frame]:
        assert self._place is not None
        frames = self._room.frames[self._place - self._room.first :]
        self._began, self._place = self._place, self._place + len(frames)
        return frames

    async def _stored(self) -> list[Frame]:
        try:
            batch = await self._room.read(self.cursor)
        except (PyMongoError, Unavailable):
            await asyncio.sleep(OUTAGE)
            return []
        if batch is None and self._room.ended:  # deleted while it was read
            self._place = self._room.first
        return batch.frames if batch else []


def _subject(change: Change) -> ObjectId | str:
    """The job that a change is about, or the return queue."""
    if change.collection == RETURN:
        return str(change.fields.get("queue"))
    found: ObjectId = change.fields["job"] if change.collection == LOG else change.id
    return found
