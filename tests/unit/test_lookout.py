"""When a lookout looks again: at a hint, at the expected time, after a pause; seldom while all is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from core4.changes import (
    FEW,
    FIRST,
    GAP,
    HEARD,
    LONGEST_GAP,
    MANY,
    QUIET,
    Change,
    Lookout,
    pause_after,
    turn,
)
from core4.claims import stir
from core4.jobs import Owner
from core4.store import QUEUE

PAUSE = 0.05
FAR = 3600.0
ME = Owner("mine", "me@here", "here", 1)


def live() -> bool:
    return True


def deaf() -> bool:
    return False


async def looks_within(lookout: Lookout, seconds: float) -> bool:
    """Whether the next look comes within that time."""
    try:
        async with asyncio.timeout(seconds):
            await lookout.wait()
    except TimeoutError:
        return False
    return True


async def test_a_hint_wakes_and_is_not_lost() -> None:
    """Whether it comes before the wait, during it or during the look."""
    lookout = Lookout(deaf, FAR)
    lookout.looking()
    lookout.hint()
    await lookout.wait()
    lookout.looking()
    waiting = asyncio.create_task(lookout.wait())
    await asyncio.sleep(0)
    lookout.hint()
    await waiting
    lookout.looking()
    lookout.hint()  # what the look under way may have missed
    await lookout.wait()
    lookout.looking()
    assert not await looks_within(lookout, 0.01)  # a look has seen what was hinted at before it


async def test_the_first_of_what_is_expected() -> None:
    """Also if it becomes known while the lookout waits; and a look forgets it."""
    lookout = Lookout(deaf, FAR)
    lookout.looking()
    lookout.expect(FAR)
    waiting = asyncio.create_task(lookout.wait())
    await asyncio.sleep(0)
    lookout.expect(0.01)
    lookout.expect(FAR)
    await waiting
    lookout.looking()
    assert not await looks_within(lookout, 0.05)
    lookout.expect(-1.0)
    await lookout.wait()


@pytest.mark.parametrize(("tells", "pauses"), [(live, QUIET), (deaf, 1)])
async def test_without_a_hint_after_a_pause(tells: Callable[[], bool], pauses: int) -> None:
    """Then after longer ones, if all is told meanwhile."""
    lookout = Lookout(tells, PAUSE)
    lookout.looking()
    began = time.monotonic()
    await lookout.wait()
    first = time.monotonic() - began
    lookout.looking()
    began = time.monotonic()
    await lookout.wait()
    second = time.monotonic() - began
    assert first >= PAUSE * 0.75
    assert second >= PAUSE * 0.75 * pauses


async def test_an_end_that_comes_together_with_a_hint() -> None:
    """Is not lost: whoever waits for the end of a part would wait for ever."""
    lookout = Lookout(deaf, FAR)
    for looks in range(20):
        lookout.looking()
        waiting = asyncio.create_task(lookout.wait())
        for _ in range(looks % 5 + 1):
            await asyncio.sleep(0)
        lookout.hint()
        for _ in range(looks % 4):
            await asyncio.sleep(0)
        if waiting.cancel():
            await asyncio.wait({waiting})
            assert waiting.cancelled()


async def test_the_feed_breaks_off_meanwhile() -> None:
    """Then nobody would give a hint, and the pause is a short one again."""
    asked: list[bool] = []

    def breaks_off() -> bool:
        asked.append(len(asked) < 2)
        return asked[-1]

    lookout = Lookout(breaks_off, PAUSE)
    lookout.looking()
    lookout.looking()  # nothing came
    await lookout.wait()
    assert asked == [True, True, False]


def waits(lookout: Lookout) -> bool:
    """True if there is no reason to look yet."""
    waiting = lookout.wait()
    try:
        waiting.send(None)
    except StopIteration:
        return False
    finally:
        waiting.close()
    return True


async def test_what_others_take_meanwhile_is_no_reason_to_look() -> None:
    """Until then it is, when its turn has come; a look sees all that was told before it."""
    lookout = Lookout(live, FAR)
    lookout.looking()
    lookout.hint_of("a", 100)
    lookout.hint_of("b", 0.01)
    lookout.gone("a")
    await lookout.wait()
    lookout.looking()
    assert waits(lookout)
    lookout.hint_of("a", 0.01)
    lookout.gone("a")
    lookout.gone("unknown")
    assert not await looks_within(lookout, 0.05)
    lookout.hint_of("a", 0)
    await lookout.wait()


async def test_a_turn_comes_while_it_waits() -> None:
    """Also if it was told of others before, whose turn is later."""
    lookout = Lookout(live, FAR)
    lookout.looking()
    lookout.hint_of("a", FAR)
    waiting = asyncio.create_task(lookout.wait())
    await asyncio.sleep(0)
    lookout.hint_of("b", 0.01)
    await waiting


async def test_who_hears_of_too_much_looks() -> None:
    """What it would have to keep is bounded."""
    lookout = Lookout(live, FAR)
    lookout.looking()
    for number in range(HEARD):
        lookout.hint_of(number, FAR)
    assert waits(lookout)
    lookout.hint_of("one more", FAR)
    assert not waits(lookout)


@pytest.mark.parametrize("crowd", range(FEW + 1))
def test_all_of_a_few_look_at_once(crowd: int) -> None:
    """Also if it is not known how many they are."""
    assert {turn(key, who, crowd) for key in range(50) for who in "abcd"} == {0.0}


@pytest.mark.parametrize("crowd", [FEW + 1, 10, 100, 1000])
def test_a_few_of_a_crowd_look_at_once(crowd: int) -> None:
    """About as many for each key, others each time; twice as many with each wave; and at last everybody."""
    keys, crew = range(200), [f"worker{number}" for number in range(crowd)]
    turns = {key: [turn(key, who, crowd) for who in crew] for key in keys}
    first = [sum(each == 0 for each in turns[key]) for key in keys]
    second = [sum(each <= 1 for each in turns[key]) for key in keys]
    assert FIRST * 0.85 < sum(first) / len(keys) < FIRST * 1.15
    assert min(2 * FIRST, crowd) * 0.85 < sum(second) / len(keys) < FIRST * 2 * 1.15
    assert max(max(some) for some in turns.values()) <= 8.4
    busiest = max(sum(turns[key][number] == 0 for key in keys) for number in range(crowd))
    assert busiest < len(keys)
    assert turn("a", "b", crowd) == turn("a", "b", crowd)


@pytest.mark.parametrize(
    ("change", "looks", "alone"),
    [
        (Change("resync"), True, True),
        (Change("insert", QUEUE, 1, {"due": True, "namespace": "DEFAULT"}), True, False),
        (Change("insert", QUEUE, 1, {"due": True, "namespace": "other"}), False, False),
        (Change("update", QUEUE, 1, {"due": True, "query_at": None}), True, False),
        (Change("update", QUEUE, None, {"due": True}), True, False),
        (Change("update", QUEUE, 1, {"query_at": None, "rev": 2}), True, True),
        (Change("update", QUEUE, 1, {"query_at": None, "due": None, "lease": {"id": "a"}}), False, False),
        (Change("insert", QUEUE, 1, {"held": "worker", "worker": "me@here"}), True, True),
        (Change("insert", QUEUE, 1, {"held": "worker", "worker": "you@there"}), False, False),
        (Change("update", QUEUE, 1, {"held": "worker"}), True, True),
        (Change("update", QUEUE, 1, {"held": "max_running", "due": None}), False, False),
        (Change("delete", QUEUE, 1), False, False),
    ],
)
async def test_what_stirs_the_only_worker(change: Change, looks: bool, alone: bool) -> None:
    lookout = Lookout(live, FAR)
    lookout.looking()
    assert stir(lookout, change, ME, ["DEFAULT"], lambda namespace: 1) is alone
    assert waits(lookout) is not looks


@pytest.mark.parametrize("taken", [Change("update", QUEUE, 1, {"due": None}), Change("delete", QUEUE, 1)])
async def test_one_of_a_crowd_lets_others_go_first(taken: Change) -> None:
    """What it is told of it forgets when that is out of line."""
    lookout = Lookout(live, FAR)
    lookout.looking()
    due = Change("insert", QUEUE, 1, {"due": True, "namespace": "DEFAULT"})
    stir(lookout, due, ME, ["DEFAULT"], lambda namespace: 10**9 if namespace == "DEFAULT" else 0)
    assert waits(lookout)
    assert lookout._heard
    stir(lookout, taken, ME, ["DEFAULT"], lambda namespace: 10**9)
    assert not lookout._heard


def test_only_where_many_changes_come_more_are_gathered_for_longer() -> None:
    """A chain of calls waits for each pause: few changes come at once, again and again."""
    pause = 0.0
    for _ in range(10):
        pause = pause_after(6, pause)
    assert pause == GAP
    assert pause_after(0, pause) == 0

    pauses = [pause := pause_after(MANY, pause) for _ in range(10)]
    assert pauses[0] == 2 * GAP
    assert pauses[-1] == LONGEST_GAP
    assert pause_after(MANY - 1, pause) == GAP
