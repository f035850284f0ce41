"""When a lookout looks again: at a hint, at the expected time, after a pause; seldom while all is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from core4.changes import QUIET, Lookout

PAUSE = 0.05
FAR = 3600.0


def live() -> bool:
    return True


def deaf() -> bool:
    return False


async def looks_within(lookout: Lookout, seconds: float) -> bool:
    """Whether the next look comes within that time."""
    try:
        await asyncio.wait_for(lookout.wait(), seconds)
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
