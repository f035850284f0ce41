"""Answers that are kept for a moment."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from core4.remembered import Remembered


class Oracle:
    """Answers in order, when it may."""

    def __init__(self, answers: Sequence[str | Exception | None]) -> None:
        self.asked = 0
        self.may = asyncio.Event()
        self.may.set()
        self._answers = answers

    async def ask(self, key: str) -> str | None:
        answer = self._answers[self.asked]
        self.asked += 1
        await self.may.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def test_who_ask_together_ask_once_and_later_ones_not_at_all() -> None:
    oracle = Oracle(["first"])
    remembered = Remembered(oracle.ask, lambda: math.inf)

    assert await asyncio.gather(*(remembered.get("k") for _ in range(3))) == ["first"] * 3
    assert await remembered.get("k") == "first"
    assert oracle.asked == 1


async def test_what_is_old_or_forgotten_is_asked_for_again() -> None:
    oracle, life = Oracle(["first", "second", "third"]), [math.inf]
    remembered = Remembered(oracle.ask, lambda: life[0])

    assert await remembered.get("k") == "first"
    remembered.forget()
    assert await remembered.get("k") == "second"
    life[0] = -1.0
    assert await remembered.get("k") == "third"


async def test_what_is_forgotten_while_it_is_asked_is_not_kept() -> None:
    """A change that is told of then may have come too late for the answer."""
    oracle = Oracle(["old", "new"])
    remembered = Remembered(oracle.ask, lambda: math.inf)
    oracle.may.clear()
    asking = asyncio.create_task(remembered.get("k"))
    while not oracle.asked:
        await asyncio.sleep(0)
    remembered.forget()
    oracle.may.set()

    assert await asking == "old"
    assert await remembered.get("k") == "new"


async def test_nothing_and_errors_are_not_kept() -> None:
    oracle = Oracle([None, OSError("gone"), "there"])
    remembered = Remembered(oracle.ask, lambda: math.inf)

    assert await remembered.get("k") is None
    with pytest.raises(OSError, match="gone"):
        await remembered.get("k")
    assert await remembered.get("k") == "there"


async def test_who_hangs_up_takes_the_answer_from_nobody() -> None:
    oracle = Oracle(["first"])
    remembered = Remembered(oracle.ask, lambda: math.inf)
    oracle.may.clear()
    leaving, staying = (asyncio.create_task(remembered.get("k")) for _ in range(2))
    while not oracle.asked:
        await asyncio.sleep(0)
    leaving.cancel()
    oracle.may.set()

    assert await staying == "first"
    assert leaving.cancelled()
