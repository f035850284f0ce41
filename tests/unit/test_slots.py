"""The slots of a worker, without one."""

from __future__ import annotations

import asyncio

import pytest
from bson import ObjectId

from core4.jobs import Job, JobOrder, new_document, utcnow
from core4.worker.slots import Slots


def job(name: str = "DEFAULT:some", max_parallel: int | None = None) -> Job:
    order = JobOrder(name=name, options={"max_parallel": max_parallel})
    return Job.from_document(new_document(order, ObjectId(), utcnow()))


def slots(count: int) -> Slots:
    return Slots(count, lambda: None)


async def settled() -> None:
    """All that can go on has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def wants_back(slots: Slots, caller: Job, other: Job) -> asyncio.Task[None]:
    """The caller has lent its slot, the other took it, and now the caller waits for one."""
    slots.take(caller)
    slots.lend(caller)
    slots.take(other)
    back = asyncio.create_task(slots.take_back(caller))
    await settled()
    return back


async def test_who_waits_lends_the_slot() -> None:
    one, caller = slots(1), job()
    one.take(caller)
    assert one.free == 0

    one.lend(caller)

    assert (one.free, one.lent) == (1, 1)


async def test_who_continues_waits_for_a_slot_and_comes_first() -> None:
    one, first, second, other = slots(1), job(), job(), job()
    for caller in (first, second):
        one.take(caller)
        one.lend(caller)
    one.take(other)
    back = [asyncio.create_task(one.take_back(caller)) for caller in (first, second)]
    await settled()
    assert [task.done() for task in back] == [False, False]

    one.leave(other)
    await settled()
    assert [task.done() for task in back] == [True, False]
    assert one.free == 0

    one.leave(first)
    await settled()
    assert back[1].done()
    assert (one.free, one.lent) == (0, 0)


async def test_an_end_that_is_being_stored_takes_no_slot() -> None:
    """Not of the first ones; its name is as full as before."""
    two, jobs = slots(2), [job(max_parallel=4) for _ in range(4)]
    for each in jobs[:2]:
        two.take(each)
        two.end(each)
    assert two.free == 2
    assert two.rooms() == {jobs[0].name: 2}

    two.take(jobs[2])
    two.end(jobs[2])
    assert two.free == 1
    two.take(jobs[3])
    assert two.free == 0

    two.leave(jobs[0])
    assert two.free == 1
    assert two.rooms() == {jobs[0].name: 1}
    for each in jobs:
        two.leave(each)
    assert (two.free, two.rooms()) == (2, {})


async def test_who_waits_for_a_slot_has_that_of_a_body_that_ends() -> None:
    one, caller, other = slots(1), job(), job()
    back = await wants_back(one, caller, other)
    assert not back.done()

    one.end(other)
    await settled()
    assert back.done()
    assert one.free == 0


async def test_what_is_being_claimed_is_not_handed_out() -> None:
    one, caller, claimed = slots(1), job(), job()
    one.take(caller)
    one.lend(caller)
    with one.reserved(one.free):
        back = asyncio.create_task(one.take_back(caller))
        await settled()
        assert not back.done()
        one.take(claimed)
    await settled()
    assert not back.done()

    one.leave(claimed)
    await settled()
    assert back.done()


async def test_a_new_call_needs_no_slot() -> None:
    """The job was about to continue and calls again: it is told of the first call, and goes on lending."""
    one, caller, other = slots(1), job(), job()
    back = await wants_back(one, caller, other)

    one.lend(caller)
    await settled()

    assert back.done()
    assert one.lent == 1


async def test_names_that_are_full() -> None:
    """Those that wait do not count, and who continues does not make them too many."""
    two, first, second = slots(2), job(max_parallel=1), job(max_parallel=1)
    two.take(first)
    assert two.rooms() == {first.name: 0}
    two.lend(first)
    assert two.rooms() == {}
    two.take(second)
    back = asyncio.create_task(two.take_back(first))
    await settled()
    assert not back.done()

    two.leave(second)
    await settled()
    assert back.done()


async def test_the_end_of_who_waits() -> None:
    one, caller, other = slots(1), job(), job()
    back = await wants_back(one, caller, other)

    one.leave(caller)
    await settled()

    assert back.cancelled()
    assert one.lent == 0
    with pytest.raises(asyncio.CancelledError):
        await back
