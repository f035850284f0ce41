"""The inline counterpart of the chaos job: the same notes in the same ledger."""

from __future__ import annotations

import asyncio
import time
import uuid

from core4 import CoreJob
from tests.chaos.jobs import TICK
from tests.chaos.ledger import note


class InlineChaosJob(CoreJob):
    """Like `tests.chaos.jobs.ChaosJob`, on a loop that it shares with others."""

    author = "chaos"
    qual_name = "tests.chaos.InlineJob"
    inline = True
    attempts = 4
    error_time = 0.5
    defer_time = 0.5
    defer_max = 3600
    max_parallel = None
    progress_interval = 0.2

    async def execute(
        self, key: str, ledger: str, seconds: float = 0.1, fails: int = 0, defers: int = 0
    ) -> dict[str, str]:
        token = uuid.uuid4().hex
        note(ledger, "start", self.job_id, self.attempt, token)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, TICK))
            note(ledger, "tick", self.job_id, self.attempt, token)
            self.logger.info("attempt %d has %.1f s left", self.attempt, left)
            self.progress(1 - left / seconds, "attempt %d", self.attempt)
        note(ledger, "end", self.job_id, self.attempt, token)
        if self.attempt <= defers:
            self.defer("attempt %d", self.attempt)
        if self.attempt <= defers + fails:
            raise RuntimeError(f"attempt {self.attempt} is to fail")
        return {"token": token}
