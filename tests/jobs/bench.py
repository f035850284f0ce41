"""Jobs that the benchmarks run: as little as a job can do."""

from __future__ import annotations

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
