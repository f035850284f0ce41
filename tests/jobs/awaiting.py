"""Coroutine functions as jobs: the same body on a loop of its own, and on one that is shared."""

from __future__ import annotations

import asyncio
from typing import Any

from core4 import CoreJob


class Awaiting(CoreJob):
    """Does `what` on a loop of its own."""

    author = "tests"
    qual_name = "tests.jobs.Awaiting"
    progress_interval = 0.01

    async def execute(self, what: str, pidfile: str = "", value: Any = None) -> Any:
        return await getattr(self, what)(pidfile, value)

    async def answer(self, pidfile: str, value: Any) -> Any:
        self.logger.info("before")
        await asyncio.sleep(0)
        return value

    async def raises(self, pidfile: str, value: Any) -> None:
        raise RuntimeError("as told")

    async def enqueues(self, pidfile: str, value: Any) -> str:
        return await self.enqueue_async("tests.jobs.Awaiting", what="answer", value=value)

    async def leaves_a_task(self, pidfile: str, value: Any) -> str:
        self.left = asyncio.create_task(asyncio.sleep(600))
        await asyncio.sleep(0)
        return "left"
