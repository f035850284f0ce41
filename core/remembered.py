"""Answers that are kept for a moment, by who asks the same all the time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, Generic, TypeVar

MOST = 10_000  # answers that are kept

K = TypeVar("K")
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """Asks once however many want to know at the same time, and keeps the answer.

    One of nothing (None, False) is not kept: what is not there yet may be there in the next moment.

    Args:
        ask: the question.
        life: seconds for which an answer is good, just now.
    """

    def __init__(self, ask: Callable[[K], Coroutine[Any, Any, V]], life: Callable[[], float]) -> None:
        self._ask, self._life = ask, life
        self._answers: dict[K, tuple[float, asyncio.Task[V]]] = {}

    async def get(self, key: K) -> V:
        """The answer. Raises: what the question raises."""
        asked, answer = self._answers.get(key, (0.0, None))
        fresh = answer is not None and monotonic() - asked <= self._life()
        if answer is not None and fresh and answer.done():
            return answer.result()
        if answer is None or not fresh:
            if len(self._answers) >= MOST:
                self.forget()
            answer = asyncio.create_task(self._ask(key))
            self._answers[key] = monotonic(), answer
            answer.add_done_callback(lambda done: self._answered(key, done))
        # Who hangs up must not take the answer from the others.
        return await asyncio.shield(answer)

    def forget(self) -> None:
        """All of it may be wrong now; what is being asked, too, for those who come later."""
        self._answers.clear()

    def _answered(self, key: K, done: asyncio.Task[V]) -> None:
        useless = done.cancelled() or done.exception() is not None or not done.result()
        if useless and self._answers.get(key, (0.0, None))[1] is done:
            del self._answers[key]
