"""A process of claimers for test_claimers: prints the ids it claimed, one line each.

Usage: python -m tests.integration.claimer DATABASE COUNT NAME, the server's address in CLAIMER_URL.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid

from core4.config import Settings
from core4.database import Database
from core4.jobs import Owner
from core4.queues import JobQueue


async def claimer(queue: JobQueue, name: str) -> None:
    """Claim until nothing is left; an empty answer counts only when the queue has no due job."""
    owner = Owner(uuid.uuid4().hex, f"{name}@here", "here", os.getpid())
    while True:
        taken = await queue.claims.claim(owner, namespaces=["DEFAULT"], limit=3)
        for job in taken:
            print(job.id, owner.id, flush=True)
        if not taken and not (await queue.store.counts()).get("pending"):
            return


async def main(name: str, count: int, prefix: str) -> None:
    database = await Database.connect(os.environ["CLAIMER_URL"], name)
    queue = JobQueue(database, Settings.load(environ={}))
    await asyncio.gather(*(claimer(queue, f"{prefix}{n}") for n in range(count)))
    await database.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
