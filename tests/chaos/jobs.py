"""The job of the chaos run: it notes its start, its life and its end, and fails and defers when told."""

from __future__ import annotations

import time
import uuid

from core4 import CoreJob
from tests.chaos.ledger import note

TICK = 0.1


class ChaosJob(CoreJob):
    """Takes its time, its first attempts defer or fail; its result names the execution it comes from."""

    author = "chaos"
    qual_name = "tests.chaos.Job"
    attempts = 4
    error_time = 0.5
    defer_time = 0.5
    defer_max = 3600
    max_parallel = None
    progress_interval = 0.2

    def execute(
        self, key: str, ledger: str, seconds: float = 0.1, fails: int = 0, defers: int = 0
    ) -> dict[str, str]:
        token = uuid.uuid4().hex
        note(ledger, "start", self.job_id, self.attempt, token)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, TICK))
            note(ledger, "tick", self.job_id, self.attempt, token)
            self.logger.info("attempt %d has %.1f s left", self.attempt, left)
            self.progress(1 - left / seconds, "attempt %d", self.attempt)
        note(ledger, "end", self.job_id, self.attempt, token)
        if self.attempt <= defers:
            self.defer("attempt %d", self.attempt)
        if self.attempt <= defers + fails:
            raise RuntimeError(f"attempt {self.attempt} is to fail")
        return {"token": token}
