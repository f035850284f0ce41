"""What a worker knows of the line between two looks at it.

What came into a line whose end the last look has seen is known whole: each insert is told of with its
document. Then there is nothing to read, and the job is claimed with the word of it. Whatever else may have
changed has to be read.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import Any

from core4.changes import Change
from core4.claims import PEEK, Claimed
from core4.database import Document


@dataclass(frozen=True)
class Look:
    """What one look is for.

    `arrived` is all that can be in line; None if it has to be read. `pinned`: there may be some for this
    worker alone.
    """

    arrived: Sequence[Document] | None
    pinned: bool


class Prospects:
    """What may be in line. `more`: jobs may have been left there, so that room for one matters.

    Args:
        read_every: seconds after which the next look reads the line, whatever was told of it.
    """

    def __init__(self, read_every: float) -> None:
        self.more = True
        self._read_every, self._read = read_every, time.monotonic()
        self._news = True  # something may have come into the line since the last look began
        self._arrived: dict[Any, Document] | None = None  # all that can be in line; None if that is not known
        self._passed: set[str] = set()  # names that were full when something of them came, since then
        self._barren: Set[str] | None = None  # the names beside which nothing was in line, before any news
        self._pinned = True  # there may be some for this worker alone

    def doubt(self) -> None:
        """Anything may be there that was not looked at."""
        self._news, self._arrived = True, None

    def doubt_all(self) -> None:
        """The same of what is for this worker alone."""
        self.doubt()
        self._pinned = True

    def hear(self, change: Change, *, pinned: bool) -> None:
        """The queue has changed; `pinned` says that it may be for this worker alone."""
        fields = change.fields
        self._pinned = self._pinned or pinned
        if not (pinned or fields.get("due")):
            if self._arrived and ("due" in fields or change.kind == "delete"):
                self._arrived.pop(change.id, None)  # somebody has it
            elif self._arrived and change.id in self._arrived:
                self._arrived = None  # it is not what was told any more
            return
        self._news = True
        if pinned or change.kind != "insert" or self._arrived is None or len(self._arrived) >= PEEK:
            self._arrived = None
        else:
            self._arrived[change.id] = dict(fields)

    def leave(self, name: str) -> None:
        """A job of a full name has come: it is looked for when there is room for it."""
        self.more, self._arrived = True, None
        self._passed.add(name)
        if self._barren is not None:
            self._barren |= {name}

    def look(self, full: Collection[str], *, untold: bool) -> Look | None:
        """A look begins; None if it would read all that stands in line, for nothing.

        Args:
            full: names for which there is no room.
            untold: the worker may not have heard of all that there is.
        """
        if self._news or untold:
            self._barren = None
        if self._barren is not None and self._barren <= set(full):
            return None
        arrived = None if untold or self._arrived is None else tuple(self._arrived.values())
        if arrived is None or time.monotonic() > self._read + self._read_every:
            arrived, self._read = None, time.monotonic()
        look = Look(arrived, self._pinned or untold)
        self._news, self._arrived, self._passed, self._pinned = False, {}, set(), False
        return look

    def seen(self, claimed: Claimed, full: Collection[str], *, all_kinds: bool) -> None:
        """The look has ended. `all_kinds` is False if there are jobs that it was not for."""
        self.more = claimed.more or bool(self._passed)
        self._pinned = self._pinned or claimed.pinned
        if full and claimed.barren and all_kinds and not self._news:
            self._barren = set(full) | self._passed
        if self.more:
            self._arrived = None
        elif self._arrived:
            for job in claimed:  # the word of it came when it had been read
                self._arrived.pop(job.id, None)
