"""The events of a job's stream, made from what is stored. Pure.

There is one order: history entries by revision, log lines by number, and an entry comes behind the lines
that its attempt had written (`log_seq`). A cursor says how far somebody has read in both; whatever is
stored behind it is what comes next, in whichever process.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from core4.api.encoding import dumps
from core4.errors import BadRequest
from core4.jobs import first_seq, seq_fence
from core4.results import has_ended
from core4.states import FINAL, State

ENOUGH = 1024 * 1024  # bytes of frames made at once
Mode = Literal["prelog", "watchlog", "postlog"]
Document = Mapping[str, Any]

_CURSOR = re.compile(r"([0-9]{1,15})\.([0-9]{1,18})")
# Of an entry that is not the newest: what the document says about a later time.
_LATER = ("result", "last_error", "error_cat", "finished_at", "history")


@dataclass(frozen=True, order=True)
class Cursor:
    """How far a stream was read: the revision of the last state and the number of the last line.

    The `close` event counts as one line more, so that a reader who missed only that gets it.
    """

    rev: int = 0
    seq: int = 0

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor in an event's id; the beginning for an empty one. Raises: BadRequest."""
        if not text:
            return cls()
        match = _CURSOR.fullmatch(text)
        if match is None or int(match[2]) >= 2**63:
            raise BadRequest("Last-Event-ID is not the id of an event of a job's stream")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.rev}.{self.seq}"

    def covers(self, other: Cursor) -> bool:
        """True if everything up to `other` has been read."""
        return self.rev >= other.rev and self.seq >= other.seq


@dataclass(frozen=True)
class Frame:
    """One event, encoded once for all readers; its id and a log's mode differ from reader to reader."""

    kind: Literal["state", "log"]
    number: int  # revision of a state, number of a line
    body: bytes
    last: bool = False  # read after the job had ended

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor of who has read `cursor` and then this."""
        return behind((self,), cursor)

    def new_for(self, cursor: Cursor) -> bool:
        """True if who has read `cursor` has not read this."""
        return self.number > (cursor.rev if self.kind == "state" else cursor.seq)

    def encode(self, cursor: Cursor, mode: Mode) -> bytes:
        """The bytes to send; `cursor` is that behind this event."""
        tail = b"" if self.kind == "state" else b',"mode":"%s"}' % mode.encode()
        return b"id: %d.%d\nevent: %s\ndata: %s%s\n\n" % (
            cursor.rev,
            cursor.seq,
            self.kind.encode(),
            self.body,
            tail,
        )


@dataclass(frozen=True)
class Batch:
    """What follows a cursor: the next frames, the cursor behind them, and what to expect."""

    frames: list[Frame] = field(default_factory=list)
    cursor: Cursor = field(default_factory=Cursor)
    ended: bool = False  # this was the last one
    more: bool = False  # there is more in the database right now
    waiting: bool = False  # the job has ended, but lines that it counted have not arrived


class _Frames(list[Frame]):
    """Frames of one batch, and whether they are enough: each state repeats the arguments of its job."""

    size = 0

    @property
    def full(self) -> bool:
        return self.size >= ENOUGH

    def append(self, frame: Frame) -> None:
        super().append(frame)
        self.size += len(frame.body)


def close_frame(cursor: Cursor, counts: Mapping[str, int]) -> bytes:
    """The bytes of the last event."""
    return b"id: %s\nevent: close\ndata: %s\n\n" % (
        str(Cursor(cursor.rev, cursor.seq + 1)).encode(),
        dumps({kind: n for kind, n in counts.items() if n}).encode(),
    )


def transitions(document: Document) -> list[Document]:
    """The history that belongs to the stream: up to the end of the job, not what was done with it later."""
    entries: list[Document] = list(document.get("history", ()))
    for index, entry in enumerate(entries):
        if entry["state"] in FINAL:
            return entries[: index + 1]
    return entries


def merge(
    document: Document, lines: Sequence[Document], cursor: Cursor, *, more: bool, patient: bool = False
) -> Batch:
    """The frames behind `cursor`, in order.

    Args:
        document: read before the lines: whatever it counts is among them, if it is stored at all.
        lines: the stored lines behind the cursor, by number.
        more: whether there are lines behind these.
        patient: whether lines that the document counts are waited for if they are not there.
    """
    ended = has_ended(document)
    entries = transitions(document)
    due = deque(entry for entry in entries if entry["rev"] > cursor.rev)
    final = entries[-1] if ended and entries else None
    batch, held = _Frames(), False
    for line in lines:
        # The document is older than this line: its attempt has begun in between.
        held = not ended and seq_fence(line["seq"]) > document["fence"]
        if held:
            break
        while due and due[0] is not final and due[0]["log_seq"] < line["seq"] and not batch.full:
            batch.append(_entry_frame(document, due.popleft(), ended))
        if batch.full:
            break
        batch.append(_line_frame(line, ended))
    at = behind(batch, cursor)
    if more or held or batch.full:
        return Batch(batch, at, more=True)
    if patient and ended and _counted(document["log_seq"]) > at.seq:
        return Batch(batch, at, waiting=True)
    while due and not batch.full:
        batch.append(_entry_frame(document, due.popleft(), ended))
    at = behind(batch, cursor)
    if due:
        return Batch(batch, at, more=True)
    if not ended and document["rev"] > at.rev:
        batch.append(Frame("state", document["rev"], dumps(document).encode()))
    return Batch(batch, behind(batch, cursor), ended=ended)


def _counted(log_seq: int) -> int:
    """The number of the last line an attempt counted; 0 if it wrote none."""
    return log_seq if log_seq >= first_seq(seq_fence(log_seq)) else 0


def behind(frames: Sequence[Frame], cursor: Cursor) -> Cursor:
    """The cursor of who has read `cursor` and then these; for each of thousands of readers."""
    rev, seq = cursor.rev, cursor.seq
    for frame in frames:
        if frame.kind == "log":
            seq = max(seq, frame.number)
        else:
            rev = max(rev, frame.number)
    return Cursor(rev, seq)


def _entry_frame(document: Document, entry: Document, ended: bool) -> Frame:
    """A `state` event: the document as it was with this entry, as far as that is known."""
    data: dict[str, Any] = {
        **document,
        "rev": entry["rev"],
        "state": entry["state"],
        "trial": entry["attempt"],
    }
    if entry is not transitions(document)[-1]:
        for name in _LATER:
            data.pop(name, None)
        data["locked"] = None
        if entry["state"] == State.RUNNING:
            data["locked"] = {"at": entry["at"], "worker": entry["worker"]}
    return Frame("state", entry["rev"], dumps(data).encode(), last=ended)


def _line_frame(line: Document, ended: bool) -> Frame:
    return Frame("log", line["seq"], dumps(line).encode()[:-1], last=ended)
