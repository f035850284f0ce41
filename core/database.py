"""The only module that knows which asyncio driver speaks to MongoDB.

Today that is motor; its successor is PyMongo's own async client. Everything outside gets a `Database`
and collections with the method names that both share.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

# Each open change stream keeps one of motor's threads; its default of 5 per core starves the rest.
# Read by motor when it is imported.
os.environ.setdefault("MOTOR_MAX_WORKERS", "64")

from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection
from pymongo import IndexModel, ReadPreference, WriteConcern
from pymongo.errors import BulkWriteError, DuplicateKeyError, OperationFailure, PyMongoError, WriteError

from core4 import faults
from core4.waits import heard

Document = dict[str, Any]
Collection = AsyncIOMotorCollection[Document]

# State must survive a kill -9 of the server: only journaled writes do (see docs, embedded database).
DURABLE = WriteConcern(w="majority", j=True, wtimeout=10_000)
FAST = WriteConcern(w=1)

LANDING = 10.0  # seconds that are waited at the end for what is done beside
AWAIT = 2.0  # seconds after which a server answers on a change stream that there was nothing
GOING_DOWN = frozenset(
    {91, 189, 10107, 11600, 11602, 13435, 13436}
)  # codes of a server that is being replaced
_ENDED = 260  # code of a resume token after which there is nothing
DUPLICATE = 11000  # code of a key that is there already
_BUSY = frozenset(
    {24, 50, 112, 262, 11601, 14031}
)  # locks, time limits, conflicts, interruption, a full disk


class ScaleIndex(IndexModel):
    """An index that pays in large collections only.

    The embedded Python server reads the definitions of all indexes of a collection for each write, several
    times over, and is for small ones: there it is not made.
    """


def exactly(value: Any) -> Document:
    """The clause of a filter for a field that equals `value`, beside an ``_id`` that is asked for anyway.

    The embedded Python server looks for an index for each field with a plain value, which costs it more than
    the write itself; one that must exist, too, is left alone. To MongoDB both are the same.
    """
    return {"$eq": value, "$exists": True}


@dataclass(frozen=True)
class Page:
    """One page of stored documents and how many there are behind the filter, if they were counted."""

    rows: list[Document]
    total: int
    page: int
    per_page: int
    counted: bool = True
    at_least: bool = False  # they were counted up to `total` only
    more: bool = False  # there are rows behind these; only lists that can be read by bookmarks tell


class Database:
    """One connection pool and one database; build it with `connect` inside the running loop.

    ``find_and_modify`` is False where the server scans the collection for it (the embedded Python
    server); `Claims.claim` then peeks and updates instead.
    """

    def __init__(self, client: AsyncIOMotorClient[Document], name: str, *, find_and_modify: bool) -> None:
        self._client = client
        self._database = client.get_database(name, read_preference=ReadPreference.PRIMARY)
        self.name = name
        self.find_and_modify = find_and_modify
        self._beside: set[asyncio.Task[None]] = set()
        self._awaited = asyncio.Event()  # set while somebody waits for what is done beside

    @classmethod
    async def connect(
        cls,
        url: str,
        name: str = "core4",
        *,
        app_name: str = "core4",
        timeout: float = 5.0,
        find_and_modify: bool | None = None,
    ) -> Self:
        """A database that answered within `timeout` seconds.

        `find_and_modify` overrides what the server is known to do well.

        Raises: PyMongoError if the server cannot be reached.
        """
        client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
            url,
            appname=app_name,
            tz_aware=True,
            tzinfo=UTC,
            io_loop=asyncio.get_running_loop(),
            serverSelectionTimeoutMS=int(timeout * 1000),
            connectTimeoutMS=int(timeout * 1000),
            socketTimeoutMS=30_000,
        )
        try:
            info = await client.admin.command("buildInfo")
        except PyMongoError:
            client.close()
            raise
        scans = "secantusVersion" in info
        return cls(client, name, find_and_modify=not scans if find_and_modify is None else find_and_modify)

    def collection(self, name: str) -> Collection:
        """The collection for state: a write is acknowledged when it is durable."""
        return faults.wrap(self._database.get_collection(name, write_concern=DURABLE))

    def fast(self, name: str) -> Collection:
        """The collection for logs and the like: a crash of the server may lose the last moment."""
        return faults.wrap(self._database.get_collection(name, write_concern=FAST))

    async def server_time(self) -> datetime:
        """The server's clock, the only one that may declare a worker dead."""
        reply: Mapping[str, Any] = await self._client.admin.command("hello")
        time: datetime = reply["localTime"]
        return time if time.tzinfo else time.replace(tzinfo=UTC)  # replies to commands come without a zone

    async def ping(self) -> None:
        """Raises: PyMongoError if the server does not answer."""
        await self._client.admin.command("ping")

    async def aggregate(self, collection: str, pipeline: Sequence[Mapping[str, Any]]) -> list[Document]:
        """All documents a pipeline yields."""
        return await self._database.get_collection(collection).aggregate(list(pipeline)).to_list(None)

    async def ensure_indexes(self, indexes: Mapping[str, Sequence[IndexModel]]) -> None:
        """Make what is missing of `indexes` (by collection); safe to repeat and to race."""
        for collection, models in indexes.items():
            if made := self._made(models):
                await self._database.get_collection(collection).create_indexes(made)

    def _made(self, models: Sequence[IndexModel]) -> list[IndexModel]:
        """Those of the indexes that this server gets."""
        return [model for model in models if self.find_and_modify or not isinstance(model, ScaleIndex)]

    async def missing_indexes(self, indexes: Mapping[str, Sequence[IndexModel]]) -> list[tuple[str, str]]:
        """Collection and name of each of `indexes` that is not there; of collections with documents."""
        missing: list[tuple[str, str]] = []
        for collection, models in indexes.items():
            table = self._database.get_collection(collection)
            if await table.find_one({}, {"_id": 1}) is None:
                continue
            there = await table.index_information()
            names = (str(model.document["name"]) for model in self._made(models))
            missing += [(collection, name) for name in names if name not in there]
        return missing

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Have this done beside what comes next. `close` waits for it; a process that dies does not do it."""
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def pause(self, seconds: float) -> None:
        """Wait for more to do together; no longer than until somebody waits for that."""
        await heard(self._awaited, seconds)

    async def landed(self) -> None:
        """Wait until all that is done beside is done, for some seconds at most."""
        self._awaited.set()
        if self._beside:
            await asyncio.wait(self._beside, timeout=LANDING)
        self._awaited.clear()

    async def drop(self) -> None:
        """Delete the whole database (tests, demos)."""
        await self.landed()
        await self._client.drop_database(self.name)

    @asynccontextmanager
    async def watch(
        self, collections: Sequence[str], resume_token: Mapping[str, Any] | None
    ) -> AsyncIterator[ChangeStream]:
        """A change stream over `collections`, after `resume_token` if there is one.

        Raises: OperationFailure where the server has no change streams or has lost the history.
        """
        after = {"resumeAfter": resume_token} if resume_token else {}
        wanted = {"ns.coll": {"$in": list(collections)}}
        # By hand: motor's stream hands over one change at a time, does not tell when it has no more of them
        # in store, and answers a first time only when something has changed.
        async with await self._client.start_session(causal_consistency=False) as session:
            command = partial(
                self._database.command, session=session, codec_options=self._database.codec_options
            )
            opened = await command(
                "aggregate",
                1,
                pipeline=[{"$changeStream": after}, {"$match": wanted}],
                cursor={},
                readConcern={"level": "majority"},
            )
            stream = ChangeStream(command, opened["cursor"], resume_token)
            try:
                yield stream
            finally:
                await stream.close()

    async def close(self) -> None:
        """Finish what is done beside, then give the connections back."""
        await self.landed()
        self._client.close()


class ChangeStream:
    """An open change stream; see `Database.watch`."""

    def __init__(
        self,
        command: Callable[..., Awaitable[Document]],
        cursor: Document,
        resume_token: Mapping[str, Any] | None,
    ) -> None:
        self._command = command
        self._id, self._collection = cursor["id"], cursor["ns"].partition(".")[2]
        self._changes: list[Document] = cursor["firstBatch"]
        self.resume_token: Mapping[str, Any] | None = cursor.get("postBatchResumeToken") or resume_token

    async def next(self) -> Sequence[Mapping[str, Any]]:
        """The changes since the last call; none if there were none for `AWAIT` seconds.

        Raises: OperationFailure at the end of the stream, too.
        """
        if not self._changes:
            await self._read()
        changes, self._changes = self._changes, []
        return changes

    async def _read(self) -> None:
        if not self._id:
            raise OperationFailure("the change stream has ended", _ENDED)
        more = await self._command(
            "getMore", self._id, collection=self._collection, maxTimeMS=int(AWAIT * 1000)
        )
        self._id, self._changes = more["cursor"]["id"], more["cursor"]["nextBatch"]
        last = self._changes[-1]["_id"] if self._changes else self.resume_token
        self.resume_token = more["cursor"].get("postBatchResumeToken") or last

    async def close(self) -> None:
        """Give the cursor back; the server forgets it sooner or later anyway."""
        if self._id:
            with suppress(PyMongoError):
                await self._command("killCursors", self._collection, cursors=[self._id])


def history_lost(error: OperationFailure) -> bool:
    """True if a change stream cannot go on from its token, but a new one can be opened."""
    return error.code in {_ENDED, 280, 286}


def only_duplicates(error: BulkWriteError) -> bool:
    """True if all that a batch of writes met are keys that were there already, and the rest is durable."""
    codes = {each["code"] for each in error.details["writeErrors"]}
    return codes == {DUPLICATE} and not error.details.get("writeConcernErrors")


def refuses_content(error: WriteError) -> bool:
    """True if the server answered that it does not take what is to be written, however often it is sent."""
    return not isinstance(error, DuplicateKeyError) and error.code not in GOING_DOWN | _BUSY
