"""The log lines of jobs: stored in chunks, read as lines in core4's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from pymongo import IndexModel
from pymongo.errors import BulkWriteError, DuplicateKeyError

from core4.database import Database, Document, Page, only_duplicates
from core4.jobs import Job

LOG = "sys.log"
INDEXES = {
    LOG: (
        IndexModel([("job", 1), ("seq", 1)], name="job", unique=True),
        IndexModel([("created", 1)], name="created"),
    )
}
LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
SOURCES = ("log", "stdout", "stderr")
WINDOW = 500  # jobs that `jobs` gives at once
FIRST_CHUNKS, CHUNKS = 2, 20  # read at once by `tail`, at first and at most: who wants little reads little


@dataclass(frozen=True)
class Line:
    """One line. `seq` has the fence of the attempt in its high bits; `epoch` is in seconds."""

    seq: int
    epoch: float
    level: str
    message: str
    source: str = "log"  # one of SOURCES
    exception: Mapping[str, Any] | None = None


class LogStore:
    """The only writer of `sys.log`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._log = database.fast(LOG)

    async def prepare(self) -> None:
        """Make the indexes that are missing."""
        await self._database.ensure_indexes(INDEXES)

    async def append(self, job: Job, hostname: str, lines: Sequence[Line]) -> None:
        """Store lines as one chunk. Repeating a call whose reply was lost stores nothing twice."""
        if not lines:
            return
        try:
            await self._log.insert_one(_chunk(job, hostname, lines))
        except DuplicateKeyError:
            pass  # an earlier call did it

    async def append_many(self, batches: Sequence[tuple[Job, str, Sequence[Line]]]) -> None:
        """`append` for several jobs in one round trip."""
        chunks = [_chunk(job, hostname, lines) for job, hostname, lines in batches if lines]
        try:
            await self._log.insert_many(chunks, ordered=False)
        except BulkWriteError as error:
            if not only_duplicates(error):
                raise

    async def tail(
        self,
        job_id: ObjectId,
        after: int,
        *,
        limit: int = 1000,
        size: int | None = None,
        keep: Callable[[Document], bool] | None = None,
    ) -> list[Document]:
        """Up to `limit` lines with numbers above `after`, of those to `keep`, in order; empty at the end.

        With `size` the line that brings their texts to so many characters is the last one.
        """
        found: list[Document] = []
        characters = 0
        async for line in self._lines(job_id, after):
            if keep is not None and not keep(line):
                continue
            found.append(line)
            characters += text_size(line)
            if len(found) >= limit or (size is not None and characters >= size):
                break
        return found

    async def page(
        self,
        job_id: ObjectId,
        *,
        page: int = 0,
        per_page: int = 10,
        descending: bool = False,
        keep: Callable[[Document], bool] | None = None,
    ) -> Page:
        """One page of lines, of those to `keep`; a negative `page` counts from the end.

        Lines are read and not held: a first pass counts those to keep, a second one takes the page.
        """
        total = await self.count(job_id) if keep is None else await self._count(job_id, keep)
        pages = -(-total // per_page)
        number = pages + page if page < 0 else page
        if number < 0 or number >= pages:
            return Page([], total, page, per_page)
        first = number * per_page
        stop = min(first + per_page, total)
        if descending:
            first, stop = total - stop, total - first
        if keep is None:
            rows = await self._range(job_id, first, stop)
        else:
            rows = await self._kept_range(job_id, keep, first, stop)
        return Page(rows[::-1] if descending else rows, total, page, per_page)

    async def jobs(self, newest: int | None = None) -> AsyncIterator[list[ObjectId]]:
        """The jobs that have lines, newest first, in windows; those of the `newest` chunks only."""
        cursor = self._log.find({}, {"_id": 0, "job": 1}).sort("job", -1).limit(newest or 0)
        window: list[ObjectId] = []
        async for chunk in cursor.batch_size(WINDOW):
            if window and window[-1] == chunk["job"]:
                continue
            if len(window) >= WINDOW:
                yield window
                window = []
            window.append(chunk["job"])
        if window:
            yield window

    async def count(self, job_id: ObjectId) -> int:
        """Number of lines of a job."""
        chunks = await self._log.find({"job": job_id}, {"count": 1}).to_list(None)
        return sum(chunk["count"] for chunk in chunks)

    async def last_seq(self, job_id: ObjectId) -> int:
        """Number of the last line stored; 0 if there is none."""
        chunks = await self._log.find({"job": job_id}, {"last": 1}).sort("seq", -1).limit(1).to_list(None)
        return int(chunks[0]["last"]) if chunks else 0

    async def older(self, before: datetime, limit: int) -> set[ObjectId]:
        """Jobs with lines from before that time, up to `limit` chunks of them, those of the oldest first."""
        found = self._log.find({"created": {"$lt": before}}, {"job": 1}).sort("created", 1).limit(limit)
        return {chunk["job"] for chunk in await found.to_list(None)}

    async def forget(self, ids: Collection[ObjectId], before: datetime | None = None) -> int:
        """Delete the lines of these jobs, or those from before a time; the number of chunks."""
        if not ids:
            return 0
        where: Document = {"job": {"$in": list(ids)}, **({"created": {"$lt": before}} if before else {})}
        return (await self._log.delete_many(where)).deleted_count

    async def _range(self, job_id: ObjectId, first: int, stop: int) -> list[Document]:
        """The lines from the first-th to before the stop-th, reading no chunk in vain."""
        sizes = await self._log.find({"job": job_id}, {"seq": 1, "count": 1}).sort("seq", 1).to_list(None)
        wanted: list[int] = []
        position, skip = 0, 0
        for chunk in sizes:
            end = position + chunk["count"]
            if end > first and position < stop:
                if not wanted:
                    skip = first - position
                wanted.append(chunk["seq"])
            position = end
        chunks = await self._log.find({"job": job_id, "seq": {"$in": wanted}}).sort("seq", 1).to_list(None)
        lines = [line for chunk in chunks for line in _unpacked(chunk)]
        return lines[skip : skip + stop - first]

    async def _count(self, job_id: ObjectId, keep: Callable[[Document], bool]) -> int:
        total = 0
        async for line in self._lines(job_id, 0):
            total += keep(line)
        return total

    async def _kept_range(
        self, job_id: ObjectId, keep: Callable[[Document], bool], first: int, stop: int
    ) -> list[Document]:
        rows: list[Document] = []
        position = 0
        async for line in self._lines(job_id, 0):
            if not keep(line):
                continue
            if position >= first:
                rows.append(line)
            position += 1
            if position >= stop:
                break
        return rows

    async def _lines(self, job_id: ObjectId, after: int) -> AsyncIterator[Document]:
        """Lines behind `after`. The chunk that holds `after` begins before it, so its start is looked up."""
        where: Document = {"job": job_id, "seq": {"$lte": after}}
        start = await self._log.find(where, {"seq": 1, "last": 1}).sort("seq", -1).limit(1).to_list(None)
        low = start[0]["seq"] if start and start[0]["last"] > after else after + 1
        most = FIRST_CHUNKS
        while True:
            where = {"job": job_id, "seq": {"$gte": low}}
            chunks = await self._log.find(where).sort("seq", 1).limit(most).to_list(None)
            for chunk in chunks:
                for line in _unpacked(chunk):
                    if line["seq"] > after:
                        yield line
            if len(chunks) < most:
                return
            low = chunks[-1]["last"] + 1
            most = min(most * 2, CHUNKS)


def _chunk(job: Job, hostname: str, lines: Sequence[Line]) -> Document:
    return {
        "job": job.id,
        "seq": lines[0].seq,
        "last": lines[-1].seq,
        "count": len(lines),
        "created": datetime.now(UTC),
        "hostname": hostname,
        "username": job.username,
        "qual_name": job.name,
        "lines": [_packed(line) for line in lines],
    }


def text_size(line: Document) -> int:
    """The number of characters in the texts of a line as `tail` gives it."""
    exception = line.get("exception") or {}
    return len(line["message"]) + len(exception.get("info", "")) + sum(map(len, exception.get("text", ())))


def _packed(line: Line) -> Document:
    packed: Document = {"s": line.seq, "t": line.epoch, "l": line.level, "m": _storable(line.message)}
    if line.source != "log":
        packed["o"] = line.source
    if line.exception is not None:
        packed["e"] = {
            "info": _storable(str(line.exception.get("info", ""))),
            "text": [_storable(str(text)) for text in line.exception.get("text", ())],
        }
    return packed


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _unpacked(chunk: Mapping[str, Any]) -> list[Document]:
    """The lines of a chunk as log documents of core4 (core4.md 7), with `seq` and `source` added."""
    lines: list[Document] = []
    for packed in chunk["lines"]:
        epoch = packed["t"] if _is_time(packed["t"]) else 0.0
        line: Document = {
            "_id": f"{chunk['job']}.{packed['s']}",
            "created": datetime.fromtimestamp(int(epoch), UTC),
            "epoch": epoch,
            "level": packed["l"],
            "levelno": LEVELS.get(packed["l"], 20),
            "message": packed["m"],
            "hostname": chunk["hostname"],
            "username": chunk["username"],
            "qual_name": chunk["qual_name"],
            "identifier": str(chunk["job"]),
            "seq": packed["s"],
            "source": packed.get("o", "log"),
        }
        if "e" in packed:
            line["exception"] = packed["e"]
        lines.append(line)
    return lines


def _is_time(epoch: Any) -> bool:
    """False for what only a broken worker can have sent: such a line must not hide all the others."""
    try:
        return datetime.fromtimestamp(int(epoch), UTC).year > 0
    except (TypeError, ValueError, OverflowError, OSError):
        return False
