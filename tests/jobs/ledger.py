"""Jobs that write what happens to them into a file outside of the product, durable line by line."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from core4 import CoreJob
from core4.errors import EnqueueRefused


def note(path: str, *words: object) -> None:
    """Append one line; it is on the disk when this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


class LedgerJob(CoreJob):
    """Notes its start and its end, which is not before a file `gate` is there."""

    author = "tests"
    qual_name = "tests.jobs.LedgerJob"

    def execute(self, ledger: str, n: int, seconds: float = 0.05, gate: str | None = None) -> dict[str, Any]:
        note(ledger, "start", self.job_id, self.attempt)
        self.logger.info("job %d", n)
        time.sleep(seconds)
        while gate and not os.path.exists(gate):
            time.sleep(0.02)
        note(ledger, "end", self.job_id, self.attempt)
        return {"n": n}


class InlineLedgerJob(CoreJob):
    """Notes its start and its end, on a loop that it shares with others."""

    author = "tests"
    qual_name = "tests.jobs.InlineLedgerJob"
    inline = True

    async def execute(self, ledger: str, n: int, seconds: float = 0.05) -> dict[str, Any]:
        note(ledger, "start", self.job_id, self.attempt)
        self.logger.info("job %d", n)
        await asyncio.sleep(seconds)
        note(ledger, "end", self.job_id, self.attempt)
        return {"n": n}


class ChattyJob(CoreJob):
    """Logs many lines and fails, until its last attempt."""

    author = "tests"
    qual_name = "tests.jobs.ChattyJob"
    attempts = 4
    error_time = 0.5
    progress_interval = 0.2

    def execute(self, lines: int) -> int:
        for n in range(lines):
            self.logger.info("attempt %d line %d", self.attempt, n)
            self.progress(n / lines, "line %d", n)
            time.sleep(0.0005)  # a job that works between its lines: the followers see it grow
        if self.attempt < self.attempts:
            raise RuntimeError(f"attempt {self.attempt} is to fail")
        return lines


class FamilyJob(CoreJob):
    """Enqueues children and ends without them; its second attempt asks for the same ones."""

    author = "tests"
    qual_name = "tests.jobs.FamilyJob"
    attempts = 2
    error_time = 0.2

    def execute(self, ledger: str, children: int) -> list[str]:
        ids = [self.enqueue(LedgerJob, ledger=ledger, n=n) for n in range(children)]
        try:
            self.enqueue("tests.jobs.NoSuchJob")
        except EnqueueRefused as refused:
            self.logger.info("refused: %s", refused.facts["reason"])
        try:
            self.enqueue(LedgerJob, ledger=ledger, n="one")
        except EnqueueRefused as refused:
            self.logger.info("refused: %s", refused.facts["reason"])
        if self.attempt == 1:
            raise RuntimeError("once more")
        return ids
