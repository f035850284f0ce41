"""What can be enqueued: published by the workers, read by everybody else."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pymongo import ReplaceOne
from pymongo.errors import BulkWriteError

from core4 import chains
from core4.changes import Change, ChangeFeed
from core4.database import Database, Document, Page, only_duplicates
from core4.jobs import utcnow
from core4.remembered import Remembered
from core4.signatures import Kept

CATALOGUE = "sys.job"
# Seconds for which an entry is remembered: while its changes are told of, and while they are not.
TOLD, UNTOLD = 30.0, 1.0
MOST_SIMILAR = 3  # names that are proposed for one that is not there


class Catalogue:
    """The only writer of `sys.job`; `_id` is the qual_name. The newest publication stands."""

    def __init__(self, database: Database) -> None:
        self._jobs = database.collection(CATALOGUE)

    async def publish(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Store what a worker can run: entries as `core4.discovery.describe` makes them."""
        by_name = {str(entry["_id"]): entry for entry in entries}
        for _ in range(2):
            changed = await self._changed(by_name)
            if not changed:
                return
            try:
                await self._jobs.bulk_write(changed, ordered=False)
                return
            except BulkWriteError as error:
                if not only_duplicates(error):
                    raise
                # Another worker published some of them first: now they are known.

    async def _changed(self, entries: Mapping[str, Mapping[str, Any]]) -> list[ReplaceOne[Document]]:
        """What is to be written so that these entries stand."""
        rows = await self._jobs.find({"_id": {"$in": list(entries)}}).to_list(None)
        known, now = {str(row["_id"]): row for row in rows}, utcnow()
        found = []
        for name, entry in entries.items():
            old = known.get(name)
            times = {"created_at": (old or {}).get("created_at", now), "updated_at": now}
            if old is None or {**old, **times} != {**entry, **times}:
                # All of it: what its author has dropped must not stay.
                found.append(ReplaceOne({"_id": name}, {**entry, **times}, upsert=True))
        return found

    async def get(self, name: str) -> Document | None:
        """The entry of this qual_name; `hooked` are those of all tasks that can follow from it, if any."""
        entry = await self._jobs.find_one({"_id": name})
        if entry is not None and chains.hooks_of(entry):
            entry["hooked"] = await self._hooked(entry)
        return entry

    async def _hooked(self, entry: Document) -> list[Document]:
        found: dict[str, Document] = {entry["_id"]: entry}
        wanted = set(chains.hooks_of(entry)) - set(found)
        while wanted and len(found) <= chains.MOST_TASKS:
            rows = await self._jobs.find({"_id": {"$in": sorted(wanted)}}).to_list(None)
            found.update({row["_id"]: row for row in rows})
            asked = wanted
            wanted = {name for row in rows for name in chains.hooks_of(row)} - set(found) - asked
        return [row for name, row in found.items() if name != entry["_id"]]

    async def all(self) -> list[Document]:
        """Every entry, by name."""
        return sorted(await self._jobs.find({}).to_list(None), key=lambda entry: str(entry["_id"]))

    async def similar(self, name: str, allowed: Callable[[str], bool]) -> list[str]:
        """What may be meant by a name that is not there: a name without its namespace, or misspelt."""
        names = [
            str(row["_id"]) for row in await self.all() if not row.get("hidden") and allowed(str(row["_id"]))
        ]
        same = [each for each in names if _last(each) == _last(name)]
        return same[:MOST_SIMILAR] or difflib.get_close_matches(name, names, n=MOST_SIMILAR, cutoff=0.8)

    async def page(
        self,
        *,
        allowed: Callable[[str], bool],
        where: Callable[[Document], bool] = lambda entry: True,
        search: str | None = None,
        sort: Sequence[tuple[str, int]] = (("_id", 1),),
        page: int = 0,
        per_page: int = 10,
    ) -> Page:
        """One page of the entries that `allowed` lets through: a catalogue is small, so it is cut here."""
        rows = [row for row in await self.all() if allowed(str(row["_id"])) and where(row)]
        rows = [row for row in rows if not row.get("hidden") and (not search or matches(search, row["_id"]))]
        return cut(rows, sort, page, per_page)


class RememberedCatalogue(Catalogue):
    """For who asks for the same entries all the time; what `get` returns is not to be changed."""

    def __init__(self, database: Database, feed: ChangeFeed) -> None:
        super().__init__(database)
        self._entries = Remembered(self._read, lambda: TOLD if feed.live else UNTOLD)
        feed.listen(self._hear)

    async def get(self, name: str) -> Document | None:
        """As `Catalogue.get`, from memory for some seconds, or until a change is told of."""
        return await self._entries.get(name)

    async def _read(self, name: str) -> Document | None:
        entry = await super().get(name)
        return entry and {**entry, "schema": Kept(entry.get("schema") or {})}

    def _hear(self, change: Change) -> None:
        if change.kind == "resync" or change.collection == CATALOGUE:
            self._entries.forget()


def cut(rows: Sequence[Document], sort: Sequence[tuple[str, int]], page: int, per_page: int) -> Page:
    """One page of rows that are all here."""
    ordered = list(rows)
    for key, direction in reversed(list(sort)):
        ordered.sort(key=lambda row: _sortable(row.get(key)), reverse=direction < 0)
    pages = -(-len(ordered) // per_page)
    number = pages + page if page < 0 else page
    found = ordered[number * per_page : (number + 1) * per_page] if 0 <= number < pages else []
    return Page(found, len(ordered), page, per_page)


def matches(search: str, name: str) -> bool:
    """True if `search` occurs in `name`: no case, `?` is one character, `*` any run, the rest is literal."""
    literal = search.replace("[", "[[]")
    return fnmatch.fnmatchcase(name.lower(), f"*{literal.lower()}*")


def _last(name: str) -> str:
    """The name without its namespace or module."""
    return name.rpartition(":")[2].rpartition(".")[2]


def _sortable(value: Any) -> tuple[bool, str]:
    return value is not None, str(value)
