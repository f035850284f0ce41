"""What a worker knows of the line between two looks: what it claims with the word of it, when it reads."""

from __future__ import annotations

from typing import Any

import pytest
from bson import ObjectId

from core4.changes import Change
from core4.claims import PEEK, Claimed
from core4.jobs import Job, JobOrder, new_document, utcnow
from core4.store import QUEUE
from core4.worker.prospects import Prospects

FAR = 1000.0  # seconds until the line is read for no reason


def due(number: int) -> Change:
    return Change("insert", QUEUE, number, {"_id": number, "due": True, "namespace": "DEFAULT"})


def at_the_end() -> Prospects:
    """The last look has seen the end of the line."""
    prospects = Prospects(FAR)
    look = prospects.look((), untold=True)
    assert look is not None
    assert look.pinned
    prospects.seen(Claimed(more=False, pinned=False), (), all_kinds=True)
    return prospects


def arrived(prospects: Prospects) -> list[Any] | None:
    """Ids of what the next look claims without reading; None if it reads."""
    look = prospects.look((), untold=False)
    assert look is not None
    return None if look.arrived is None else [row["_id"] for row in look.arrived]


def test_the_first_look_reads() -> None:
    prospects = Prospects(FAR)
    prospects.hear(due(1), pinned=False)
    assert arrived(prospects) is None


def test_what_comes_into_an_empty_line_is_known() -> None:
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    prospects.hear(due(2), pinned=False)
    assert arrived(prospects) == [1, 2]
    prospects.hear(due(3), pinned=False)  # during that look
    prospects.seen(Claimed(more=False, pinned=False), (), all_kinds=True)
    assert arrived(prospects) == [3]


@pytest.mark.parametrize("change", [Change("update", QUEUE, 1, {"due": None}), Change("delete", QUEUE, 1)])
def test_what_another_has_is_forgotten(change: Change) -> None:
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    prospects.hear(due(2), pinned=False)
    prospects.hear(change, pinned=False)
    assert arrived(prospects) == [2]


def test_what_has_changed_since_is_not_claimed_as_it_came() -> None:
    """Somebody waits for it now, say: its revision is another."""
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    prospects.hear(Change("update", QUEUE, 2, {"awaited": True, "rev": 2}), pinned=False)
    assert arrived(prospects) == [1]
    prospects.hear(due(3), pinned=False)
    prospects.hear(Change("update", QUEUE, 3, {"awaited": True, "rev": 2}), pinned=False)
    assert arrived(prospects) is None


@pytest.mark.parametrize(
    ("change", "pinned"),
    [
        (Change("update", QUEUE, 2, {"due": True, "query_at": None}), False),
        (Change("insert", QUEUE, 2, {"held": "worker", "worker": "me@here"}), True),
        (Change("resync"), True),
    ],
)
def test_what_is_not_known_whole_is_read(change: Change, pinned: bool) -> None:
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    prospects.hear(change, pinned=pinned)
    prospects.hear(due(3), pinned=False)
    look = prospects.look((), untold=False)
    assert look is not None
    assert look.arrived is None
    assert look.pinned is pinned


def test_more_than_a_reading_has_is_read() -> None:
    prospects = at_the_end()
    for number in range(PEEK + 1):
        prospects.hear(due(number), pinned=False)
    assert arrived(prospects) is None


def test_what_was_left_in_line_is_read() -> None:
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    assert arrived(prospects) == [1]
    prospects.seen(Claimed(more=True, pinned=False), (), all_kinds=True)
    prospects.hear(due(2), pinned=False)
    assert prospects.more
    assert arrived(prospects) is None


def test_who_has_not_heard_of_all_reads() -> None:
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    look = prospects.look((), untold=True)
    assert look is not None
    assert look.arrived is None
    assert look.pinned


def test_a_look_that_failed_is_no_knowledge() -> None:
    prospects = at_the_end()
    prospects.hear(due(1), pinned=False)
    assert arrived(prospects) == [1]
    prospects.doubt_all()
    look = prospects.look((), untold=False)
    assert look is not None
    assert look.arrived is None
    assert look.pinned


def test_now_and_then_the_line_is_read_whatever_was_told() -> None:
    """A change of which no word came would else wait for as long as others come."""
    prospects = Prospects(read_every=0.0)
    prospects.look((), untold=True)
    prospects.seen(Claimed(more=False, pinned=False), (), all_kinds=True)
    prospects.hear(due(1), pinned=False)
    assert arrived(prospects) is None


def test_what_was_read_before_its_word_came_is_not_claimed_again() -> None:
    prospects = at_the_end()
    job = Job.from_document(new_document(JobOrder(name="a"), ObjectId(), utcnow()))
    prospects.doubt()
    assert arrived(prospects) is None
    prospects.hear(Change("insert", QUEUE, job.id, {**job.document, "due": True}), pinned=False)
    prospects.seen(Claimed([job], more=False, pinned=False), (), all_kinds=True)
    assert arrived(prospects) == []


def test_a_line_of_full_names_is_not_read_until_something_comes() -> None:
    prospects = Prospects(FAR)
    assert prospects.look(["a"], untold=False) is not None
    barren = Claimed(more=True, pinned=False)
    barren.barren = True
    prospects.seen(barren, ["a"], all_kinds=True)
    assert prospects.look(["a", "b"], untold=False) is None
    prospects.leave("b")
    assert prospects.look(["a", "b"], untold=False) is None
    assert prospects.look(["a"], untold=False) is not None
