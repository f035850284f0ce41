"""Jobs that the benchmarks run: as little as a job can do."""

from __future__ import annotations

import asyncio
import time

from core4 import CoreJob


class Noop(CoreJob):
    """Do nothing; `n` makes each one different."""

    author = "tests"
    qual_name = "tests.jobs.Noop"

    def execute(self, n: int) -> None:
        return None


class Line(CoreJob):
    """Write one line."""

    author = "tests"
    qual_name = "tests.jobs.Line"

    def execute(self, n: int) -> None:
        self.logger.info("line %d", n)


class Stamp(CoreJob):
    """Say when the body began."""

    author = "tests"
    qual_name = "tests.jobs.Stamp"

    def execute(self, n: int) -> float:
        return time.time()


class InlineStamp(CoreJob):
    """The same, inline."""

    author = "tests"
    qual_name = "tests.jobs.InlineStamp"
    inline = True
    max_parallel = None

    async def execute(self, n: int) -> float:
        return time.time()


class InlineLine(CoreJob):
    """Write one line, inline."""

    author = "tests"
    qual_name = "tests.jobs.InlineLine"
    inline = True
    max_parallel = None

    async def execute(self, n: int) -> None:
        self.logger.info("line %d", n)


class Nap(CoreJob):
    """Take so many seconds, and no processor."""

    author = "tests"
    qual_name = "tests.jobs.Nap"

    def execute(self, n: int, seconds: float) -> None:
        time.sleep(seconds)


class InlineNap(CoreJob):
    """The same, inline."""

    author = "tests"
    qual_name = "tests.jobs.InlineNap"
    inline = True
    max_parallel = None

    async def execute(self, n: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
