"""A process of workers for test_slots: claims, starts and finishes, and writes a ledger of its own.

Usage: python -m tests.integration.slotter DATABASE NAME SHAPE, the server's address in SLOTTER_URL. A line
``+ ID`` or ``- ID`` is one write to a file that all processes append to.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from pathlib import Path

from core4.config import Settings
from core4.database import Database
from core4.jobs import Job, Owner
from core4.queues import JobQueue
from core4.retries import Outcome

TWO_LINES = 2 * len("+ 0123456789abcdef01234567\n")


async def worker(queue: JobQueue, name: str, ledger: int) -> None:
    """Work until nothing is left that waits or runs."""
    owner = Owner(uuid.uuid4().hex, f"{name}@here", "here", os.getpid())
    while (counts := await queue.store.counts()).get("pending") or counts.get("running"):
        for job in (claimed := await queue.claims.claim(owner, namespaces=["DEFAULT"])):
            await run(queue, job, ledger)
        if not claimed:
            await asyncio.sleep(0.05)  # between two looks, as a worker without work does
            await queue.claims.wake_held()


async def run(queue: JobQueue, job: Job, ledger: int) -> None:
    started = await queue.start(job, pid=1)
    os.write(ledger, f"+ {job.id}\n".encode())
    while os.fstat(ledger).st_size < TWO_LINES:  # nobody ends before a second one has begun beside it
        await asyncio.sleep(0.01)
    os.write(ledger, f"- {job.id}\n".encode())
    await queue.finish(started, Outcome.complete(None), log_seq=0)


async def main(name: str, prefix: str, shape: str) -> None:
    database = await Database.connect(os.environ["SLOTTER_URL"], name, find_and_modify=shape == "one")
    queue = JobQueue(database, Settings.load(environ={}))
    ledger = os.open(Path(os.environ["SLOTTER_LEDGER"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    await worker(queue, prefix, ledger)
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
