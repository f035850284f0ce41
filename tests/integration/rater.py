"""A process of workers for test_rates: claims, starts and finishes until nothing is in line any more.

Usage: python -m tests.integration.rater DATABASE NAME SHAPE, the server's address in SLOTTER_URL. All
processes append to one file: a line is the id of a job that was started.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from pathlib import Path

from core4.config import Settings
from core4.database import Database
from core4.jobs import Owner
from core4.queues import JobQueue
from core4.retries import Outcome


async def worker(queue: JobQueue, name: str, ledger: int) -> None:
    owner = Owner(uuid.uuid4().hex, f"{name}@here", "here", os.getpid())
    while claimed := await queue.claims.claim(owner, namespaces=["DEFAULT"], limit=2):
        for job in claimed:
            started = await queue.start(job, pid=1)
            os.write(ledger, f"{job.id}\n".encode())
            await queue.finish(started, Outcome.complete(None), log_seq=0)


async def main(name: str, prefix: str, shape: str) -> None:
    database = await Database.connect(os.environ["SLOTTER_URL"], name, find_and_modify=shape == "one")
    queue = JobQueue(database, Settings.load(environ={}))
    ledger = os.open(Path(os.environ["SLOTTER_LEDGER"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    await asyncio.gather(worker(queue, f"{prefix}1", ledger), worker(queue, f"{prefix}2", ledger))
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
