"""Lists in the order of ids on a server that reads all that a filter leaves before it gives the first of it.

The embedded servers do. They seek only to one state and a range of ids within it, by the index of both, and
only if nothing else is asked for: so a list is read state by state and span by span, as an id begins with the
second in which it was made. What a page costs there is then what its rows and those before it cost, and not
what the collection holds.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from bson import ObjectId

from core4.database import Collection, Document
from core4.states import State

FIRST, GROWTH = 1.0, 8.0  # seconds of the first span, and how much longer each is than the one before
_ID = ("_id",)


class Spans:
    """What a filter finds, in the order of ids. Made by `of`."""

    def __init__(
        self, table: Collection, states: Sequence[str], direction: int, bound: Mapping[str, ObjectId]
    ) -> None:
        self._table, self._states, self._direction, self._bound = table, states, direction, bound

    @classmethod
    def of(
        cls,
        table: Collection,
        where: Mapping[str, Any],
        behind: Mapping[str, Any],
        sort: Sequence[tuple[str, int]],
    ) -> Self | None:
        """A list that can be read so; None if this one cannot.

        Newest first it can, and behind a bookmark in either order, all or by state: with any other term each
        span would read all of its state. `where` is a trusted filter, `behind` what `core4.bookmarks.behind`
        made of a bookmark.
        """
        path, direction = sort[0]
        states = _states(where.get("state"))
        oldest = direction > 0 and not behind  # nobody knows where that is
        if path != "_id" or where.keys() - {"state"} or behind.keys() - {"_id"} or oldest or not states:
            return None
        return cls(table, states, direction, behind.get("_id", {}))

    async def ids(self, most: int) -> list[ObjectId]:
        """The first ids, `most` of them."""
        found: list[ObjectId] = []
        for span in spans(self._direction, self._bound, time.time()):
            parts = await asyncio.gather(*(self._some(part, most) for part in self._parts(span)))
            found += sorted((each for part in parts for each in part), reverse=self._direction < 0)
            if len(found) >= most:
                break
        return found[:most]

    async def _some(self, where: Document, most: int) -> list[ObjectId]:
        rows = await self._table.find(where, _ID).sort("_id", self._direction).limit(most).to_list(None)
        return [row["_id"] for row in rows]

    async def count(self, most: int) -> int:
        """How many there are, or some number above `most`."""
        found = 0
        for span in spans(-1, {}, time.time()):
            found += sum(await asyncio.gather(*map(self._table.count_documents, self._parts(span))))
            if found > most:
                break
        return found

    def _parts(self, span: Document) -> Iterator[Document]:
        """The filters for a span, one for each state."""
        return ({"state": state, "_id": span} for state in self._states)


def spans(direction: int, bound: Mapping[str, ObjectId], now: float) -> Iterator[Document]:
    """Terms for `_id` that leave nothing out, in their order: newest first if `direction` is negative.

    Args:
        bound: where they begin, ``$lt`` or ``$gt`` an id; none for the newest of all.
        now: seconds since 1970; there are newer ids, of clocks that are ahead.
    """
    seconds = FIRST
    if direction < 0:
        edge = _second(bound["$lt"]) if bound else now
        while edge > 0:
            edge -= seconds
            yield {"$gte": _first(edge), **bound}
            bound, seconds = {"$lt": _first(edge)}, seconds * GROWTH
        return
    edge = _second(bound["$gt"])
    while (edge := edge + seconds) < now:
        yield {**bound, "$lt": _first(edge)}
        bound, seconds = {"$gte": _first(edge)}, seconds * GROWTH
    yield dict(bound)


def _second(found: ObjectId) -> float:
    return found.generation_time.timestamp()


def _first(second: float) -> ObjectId:
    """The first id of a second."""
    return ObjectId(struct.pack(">I8x", max(0, int(second))))


def _states(term: Any) -> Sequence[str] | None:
    """Those that a filter leaves; None if it is not one that names them."""
    match term:
        case None:
            return sorted(State)
        case str():
            return [term]
        case {"$eq": str(state), **more} if not more:
            return [state]
        case {"$in": [*states], **more} if not more:
            return states
    return None
